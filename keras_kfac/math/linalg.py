"""Linear algebra of symmetric positive definite matrices.

A vector `[d]` stands for the diagonal matrix whose diagonal it is, wherever a matrix
`[..., d, d]` can; in products a matrix `[..., 1, 1]` stands for that multiple of the identity.
Gradients can be `tf.IndexedSlices`, a few rows of a matrix, or `RowPairs`, what a matrix is the sum
of.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf


class RowPairs(NamedTuple):
    """A gradient `Σ aₙ gₙᵀ` that is not added up yet.

    Products with matrices take less as long as there are few terms.

    Attributes:
        inputs: Rows `a`, `[..., n, d_in]`.
        outputs: Rows `g`, `[..., n, d_out]`.
    """

    inputs: tf.Tensor
    outputs: tf.Tensor

    def sum(self) -> tf.Tensor:
        """The gradient as a matrix, `[..., d_in, d_out]`."""
        # Of equal leading axes: see `_by_one_matrix`.
        leading = tf.broadcast_static_shape(*(rows.shape[:-2] for rows in self))
        inputs, outputs = (
            rows
            if rows.shape[:-2] == leading
            else tf.broadcast_to(rows, [*leading, *tf.unstack(tf.shape(rows)[-2:])])
            for rows in self
        )
        return tf.matmul(inputs, outputs, transpose_a=True)


Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | RowPairs


def scalar(value: float | tf.Tensor, dtype: tf.DType | str) -> tf.Tensor:
    """A number or tensor in the given dtype.

    `tf.cast` takes Python floats through float32, which costs float64 half of its digits.
    """
    if tf.is_tensor(value):
        return tf.cast(value, dtype)
    return tf.constant(value, dtype)


def known_value(value: Any) -> Any:
    """A number as it is; that of a tensor or variable, `None` if a graph has yet to compute it.

    Example:
    >>> known_value(3.0), float(known_value(tf.constant(4.0)))
    (3.0, 4.0)
    """
    return tf.get_static_value(tf.convert_to_tensor(value)) if tf.is_tensor(value) else value


def epsilon(dtype: tf.DType | str) -> float:
    """Distance from 1 to the next number of a floating-point type.

    Example:
    >>> epsilon(tf.float32) == 2.0**-23, epsilon(tf.bfloat16) == 2.0**-7
    (True, True)
    """
    mantissa, _ = math.frexp(float(tf.as_dtype(dtype).max))
    return 2 * (1 - mantissa)


def with_rank(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """The tensor with axes of size 1 at its end, until it has so many in all.

    Example:
    >>> with_rank(tf.zeros([2, 3]), 4).shape
    TensorShape([2, 3, 1, 1])
    """
    missing = rank - tensor.shape.rank
    return tf.reshape(tensor, tf.concat([tf.shape(tensor), [1] * missing], axis=0))


def shaped_like(gradient: tf.Tensor | tf.IndexedSlices, of: tf.Tensor) -> tf.Tensor:
    """A gradient by a tensor, as one of which is known what is known of that."""
    # Of what is gathered from, it can be a few rows; within a loop, that of a product with more
    # than two axes has none of a known size.
    tensor = tf.convert_to_tensor(gradient)
    tensor.set_shape(of.shape)
    return tensor


def cast(gradient: Gradient, dtype: tf.DType | str) -> Gradient:
    """A gradient in another dtype."""
    if isinstance(gradient, RowPairs):
        return RowPairs(*(tf.cast(rows, dtype) for rows in gradient))
    return tf.cast(gradient, dtype)


def is_finite(tensor: tf.Tensor) -> tf.Tensor:
    """Whether all entries are finite, bool scalar.

    A sum shows it in one pass, without a tensor of bools: NaN and infinities survive in sums.
    """
    wide = tf.cast(tensor, tf.float32) if tensor.dtype.size < 4 else tensor
    return tf.math.is_finite(tf.reduce_sum(wide))


def is_diagonal(matrix: tf.Tensor) -> bool:
    """Whether it is a vector that stands for a diagonal matrix."""
    return matrix.shape.rank == 1


def _is_isotropic(matrix: tf.Tensor) -> bool:
    """Whether it is a number that stands for a multiple of the identity, or is one."""
    return matrix.shape[-1] == 1 and not is_diagonal(matrix)


def _of_each(values: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """Values `[...]`, one for each matrix `[..., d, d]`, to multiply these by."""
    return values if is_diagonal(matrix) else values[..., tf.newaxis, tf.newaxis]


def trace(matrix: tf.Tensor) -> tf.Tensor:
    """Traces of matrices, `[...]`."""
    # One operation: `tf.linalg.trace` makes nine, and models have many factors.
    return tf.reduce_sum(matrix) if is_diagonal(matrix) else tf.einsum("...ii->...", matrix)


def inner_products(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Traces of the products of symmetric matrices, `[...]`."""
    return tf.reduce_sum(first * second, axis=-1 if is_diagonal(first) else [-2, -1])


