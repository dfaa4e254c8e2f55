"""The adapter of `keras.layers.Embedding`: a dense layer on one-hot rows, never written down."""

from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.math import factors
from keras_kfac.math.linalg import Gradient


class EmbeddingAdapter(LayerAdapter):
    """A table of vectors, looked up by index: the kernel of a dense layer on one-hot rows.

    Its input factor is diagonal: how often each index occurs. Gradients stay the few rows that they
    are until they are preconditioned. Index 0 does not count where it stands for a mask.
    """

    takes_slices = True

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

    @property
    def diagonal(self) -> tuple[bool, bool]:
        """The input factor is, whatever its size."""
        return True, self.too_large[1]

    @property
    def too_large(self) -> tuple[bool, bool]:
        """Diagonal as it is, no table is too large."""
        return False, super().too_large[1]

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """How often each index occurs, and how many indices there are."""
        indices = tf.cast(inputs, tf.int32)
        indices = tf.reshape(indices, [tf.shape(indices)[0], -1])
        counts = indices != 0 if self.layer.mask_zero else tf.ones_like(indices)
        weights = factors.row_weights(example_weights, tf.cast(counts, dtype))
        return factors.index_moment(indices, self.dims[0], weights)

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
