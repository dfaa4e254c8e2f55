"""How far to step: the quadratic model of the batch, averaged over steps, and its minimiser."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.curvature.regularization import l2_coefficient, penalty_change
from keras_kfac.introspection import gauss_newton
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import ModelLoss
from keras_kfac.math.moving_average import weighted_average
from keras_kfac.math.quadratic_model import QuadraticModel, minimise

Tensors = Mapping[int, tf.Tensor]
"""Tensors by `id` of the variable."""

# The model takes its curvature on this part of the batch: its noise is small beside that of the
# gradient, and forward-mode products cost as much as forward passes.
BATCH_FRACTION = 0.125
# A solved momentum beyond this means that the model can't tell the directions apart.
_MAX_MOMENTUM = 0.95
# Decay of the sums in `SignalShare`.
_SHARE_DECAY = 0.98
_SMALLEST_SHARE = 0.01
# The model is averaged over `1 + c (noise / signal)` steps.
_TOLERATED_NOISE = 0.5
# The slope is discounted by this power of the signal share. Fitted, not derived: see
# docs/step-control.md.
_DISCOUNT_POWER = 0.25

_SUM = tf.float64


class Batch(NamedTuple):
    """The batch of a step: its forward passes, and the gradient of its loss before clipping."""

    passes: Sequence[ForwardPass]
    loss: ModelLoss
    gradients: Tensors

    def quadratic_model(
        self, variables: Sequence[keras.Variable], directions: Sequence[Tensors]
    ) -> QuadraticModel:
        """The model of the loss, with its L2 regularisers, along two directions."""
        weights = current_values(variables)
        curvature = gauss_newton.products(
            self.passes, self.loss, weights, directions, BATCH_FRACTION
        )
        metric = tf.zeros_like(curvature)
        for variable in variables:
            parts = tf.stack([tf.reshape(d[id(variable)], [-1]) for d in directions])
            products = tf.cast(tf.matmul(parts, parts, transpose_b=True), _SUM)
            metric += products
            curvature += l2_coefficient(variable) * products
        gradient = tf.stack([_dot(self.gradients, direction) for direction in directions])
        return QuadraticModel(curvature, metric, gradient)

    def loss_change(self, variables: Sequence[keras.Variable], steps: Tensors) -> tf.Tensor:
        """What the loss, with its regularisers, changes by if the variables step."""
        new = {key: value + steps[key] for key, value in current_values(variables).items()}
        change = gauss_newton.loss_change(self.passes, self.loss, new)
        return change + penalty_change(variables, new)


def current_values(variables: Sequence[keras.Variable]) -> dict[int, tf.Tensor]:
    """The values of variables by their `id`."""
    return {id(v): tf.convert_to_tensor(v.value) for v in variables}


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Whether all gradients are finite; `None` is."""
    values = [
        g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None
    ]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])


def combination(coefficients: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """`α d + μ δ₀` in the dtype of `d`."""
    rate, momentum = tf.unstack(tf.cast(coefficients, new.dtype))
    return rate * new + momentum * tf.cast(old, new.dtype)


def _dot(gradients: Tensors, direction: Tensors) -> tf.Tensor:
    terms = [tf.reduce_sum(tf.cast(gradients[k], d.dtype) * d) for k, d in direction.items()]
    return tf.add_n([tf.cast(term, _SUM) for term in terms])


class StepRule:
    """Solves for learning rate and momentum, with memory of earlier steps.

    On a large batch the minimiser of the batch's own model is the step to take. On a small one
    that model fits the noise: the gradient and the direction made from it err alike, so the
    slope along the direction looks steeper than it is. Two remedies, both as strong as the noise:
    the coefficients of the model are averaged over steps, and the slope is discounted. The noise is
    measured by `SignalShare`.
    """

    def __init__(self, add_variable: Callable[..., keras.Variable]) -> None:
        self.average = AveragedModel(add_variable)
        self.share = SignalShare(add_variable)

    def choose(
        self,
        model: QuadraticModel,
        damping: tf.Tensor,
        fixed: Sequence[Any],
        is_free: Sequence[Any],
    ) -> tf.Tensor:
        """Learning rate and momentum, `[2]`.

        Args:
            model: The model of this step.
            damping: `λ`.
            fixed: Learning rate and momentum to use where they are not free.
            is_free: Whether each is to be solved for.
        """
        share = self.share.measure(model)
        noise = _TOLERATED_NOISE * (1 - share)
        average = self.average.include(model, noise / (share + noise))
        discount = tf.stack([share**_DISCOUNT_POWER, tf.ones((), _SUM)])
        return minimise(
            average.damped(damping),
            discount * average.gradient,
            fixed,
            is_free,
            momentum_range=(0.0, _MAX_MOMENTUM),
        )


class AveragedModel:
    """Exponential moving average of quadratic models, leaving out what is not finite."""

    def __init__(self, add_variable: Callable[..., keras.Variable]) -> None:
        self._parts = [
            add_variable(shape, dtype="float64", name=f"average_{name}")
            for name, shape in (("curvature", (2, 2)), ("metric", (2, 2)), ("gradient", (2,)))
        ]
        self._weight = add_variable((), dtype="float64", name="average_weight")

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
    all noise. Both are entries of the quadratic model: it costs nothing.
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
        found = model.gradient[1] - model.curvature[1, 1] - self._last_known.value
        counts = (promise < 0) & tf.math.is_finite(promise) & tf.math.is_finite(found)
        confirmed = _SHARE_DECAY * self._confirmed.value + tf.where(counts, found, 0)
        promised = _SHARE_DECAY * self._promised.value + tf.where(counts, promise, 0)
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

    def remember(self, model: QuadraticModel, coefficients: tf.Tensor, accepted: tf.Tensor) -> None:
        """Notes what the step with these coefficients promises; nothing if it is not taken."""
        promises = tf.where(accepted, coefficients * model.gradient, tf.zeros((), _SUM))
        promise, known = tf.unstack(promises)
        self._last_promise.assign(promise)
        self._last_known.assign(known)
