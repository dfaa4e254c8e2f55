"""EKFAC: the eigenbases of the Kronecker factors, with the second moments of gradients in these.

Source: George, Laurent, Bouthillier, Ballas & Vincent (2018), "Fast approximate natural gradient
descent in a Kronecker-factored eigenbasis", arXiv:1806.03884.
"""

from collections.abc import Sequence
from typing import cast

import keras
import tensorflow as tf

from keras_kfac.curvature.block import BlockPlan, KroneckerBlock
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.example_gradients import (
    RotatedSquaresAdapter,
    reason_without_pairs,
)
from keras_kfac.introspection.statistics import BatchWeights, LayerStatistics
from keras_kfac.math.inverses import ExactInverse, Inverse
from keras_kfac.math.linalg import epsilon, is_finite
from keras_kfac.math.moving_average import weighted_average
from keras_kfac.math.structure import Structures, whole_blocks

# Gradients in the bases are rounded by about so many times the precision of the largest.
_ROUNDING = 8


class EigenbasisBlock(KroneckerBlock):
    """`U (S + λ I)⁻¹ Uᵀ`: `U` are the eigenvectors of `A ⊗ G`, `S` the diagonal of `Uᵀ F U`.

    K-FAC's block has the products of the eigenvalues of `A` and `G` for `S`. Of all that are
    diagonal in these bases this one is nearest to the Fisher matrix, and has its trace.

    `S` is the moving average of the squares of the gradients of single examples in the bases that
    are kept, updated with the factors. When the bases are renewed it becomes the diagonal that the
    old approximation has in the new bases, so that it forgets nothing; at first, that of K-FAC.

    Without damping it is the pseudo-inverse: no gradient of the batches has a part in a direction
    in which `S` is zero, or is what rounding leaves of that, and there the weights stay.
    """

    kind = "ekfac"
    needs_gradients = True
    needs_bases = True

    @classmethod
    def unsuitable(cls, adapter: LayerAdapter) -> str | None:
        """Why the structure can't be had for a layer; `None` if it can."""
        return reason_without_pairs(adapter)

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for a layer that it suits: damped exactly in any case."""
        return super().plan(adapter, ExactInverse)

    @property
    def observers(self) -> Sequence[LayerAdapter]:
        """The layer, and the squares in the bases that are kept."""
        shapes, bases = self.adapter.factor_shapes, self.inverse[:2]
        plain = [tf.reshape(basis, shape) for basis, shape in zip(bases, shapes)]
        return [self.adapter, RotatedSquaresAdapter(self.adapter, (plain[0], plain[1]))]

    def update(
        self, statistics: Sequence[LayerStatistics], weights: BatchWeights, decay: tf.Tensor
    ) -> None:
        """Includes the statistics of a batch in the moving averages, unless they are not finite."""
        variable = self._eigenvalues
        old = tf.convert_to_tensor(variable)
        squares = self._as_eigenvalues(statistics[1].output_factor)
        average, _ = weighted_average(
            old,
            tf.convert_to_tensor(self.weight),
            tf.cast(squares, old.dtype),
            tf.cast(weights.outputs, old.dtype),
            tf.cast(decay, old.dtype),
        )
        # Before the first refresh there are no bases.
        counts = self._is_refreshed & is_finite(squares)
        variable.assign(tf.where(counts, _resolved(average), old))
        super().update(statistics, weights, decay)

    def invert(self, damping: tf.Tensor) -> ExactInverse:
        """The inverse in the eigenbases of the factors as they are now.

        What fills up the last of several blocks counts in its condition number.
        """
        new, old = cast(ExactInverse, super().invert(damping)), cast(ExactInverse, self.inverse)
        regular = _of_regular_factors(new.eigenvalues, self._structures)
        product = tf.where(new.damping > 0, new.eigenvalues, regular)
        values = tf.where(self._is_refreshed, old.diagonal_in(new, old.eigenvalues), product)
        return new.with_eigenvalues(_resolved(values))

    @property
    def _eigenvalues(self) -> keras.Variable:
        return self._inverse[ExactInverse._fields.index("eigenvalues")]

    @property
    def _is_refreshed(self) -> tf.Tensor:
        return tf.convert_to_tensor(self.refreshes) > 0

    def _as_eigenvalues(self, squares: tf.Tensor) -> tf.Tensor:
        """Squares in a row, as the eigenvalues lie."""
        sizes = [s.blocks * s.block_size for s in self._structures]
        if self.adapter.groups is not None:
            return tf.reshape(squares, [self.adapter.groups, *sizes])
        return whole_blocks(tf.reshape(squares, sizes), self._structures)


def _of_regular_factors(products: tf.Tensor, structures: Structures) -> tf.Tensor:
    """Products `aᵢ gⱼ` with zeros where `aᵢ` or `gⱼ` is what rounding leaves of zero."""
    largest = tf.reduce_max(products, axis=[-2, -1], keepdims=True)
    for (axis, other), structure in zip(((-2, -1), (-1, -2)), structures):
        if structure.is_diagonal:  # Nothing is rounded there.
            continue
        least = products.shape[axis] * epsilon(products.dtype) * largest
        own = tf.reduce_max(products, axis=other, keepdims=True)
        products = tf.where(own > least, products, tf.zeros_like(products))
    return products


def _resolved(squares: tf.Tensor) -> tf.Tensor:
    """Squares `[..., d_in, d_out]` with zeros for what rounding leaves of zeros."""
    least = (_ROUNDING * epsilon(squares.dtype)) ** 2
    largest = tf.reduce_max(squares, axis=[-2, -1], keepdims=True)
    return tf.where(squares > least * largest, squares, tf.zeros_like(squares))
