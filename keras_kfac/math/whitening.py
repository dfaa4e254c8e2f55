"""Coordinates in which the inputs of an affine map are centred and white, and its weights in them.

With `z = U (a - c)` in the place of the inputs `a`, the map `Wᵀ a + b` is `Vᵀ z + d` with

    V = U⁻¹ W,    d = b + Wᵀ c.

Weights are homogeneous matrices `[..., n d + 1, units]`: the kernel, which can act on the same `d`
features at `n` places (the pixels under a window), and below it the bias. `U` is symmetric; that of
single features is a vector, see `linalg.py`. Source: Desjardins et al. (2015), arXiv:1507.00210,
section 3.
"""

import numpy as np
import tensorflow as tf

from keras_kfac.math.eigen import eigen_decomposition
from keras_kfac.math.factors import input_moment, row_weights
from keras_kfac.math.linalg import is_diagonal, left_product, scalar
from keras_kfac.math.rows import stretched
from keras_kfac.math.structure import Structure


def mean_and_covariance(
    rows: tf.Tensor, mask: tf.Tensor | None, is_diagonal: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Of the rows that count; each example counts alike, as in an input factor.

    Args:
        rows: `[batch, positions, d]`.
        mask: `[batch, steps]` for steps of one or several positions; `None` if all count.
        is_diagonal: Whether to return the variances alone.

    Returns:
        `[d]`, and `[d, d]` or `[d]`.

    Example:
    >>> rows = tf.constant([[[1.0, 0.0]], [[3.0, 4.0]]])
    >>> mean, covariance = mean_and_covariance(rows, None, is_diagonal=False)
    >>> mean.numpy().tolist(), covariance.numpy().tolist()
    ([2.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """
    if mask is None:
        weights = tf.ones(tf.shape(rows)[:2], rows.dtype)
    else:
        weights = row_weights(None, stretched(tf.cast(mask, rows.dtype), rows))
    # `where` and not a product alone: 0 * inf of an ignored row must be 0.
    each = weights[..., tf.newaxis]
    total = tf.reduce_sum(tf.where(each > 0, each * rows, tf.zeros_like(rows)), axis=[0, 1])
    mean = total / tf.reduce_sum(weights)
    structure = Structure(rows.shape[-1], is_diagonal=is_diagonal)
    moment, weight = input_moment(rows - mean, weights, structure)
    return mean, moment / weight


def whitener(covariance: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor]:
    """`U = (Σ + ε I)^(-1/2)`, and its inverse.

    Of all roots this one (ZCA) leaves features as much as possible what they were; eigenvectors
    (PCA) change places from one estimate to the next. Source: Huang et al. (2018),
    arXiv:1804.08450.

    Args:
        covariance: `[d, d]`, or `[d]` for variances.
        epsilon: `>= 0`.

    Returns:
        As given. NaN where `Σ + ε I` is singular to working precision: callers decide what that
        means.

    Example:
    >>> matrix, inverse = whitener(tf.constant([[4.0, 0.0], [0.0, 1.0]]), 0.0)
    >>> matrix.numpy().tolist(), inverse.numpy().tolist()
    ([[0.5, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]])
    """
    values, vectors = eigen_decomposition(covariance)
    values += scalar(epsilon, values.dtype)
    lost = tf.reduce_max(values) * len(values) * np.finfo(values.dtype.as_numpy_dtype).eps
    roots = tf.sqrt(tf.where(values > lost, values, float("nan")))
    if is_diagonal(covariance):
        return 1 / roots, roots
    matrix = tf.matmul(vectors / roots, vectors, transpose_b=True)
    return matrix, tf.matmul(vectors * roots, vectors, transpose_b=True)


def in_white_coordinates(weights: tf.Tensor, mean: tf.Tensor, inverse: tf.Tensor) -> tf.Tensor:
    """`[V; d]` of `[W; b]`, given `c` and `U⁻¹`."""
    kernel, bias = _parts(weights, mean)
    return _whole(left_product(inverse, kernel), bias + _constant(mean, kernel))


def in_plain_coordinates(weights: tf.Tensor, mean: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """`[W; b]` of `[V; d]`, given `c` and `U`.

    Example:
    >>> mean, (matrix, inverse) = tf.constant([3.0]), whitener(tf.constant([[4.0]]), 0.0)
    >>> white = in_white_coordinates(tf.constant([[1.0], [0.0]]), mean, inverse)
    >>> white.numpy().tolist(), in_plain_coordinates(white, mean, matrix).numpy().tolist()
    ([[2.0], [3.0]], [[1.0], [0.0]])
    """
    kernel, bias = _parts(weights, mean)
    kernel = left_product(matrix, kernel)
    return _whole(kernel, bias - _constant(mean, kernel))


def _parts(weights: tf.Tensor, mean: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The kernel, `[..., n, d, units]`, and the bias, `[..., 1, units]`."""
    *leading, rows, units = weights.shape
    size = mean.shape[0]
    kernel = tf.reshape(weights[..., :-1, :], [*leading, (rows - 1) // size, size, units])
    return kernel, weights[..., -1:, :]


def _whole(kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    *leading, places, size, units = kernel.shape
    return tf.concat([tf.reshape(kernel, [*leading, places * size, units]), bias], axis=-2)


def _constant(mean: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """What the kernel makes of the mean at all places, `[..., 1, units]`."""
    return tf.reduce_sum(mean[:, tf.newaxis] * kernel, axis=[-3, -2])[..., tf.newaxis, :]
