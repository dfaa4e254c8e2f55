"""Linear algebra of symmetric positive definite matrices."""

import tensorflow as tf


def scalar(value: float | tf.Tensor, dtype: tf.DType | str) -> tf.Tensor:
    """A number or tensor in the given dtype.

    `tf.cast` takes Python floats through float32, which costs float64 half of its digits.
    """
    if tf.is_tensor(value):
        return tf.cast(value, dtype)
    return tf.constant(value, dtype)


def symmetrize(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the symmetric part `(M + Mᵀ) / 2` of `[..., d, d]` matrices."""
    return 0.5 * (matrix + tf.linalg.matrix_transpose(matrix))


def spd_inverse(matrix: tf.Tensor) -> tf.Tensor:
    """Inverse of symmetric positive definite matrices by Cholesky factorisation.

    Args:
        matrix: Tensor `[..., d, d]`, symmetric.

    Returns:
        Tensor `[..., d, d]`, exactly symmetric. All NaN where a matrix is not positive definite
        to working precision: callers decide what a failure means.

    Example:
    >>> spd_inverse(tf.constant([[4.0, 0.0], [0.0, 1.0]])).numpy().tolist()
    [[0.25, 0.0], [0.0, 1.0]]
    """
    factor = tf.linalg.cholesky(matrix)
    identity = tf.eye(tf.shape(matrix)[-1], dtype=matrix.dtype)
    identity = tf.broadcast_to(identity, tf.shape(matrix))
    inverse_factor = tf.linalg.triangular_solve(factor, identity)
    # One matrix product replaces the second triangular solve: it runs on all cores, and the
    # result of MᵀM is symmetric up to rounding.
    inverse = symmetrize(tf.matmul(inverse_factor, inverse_factor, transpose_a=True))
    # A failed factorisation leaves NaN in a part of the matrix only.
    succeeded = tf.reduce_all(tf.math.is_finite(inverse), axis=[-2, -1], keepdims=True)
    return tf.where(succeeded, inverse, tf.constant(float("nan"), inverse.dtype))


def eigen_decomposition(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Eigenvalues and eigenvectors of symmetric positive semi-definite matrices.

    Args:
        matrix: Tensor `[..., d, d]`.

    Returns:
        Eigenvalues `[..., d]` in ascending order, those that rounding made negative set to 0, and
        the eigenvectors in the columns of `[..., d, d]`.

    Example:
    >>> values, _ = eigen_decomposition(tf.constant([[1.0, 1.0], [1.0, 1.0]]))
    >>> np.round(values, 6).tolist()
    [0.0, 2.0]
    """
    values, vectors = tf.linalg.eigh(symmetrize(matrix))
    return tf.maximum(values, 0), vectors


def condition_number(matrix: tf.Tensor, inverse: tf.Tensor) -> tf.Tensor:
    """Condition number `‖M‖₁ ‖M⁻¹‖₁` of `[..., d, d]` matrices, `[...]`.

    For symmetric matrices it lies between the ratio of the extreme eigenvalues and `d` times that.
    It multiplies over Kronecker factors, as that ratio does.

    Example:
    >>> matrix = tf.constant([[4.0, 0.0], [0.0, 1.0]])
    >>> float(condition_number(matrix, spd_inverse(matrix)))
    4.0
    """

    def norm(m: tf.Tensor) -> tf.Tensor:
        return tf.reduce_max(tf.reduce_sum(tf.abs(m), axis=-2), axis=-1)

    return norm(matrix) * norm(inverse)
