"""The quadratic model of the loss along a few directions, and its minimiser.

A step is `δ = α Σ wᵢ dᵢ + μ δ₀`, with `dᵢ` the part of the (negative) preconditioned gradient that
belongs to the i-th group of layers, and `δ₀` the previous step. With the curvature matrix `C` of
the loss, the gradient `∇h` and the damping `λ`

    M(δ) = ½ δᵀ (C + λ I) δ + ∇hᵀ δ

is a quadratic function of a few numbers. `group_rates` finds `w`, `minimise` then `α` and `μ`.
Source: Martens & Grosse (2015), arXiv:1503.05671, sections 6.4 (learning rate) and 7 (momentum),
for a single group.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_kfac.math.linalg import scalar

# Directions whose cosine in the metric of the model is closer to ±1 count as one.
_PARALLEL = 1e-9
# `ρ` of `group_rates`. Found by trial: see docs/step-control.md.
_SHRINKAGE = 0.2


class QuadraticModel(NamedTuple):
    """The model's coefficients for `n` directions, the last of them `δ₀`.

    Attributes:
        curvature: `[n, n]`, products of the directions in the curvature matrix `C`.
        metric: `[n, n]`, products of the directions.
        gradient: `[n]`, products of the directions with the gradient.
    """

    curvature: tf.Tensor
    metric: tf.Tensor
    gradient: tf.Tensor

    def along(self, basis: tf.Tensor) -> Self:
        """The model along combinations of the directions, the columns of `[n, m]`."""

        def turned(matrix: tf.Tensor) -> tf.Tensor:
            return tf.matmul(basis, tf.matmul(matrix, basis), transpose_a=True)

        gradient = tf.linalg.matvec(basis, self.gradient, transpose_a=True)
        return type(self)(turned(self.curvature), turned(self.metric), gradient)

    def damped(self, damping: tf.Tensor) -> tf.Tensor:
        """`[n, n]`, products of the directions in `C + λ I`."""
        return self.curvature + scalar(damping, self.curvature.dtype) * self.metric

    def change(self, coefficients: tf.Tensor) -> tf.Tensor:
        """The change of the loss that the model predicts for a step, *without* damping.

        The damping limits the step; it is no part of the prediction. So the ratio of true and
        predicted change is 1 if the loss is quadratic with curvature `C`.
        """
        return self.kl(coefficients) + self.slope(coefficients)

    def slope(self, coefficients: tf.Tensor) -> tf.Tensor:
        """`∇hᵀ δ`: the slope of the loss along the step, at its start."""
        return tf.tensordot(self.gradient, coefficients, 1)

    def value(self, coefficients: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
        """`M(δ)`, with damping."""
        squared = tf.tensordot(coefficients, tf.linalg.matvec(self.metric, coefficients), 1)
        return self.change(coefficients) + 0.5 * scalar(damping, squared.dtype) * squared

    def kl(self, coefficients: tf.Tensor) -> tf.Tensor:
        """`½ δᵀ C δ`: the step's KL divergence between predictions, in units of the loss."""
        return 0.5 * tf.tensordot(coefficients, tf.linalg.matvec(self.curvature, coefficients), 1)


