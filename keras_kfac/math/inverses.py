"""Inverses of a damped Kronecker product, in the two ways to damp it, and without inverting.

Each factor is a matrix `[..., d, d]`, or the diagonal `[d]` of a diagonal one; so are the parts of
the inverse that belong to it. Factors in blocks have the axes of the gradient's blocks: see
`structure.aligned`.

Source: Martens & Grosse (2015), arXiv:1503.05671, section 6.3 (factored damping); George et al.
(2018), arXiv:1806.03884, section 3.1 (eigenbases); Lin et al. (2024), arXiv:2312.05705 (roots).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_kfac.math.eigen import eigen_decomposition, without_rounding
from keras_kfac.math.kronecker import (
    factored_damping,
    is_number,
    mean_eigenvalue,
    precondition,
    split_damping,
)
from keras_kfac.math.linalg import (
    Gradient,
    condition_number,
    inner_products,
    is_diagonal,
    left_product,
    right_product,
    scalar,
    scaled_rows,
    spd_inverse,
)
from keras_kfac.math.roots import DampedRoot, numbers_shape

Shape = tuple[int, ...]

Part = tuple[Shape, Callable[[Any, Any], tf.Tensor]]
"""Shape and initial value, a function of shape and dtype, of a part of an inverse."""

Start = list[Part]
"""Those of all parts."""


def identity(shape: Shape, dtype: Any) -> tf.Tensor:
    """Identity matrices `[..., d, d]`, or the diagonal `[d]` of one."""
    if len(shape) == 1:
        return tf.ones(shape, dtype)
    return tf.eye(shape[-1], batch_shape=shape[:-2], dtype=dtype)


class FactoredInverse(NamedTuple):
    """`(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹`.

    Attributes:
        input_inverse: `[..., d_in, d_in]`.
        output_inverse: `[..., d_out, d_out]`.
        condition_number: Of the damped product in the 1-norm, the largest if there are several.
    """

    input_inverse: tf.Tensor
    output_inverse: tf.Tensor
    condition_number: tf.Tensor

    @classmethod
    def of(cls, input_factor: tf.Tensor, output_factor: tf.Tensor, damping: tf.Tensor) -> Self:
        """The inverse for factors `A` and `G` and damping `λ`; not finite if it fails."""
        a, g = factored_damping(input_factor, output_factor, damping)
        a_inverse, g_inverse = spd_inverse(a), spd_inverse(g)
        condition = condition_number(a, a_inverse) * condition_number(g, g_inverse)
        return cls(a_inverse, g_inverse, tf.reduce_max(condition))

    @staticmethod
    def start(input_factor: Shape, output_factor: Shape) -> Start:
        """What makes up the identity, for factors of these shapes."""
        return [(input_factor, identity), (output_factor, identity), ((), tf.ones)]

    def precondition(self, gradient: Gradient) -> Gradient:
        """The product with a gradient `[..., d_in, d_out]`."""
        return precondition(gradient, self.input_inverse, self.output_inverse)

    def inner_product(self, other: Any) -> tf.Tensor:
        """Trace of the product with another such inverse, scalar."""
        parts = zip(self[:2], other[:2])
        traces = [inner_products(mine, others) for mine, others in parts]
        return tf.reduce_sum(traces[0] * traces[1])


# Eigenvalues do not depend on the damping, but without any those that may be rounding are zeros.
ANY_DAMPING = 1.0


class ExactInverse(NamedTuple):
    """`(A ⊗ G + λ I)⁻¹` by the eigenbases of `A` and `G`, or with other eigenvalues in these.

    The pseudo-inverse if `λ` is 0.

    Attributes:
        input_basis: Eigenvectors of `A` in columns, `[..., d_in, d_in]`.
        output_basis: Those of `G`, `[..., d_out, d_out]`.
        eigenvalues: Before damping: `aᵢ gⱼ`, `[..., d_in, d_out]`.
        damping: `λ`, scalar.
        condition_number: Of the damped product in the 2-norm, the largest if there are several.
    """

    input_basis: tf.Tensor
    output_basis: tf.Tensor
    eigenvalues: tf.Tensor
    damping: tf.Tensor
    condition_number: tf.Tensor

    @classmethod
    def of(cls, input_factor: tf.Tensor, output_factor: tf.Tensor, damping: tf.Tensor) -> Self:
        """The inverse for factors `A` and `G` and damping `λ`; not finite if it fails.

        Without damping, eigenvalues of a factor that are what rounding leaves of zero are zero.
        """
        a, input_basis = eigen_decomposition(input_factor)
        g, output_basis = eigen_decomposition(output_factor)
        damping = scalar(damping, a.dtype)
        factors = (a, input_factor), (g, output_factor)
        a, g = (tf.where(damping > 0, v, without_rounding(v, of)) for v, of in factors)
        eigenvalues = a[..., :, tf.newaxis] * g[..., tf.newaxis, :]
        condition = _largest_ratio(eigenvalues + damping)
        return cls(input_basis, output_basis, eigenvalues, damping, condition)

    @staticmethod
    def start(input_factor: Shape, output_factor: Shape) -> Start:
        """What makes up the identity, for factors of these shapes."""
        bases = [(input_factor, identity), (output_factor, identity)]
        # A diagonal factor has no leading axes; blocks broadcast with those of the other factor.
        leading = tuple(map(max, zip(input_factor[:-2], output_factor[:-2])))
        values = (*leading, input_factor[-1], output_factor[-1])
        return [*bases, (values, tf.ones), ((), tf.zeros), ((), tf.ones)]

    def precondition(self, gradient: Gradient) -> Gradient:
        """The product with a gradient `[..., d_in, d_out]`."""
        inside = left_product(self.input_basis, gradient, transpose=True)
        inside = scaled_rows(right_product(inside, self.output_basis), self._inverted())
        outside = right_product(inside, self.output_basis, transpose=True)
        return left_product(self.input_basis, outside)

    def with_eigenvalues(self, values: tf.Tensor) -> Self:
        """The inverse with other eigenvalues in the same bases, before damping.

        Its condition number is that of the pseudo-inverse where these and the damping are 0.

        Example:
        >>> inverse = ExactInverse.of(tf.eye(3), tf.eye(1), 0.0)
        >>> inverse = inverse.with_eigenvalues(tf.constant([[4.0], [2.0], [0.0]]))
        >>> float(inverse.condition_number), inverse.precondition(tf.ones([3, 1])).numpy().tolist()
        (2.0, [[0.25], [0.5], [0.0]])
        """
        condition = _largest_ratio(values + self.damping)
        return self._replace(eigenvalues=values, condition_number=condition)

    def _inverted(self) -> tf.Tensor:
        """Eigenvalues of the inverse; of the pseudo-inverse without damping."""
        damped = self.eigenvalues + self.damping
        return tf.math.divide_no_nan(tf.ones_like(damped), damped)

    def diagonal_in(self, other: Self, values: tf.Tensor) -> tf.Tensor:
        """What a matrix that is diagonal in these bases has on its diagonal in others.

        Args:
            other: An inverse with the other bases.
            values: The matrix in these, shaped as the eigenvalues.

        Example:
        >>> bases = [(tf.eye(2), tf.eye(1)), (tf.constant([[0.0, 1.0], [1.0, 0.0]]), tf.eye(1))]
        >>> here, there = (ExactInverse(*pair, tf.ones([2, 1]), 0.0, 1.0) for pair in bases)
        >>> here.diagonal_in(there, tf.constant([[3.0], [5.0]])).numpy().tolist()
        [[5.0], [3.0]]
        """
        a, g = (_overlaps(new, old) for new, old in zip(other[:2], self[:2]))
        return right_product(left_product(a, values), g, transpose=True)

    def inner_product(self, other: Any) -> tf.Tensor:
        """Trace of the product with another such inverse, scalar."""
        turned = other.diagonal_in(self, other._inverted())
        return tf.reduce_sum(self._inverted() * turned)


def _largest_ratio(values: tf.Tensor) -> tf.Tensor:
    """Of the largest and the smallest positive value of each matrix; 1 where there is none."""
    largest = tf.reduce_max(values, axis=[-2, -1])
    positive = tf.where(values > 0, values, tf.cast(float("inf"), values.dtype))
    ratios = largest / tf.reduce_min(positive, axis=[-2, -1])
    return tf.reduce_max(tf.maximum(ratios, 1))


def _overlaps(basis: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Squared inner products of the vectors of two bases."""
    is_same = is_diagonal(basis)
    return tf.square(basis * other if is_same else tf.matmul(basis, other, transpose_a=True))


