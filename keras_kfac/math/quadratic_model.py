"""The quadratic model of the loss along two directions, and its minimiser.

A step is `δ = α d + μ δ₀`, with `d` the (negative) preconditioned gradient and `δ₀` the previous
step. With the curvature matrix `C` of the loss, the gradient `∇h` and the damping `λ`

    M(α, μ) = ½ δᵀ (C + λ I) δ + ∇hᵀ δ

is a quadratic function of two numbers. Source: Martens & Grosse (2015), arXiv:1503.05671, sections
6.4 (learning rate) and 7 (momentum).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_kfac.math.linalg import scalar

# Directions whose cosine in the metric of the model is closer to ±1 count as one.
_PARALLEL = 1e-9


class QuadraticModel(NamedTuple):
    """The model's coefficients for the directions `d` and `δ₀`.

    Attributes:
        curvature: `[2, 2]`, products of the directions in the curvature matrix `C`.
        metric: `[2, 2]`, products of the directions.
        gradient: `[2]`, products of the directions with the gradient.
    """

    curvature: tf.Tensor
    metric: tf.Tensor
    gradient: tf.Tensor

    def damped(self, damping: tf.Tensor) -> tf.Tensor:
        """`[2, 2]`, products of the directions in `C + λ I`."""
        return self.curvature + scalar(damping, self.curvature.dtype) * self.metric

    def change(self, coefficients: tf.Tensor) -> tf.Tensor:
        """The change of the loss that the model predicts for a step, *without* damping.

        The damping limits the step; it is no part of the prediction. So the ratio of true and
        predicted change is 1 if the loss is quadratic with curvature `C`.
        """
        return self.kl(coefficients) + tf.tensordot(self.gradient, coefficients, 1)

    def value(self, coefficients: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
        """`M(α, μ)`, with damping."""
        squared = tf.tensordot(coefficients, tf.linalg.matvec(self.metric, coefficients), 1)
        return self.change(coefficients) + 0.5 * scalar(damping, squared.dtype) * squared

    def kl(self, coefficients: tf.Tensor) -> tf.Tensor:
        """`½ δᵀ C δ`: the step's KL divergence between predictions, in units of the loss."""
        return 0.5 * tf.tensordot(coefficients, tf.linalg.matvec(self.curvature, coefficients), 1)


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