def group_rates(matrix: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    """Relative rates `w` of the directions of `k` groups of layers.

    Blocks between layers are zero in the preconditioner. The model knows them along the given
    directions: `w >= 0` solves `(M + ρ diag M) w = -g` with `ρ = 0.2`. That holds more of each
    direction's own curvature than `M` does, for two directions that do nearly the same
    would otherwise take all from each other.

    Args:
        matrix: `M`, `[k, k]`, positive semi-definite.
        gradient: `g`, `[k]`, negative where a direction lowers the loss. Others get the rate 0.

    Returns:
        `[k]`, of mean 1; all 1 if no direction lowers the loss.

    Example:
    >>> matrix, gradient = tf.constant([[1.0, 0.0], [0.0, 3.0]]), tf.constant([-1.0, -1.0])
    >>> group_rates(matrix, gradient).numpy().round(6).tolist()
    [1.5, 0.5]
    """
    curvature = tf.linalg.diag_part(matrix)
    used = (curvature > 0) & (gradient < 0)
    unit = tf.where(used, 1 / tf.sqrt(tf.where(used, curvature, 1)), 0)
    # Of unit diagonal but for ρ: positive definite, and well conditioned.
    scaled = unit[:, tf.newaxis] * matrix * unit
    scaled = tf.linalg.set_diag(scaled, tf.fill(tf.shape(unit), scalar(1 + _SHRINKAGE, unit.dtype)))
    rates = tf.zeros_like(unit)
    for _ in range(matrix.shape[0]):  # Each round leaves out what came out negative.
        free = tf.cast(used, unit.dtype)
        outer = free[:, tf.newaxis] * free
        system = tf.linalg.set_diag(outer * scaled, tf.linalg.diag_part(scaled))
        slopes = (-free * unit * gradient)[:, tf.newaxis]
        rates = tf.linalg.cholesky_solve(tf.linalg.cholesky(system), slopes)[:, 0]
        used = used & (rates > 0)
    rates = tf.maximum(rates, 0) * unit
    mean = tf.reduce_mean(rates)
    return tf.where(mean > 0, rates / tf.where(mean > 0, mean, 1), tf.ones_like(rates))


def minimise(
    matrix: tf.Tensor,
    gradient: tf.Tensor,
    fixed: Sequence[Any] = (0.0, 0.0),
    is_free: Sequence[Any] = (True, True),
    momentum_range: tuple[float, float] = (-math.inf, math.inf),
) -> tf.Tensor:
    """The step that minimises `½ wᵀ M w + gᵀ w` for `w = (α, μ)`.

    A direction without curvature (the previous step before there was one) gets the coefficient 0,
    and so does the previous step where it is parallel to the new direction. A solved `α` is
    never negative.

    Args:
        matrix: `M`, `[2, 2]`, positive semi-definite.
        gradient: `g`, `[2]`.
        fixed: `α` and `μ`, used where they are not free.
        is_free: Whether each is to be solved for, bools or bool tensors.
        momentum_range: Bounds of a solved `μ`.

    Returns:
        `[α, μ]`.

    Example:
    >>> matrix, gradient = tf.constant([[2.0, 0.0], [0.0, 1.0]]), tf.constant([-4.0, -0.5])
    >>> minimise(matrix, gradient).numpy().tolist()
    [2.0, 0.5]
    >>> minimise(matrix, gradient, fixed=(3.0, 0.0), is_free=(False, True)).numpy().tolist()
    [3.0, 0.5]
    """
    dtype = matrix.dtype
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[1, 1]
    g_new, g_old = tf.unstack(gradient)
    rate, momentum = (scalar(value, dtype) for value in fixed)
    rate_is_free, momentum_is_free = (tf.convert_to_tensor(free) for free in is_free)

    determinant = a * c - b * b
    jointly = _ratio(b * g_new - a * g_old, determinant, determinant > _PARALLEL * a * c)
    given_rate = _ratio(-g_old - b * rate, c, c > 0)
    low, high = (scalar(bound, dtype) for bound in momentum_range)
    solved = tf.clip_by_value(tf.where(rate_is_free, jointly, given_rate), low, high)
    momentum = tf.where(momentum_is_free, solved, momentum)
    solved = tf.maximum(_ratio(-g_new - b * momentum, a, a > 0), 0)
    return tf.stack([tf.where(rate_is_free, solved, rate), momentum])


def _ratio(numerator: tf.Tensor, denominator: tf.Tensor, is_valid: tf.Tensor) -> tf.Tensor:
    return tf.where(is_valid, numerator / tf.where(is_valid, denominator, 1), 0)
