"""Affine maps by the gradients of their weights for each example, in place of Kronecker factors."""

import math
from collections.abc import Collection
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Arrived, Gradients, LayerAdapter
from keras_kfac.introspection.forward_pass import LayerCall
from keras_kfac.introspection.per_example import ExactAdapter
from keras_kfac.math import example_gradients as math_of
from keras_kfac.math import factors
from keras_kfac.math.rows import Starts
from keras_kfac.math.structure import Structure, Structures


def reason_without_pairs(adapter: LayerAdapter) -> str | None:
    """Why gradients of single examples can't be had; `None` if they can."""
    if adapter.has_row_pairs:
        return None
    return "it needs gradients of single examples as products of rows"


class ExampleGradientsAdapter(ExactAdapter):
    """The weights of another adapter, whose gradients for an example are sums over row pairs.

    Args:
        base: That adapter, whose `has_row_pairs` is true.
        max_full_block: Of more weights than this only the diagonal is kept.
    """

    def __init__(self, base: LayerAdapter, max_full_block: float) -> None:
        super().__init__(base.layer, lambda variable: True)
        self._base = base
        self.part = base.part
        self.with_activation = base.with_activation
        self.max_full_block = max_full_block

    @classmethod
    def methods(cls) -> Collection[str]:
        """Those of the other adapter count."""
        return ()

    @property
    def path(self) -> str:
        """What the block is called in reports."""
        return self._base.path

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""
        return self._base.variables

    def takes_part_in(self, call: LayerCall) -> bool:
        """Whether a call of the layer uses the variables."""
        return self._base.takes_part_in(call)

    @property
    def dims(self) -> tuple[int, int]:
        """One row; a column for each weight."""
        return 1, math.prod(self._base.matrix_shape)

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """The inputs, and what the other adapter looks at."""
        return (call.inputs, *self._base.observed(call))

    def output_factor_of_calls(self, calls: Arrived, starts: Starts) -> tf.Tensor:
        """The Fisher matrix of the weights, or its diagonal."""
        pair = self._row_pair(calls, starts)
        if self.structures[1].is_diagonal:
            return tf.reshape(math_of.squared_gradients(*pair), [-1])
        return factors.output_factor(self._rows(pair), self.structures[1])

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Gradients of the weights for each example: `[batch, 1, d_out]`."""
        return self._rows(self._row_pair([(gradients, observed)]))

    def _rows(self, pair: math_of.RowPair) -> tf.Tensor:
        each = math_of.example_gradients(*pair)
        if self._base.groups is not None:
            each = tf.transpose(each, [1, 0, 2, 3])
        return tf.reshape(each, [-1, 1, self.dims[1]])

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins the gradients of the variables into `[1, weights]`."""
        return tf.reshape(self._base.to_matrix(gradients), [1, -1])

    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`."""
        return self._base.from_matrix(tf.reshape(matrix, self._base.matrix_shape))

    def _row_pair(self, calls: Arrived, starts: Starts = None) -> math_of.RowPair:
        """The rows of all calls: each has positions of its own."""
        each = [self._base.row_pairs(seen[0], gradients, *seen[1:]) for gradients, seen in calls]
        return math_of.of_all_uses(each, starts)


class RotatedSquaresAdapter(ExampleGradientsAdapter):
    """Second moments of the gradients in the eigenbases of the factors: to look at, for no block.

    Args:
        base: The adapter with these factors.
        bases: Of the input factor and the output factor, as in `math.example_gradients.rotated`.
    """

    def __init__(self, base: LayerAdapter, bases: tuple[tf.Tensor, tf.Tensor]) -> None:
        super().__init__(base, max_full_block=0)
        self._bases = bases

    def _structures(self) -> Structures:
        """All entries of the matrix, with those that fill up its last blocks."""
        sizes = [s.blocks * s.block_size for s in self._base.structures]
        size = math.prod(sizes) * (self._base.groups or 1)
        return Structure(1), Structure(size, is_diagonal=True)

    def _row_pair(self, calls: Arrived, starts: Starts = None) -> math_of.RowPair:
        pair = super()._row_pair(calls, starts)
        inputs, outputs = map(math_of.rotated, pair, self._bases, self._base.structures)
        return inputs, outputs
