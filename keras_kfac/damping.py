"""How the damping adapts itself."""

from typing import Any, Self

import keras
import tensorflow as tf

from keras_kfac import validation
from keras_kfac.math.step_control import levenberg_marquardt

# Relative to the mean eigenvalue of the Fisher matrix: above it, for short first steps.
_RELATIVE_START = 10.0
# Without `initial` nothing is known of the scale: in so many first steps it is looked for.
_START_STEPS = 20


@keras.saving.register_keras_serializable(package="keras_kfac")
class LevenbergMarquardt:
    """Damping that follows how well the quadratic model predicts the loss.

    Every `period` steps the change of the batch's loss in the step (same batch, same dropout
    masks) is divided by the change that the quadratic model predicted. A ratio above ¾ lowers the
    damping; a ratio below ¼, a rising loss or a NaN raises it.

    Args:
        initial: Damping to start with, in units of the loss per squared weight. `None` takes 10
            times the mean eigenvalue of the Fisher matrix of the first batch, and finds the scale
            in the first 20 steps: each of them adapts the damping, and is undone if it raises the
            loss of its batch; inverses are also refreshed at steps 1, 2, 4, 8 and so on.
        minimum: Floor of the damping. `None` takes the mean eigenvalue, as it is at the time, times
            the square of the share of noise in the steps (1 less `KFAC.signal_share`): what lies
            below is not known from small batches.
        maximum: Its ceiling.
        decay: Factor in (0, 1) for each step by which the damping falls or rises: it changes by
            `decay ** period` at a time.
        period: Steps between adaptations, a positive int. Each costs one forward pass.
        reject: Whether a step is undone if it is found to raise the loss of its own batch. Weights
            and velocities then stay as they were, and `KFAC.rejected_steps` counts it. A step
            after which the loss is not finite is always undone.

    Raises:
        ValueError: For arguments out of range.

    Example:
    >>> optimizer = KFAC(damping=LevenbergMarquardt(initial=3.0, minimum=0.01))

    Source: Martens & Grosse (2015), arXiv:1503.05671, section 6.5. The ratio leaves the damping
    out of the predicted change.
    """

    def __init__(
        self,
        initial: float | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        decay: float = 0.95,
        period: int = 5,
        reject: bool = False,
    ) -> None:
        validation.check_damping_bounds(initial, minimum, maximum)
        validation.check_open_unit_interval("decay", decay)
        validation.check_positive_int("period", period)
        self.initial = initial
        self.minimum = minimum
        self.maximum = maximum
        self.decay = decay
        self.period = period
        self.reject = reject

    def start(self, scale: tf.Tensor) -> Any:
        """The first damping, given the mean eigenvalue of the Fisher matrix."""
        return _RELATIVE_START * scale if self.initial is None else self.initial

    def next(
        self, damping: tf.Tensor, ratio: tf.Tensor, scale: tf.Tensor, signal_share: tf.Tensor
    ) -> tf.Tensor:
        """The damping after a step of the given reduction ratio."""
        minimum = self.minimum
        if minimum is None:
            minimum = tf.cast(scale, damping.dtype) * tf.square(1 - signal_share)
        maximum = damping.dtype.max if self.maximum is None else self.maximum
        return levenberg_marquardt(damping, ratio, self.decay**self.period, minimum, maximum)

    def is_due(self, iterations: tf.Tensor) -> tf.Tensor:
        """Whether the damping adapts at this step."""
        return tf.equal((iterations + 1) % self.period, 0) | self._is_start(iterations)

    def accepts(self, change: tf.Tensor, iterations: tf.Tensor) -> tf.Tensor:
        """Whether a step that changes the loss so is taken."""
        rejects = tf.constant(self.reject) | self._is_start(iterations)
        return tf.where(rejects, change <= 0, tf.math.is_finite(change))

    def _is_start(self, iterations: tf.Tensor) -> tf.Tensor:
        return tf.constant(self.finds_its_scale) & (iterations < _START_STEPS)

    @property
    def finds_its_scale(self) -> bool:
        """Whether the first 20 steps look for the scale of the damping."""
        return self.initial is None

    def get_config(self) -> dict[str, Any]:
        """Arguments to create the same object again."""
        names = ("initial", "minimum", "maximum", "decay", "period", "reject")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Creates an object from the result of `get_config`."""
        return cls(**config)
