"""Roots of damped inverses, kept up by matrix products alone.

`K` with `K Kᵀ = (A + δ I)⁻¹` determines `A`. If `A` becomes another matrix `B - δ' I`, the new root
is `K M^{-1/2}` with `M = Kᵀ B K`: to be computed it takes neither `A` nor a factorisation.

- A moving average, `B = (1 - w) A + w Â + δ I`, has `M = I + w (Kᵀ (Â + δ I) K - I)`.
- A new damping, `B = A + δ' I`, has `M = I + (δ' - δ) Kᵀ K`.

`K (I - ½ (M - I))` is the step of Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner &
Makhzani (2024), "Structured inverse-free natural gradient descent", arXiv:2312.05705 (IKFAC), which
differs from `K M^{-1/2}` by terms of second order in `w`. Here it is repeated on what it leaves
over, scaled so that it can't diverge: the iteration of Newton and Schulz (Higham 2008, "Functions
of matrices", section 6.7).

`K` has the root of the condition number of what it stands for, and `K Kᵀ` is positive definite
whatever rounding does to `K`.
"""

import functools
import math
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_kfac.math.kronecker import mean_eigenvalue
from keras_kfac.math.linalg import (
    epsilon,
    inner_products,
    is_diagonal,
    right_product,
    scalar,
    scaled_plus_identity,
    symmetrize,
)
from keras_kfac.math.structure import Shape

# The damping of a root falls by no more than this at once, times the precision of the root: what
# is left of a difference of numbers close to each other is rounding.
_SHOWN = 16
# Steps of the iteration, each of which multiplies small eigenvalues by 9/4: enough for a condition
# number of 1e17.
_MAX_STEPS = 60
# An error that no longer falls is rounding, or this: an eigenvalue that is not positive.
_FAILED = 0.5


