"""Layer adapters: how a layer's weights, inputs and gradients become matrices.

An adapter presents one layer in the convention of `keras_kfac.math`: inputs and gradients of the
pre-activations as rows `[..., batch, positions, features]`, kernel and bias gradient as one matrix
`[..., d_in, d_out]`, the bias in the last row. A new layer is one adapter class and one entry in
`registry.py`; a layer of several affine maps has one for each.
"""

import abc
import math
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.math import factors

Gradients = dict[int, tf.Tensor]
"""Gradients (or directions) of a layer's variables, by `id` of the variable."""


def layer_path(layer: keras.Layer) -> str:
    """What a layer is called in reports: its place in the model, where Keras knows one."""
    return getattr(layer, "path", None) or layer.name


class LayerAdapter(abc.ABC):
    """A layer, or a part of one, with a kernel, a bias, or both, and an affine map in between.

    Attributes:
        layer: The adapted layer, built.
        kernel: Its kernel if that is trained, else `None`.
        bias: Its bias if that is trained, else `None`.
        kernel_name: What the layer calls it; `None` if the adapter is for a bias only.
        bias_name: Likewise.
        part: Which part of the layer it is; empty if it is the whole.
    """

    kernel_name: str | None = "kernel"
    bias_name: str | None = "bias"
    part = ""

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        self.layer = layer
        # Trained or not.
        self._kernel: Any = getattr(layer, self.kernel_name) if self.kernel_name else None
        self._bias: Any = getattr(layer, self.bias_name) if self.bias_name else None
        self.kernel = self._kernel if self._kernel is not None and trained(self._kernel) else None
        self.bias = self._bias if self._bias is not None and trained(self._bias) else None

    @classmethod
    @abc.abstractmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods whose mathematics the adapter relies on."""

    @classmethod
    def unsupported_reason(cls, layer: keras.Layer, base: type[keras.Layer]) -> str | None:
        """Why `layer`, an instance of `base`, can't be adapted; `None` if it can."""
        for name in cls.methods():
            if getattr(type(layer), name) is not getattr(base, name):
                return f"{type(layer).__name__} overrides `{base.__name__}.{name}`"
        if getattr(layer, "lora_enabled", False):
            return "LoRA is enabled: the kernel is a sum of a frozen and a factored matrix"
        if layer.quantization_mode is not None:
            return f"the layer is quantized ({layer.quantization_mode})"
        return None

    @property
    def path(self) -> str:
        """What the block is called in reports."""
        return f"{layer_path(self.layer)}/{self.part}".rstrip("/")

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""
        return [v for v in (self.kernel, self.bias) if v is not None]

    @property
    def groups(self) -> int | None:
        """Number of independent blocks, or `None` for one block without a leading axis."""
        return None

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

    @abc.abstractmethod
    def output_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Rows of pre-activation gradients: `[..., batch, positions, d_out]`."""

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows of layer inputs: `[..., batch, positions, d_in]`."""
        if self.kernel is None:  # The bias alone sees the constant 1, wherever it is applied.
            leading = [] if self.groups is None else [self.groups]
            return tf.ones([*leading, tf.shape(inputs)[0], 1, 1], inputs.dtype)
        rows = self.kernel_rows(inputs)
        if self.bias is None:
            return rows
        return factors.with_homogeneous_coordinate(rows)

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins kernel and bias gradients into `[..., d_in, d_out]`."""
        parts = []
        if self.kernel is not None:
            parts.append(self.kernel_matrix(gradients[id(self.kernel)]))
        if self.bias is not None:
            parts.append(self.bias_row(gradients[id(self.bias)]))
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=-2)

    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`."""
        result = {}
        if self.bias is not None:
            result[id(self.bias)] = self.bias_tensor(matrix[..., -1:, :])
        if self.kernel is not None:
            rows = matrix[..., : self.kernel_dims[0], :]
            result[id(self.kernel)] = self.kernel_tensor(rows)
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


class DenseAdapter(LayerAdapter):
    """`keras.layers.Dense` on inputs `[batch, ..., features]`; the middle axes are positions."""

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
        return self._rows(inputs)

    def output_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Rows of pre-activation gradients."""
        return self._rows(gradients)

    @staticmethod
    def _rows(tensor: tf.Tensor) -> tf.Tensor:
        if tensor.shape.rank == 2:
            return tensor[:, tf.newaxis, :]
        positions = -1 if None in tensor.shape[1:-1] else math.prod(tensor.shape[1:-1])
        return tf.reshape(tensor, [tf.shape(tensor)[0], positions, tensor.shape[-1]])