class RootInverse(NamedTuple):
    """`K Kᵀ ⊗ C Cᵀ` with `K Kᵀ = (A + π√λ I)⁻¹` and `C Cᵀ = (G + √λ/π I)⁻¹`.

    The roots stand for the factors, too: see `DampedRoot`.

    Attributes:
        input_root: `K`, `[..., d_in, d_in]`.
        input_damping: `π√λ` of each matrix, `[...]`; of blocks, one `[1, 1]`.
        output_root: `C`, `[..., d_out, d_out]`.
        output_damping: `√λ/π`, likewise.
        condition_number: A bound of that of the damped product, the largest if there are several.
    """

    input_root: tf.Tensor
    input_damping: tf.Tensor
    output_root: tf.Tensor
    output_damping: tf.Tensor
    condition_number: tf.Tensor

    @classmethod
    def of(cls, input_factor: tf.Tensor, output_factor: tf.Tensor, damping: tf.Tensor) -> Self:
        """The inverse for factors `A` and `G` and damping `λ`; not finite if it fails."""
        factors = input_factor, output_factor
        start = cls.start(*(tuple(factor.shape) for factor in factors))
        zero = cls(*(initial(shape, input_factor.dtype) for shape, initial in start))
        first = zero.including(factors, [tf.ones((), input_factor.dtype)] * 2, is_first=True)
        return first.damped([mean_eigenvalue(factor) for factor in factors], damping)

    @staticmethod
    def start(input_factor: Shape, output_factor: Shape) -> Start:
        """What makes up the identity, for factors of these shapes: zero, damped by one."""
        sides = input_factor, output_factor
        parts = [part for s in sides for part in ((s, identity), (numbers_shape(s), tf.ones))]
        return [*parts, ((), tf.ones)]

    @property
    def roots(self) -> tuple[DampedRoot, DampedRoot]:
        """`K` and `C`, with their damping."""
        return DampedRoot(*self[:2]), DampedRoot(*self[2:4])

    def including(
        self, factors: Sequence[tf.Tensor], shares: Sequence[tf.Tensor], is_first: tf.Tensor | bool
    ) -> Self:
        """Takes both factors into the moving averages; see `DampedRoot.including`."""
        each = zip(self.roots, factors, shares)
        a, g = (root.including(f, share, is_first) for root, f, share in each)
        return type(self)(*a, *g, self.condition_number)

    def damped(self, means: Sequence[tf.Tensor], damping: tf.Tensor) -> Self:
        """The inverse for another damping `λ`, given the mean eigenvalues of `A` and `G`."""
        are_numbers = [is_number(root.root) for root in self.roots]
        amounts = split_damping(means, are_numbers, damping)
        a, g = (root.damped(amount) for root, amount in zip(self.roots, amounts))
        condition = a.condition_bound(means[0]) * g.condition_bound(means[1])
        largest = tf.cast(tf.reduce_max(condition), self.condition_number.dtype)
        return type(self)(*a, *g, largest)

    def precondition(self, gradient: Gradient) -> Gradient:
        """The product with a gradient `[..., d_in, d_out]`."""
        k, c = self.input_root, self.output_root
        inside = right_product(left_product(k, gradient, transpose=True), c)
        return left_product(k, right_product(inside, c, transpose=True))

    def inner_product(self, other: Any) -> tf.Tensor:
        """Trace of the product with another such inverse, scalar, in float32 at least."""
        a, g = (mine.inner_products(others) for mine, others in zip(self.roots, other.roots))
        return tf.reduce_sum(a * g)


Inverse = FactoredInverse | ExactInverse | RootInverse


def relative_change(old: Inverse, new: Inverse) -> tf.Tensor:
    """`‖new - old‖ / ‖new‖` of two inverses of one kind in the Frobenius norm, scalar.

    Example:
    >>> old, new = (FactoredInverse.of(tf.eye(2), tf.eye(3), x) for x in (4.0, 0.0))
    >>> round(float(relative_change(old, new)), 4)  # of 1 / (1 + √λ)²: 1/9 and 1
    0.8889
    """
    squared = new.inner_product(new)
    difference = squared - 2 * old.inner_product(new) + old.inner_product(old)
    # Rounding can make the difference of equals negative.
    return tf.sqrt(tf.math.divide_no_nan(tf.maximum(difference, 0), squared))
