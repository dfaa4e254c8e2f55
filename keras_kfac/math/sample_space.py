"""Natural gradients from the rows that a Fisher matrix is made of, by the smaller of two matrices.

Of `F = Rᵀ R` with rows `R`, `[rows, weights]`, such as the gradients of single examples, the
inverse is had from a matrix of rows where these are fewer than the weights:

    (Rᵀ R + λ I)⁻¹ = (I - Rᵀ (R Rᵀ + λ I)⁻¹ R) / λ    and    (Rᵀ R + λ I)⁻¹ Rᵀ = Rᵀ (R Rᵀ + λ I)⁻¹.

Source: Ren & Goldfarb (2019), "Efficient subsampled Gauss-Newton and natural gradient methods for
training neural networks", arXiv:1906.02353; Higham (2002), "Accuracy and Stability of Numerical
Algorithms", section 10.1 (errors of Cholesky factorisation).
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_kfac.math.linalg import epsilon, scalar

# Rounding changes the smallest eigenvalues of a Gram matrix by about as many times the precision of
# its trace.
_ROUNDING = 8


def resolved_damping(damping: float | tf.Tensor, trace: tf.Tensor) -> tf.Tensor:
    """A damping that rounding of the matrix leaves positive definite.

    Args:
        damping: `λ >= 0`, scalar.
        trace: Of the matrix, scalar.

    Returns:
        `λ`, but at least eight times the relative precision of the trace.

    Example:
    >>> [float(resolved_damping(x, tf.constant(2.0**20))) for x in (0.0, 3.0)]
    [1.0, 3.0]
    """
    least = _ROUNDING * epsilon(trace.dtype)
    return tf.maximum(scalar(damping, trace.dtype), scalar(least, trace.dtype) * trace)


def damped_direction(rows: tf.Tensor, gradient: tf.Tensor, damping: float | tf.Tensor) -> tf.Tensor:
    """`(Rᵀ R + λ I)⁻¹ g`.

    Args:
        rows: `R`, `[rows, weights]`; how many rows there are need not be known.
        gradient: `g`, `[weights]`.
        damping: `λ >= 0`, scalar. It is raised to what the smaller of `R Rᵀ` and `Rᵀ R` has lost to
            rounding, eight times the precision of its trace: undamped, directions of less curvature
            than that, 1e-15 of the whole in float64, are damped.

    Returns:
        `[weights]`; not finite if the rows are not, or if they are zero and `λ` is.

    Example:
    >>> rows = tf.constant([[2.0, 0.0]])
    >>> damped_direction(rows, tf.constant([10.0, 10.0]), 1.0).numpy().round(6).tolist()
    [2.0, 10.0]
    """
    damping = resolved_damping(damping, tf.reduce_sum(tf.square(rows)))

    def in_sample_space() -> tf.Tensor:
        return _by_rows(rows, gradient, damping)

    def in_weight_space() -> tf.Tensor:
        solve = _solver(tf.matmul(rows, rows, transpose_a=True), damping)
        return solve(gradient)

    count, weights = rows.shape
    if count is None:
        return tf.cond(tf.shape(rows)[0] < weights, in_sample_space, in_weight_space)
    return in_sample_space() if count < weights else in_weight_space()


def _by_rows(rows: tf.Tensor, gradient: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
    """From `R Rᵀ + λ I`.

    A gradient is a sum of rows, but for regularisers and draws: `g = Rᵀ c + r` with a small rest.
    For the sum the product is `Rᵀ (R Rᵀ + λ I)⁻¹ c`. The other formula is for the rest alone: it
    takes a difference of nearly equal vectors, over `λ`, where curvature is far above that.
    """
    solve = _solver(tf.matmul(rows, rows, transpose_b=True), damping)

    def along(vector: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(rows, vector)

    def combined(coefficients: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(rows, coefficients, transpose_a=True)

    coefficients = solve(along(gradient))
    rest = gradient - combined(coefficients)
    beyond = rest - combined(solve(along(rest)))
    return combined(solve(coefficients)) + beyond / damping


def _solver(matrix: tf.Tensor, damping: tf.Tensor) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function that multiplies by `(M + λ I)⁻¹`.

    By substitution: the inverse itself would have errors as large along eigenvectors of large
    eigenvalues as along others.
    """
    damped = tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) + damping)
    root = tf.linalg.cholesky(damped)
    return lambda vector: tf.linalg.cholesky_solve(root, vector[:, tf.newaxis])[:, 0]


class RowsInverse(NamedTuple):
    """`(Rᵀ R + λ I + D)⁻¹`, to multiply gradients `[1, weights]` by.

    Attributes:
        rows: `R`, `[rows, weights]`.
        damping: `λ`, scalar.
    """

    rows: tf.Tensor
    damping: tf.Tensor

    def precondition(self, gradient: tf.Tensor, further: tf.Tensor | None = None) -> tf.Tensor:
        """The product, in the precision of the rows.

        Args:
            gradient: `[1, weights]`.
            further: `D >= 0` of each weight, `[1, weights]`, if there is any.

        Example:
        >>> inverse = RowsInverse(tf.constant([[2.0, 0.0]]), tf.constant(1.0))
        >>> product = inverse.precondition(tf.constant([[10.0, 10.0]]), tf.constant([[3.0, 1.0]]))
        >>> product.numpy().round(6).tolist()
        [[1.25, 5.0]]
        """
        rows, vector = self.rows, tf.cast(gradient, self.rows.dtype)[0]
        if further is None:
            return damped_direction(rows, vector, self.damping)[tf.newaxis]
        # With weights in units in which all are damped alike.
        damping = resolved_damping(self.damping, tf.reduce_sum(tf.square(rows)))
        units = tf.math.rsqrt(1 + tf.cast(further, rows.dtype)[0] / damping)
        return (units * damped_direction(rows * units, units * vector, damping))[tf.newaxis]


class AwaitedInverse(NamedTuple):
    """What is known of such an inverse before the rows are.

    Attributes:
        damping: `λ`, scalar.
        condition_number: A bound of that of the damped matrix.
    """

    damping: tf.Tensor
    condition_number: tf.Tensor

    @classmethod
    def of(
        cls, trace: tf.Tensor, damping: tf.Tensor, further: float | tf.Tensor = 0.0
    ) -> "AwaitedInverse":
        """For a Fisher matrix of this trace, about, and at most so much further damping.

        Example:
        >>> float(AwaitedInverse.of(tf.constant(6.0), tf.constant(2.0)).condition_number)
        4.0
        """
        least = resolved_damping(damping, trace)
        return cls(damping, 1 + tf.math.divide_no_nan(trace + scalar(further, trace.dtype), least))

    def on(self, rows: tf.Tensor) -> RowsInverse:
        """The inverse, given the rows."""
        return RowsInverse(rows, self.damping)

    def inner_product(self, other: "AwaitedInverse") -> tf.Tensor:
        """Zero: what comes with each batch does not grow old."""
        return tf.zeros((), self.damping.dtype)
