"""Natural gradients of sums of squares, exactly, in the space of weights or that of residuals."""

import numpy as np
import tensorflow as tf

from keras_kfac.math.eigen import eigen_decomposition
from keras_kfac.math.linalg import scalar


def natural_direction(
    jacobian: tf.Tensor,
    residuals: tf.Tensor,
    damping: float | tf.Tensor = 0.0,
    cutoff: float | None = None,
) -> tf.Tensor:
    """`(Jᵀ J + λ I)⁻¹ Jᵀ r`.

    Args:
        jacobian: `J`, `[residuals, weights]`; how many weights there are has to be known.
        residuals: `r`, `[residuals]`.
        damping: `λ >= 0`.
        cutoff: Directions in which `√(σ² + λ)`, with the singular value `σ` of `J`, is at most this
            part of the largest `σ` are left out: undamped, the result is that of the
            pseudo-inverse. By default those that the smaller of `Jᵀ J` and `J Jᵀ` has lost to
            rounding, of which the eigenvalues are taken. For a smaller part the singular values of
            `J` itself are, which takes about four times as long.

    Returns:
        `[weights]`.

    Source: Martens (2020), "New insights and perspectives on the natural gradient method", section
    8 (the Gauss-Newton matrix of a squared loss is its Fisher matrix).

    Example:
    >>> natural_direction(tf.constant([[2.0, 0.0]]), tf.constant([6.0])).numpy().tolist()
    [3.0, 0.0]
    """
    count, weights = jacobian.shape
    rank = weights if count is None else min(count, weights)
    eps = float(np.finfo(jacobian.dtype.as_numpy_dtype).eps)
    resolved = (rank * eps) ** 0.5
    if cutoff is not None and cutoff < resolved:
        values, left, right = tf.linalg.svd(jacobian)
        inverted = values * _inverted(values**2, values[0] ** 2, damping, cutoff**2)
        turned = tf.linalg.matvec(left, residuals, transpose_a=True)
        return tf.linalg.matvec(right, inverted * turned)
    least = resolved if cutoff is None else cutoff
    column = residuals[:, tf.newaxis]
    if rank < weights:
        matrix = tf.matmul(jacobian, jacobian, transpose_b=True)
        inner = _solve(matrix, column, damping, least**2)
        return tf.matmul(jacobian, inner, transpose_a=True)[:, 0]
    gradient = tf.matmul(jacobian, column, transpose_a=True)
    matrix = tf.matmul(jacobian, jacobian, transpose_a=True)
    return _solve(matrix, gradient, damping, least**2)[:, 0]


def _solve(
    matrix: tf.Tensor, column: tf.Tensor, damping: float | tf.Tensor, least: float
) -> tf.Tensor:
    """`(M + λ I)⁻¹ y` of a positive semi-definite matrix."""
    values, vectors = eigen_decomposition(matrix)
    inverted = _inverted(values, values[-1], damping, least)
    turned = tf.matmul(vectors, column, transpose_a=True)
    return tf.matmul(vectors, inverted[:, tf.newaxis] * turned)


def _inverted(
    values: tf.Tensor, largest: tf.Tensor, damping: float | tf.Tensor, least: float
) -> tf.Tensor:
    """`1 / (values + λ)`, and 0 where that is at most a part `least` of the largest value."""
    damped = values + scalar(damping, values.dtype)
    return tf.where(damped > least * largest, 1 / damped, tf.zeros_like(damped))
