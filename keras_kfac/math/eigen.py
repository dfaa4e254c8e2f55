"""Eigenvalues of symmetric matrices, and of those that are kept as a diagonal."""

import tensorflow as tf

from keras_kfac.math.linalg import epsilon, is_diagonal, symmetrize


def eigen_decomposition(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Eigenvalues and eigenvectors of symmetric positive semi-definite matrices.

    Args:
        matrix: Tensor `[..., d, d]`, or the diagonal of one.

    Returns:
        Eigenvalues `[..., d]`, those that rounding made negative set to 0, and the eigenvectors in
        the columns of `[..., d, d]`. Of a diagonal matrix, itself and the diagonal of the identity.

    Example:
    >>> values, _ = eigen_decomposition(tf.constant([[1.0, 1.0], [1.0, 1.0]]))
    >>> np.round(values, 6).tolist()
    [0.0, 2.0]
    """
    if is_diagonal(matrix):
        return tf.maximum(matrix, 0), tf.ones_like(matrix)
    if matrix.shape[-1] == 1:
        return tf.maximum(matrix[..., 0], 0), tf.ones_like(matrix)
    values, vectors = tf.linalg.eigh(symmetrize(matrix))
    return tf.maximum(values, 0), vectors


def eigenvalues(matrix: tf.Tensor) -> tf.Tensor:
    """Eigenvalues `[..., d]` of a symmetric matrix `[..., d, d]`, or of a diagonal one."""
    if is_diagonal(matrix):
        return matrix
    # Of a single number in any precision: TensorFlow has no eigenvalues in half of it.
    return matrix[..., 0] if matrix.shape[-1] == 1 else tf.linalg.eigvalsh(matrix)


def without_rounding(values: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """Eigenvalues with zeros for those that may be what rounding leaves of zero.

    Args:
        values: Eigenvalues, none negative, `[..., d]`.
        matrix: What they are of. A diagonal one is not rounded.

    Returns:
        As given, with zeros up to `d ε` times the largest: the rule of numerical ranks.

    Source: Golub & Van Loan (2013), "Matrix Computations", section 5.4.1.

    Example:
    >>> without_rounding(tf.constant([0.0, 1e-8, 1e-5, 1.0]), tf.eye(4)).numpy().tolist()
    [0.0, 0.0, 9.999999747378752e-06, 1.0]
    """
    if is_diagonal(matrix):
        return values
    least = values.shape[-1] * epsilon(values.dtype)
    largest = tf.reduce_max(values, axis=-1, keepdims=True)
    return tf.where(values <= least * largest, tf.zeros_like(values), values)  # NaN stays.
