"""Natural gradients of sums of squares, exactly, in the space of weights or that of residuals."""

import numpy as np
import tensorflow as tf

from keras_kfac.math.linalg import eigen_decomposition, scalar


def natural_direction(
    jacobian: tf.Tensor, residuals: tf.Tensor, damping: float | tf.Tensor = 0.0
) -> tf.Tensor:
    """`(Jᵀ J + λ I)⁻¹ Jᵀ r`.

    If there are fewer residuals than weights, as `Jᵀ (J Jᵀ + λ I)⁻¹ r`: the smaller of both
    matrices is formed.

    Args:
        jacobian: `J`, `[residuals, weights]`, of static shape.
        residuals: `r`, `[residuals]`.
        damping: `λ >= 0`. Without it, directions in which the matrix is zero to rounding are left
            out: the result is that of the pseudo-inverse.

    Returns:
        `[weights]`.

    Source: Martens (2020), "New insights and perspectives on the natural gradient method", section
    8 (the Gauss-Newton matrix of a squared loss is its Fisher matrix).

    Example:
    >>> natural_direction(tf.constant([[2.0, 0.0]]), tf.constant([6.0])).numpy().tolist()
    [3.0, 0.0]
    """
    count, weights = jacobian.shape
    column = residuals[:, tf.newaxis]
    if count < weights:
        inner = _solve(tf.matmul(jacobian, jacobian, transpose_b=True), column, damping)
        return tf.matmul(jacobian, inner, transpose_a=True)[:, 0]
    gradient = tf.matmul(jacobian, column, transpose_a=True)
    return _solve(tf.matmul(jacobian, jacobian, transpose_a=True), gradient, damping)[:, 0]


def _solve(matrix: tf.Tensor, column: tf.Tensor, damping: float | tf.Tensor) -> tf.Tensor:
    """`(M + λ I)⁻¹ y` of a positive semi-definite matrix."""
    values, vectors = eigen_decomposition(matrix)
    damped = values + scalar(damping, matrix.dtype)
    # Ascending; smaller ones than this are rounding errors.
    least = values[-1] * matrix.shape[-1] * np.finfo(matrix.dtype.as_numpy_dtype).eps
    inverted = tf.where(damped > least, 1 / damped, tf.zeros_like(damped))
    turned = tf.matmul(vectors, column, transpose_a=True)
    return tf.matmul(vectors, inverted[:, tf.newaxis] * turned)
