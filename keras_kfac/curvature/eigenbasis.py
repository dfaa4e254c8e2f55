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
    in which `S` is zero, or is what rounding leaves of that, and there the weights stay. Rounding
    is in the bases, too: of an eigenvector of one factor, `S` counts as zero if all of it is below
    the precision of the largest times the number of rows, as numerical ranks have it.
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
        variable, damping = self._eigenvalues, cast(ExactInverse, self.inverse).damping
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
        variable.assign(tf.where(counts, self._resolved(average, damping), old))
        super().update(statistics, weights, decay)

    def invert(self, damping: tf.Tensor) -> ExactInverse:
        """The inverse in the eigenbases of the factors as they are now.

        What fills up the last of several blocks counts in its condition number.
        """
        new, old = cast(ExactInverse, super().invert(damping)), cast(ExactInverse, self.inverse)
        kept = old.diagonal_in(new, old.eigenvalues)
        values = tf.where(self._is_refreshed, kept, new.eigenvalues)
        return new.with_eigenvalues(self._resolved(values, new.damping))

    def _resolved(self, squares: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
        """Squares with zeros for what rounding leaves of zeros."""
        undamped = _of_regular_vectors(squares, self._structures)
        return _of_regular_entries(tf.where(damping > 0, squares, undamped))

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


def _of_regular_vectors(squares: tf.Tensor, structures: Structures) -> tf.Tensor:
    """Squares with zeros in rows and columns of eigenvectors that rounding leaves of zero.

    An eigenvector is rounded: that of a singular factor has parts `ε / a` in directions of the
    eigenvalues `a`, relative to the largest, and `Σ ε² / a` of their squares arrive at it. That is
    below `d ε`, which all `a` that are not rounding themselves are above.
    """
    largest = tf.reduce_max(squares, axis=[-2, -1], keepdims=True)
    for (axis, other), structure in zip(((-2, -1), (-1, -2)), structures):
        if structure.is_diagonal:  # Nothing is rounded there.
            continue
        least = squares.shape[axis] * epsilon(squares.dtype) * largest
        own = tf.reduce_max(squares, axis=other, keepdims=True)
        squares = tf.where(own > least, squares, tf.zeros_like(squares))
    return squares


def _of_regular_entries(squares: tf.Tensor) -> tf.Tensor:
    """Squares `[..., d_in, d_out]` with zeros for what rounding leaves of single zeros."""
    least = (_ROUNDING * epsilon(squares.dtype)) ** 2
    largest = tf.reduce_max(squares, axis=[-2, -1], keepdims=True)
    return tf.where(squares > least * largest, squares, tf.zeros_like(squares))