def scaled_plus_identity(scale: tf.Tensor, matrix: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """`scale M + amount I`, both numbers `[...]`."""
    scaled = _of_each(scale, matrix) * matrix
    if is_diagonal(matrix):
        return scaled + amount
    # Operations of one input: those behind `tf.linalg` take five, and models have many factors.
    diagonal = tf.raw_ops.MatrixDiagPart(input=scaled) + amount[..., tf.newaxis]
    return tf.raw_ops.MatrixSetDiag(input=scaled, diagonal=diagonal)


def plus_diagonal(matrix: tf.Tensor, diagonal: tf.Tensor) -> tf.Tensor:
    """`M + diag(d)`.

    Example:
    >>> plus_diagonal(tf.ones([2, 2]), tf.constant([1.0, 2.0])).numpy().tolist()
    [[2.0, 1.0], [1.0, 3.0]]
    """
    if is_diagonal(matrix):
        return matrix + diagonal
    return tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) + diagonal)


def left_product(matrix: tf.Tensor, gradient: Gradient, transpose: bool = False) -> Gradient:
    """`M X`, or `Mᵀ X`; a few rows of `X` can be multiplied by a diagonal matrix only."""
    is_number = _is_isotropic(matrix)
    if isinstance(gradient, RowPairs):
        if is_number or is_diagonal(matrix):
            return gradient._replace(inputs=gradient.inputs * matrix)
        # Not `rows @ Mᵀ`: with a few hundred rows Eigen takes three times as long for that.
        columns = tf.matmul(matrix, gradient.inputs, transpose_a=transpose, transpose_b=True)
        return gradient._replace(inputs=tf.linalg.matrix_transpose(columns))
    if is_number:
        return right_product(gradient, matrix)
    if not is_diagonal(matrix):
        return tf.matmul(matrix, gradient, transpose_a=transpose)
    return scaled_rows(gradient, matrix[:, tf.newaxis])


def right_product(gradient: Gradient, matrix: tf.Tensor, transpose: bool = False) -> Gradient:
    """`X M`, or `X Mᵀ`."""
    if isinstance(gradient, tf.IndexedSlices):
        product = right_product(gradient.values, matrix, transpose)
        return tf.IndexedSlices(product, gradient.indices, gradient.dense_shape)
    if isinstance(gradient, RowPairs):
        return gradient._replace(outputs=right_product(gradient.outputs, matrix, transpose))
    if is_diagonal(matrix) or _is_isotropic(matrix):
        return gradient * matrix
    if gradient.shape.rank > 2 and math.prod(matrix.shape[:-2]) == 1:
        return _by_one_matrix(gradient, matrix, transpose)
    return tf.matmul(gradient, matrix, transpose_b=transpose)


def _by_one_matrix(gradient: tf.Tensor, matrix: tf.Tensor, transpose: bool) -> tf.Tensor:
    """`X M` of many `X` `[..., d]`, as one product.

    TensorFlow 2.21 writes past its memory in the product of `[n, 1, m, d]` by `[d, e]` or
    `[1, 1, d, e]`, in float32 on a CPU with oneDNN.
    """
    rows = tf.reshape(gradient, [-1, gradient.shape[-1]])
    product = tf.matmul(rows, tf.reshape(matrix, matrix.shape[-2:]), transpose_b=transpose)
    return tf.reshape(product, tf.shape(gradient))


