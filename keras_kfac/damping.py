"""How the damping adapts itself."""

from collections.abc import Callable
from typing import Any, Self

import keras
import tensorflow as tf

from keras_kfac import validation
from keras_kfac.math.linalg import scalar
from keras_kfac.math.step_control import POOR, levenberg_marquardt
from keras_kfac.math.update_times import is_due

# Relative to the mean eigenvalue of the Fisher matrix: above it, for short first steps.
_RELATIVE_START = 10.0
CALIBRATED = "calibrated"
# What calibration tries, relative to the mean eigenvalue.
_CALIBRATION = (1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3)
# Without `initial` nothing is known of the scale: in so many first steps it is looked for, at the
# times of `update_times`.
_START_STEPS = 20
# At these a step is undone unless its ratio is at least this, and one of a poor ratio counts as so
# many adaptations, for the scale may be far off.
_START_RATIO = 0.5
_START_HASTE = 4
# The floor of the damping falls with this power of the share of noise. Fitted, not derived: see
# docs/step-control.md.
_FLOOR_POWER = 4


@keras.saving.register_keras_serializable(package="keras_kfac")
class LevenbergMarquardt:
    """Damping that follows how well the quadratic model predicts the loss.

    Every `period` steps the change of the batch's loss in the step (same batch, same dropout
    masks) is divided by the change that the quadratic model predicted. A ratio above ¾ lowers the
    damping; a ratio below ¼, a rising loss or a NaN raises it.

    It is the damping `λ` of the quadratic model, and of the strongest curvature blocks. A block
    whose mean eigenvalue `e` is below that of all together, `ē`, is damped by `λ √(e / ē)`: its
    gradients are small, too, and it would hardly move otherwise.

    Args:
        initial: Damping to start with, in units of the loss per squared weight. `None` takes 10
            times the mean eigenvalue of the Fisher matrix of the first batch, and finds the scale
            in the first 20 steps: those at which inverses are renewed (the first 7, then fewer)
            adapt the damping, and are undone if their ratio is below ½.
            `"calibrated"` tries 7 values between 1000 and 1/1000 times the mean eigenvalue before
            the first step, and takes the one that lowers the loss of the first batch most: for
            large batches.
        minimum: Floor of the damping. `None` takes the mean eigenvalue, as it is at the time, times
            the fourth power of the share of noise in the steps (1 less `KFAC.signal_share`): what
            lies below is not known from small batches.
        maximum: Its ceiling.
        decay: Factor in (0, 1) for each step by which the damping falls or rises: it changes by
            `decay ** period` at a time.
        period: Steps between adaptations, a positive int. Each costs one forward pass.
        reject: Whether a step is undone if it is found to raise the loss of its own batch. Weights
            and velocities then stay as they were, and `KFAC.rejected_steps` counts it. A step
            after which the loss is not finite is always undone.
        adapt_preconditioner: Whether the damping of the preconditioner, `γ²`, adapts apart from
            that of the model, `λ`: once in the period of the inverses `γ²` is multiplied by 1,
            `decay` to the power of the steps since the last time, or its inverse, whichever makes
            the minimum of the model lowest. That inverts all factors three more times, and takes
            three more models.

    Raises:
        ValueError: For arguments out of range.

    Example:
    >>> optimizer = KFAC(damping=LevenbergMarquardt(initial=3.0, minimum=0.01))

    Source: Martens & Grosse (2015), arXiv:1503.05671, sections 6.5 (damping) and 6.6 (`γ`).
    The ratio leaves the damping out of the predicted change.
    """

    def __init__(
        self,
        initial: float | str | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        decay: float = 0.95,
        period: int = 5,
        reject: bool = False,
        adapt_preconditioner: bool = False,
    ) -> None:
        validation.check_damping_bounds(initial, minimum, maximum, CALIBRATED)
        validation.check_open_unit_interval("decay", decay)
        validation.check_positive_int("period", period)
        self.initial = initial
        self.minimum = minimum
        self.maximum = maximum
        self.decay = decay
        self.period = period
        self.reject = validation.check_bool("reject", reject)
        self.adapt_preconditioner = validation.check_bool(
            "adapt_preconditioner", adapt_preconditioner
        )

    def start(self, scale: tf.Tensor) -> Any:
        """The first damping, given the mean eigenvalue of the Fisher matrix."""
        return _RELATIVE_START * scale if self.initial is None else self.initial

    @property
    def calibrates(self) -> bool:
        """Whether the first damping is the best of `candidates`."""
        return self.initial == CALIBRATED

    def candidates(self, scale: tf.Tensor) -> tf.Tensor:
        """What to try before the first step, given the mean eigenvalue of the Fisher matrix."""
        return scale * tf.constant(_CALIBRATION, scale.dtype)

    def neighbours(self, damping: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        """What to try for the preconditioner after so many steps; the present damping first."""
        factor = scalar(self.decay, damping.dtype) ** tf.cast(steps, damping.dtype)
        return damping * tf.stack([tf.ones_like(factor), 1 / factor, factor])

    def next(
        self,
        damping: tf.Tensor,
        ratio: tf.Tensor,
        scale: tf.Tensor,
        signal_share: tf.Tensor,
        iterations: tf.Tensor,
    ) -> tf.Tensor:
        """The damping after a step of the given reduction ratio."""
        minimum = self.minimum
        if minimum is None:
            minimum = tf.cast(scale, damping.dtype) * (1 - signal_share) ** _FLOOR_POWER
        maximum = damping.dtype.max if self.maximum is None else self.maximum
        decay = self.decay**self.period
        is_start = self._is_start(iterations)
        decay = tf.where(is_start & ~(ratio >= POOR), decay**_START_HASTE, decay)
        # NaN raises the damping: a step that is undone must not be proposed again.
        undone, nan = is_start & ~(ratio >= _START_RATIO), scalar(float("nan"), ratio.dtype)
        ratio = tf.where(undone, nan, ratio)
        return levenberg_marquardt(damping, ratio, decay, minimum, maximum)

    def is_due(self, iterations: tf.Tensor) -> tf.Tensor:
        """Whether the damping adapts at this step."""
        at_start = is_due(iterations, tf.constant(self.period))
        later = tf.equal((iterations + 1) % self.period, 0)
        return tf.where(self._is_start(iterations), at_start, later)

    def accepts(self, change: tf.Tensor, ratio: tf.Tensor, iterations: tf.Tensor) -> tf.Tensor:
        """Whether a step that changes the loss so, at this reduction ratio, is taken."""
        finite = tf.math.is_finite(change)
        accepted = change <= 0 if self.reject else finite
        # While the scale is looked for, a step that the model did not foresee may be any step: a
        # long one that happens to lower the loss of its batch can put whole layers to death.
        return tf.where(self._is_start(iterations), finite & (ratio >= _START_RATIO), accepted)

    def _is_start(self, iterations: tf.Tensor) -> tf.Tensor:
        """Whether the scale of the damping is still looked for."""
        return tf.constant(self.initial is None) & (iterations < _START_STEPS)

    def get_config(self) -> dict[str, Any]:
        """Arguments to create the same object again."""
        names = ("initial", "minimum", "maximum", "decay", "period", "reject")
        return {name: getattr(self, name) for name in (*names, "adapt_preconditioner")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Creates an object from the result of `get_config`."""
        return cls(**config)


def best(candidates: tf.Tensor, score: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """The candidate of the lowest score; the first one if no score is finite.

    Args:
        candidates: `[k]`.
        score: Function of a scalar; returns a float64 scalar.
    """
    scores = tf.map_fn(score, candidates, parallel_iterations=1, fn_output_signature=tf.float64)
    scores = tf.where(tf.math.is_finite(scores), scores, scores.dtype.max)
    return tf.gather(candidates, tf.argmin(scores))
