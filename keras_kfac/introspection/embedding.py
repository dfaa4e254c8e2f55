"""Adapters of embeddings: dense layers on one-hot rows, never written down."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.forward_pass import LayerCall
from keras_kfac.math import factors
from keras_kfac.math.example_gradients import OneHot
from keras_kfac.math.kronecker import product_for_sum
from keras_kfac.math.linalg import Gradient
from keras_kfac.math.rows import masked_moment, rows_of_positions, stretched
from keras_kfac.math.structure import Structure, Structures


class EmbeddingAdapter(LayerAdapter):
    """A table of vectors, looked up by index: the kernel of a dense layer on one-hot rows.

    Its input factor is diagonal: how often each index occurs. Gradients stay the few rows that they
    are until they are preconditioned. Index 0 does not count where it stands for a mask,
    unless that is lost.
    """

    takes_slices = True
    has_row_pairs = True

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        super().__init__(layer, trained)
        self._table = layer.embeddings

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @property
    def variables(self) -> list[keras.Variable]:
        """The table, if it is trained."""
        return [self._table] if self._trained(self._table) else []

    @property
    def dims(self) -> tuple[int, int]:
        """Number of indices, length of a vector."""
        return tuple(self._table.shape)

    def _structures(self) -> Structures:
        """The input factor is diagonal as it is."""
        return Structure(self.dims[0], is_diagonal=True), Structure(self.dims[1])

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """How often each index occurs, and how many indices there are."""
        indices = self._indices(inputs)
        counts = observed[0] if observed else tf.ones_like(indices)
        weights = factors.row_weights(example_weights, tf.cast(counts, dtype))
        return factors.index_moment(indices, self.dims[0], weights)

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """Which indices are no padding, where that is told by index 0."""
        mask = self.mask_of(call)
        return () if mask is None else (mask,)

    def known_mask(self, call: LayerCall) -> tf.Tensor | None:
        """The same."""
        return self._indices(call.inputs) != 0 if self.layer.mask_zero else None

    def row_mask(self, rows: tf.Tensor, *observed: Any) -> tf.Tensor | None:
        """That of the indices, if there is one."""
        return observed[0] if observed else None

    def _indices(self, inputs: tf.Tensor) -> tf.Tensor:
        """Those that an example looks up, `[batch, positions]`."""
        indices = tf.cast(inputs, tf.int32)
        return tf.reshape(indices, [tf.shape(indices)[0], -1])

    def row_pairs(
        self, inputs: tf.Tensor, gradients: tf.Tensor, *observed: Any
    ) -> tuple[OneHot, tf.Tensor]:
        """One-hot rows, and those of the gradients of vectors."""
        return OneHot(self._indices(inputs), self.dims[0]), self.output_rows(gradients)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of the gradients of the vectors that were looked up."""
        return tf.reshape(gradients, [tf.shape(gradients)[0], -1, self.dims[1]])

    def to_matrix(self, gradients: Gradients) -> Gradient:
        """The gradient of the table: some of its rows, if these are fewer than all."""
        gradient = gradients[id(self._table)]
        if isinstance(gradient, tf.IndexedSlices):
            rows = gradient.values.shape[0]
            if rows is None or rows < self.dims[0]:
                return gradient
        return tf.convert_to_tensor(gradient)

    def from_matrix(self, matrix: Gradient) -> Gradients:
        """Inverse of `to_matrix`, with all rows."""
        return {id(self._table): tf.convert_to_tensor(matrix)}


class ReversibleEmbeddingAdapter(EmbeddingAdapter):
    """The table of `keras.layers.ReversibleEmbedding`.

    If the projection back multiplies by the same table, the block is a sum of two Kronecker
    products, and is approximated by the one that has its partial traces. The side of the indices is
    diagonal in both.
    """

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        super().__init__(layer, trained)
        self.part = "" if layer.tie_weights else "embeddings"
        self.has_row_pairs = not layer.tie_weights
        self._uses = [self, *([_TiedReverseAdapter(layer, trained)] if layer.tie_weights else [])]

    @property
    def uses(self) -> Sequence[LayerAdapter]:
        """To look up vectors, and to project back if that is by the table."""
        return self._uses

    def takes_part_in(self, call: LayerCall) -> bool:
        """Whether a call looks up vectors."""
        return not call.replay.argument("reverse")

    def joined(
        self, parts: Sequence[tuple[LayerAdapter, tuple[tf.Tensor, tf.Tensor]]]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Those of one product, for the sum over both uses."""
        # The table multiplies from the other side where it projects back.
        return product_for_sum([pair if use is self else pair[::-1] for use, pair in parts])


class ReverseAdapter(LayerAdapter):
    """The matrix that projects back in `keras.layers.ReversibleEmbedding`, a dense layer's."""

    part = "reverse_embeddings"
    has_row_pairs = True

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @property
    def variables(self) -> list[keras.Variable]:
        """The matrix, if it is trained and not the table."""
        own = [] if self.layer.tie_weights else [self.layer.reverse_embeddings]
        return [v for v in own if self._trained(v)]

    def takes_part_in(self, call: LayerCall) -> bool:
        """Whether a call projects back."""
        return bool(call.replay.argument("reverse"))

    @property
    def dims(self) -> tuple[int, int]:
        """Length of a vector, number of indices."""
        return self.layer.output_dim, self.layer.input_dim

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """The outputs, and the mask if there is one."""
        mask = self.mask_of(call)
        return (call.outputs, *([] if mask is None else [mask]))

    def known_mask(self, call: LayerCall) -> tf.Tensor | None:
        """That of its input."""
        return call.mask

    def row_mask(self, rows: tf.Tensor, *observed: Any) -> tf.Tensor | None:
        """That of the positions, if there is one."""
        return stretched(observed[1], rows) if len(observed) > 1 else None

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The second moment of the vectors."""
        rows = rows_of_positions(tf.cast(inputs, dtype))
        return masked_moment(rows, example_weights, observed[1:], self.structures[0])

    def row_pairs(
        self, inputs: tf.Tensor, gradients: tf.Tensor, *observed: Any
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows of vectors, and of gradients of logits."""
        return rows_of_positions(inputs), self.output_rows(gradients, *observed)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of the gradients of the logits, before they are capped."""
        cap = self.layer.logit_soft_cap
        if cap is not None:  # By the derivative of `cap * tanh(logits / cap)`.
            gradients *= 1 - tf.square(observed[0] / cap)
        return rows_of_positions(gradients)

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """The gradient of the matrix as it is."""
        return gradients[id(self.layer.reverse_embeddings)]

    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`."""
        return {id(self.layer.reverse_embeddings): matrix}


class _TiedReverseAdapter(ReverseAdapter):
    """The projection back by the table of the embedding; a use of that, not a block."""

    def _structures(self) -> Structures:
        """As those of the embedding, the other way round."""
        return Structure(self.dims[0]), Structure(self.dims[1], is_diagonal=True)