def scaled_rows(gradient: Gradient, scale: tf.Tensor) -> Gradient:
    """Elementwise product; of a few rows, with the same rows of `scale` (a scalar is for all)."""
    if isinstance(gradient, RowPairs):
        gradient = gradient.sum()
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient * scale
    if scale.shape.rank:
        scale = tf.gather(scale, gradient.indices)
    return tf.IndexedSlices(gradient.values * scale, gradient.indices, gradient.dense_shape)


def some_rows(gradient: tf.Tensor | RowPairs, rows: slice) -> tf.Tensor:
    """Some rows of a gradient, as a matrix.

    Example:
    >>> pairs = RowPairs(tf.constant([[1.0, 2.0]]), tf.constant([[3.0]]))
    >>> some_rows(pairs, slice(1, 2)).numpy().tolist()
    [[6.0]]
    """
    if isinstance(gradient, RowPairs):
        return gradient._replace(inputs=gradient.inputs[..., rows]).sum()
    return gradient[..., rows, :]


# Rows of so many entries are worth a product each; of shorter ones there are too many.
_LONG_ROW = 512


def inner_product(gradient: Gradient, direction: tf.Tensor) -> tf.Tensor:
    """Sum of the elementwise product, scalar, in the dtype of the direction.

    Large ones are limited by memory: the elementwise product is not made where that can be avoided.

    Example:
    >>> float(inner_product(tf.constant([[1.0, 2.0]]), tf.constant([[3.0, 4.0]])))
    11.0
    """
    if gradient is direction:
        return 2 * tf.nn.l2_loss(direction)
    if isinstance(gradient, tf.IndexedSlices):
        gradient, direction = gradient.values, tf.gather(direction, gradient.indices)
    gradient = tf.cast(gradient, direction.dtype)
    if direction.shape.rank < 2 or direction.shape[-1] < _LONG_ROW:
        return tf.reduce_sum(gradient * direction)
    rows = tf.matmul(gradient[..., tf.newaxis, :], direction[..., tf.newaxis])
    return tf.reduce_sum(rows)


def upper_triangle(size: int) -> list[tuple[int, int]]:
    """The places `(i, j)`, `i <= j`, of a square matrix."""
    return list(itertools.combinations_with_replacement(range(size), 2))


def symmetric_matrix(entries: Mapping[tuple[int, int], tf.Tensor], size: int) -> tf.Tensor:
    """The symmetric matrix with these scalars in its upper triangle.

    Example:
    >>> entries = {place: tf.constant(float(sum(place))) for place in upper_triangle(2)}
    >>> symmetric_matrix(entries, 2).numpy().tolist()
    [[0.0, 1.0], [1.0, 2.0]]
    """
    places = range(size)
    return tf.stack([[entries[min(i, j), max(i, j)] for j in places] for i in places])


def symmetrize(matrix: tf.Tensor) -> tf.Tensor:
    """Returns the symmetric part `(M + Mᵀ) / 2` of `[..., d, d]` matrices."""
    return 0.5 * (matrix + tf.linalg.matrix_transpose(matrix))


# Matrices up to this size are factorised by one library call, larger ones by blocks: the calls run
# on one core, the matrix products between blocks on all.
_LEAF_SIZE = 256


def spd_inverse(matrix: tf.Tensor) -> tf.Tensor:
    """Inverse of symmetric positive definite matrices by Cholesky factorisation.

    Args:
        matrix: Tensor `[..., d, d]`, symmetric, of static shape; or the diagonal of one.

    Returns:
        As given, symmetric to rounding. All NaN where a matrix is not positive definite to
        working precision: callers decide what a failure means.

    Example:
    >>> spd_inverse(tf.constant([[4.0, 0.0], [0.0, 1.0]])).numpy().tolist()
    [[0.25, 0.0], [0.0, 1.0]]
    """
    # Layers of many small groups have thousands of 1 x 1 matrices.
    if is_diagonal(matrix) or matrix.shape[-1] == 1:
        return tf.where(matrix > 0, 1 / matrix, float("nan"))
    _, inverse = _factor_and_inverse(matrix)
    # A failed factorisation leaves NaN in a part of the matrix only, but always in its trace.
    of_each = trace(inverse)[..., tf.newaxis, tf.newaxis]
    return inverse + tf.where(tf.math.is_finite(of_each), tf.zeros_like(of_each), float("nan"))


