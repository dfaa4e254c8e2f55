"""The block-tridiagonal inverse of a chain of layers.

Gradients of a layer are taken to depend on those of all layers above it through those of the next
one alone, linearly. The inverse of such a matrix is block-tridiagonal: `Ξᵀ Λ Ξ`, where `Ξ` takes
from each layer's gradient what the next one's predicts, and `Λ` is the inverse of what is left.

Source: Martens & Grosse (2015), arXiv:1503.05671, section 4.3 and appendix B.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_kfac.math.eigen import eigen_decomposition
from keras_kfac.math.inverses import Shape, Start, identity
from keras_kfac.math.kronecker import factored_damping
from keras_kfac.math.linalg import condition_number, spd_inverse_root

Pair = tuple[tf.Tensor, tf.Tensor]
"""A matrix for the inputs, and one for the outputs."""

_PROBE = 0  # Seed.


class Remainder(NamedTuple):
    """`(A ⊗ G - C ⊗ D)⁻¹`, the part of a layer's curvature that the next one's does not tell.

    With the roots `A = L Lᵀ` and eigenvectors `L⁻¹ C L⁻ᵀ = E S Eᵀ`, and likewise for `G` and `D`,
    it is `K (I - S ⊗ T)⁻¹ Kᵀ`, `K = L⁻ᵀ E ⊗ M⁻ᵀ F`.

    Attributes:
        input_root: `L⁻ᵀ E`, `[d_in, d_in]`.
        output_root: `M⁻ᵀ F`, `[d_out, d_out]`.
        input_values: `S`, in [0, 1], `[d_in]`.
        output_values: `T`, `[d_out]`.
    """

    input_root: tf.Tensor
    output_root: tf.Tensor
    input_values: tf.Tensor
    output_values: tf.Tensor

    def product(self, gradient: tf.Tensor) -> tf.Tensor:
        """The product with a gradient `[d_in, d_out]`."""
        inside = tf.matmul(self.input_root, gradient, transpose_a=True) @ self.output_root
        inside /= 1 - self.input_values[:, tf.newaxis] * self.output_values
        return tf.matmul(self.input_root @ inside, self.output_root, transpose_b=True)


class Coupling(NamedTuple):
    """What the gradient of the next layer predicts of that of a layer: `X V Yᵀ` of `V`.

    Attributes:
        inputs: `X`, `[d_in, d_in of the next]`.
        outputs: `Y`, `[d_out, d_out of the next]`.
    """

    inputs: tf.Tensor
    outputs: tf.Tensor

    def predicted(self, gradient: tf.Tensor) -> tf.Tensor:
        """What a gradient of the next layer predicts, `[d_in, d_out]`."""
        return tf.matmul(self.inputs @ gradient, self.outputs, transpose_b=True)

    def transposed(self, gradient: tf.Tensor) -> tf.Tensor:
        """The product of the transposed map with a gradient of the layer."""
        return tf.matmul(self.inputs, gradient, transpose_a=True) @ self.outputs


class ChainInverse(NamedTuple):
    """`Ξᵀ Λ Ξ` of a chain of layers.

    Attributes:
        remainders: The blocks of `Λ`.
        couplings: What makes up `Ξ`, one less.
        condition_number: The largest of the damped Kronecker products, in the 1-norm.
    """

    remainders: tuple[Remainder, ...]
    couplings: tuple[Coupling, ...]
    condition_number: tf.Tensor

    @classmethod
    def of(
        cls, factors: Sequence[Pair], between: Sequence[Pair], dampings: Sequence[tf.Tensor]
    ) -> Self:
        """The inverse; not finite, or not its condition number, if it fails.

        Args:
            factors: `A` and `G` of each layer.
            between: Of each layer and the next the moments of inputs, `[d_in, d_in of the next]`,
                and of output gradients, `[d_out, d_out of the next]`.
            dampings: `λ` of each layer, split over its factors.
        """
        damped = [factored_damping(*pair, own) for pair, own in zip(factors, dampings, strict=True)]
        roots = [tuple(map(spd_inverse_root, pair)) for pair in damped]
        remainders, couplings = [], []
        for own, following, moments in zip(roots, roots[1:], between):
            sides = [_regression(*side) for side in zip(own, following, moments)]
            (a, a_values, inputs), (g, g_values, outputs) = sides
            remainders.append(Remainder(a, g, a_values, g_values))
            couplings.append(Coupling(inputs, outputs))
        a, g = map(tf.linalg.matrix_transpose, roots[-1])
        remainders.append(Remainder(a, g, *(tf.zeros_like(side[0]) for side in (a, g))))
        inverses = [[tf.matmul(r, r, transpose_a=True) for r in pair] for pair in roots]
        conditions = [
            condition_number(d, i) for d, i in zip(_flat(damped), _flat(inverses), strict=True)
        ]
        largest = tf.reduce_max([a * g for a, g in zip(conditions[::2], conditions[1::2])])
        # Without damping, one layer may tell all of another: then there is no inverse.
        told = tf.stack([tf.reduce_max(r.input_values) for r in remainders])
        told *= tf.stack([tf.reduce_max(r.output_values) for r in remainders])
        is_singular = tf.reduce_any(told >= 1)
        largest = tf.where(is_singular, tf.constant(float("inf"), largest.dtype), largest)
        return cls(tuple(remainders), tuple(couplings), largest)

    @staticmethod
    def start(shapes: Sequence[tuple[Shape, Shape]]) -> Start:
        """What makes up the identity, for factors of these shapes."""
        remainders = []
        for a, g in shapes:
            remainders += [(a, identity), (g, identity), (a[:1], tf.zeros), (g[:1], tf.zeros)]
        couplings = [
            ((own[0], following[0]), tf.zeros)
            for pair, next_pair in itertools.pairwise(shapes)
            for own, following in zip(pair, next_pair)
        ]
        return [*remainders, *couplings, ((), tf.ones)]

    @classmethod
    def from_parts(cls, parts: Sequence[tf.Tensor]) -> Self:
        """From what `tf.nest.flatten` makes of one."""
        layers = (len(parts) + 1) // 6
        starts, end = range(0, 4 * layers, 4), len(parts) - 1
        remainders = tuple(Remainder(*parts[i : i + 4]) for i in starts)
        couplings = tuple(Coupling(*parts[i : i + 2]) for i in range(4 * layers, end, 2))
        return cls(remainders, couplings, parts[-1])

    def precondition(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The product with the gradients of all layers, each `[d_in, d_out]`."""
        rest = list(gradients)
        for index, coupling in enumerate(self.couplings):
            rest[index] -= coupling.predicted(gradients[index + 1])
        own = [part.product(gradient) for part, gradient in zip(self.remainders, rest)]
        result = list(own)
        for index, coupling in enumerate(self.couplings):
            result[index + 1] -= coupling.transposed(own[index])
        return result

    def inner_product(self, other: Any) -> tf.Tensor:
        """Trace of the product with another such inverse, estimated by a random vector, scalar."""
        shapes = [(*r.input_values.shape, *r.output_values.shape) for r in self.remainders]
        dtype = self.condition_number.dtype
        probe = [
            tf.random.stateless_normal(shape, (_PROBE, index), dtype=dtype)
            for index, shape in enumerate(shapes)
        ]
        pairs = zip(self.precondition(probe), other.precondition(probe))
        return tf.add_n([tf.reduce_sum(a * b) for a, b in pairs])


def _regression(
    root: tf.Tensor, next_root: tf.Tensor, moment: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What of one side of a layer the next layer's tells.

    Args:
        root: `L⁻¹` of the damped factor `L Lᵀ`.
        next_root: Likewise of the next layer.
        moment: That of both.

    Returns:
        `L⁻ᵀ E` and `S` of what is told, and the coefficients of the regression.
    """
    coefficients = tf.matmul(moment, next_root, transpose_b=True)
    white = root @ coefficients
    values, vectors = eigen_decomposition(tf.matmul(white, white, transpose_b=True))
    return tf.matmul(root, vectors, transpose_a=True), values, coefficients @ next_root


def _flat(pairs: Sequence[Any]) -> list[tf.Tensor]:
    return [matrix for pair in pairs for matrix in pair]
