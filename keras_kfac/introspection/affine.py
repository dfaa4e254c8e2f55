"""Adapters of affine maps: a kernel, a bias, or both; and of `Dense`."""

import abc
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.forward_pass import LayerCall
from keras_kfac.math import factors
from keras_kfac.math.linalg import RowPairs, some_rows
from keras_kfac.math.rows import masked_moment, of_examples, rows_of_positions, stretched


class AffineAdapter(LayerAdapter):
    """A kernel, a bias, or both, and an affine map; the bias is the last row of the matrix.

    Attributes:
        kernel: The kernel if that is trained, else `None`.
        bias: The bias if that is trained, else `None`.
        kernel_name: What the layer calls it; `None` if the adapter is for a bias only.
        bias_name: Likewise.
    """

    kernel_name: str | None = "kernel"
    bias_name: str | None = "bias"
    has_masks = False  # Whether a mask `[batch, steps]` is for its positions, steps first.
    can_reduce = True
    has_row_pairs = True

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        super().__init__(layer, trained)
        # Trained or not.
        self._kernel: Any = getattr(layer, self.kernel_name) if self.kernel_name else None
        self._bias: Any = getattr(layer, self.bias_name) if self.bias_name else None
        self.kernel = self._kernel if self._kernel is not None and trained(self._kernel) else None
        self.bias = self._bias if self._bias is not None and trained(self._bias) else None

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""
        return [v for v in (self.kernel, self.bias) if v is not None]

    @property
    @abc.abstractmethod
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel as a matrix, of one group."""

    @property
    def dims(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the block, the homogeneous coordinate included."""
        rows = self.kernel_dims[0] if self.kernel is not None else 0
        return rows + (self.bias is not None), self.kernel_dims[1]

    @abc.abstractmethod
    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows that the kernel multiplies: `[..., batch, positions, kernel_dims[0]]`."""

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The second moment of the input rows, and its weight."""
        rows = self.input_rows(tf.cast(inputs, dtype))
        if self.reduces:
            counts = self.row_mask(rows, *observed)
            if example_weights is not None and example_weights.shape.rank == 2:
                own = tf.cast(example_weights > 0, dtype)
                counts = own if counts is None else own * counts
            rows, example_weights = factors.mean_rows(rows, of_examples(example_weights), counts)
            observed = ()
        return masked_moment(rows, example_weights, observed, self.structures[0])

    def output_factor(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """The output factor of a call, given the gradients of its outputs."""
        rows = self.output_rows(gradients, *observed)
        if self.reduces:
            rows = tf.reduce_sum(rows, axis=-2, keepdims=True)
        return factors.output_factor(rows, self.structures[1])

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """The mask, if there is one."""
        mask = self.mask_of(call)
        return () if mask is None else (mask,)

    def known_mask(self, call: LayerCall) -> tf.Tensor | None:
        """That of its input, if it is for positions of a kernel."""
        return call.mask if self.has_masks and self.kernel is not None else None

    def row_mask(self, rows: tf.Tensor, *observed: Any) -> tf.Tensor | None:
        """That of the positions, if there is one."""
        return stretched(observed[0], rows) if observed else None

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows of layer inputs: `[..., batch, positions, d_in]`."""
        if self.kernel is None:  # The bias alone sees the constant 1, wherever it is applied.
            return tf.ones([*self._leading, tf.shape(inputs)[0], 1, 1], inputs.dtype)
        rows = self.kernel_rows(inputs)
        if self.bias is None:
            return rows
        return factors.with_homogeneous_coordinate(rows)

    def row_pairs(
        self, inputs: tf.Tensor, gradients: tf.Tensor, *observed: Any
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows of inputs and of output gradients."""
        return self.input_rows(inputs), self.output_rows(gradients, *observed)

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins kernel and bias gradients into `[..., d_in, d_out]`."""
        parts = self.row_blocks(gradients)
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=-2)

    def row_blocks(self, gradients: Gradients) -> list[tf.Tensor]:
        """That of the kernel, and that of the bias."""
        parts = []
        if self.kernel is not None:
            parts.append(self.kernel_matrix(gradients[id(self.kernel)]))
        if self.bias is not None:
            parts.append(self.bias_row(gradients[id(self.bias)]))
        return parts

    def from_matrix(self, matrix: tf.Tensor | RowPairs) -> Gradients:
        """Inverse of `to_matrix`; of one that is not added up yet, too."""
        rows, result = self.dims[0], {}
        if self.bias is not None:
            result[id(self.bias)] = self.bias_tensor(some_rows(matrix, slice(rows - 1, rows)))
        if self.kernel is not None:
            kernel = some_rows(matrix, slice(self.kernel_dims[0]))
            result[id(self.kernel)] = self.kernel_tensor(kernel)
        return result

    # Most kernels end in the output channels; those of a group lie side by side.
    def kernel_matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """A tensor shaped as the kernel as `[..., *kernel_dims]`."""
        columns = (self.groups or 1) * self.kernel_dims[1]
        return self._group(tf.reshape(kernel, [-1, columns]))

    def kernel_tensor(self, matrix: tf.Tensor) -> tf.Tensor:
        """Inverse of `kernel_matrix`."""
        return tf.reshape(self._ungroup(matrix), self._kernel.shape)

    def bias_row(self, bias: tf.Tensor) -> tf.Tensor:
        """A tensor shaped as the bias as `[..., 1, kernel_dims[1]]`."""
        return self._group(tf.reshape(bias, [1, -1]))

    def bias_tensor(self, row: tf.Tensor) -> tf.Tensor:
        """Inverse of `bias_row`."""
        return tf.reshape(self._ungroup(row), self._bias.shape)

    def _group(self, matrix: tf.Tensor) -> tf.Tensor:
        if self.groups is None:
            return matrix
        return tf.transpose(tf.reshape(matrix, [-1, self.groups, self.kernel_dims[1]]), [1, 0, 2])

    def _ungroup(self, matrix: tf.Tensor) -> tf.Tensor:
        return matrix if self.groups is None else tf.transpose(matrix, [1, 0, 2])


class DenseAdapter(AffineAdapter):
    """`keras.layers.Dense` on inputs `[batch, ..., features]`; the middle axes are positions."""

    has_masks = True

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        return tuple(self.layer.kernel.shape)

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows that the kernel multiplies."""
        return rows_of_positions(inputs)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of pre-activation gradients."""
        return rows_of_positions(gradients)