class DampedRoot(NamedTuple):
    """`K` with `K Kᵀ = (A + δ I)⁻¹`, which stands for `A`, too.

    `K` may be kept in fewer digits than its changes are computed in.

    Attributes:
        root: `K`, `[..., d, d]`, or the diagonal of one.
        damping: `δ` of each matrix, `[...]`; of blocks, one `[1, 1]`.
    """

    root: tf.Tensor
    damping: tf.Tensor

    def including(
        self, factor: tf.Tensor, share: tf.Tensor, is_first: tf.Tensor | bool = False
    ) -> Self:
        """The root for a moving average.

        Args:
            factor: `Â`, in the precision to compute in.
            share: `w` in [0, 1], of `Â` in the average `(1 - w) A + w Â`.
            is_first: Whether it is the first one. It is damped by its mean eigenvalue, for nothing
                else says how much is much.

        Example:
        >>> zero = DampedRoot(tf.eye(2), tf.constant(1.0))
        >>> root = zero.including(3.0 * tf.eye(2), tf.constant(0.5))
        >>> round(float(root.root[0, 0]) ** -2, 5)  # 1.5 + 1
        2.5
        """
        root, old = self._wide(factor.dtype)
        share = scalar(share, factor.dtype)
        mean = mean_eigenvalue(factor)
        first = tf.where(mean > 0, mean, tf.ones_like(mean))
        new = self._kept(tf.where(is_first, first, old))
        added = scaled_plus_identity(share, factor, new - (1 - share) * old)
        gram = _transposed_product(root, right_product(added, root))
        gram = scaled_plus_identity(tf.ones_like(share), gram, 1 - share)
        return self._changed(root, gram, new)

    def damped(self, damping: tf.Tensor) -> Self:
        """The root for another damping `δ' >= 0`, in the precision to compute in.

        It falls no further at once than the digits of a root can show.

        Example:
        >>> root = DampedRoot(tf.eye(2), tf.constant(1.0)).damped(tf.constant(0.25))
        >>> round(float(root.root[0, 0]), 5)
        2.0
        """
        root, old = self._wide(damping.dtype)
        new = self._kept(tf.maximum(damping, _SHOWN * epsilon(self.root.dtype) * old))
        gram = _transposed_product(root, root)
        gram = scaled_plus_identity(new - old, gram, tf.ones_like(old))
        return self._changed(root, gram, new)

    def inverted(self) -> tf.Tensor:
        """`A`, in float64: for reports alone, as it takes an inverse.

        Example:
        >>> np.round(DampedRoot(tf.constant([0.5, 1.0]), tf.constant(0.25)).inverted(), 6).tolist()
        [3.75, 0.75]
        """
        root, damping = self._wide(tf.float64)
        if is_diagonal(root):
            return 1 / tf.square(root) - damping
        inverse = tf.linalg.inv(root)
        whole = tf.matmul(inverse, inverse, transpose_a=True)
        return scaled_plus_identity(tf.ones_like(damping), whole, -damping)

    def condition_bound(self, mean: tf.Tensor) -> tf.Tensor:
        """Bound of the condition number of `A + δ I`, `[...]`, in the 2-norm.

        The largest eigenvalue is at most the trace, `‖K Kᵀ‖₂` at most `‖K‖₁ ‖K‖_∞`.

        Args:
            mean: The mean eigenvalue of `A`.
        """
        root, damping = self._wide(mean.dtype)
        if is_diagonal(root):
            squared = tf.square(tf.reduce_max(root))
        else:
            squared = _row_sums(root, axis=-1) * _row_sums(root, axis=-2)
        copies = math.prod(root.shape[:-2]) if root.shape.rank == 4 else 1
        return (copies * root.shape[-1] * mean + damping) * squared

    def inner_products(self, other: "DampedRoot") -> tf.Tensor:
        """Traces of the products of `K Kᵀ` and that of another root, `[...]`."""
        (mine, _), (others, _) = (root._wide(wide(root.root.dtype)) for root in (self, other))
        product = _transposed_product(mine, others)
        return inner_products(product, product)

    def _wide(self, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
        """Both parts in the precision to compute in."""
        return tf.cast(self.root, dtype), tf.cast(self.damping, dtype)

    def _kept(self, damping: tf.Tensor) -> tf.Tensor:
        """A damping as it can be kept."""
        return tf.cast(tf.cast(damping, self.damping.dtype), damping.dtype)

    def _changed(self, root: tf.Tensor, gram: tf.Tensor, damping: tf.Tensor) -> Self:
        parts = whitened(root, gram), damping
        return type(self)(*(tf.cast(part, self.root.dtype) for part in parts))


def wide(dtype: tf.DType) -> tf.DType:
    """The type to compute in where roots are kept in another: float32 at least."""
    return tf.float32 if dtype.size < 4 else dtype


def numbers_shape(matrices: Shape) -> Shape:
    """Shape of one number for each matrix `[..., d, d]`; blocks of one matrix share theirs."""
    return (1, 1) if len(matrices) == 4 else matrices[:-2]


def whitened(root: tf.Tensor, gram: tf.Tensor) -> tf.Tensor:
    """`K M^{-1/2}` of symmetric positive definite matrices `M`, by matrix products alone.

    Args:
        root: `K`, `[..., d, d]`, or the diagonal of one.
        gram: `M`, likewise.

    Returns:
        As given. All NaN where `M` is not positive definite to working precision.

    Example:
    >>> gram = tf.constant([[5.0, 4.0], [4.0, 5.0]])  # Eigenvalues 9 and 1
    >>> np.round(3 * whitened(tf.eye(2), gram), 3).tolist()
    [[2.0, -1.0], [-1.0, 2.0]]
    """
    if is_diagonal(gram) or gram.shape[-1] == 1:
        return root * tf.math.rsqrt(gram)
    size = gram.shape[-1]
    matrices = (tf.reshape(matrix, [-1, size, size]) for matrix in (root, gram))
    return tf.reshape(_iteration(gram.dtype)(*matrices), root.shape)


@functools.cache
def _iteration(dtype: tf.DType) -> Any:
    """`_iterated` traced once, for matrices of all sizes: a loop for each takes long to trace."""
    matrices = tf.TensorSpec([None, None, None], dtype)
    with tf.init_scope():
        traced = tf.function(_iterated, autograph=False)
        return traced.get_concrete_function(matrices, matrices)


def _iterated(root: tf.Tensor, gram: tf.Tensor) -> tf.Tensor:
    """`whitened` of `[n, d, d]`."""
    # Eigenvalues in (0, 2] all come nearer to 1. Either norm bounds the largest.
    norm = tf.minimum(_row_sums(gram), tf.sqrt(inner_products(gram, gram)))
    scale = tf.maximum(norm / 2, 1)[:, tf.newaxis, tf.newaxis]
    root, gram = root * tf.math.rsqrt(scale), gram / scale
    one = tf.ones((), gram.dtype)
    # A step squares the error: the last one, below, needs no more than the root of the precision.
    enough = epsilon(gram.dtype) ** 0.5

    def error(gram: tf.Tensor) -> tf.Tensor:
        rest = scaled_plus_identity(one, gram, -one)
        return tf.sqrt(tf.reduce_max(inner_products(rest, rest)))

    def correction(gram: tf.Tensor) -> tf.Tensor:
        return scaled_plus_identity(-one / 2, gram, 3 * one / 2)

    def goes_on(root: tf.Tensor, gram: tf.Tensor, now: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        return (now > enough) & (now < before)

    def step(
        root: tf.Tensor, gram: tf.Tensor, now: tf.Tensor, before: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        factor = correction(gram)
        gram = symmetrize(tf.matmul(factor, tf.matmul(gram, factor)))
        return tf.matmul(root, factor), gram, error(gram), now

    start = root, gram, error(gram), tf.constant(float("inf"), gram.dtype)
    root, gram, left, _ = tf.while_loop(goes_on, step, start, maximum_iterations=_MAX_STEPS)
    root = tf.matmul(root, correction(gram))
    return tf.where(left < _FAILED, root, float("nan"))


def _transposed_product(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """`Mᵀ N`; of two diagonal matrices, the diagonal of it."""
    return first * second if is_diagonal(first) else tf.matmul(first, second, transpose_a=True)


def _row_sums(matrix: tf.Tensor, axis: int = -1) -> tf.Tensor:
    """Largest sum of absolute values along an axis, `[...]`: the norm for -1 (∞) or -2 (1)."""
    return tf.reduce_max(tf.reduce_sum(tf.abs(matrix), axis=axis), axis=-1)