def spd_inverse_root(matrix: tf.Tensor) -> tf.Tensor:
    """`L⁻¹` for the Cholesky factor `L` of symmetric positive definite matrices `[..., d, d]`.

    Not finite where a matrix is not positive definite to working precision.

    Example:
    >>> spd_inverse_root(tf.constant([[4.0, 0.0], [0.0, 1.0]])).numpy().tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    return _factor_and_inverse(matrix, needs_factor=True)[0]


def _factor_and_inverse(matrix: tf.Tensor, needs_factor: bool = False) -> tuple[Any, tf.Tensor]:
    """`L⁻¹` (if needed) and `L⁻ᵀ L⁻¹` for the Cholesky factor `L` of a matrix, by halves.

    With `[[A, Bᵀ], [B, C]]`, `A = L₁L₁ᵀ`, `M = B L₁⁻ᵀ` and `S = C - M Mᵀ = L₂L₂ᵀ`

        L⁻¹ = [[L₁⁻¹, 0], [-L₂⁻¹ M L₁⁻¹, L₂⁻¹]].

    Source: Higham (2002), "Accuracy and Stability of Numerical Algorithms", sections 10.1, 14.2.
    """
    size = matrix.shape[-1]
    if size <= _LEAF_SIZE:
        ones = tf.ones(matrix.shape[:-1], matrix.dtype)
        identity = tf.raw_ops.MatrixDiag(diagonal=ones)
        factor = tf.linalg.triangular_solve(tf.linalg.cholesky(matrix), identity)
        return factor, tf.matmul(factor, factor, transpose_a=True)
    half = size // 2
    b, c = matrix[..., half:, :half], matrix[..., half:, half:]
    first, first_inverse = _factor_and_inverse(matrix[..., :half, :half], needs_factor=True)
    m = tf.matmul(b, first, transpose_b=True)
    rest = c - tf.matmul(m, m, transpose_b=True)
    second, second_inverse = _factor_and_inverse(rest, needs_factor)
    w = tf.matmul(m, first)
    v = tf.matmul(second_inverse, w)
    corner = first_inverse + tf.matmul(w, v, transpose_a=True)
    inverse = _blocks(corner, -tf.linalg.matrix_transpose(v), -v, second_inverse)
    if not needs_factor:
        return None, inverse
    upper = tf.zeros_like(tf.linalg.matrix_transpose(v))
    return _blocks(first, upper, -tf.matmul(second, w), second), inverse


def _blocks(a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor) -> tf.Tensor:
    """`[[a, b], [c, d]]`."""
    return tf.concat([tf.concat([a, b], axis=-1), tf.concat([c, d], axis=-1)], axis=-2)


def condition_number(matrix: tf.Tensor, inverse: tf.Tensor) -> tf.Tensor:
    """Condition number `‖M‖₁ ‖M⁻¹‖₁` of `[..., d, d]` matrices, `[...]`, or of diagonal ones.

    For symmetric matrices it lies between the ratio of the extreme eigenvalues and `d` times that.
    It multiplies over Kronecker factors, as that ratio does.

    Example:
    >>> matrix = tf.constant([[4.0, 0.0], [0.0, 1.0]])
    >>> float(condition_number(matrix, spd_inverse(matrix)))
    4.0
    """

    def norm(m: tf.Tensor) -> tf.Tensor:
        columns = tf.abs(m) if is_diagonal(m) else tf.reduce_sum(tf.abs(m), axis=-2)
        return tf.reduce_max(columns, axis=-1)

    return norm(matrix) * norm(inverse)
