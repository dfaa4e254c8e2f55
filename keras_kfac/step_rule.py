"""How far to step along each direction: averaged quadratic models and their minimisers."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.curvature.block import AddVariable
from keras_kfac.math.linalg import scalar
from keras_kfac.math.moving_average import weighted_average
from keras_kfac.math.quadratic_model import QuadraticModel, group_rates, minimise

# A solved momentum beyond this means that the model can't tell the directions apart.
_MAX_MOMENTUM = 0.95
# Decay of the sums in `SignalShare`.
_SHARE_DECAY = 0.98
# Steps alike make sums of up to `1 / (1 - 0.98) = 50` times their own. Where the loss has fallen by
# so much that the sums outweigh a step four times as far, they decay faster: else what was so long
# ago would be the share for good, and its noise the floor of the damping.
_LONG_HISTORY = 200
_SHARE_HASTE = 0.9
_SMALLEST_SHARE = 0.01
# The model is averaged over `1 + c (noise / signal)` steps.
_TOLERATED_NOISE = 0.5
# The slope is discounted by this power of the signal share. Fitted, not derived: see
# docs/step-control.md.
_DISCOUNT_POWER = 0.25

# A step is at most so many times as long as those before it are on average, which has a decay.
_GROWTH = 4.0
_TYPICAL_DECAY = 0.8

_SUM = tf.float64


class StepRule:
    """Solves for learning rates and momentum, with memory of earlier steps.

    On a large batch the minimiser of the batch's own model is the step to take. On a small one
    that model fits the noise: the gradient and the direction made from it err alike, so the
    slope along the direction looks steeper than it is. Two remedies, both as strong as the noise:
    the coefficients of the model are averaged over steps, and the slope is discounted. The noise is
    measured by `SignalShare`. Against the odd batch that is like no other there is `Typical`.
    """

    def __init__(self, add_variable: Callable[..., keras.Variable]) -> None:
        self.share = SignalShare(add_variable)
        self._typical_kl = Typical(add_variable, "kl")
        self._typical_promise = Typical(add_variable, "promise")
        self._average: AveragedModel  # Known when the model is: see `build`.

    def build(self, add_variable: AddVariable, directions: int) -> None:
        """Creates what depends on the number of directions, the previous step included."""
        self._average = AveragedModel(add_variable, directions)

    def choose(
        self,
        model: QuadraticModel,
        damping: tf.Tensor,
        fixed: Sequence[Any],
        is_free: Sequence[Any],
    ) -> tf.Tensor:
        """Coefficients of all directions.

        Args:
            model: The model of this step.
            damping: `λ`.
            fixed: Learning rate and momentum to use where they are not free.
            is_free: Whether each is to be solved for.
        """
        share = self.share.measure(model)
        noise = _TOLERATED_NOISE * (1 - share)
        average = self._average.include(model, noise / (share + noise))
        *new, previous = tf.unstack(average.gradient)
        slopes = [share**_DISCOUNT_POWER * slope for slope in new]
        discounted = average._replace(gradient=tf.stack([*slopes, previous]))
        coefficients = solve(discounted, damping, fixed, is_free, share)
        # Of two numbers of which one is fixed, no multiple is to be had.
        both_are_free = tf.reduce_all(tf.stack(is_free))
        scale = tf.minimum(
            tf.sqrt(self._typical_kl.cut(model.kl(coefficients))),
            self._typical_promise.cut(-model.slope(coefficients)),
        )
        return coefficients * tf.where(both_are_free, scale, 1)

    def remember(self, model: QuadraticModel, coefficients: tf.Tensor, accepted: tf.Tensor) -> None:
        """Notes a step by its coefficients in its model; nothing if it is not taken."""
        coefficients = tf.where(accepted, coefficients, 0)
        self.share.remember(model, coefficients)
        self._typical_kl.remember(model.kl(coefficients))
        self._typical_promise.remember(-model.slope(coefficients))


def solve(
    model: QuadraticModel,
    damping: tf.Tensor,
    fixed: Sequence[Any],
    is_free: Sequence[Any],
    signal_share: Any = 1.0,
) -> tf.Tensor:
    """The step that minimises a model with damping, the momentum in its range.

    If the learning rate is free, the groups of layers get rates of their own relative to it: the
    more so, the less noise there is. Noise makes slopes of all groups look steeper, of some more
    than of others.

    Returns:
        Coefficients of all directions. Those of the new ones average to the learning rate.
    """
    matrix = model.damped(damping)
    rates = group_rates(matrix[:-1, :-1], model.gradient[:-1])
    confidence = tf.where(is_free[0], tf.sqrt(scalar(signal_share, rates.dtype)), 0)
    rates = 1 + confidence * (rates - 1)
    new, previous = tf.pad(rates, [[0, 1]]), tf.one_hot(rates.shape[0], rates.shape[0] + 1)
    basis = tf.stack([new, tf.cast(previous, new.dtype)], axis=1)
    combined = model.along(basis)
    coefficients = minimise(
        combined.damped(damping),
        combined.gradient,
        fixed,
        is_free,
        momentum_range=(0.0, _MAX_MOMENTUM),
    )
    return tf.linalg.matvec(basis, coefficients)


class AveragedModel:
    """Exponential moving average of quadratic models, leaving out what is not finite."""

    def __init__(self, add_variable: AddVariable, directions: int) -> None:
        def add(name: str, *shape: int) -> keras.Variable:
            return add_variable(f"average.{name}", shape, "float64")

        self._parts = [
            add("curvature", directions, directions),
            add("metric", directions, directions),
            add("gradient", directions),
        ]
        self._weight = add("weight")

    def include(self, model: QuadraticModel, decay: tf.Tensor) -> QuadraticModel:
        """Includes a model, and returns the average."""
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in model])
        weight = tf.convert_to_tensor(self._weight.value)
        averages, new_weight = [], weight
        for variable, new in zip(self._parts, model):
            old = tf.convert_to_tensor(variable.value)
            average, new_weight = weighted_average(old, weight, new, tf.ones((), _SUM), decay)
            averages.append(tf.where(finite, average, old))
            variable.assign(averages[-1])
        self._weight.assign(tf.where(finite, new_weight, weight))
        return QuadraticModel(*averages)


class SignalShare:
    """The share of a new direction's slope that the next batch confirms, in (0, 1].

    A batch promises the slope `α ∇hᵀd` along the new part of its step. The next batch, whose noise
    is independent, tells the slope along the whole step `δ` from where it began:
    `∇hᵀδ - δᵀCδ`, its own slope at the end of the step less what curvature explains. The
    part along the previous step, `μ ∇hᵀδ₀`, was unbiased before. What is left, over what was
    promised, summed over steps, is near 1 on large batches and falls to 0 where gradients are
    all noise. Both are entries of the quadratic model: it costs nothing. No batch confirms or
    denies more than was promised, or an odd one would speak for all others.
    """

    def __init__(self, add_variable: Callable[..., keras.Variable]) -> None:
        def add(name: str) -> keras.Variable:
            return add_variable((), dtype="float64", name=f"share_{name}")

        self._confirmed, self._promised = add("confirmed"), add("promised")
        self._last_promise, self._last_known = add("last_promise"), add("last_known")
        self.value = add_variable((), "ones", dtype="float64", name="signal_share")

    def measure(self, model: QuadraticModel) -> tf.Tensor:
        """The share, given the model of the batch after the step of `remember`."""
        promise = tf.convert_to_tensor(self._last_promise.value)
        found = model.gradient[-1] - model.curvature[-1, -1] - self._last_known.value
        counts = (promise < 0) & tf.math.is_finite(promise) & tf.math.is_finite(found)
        found = tf.clip_by_value(found, promise, -promise)
        is_outweighed = counts & (self._promised.value < _LONG_HISTORY * promise)
        decay = tf.where(is_outweighed, scalar(_SHARE_HASTE, _SUM), _SHARE_DECAY)
        confirmed = decay * self._confirmed.value + tf.where(counts, found, 0)
        promised = decay * self._promised.value + tf.where(counts, promise, 0)
        known = promised < 0
        share = tf.where(known, confirmed / tf.where(known, promised, 1), 1)
        share = tf.clip_by_value(share, _SMALLEST_SHARE, 1)
        for variable, value in (
            (self._confirmed, confirmed),
            (self._promised, promised),
            (self.value, share),
        ):
            variable.assign(value)
        return share

    def remember(self, model: QuadraticModel, coefficients: tf.Tensor) -> None:
        """Notes what the step with these coefficients promises."""
        promises = tf.math.multiply_no_nan(model.gradient, coefficients)
        self._last_promise.assign(tf.reduce_sum(promises[:-1]))
        self._last_known.assign(promises[-1])


class Typical:
    """The average of a measure of the steps' length, which the next must not exceed by much.

    A rare batch can promise the loss for a step many times as long as any before, keep that promise
    on itself, and ruin the network. What has changed for good shows in a few steps, each somewhat
    longer than the last.
    """

    def __init__(self, add_variable: Callable[..., keras.Variable], name: str) -> None:
        self._mean = add_variable((), dtype="float64", name=f"typical_{name}")
        self._weight = add_variable((), dtype="float64", name=f"typical_{name}_weight")

    def cut(self, length: tf.Tensor) -> tf.Tensor:
        """What is left of the length of a step, a factor in (0, 1]; 1 for the first one."""
        limit = _GROWTH * tf.convert_to_tensor(self._mean.value)
        is_longer = (limit > 0) & (length > limit)
        return tf.where(is_longer, limit / tf.where(is_longer, length, 1), 1)

    def remember(self, length: tf.Tensor) -> None:
        """Includes a step; nothing if it is none, or not finite."""
        counts = (length > 0) & tf.math.is_finite(length)
        mean, weight = (tf.convert_to_tensor(v.value) for v in (self._mean, self._weight))
        new, new_weight = weighted_average(mean, weight, length, tf.ones((), _SUM), _TYPICAL_DECAY)
        self._mean.assign(tf.where(counts, new, mean))
        self._weight.assign(tf.where(counts, new_weight, weight))
