"""The adapter of `keras.layers.EinsumDense`, of which Keras's attention layers are made."""

import math
import string
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Gradients
from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.introspection.per_example import PerExampleAdapter, sum_over_others


class Axes(NamedTuple):
    """What the axes of an einsum `inputs,kernel->outputs` are for, a letter each.

    Attributes:
        inputs: Axes of the inputs.
        kernel: Axes of the kernel.
        outputs: Axes of the outputs.
        groups: Axes of all three: the kernel of each index serves these inputs and outputs only.
        features: Axes of inputs and kernel, summed over.
        units: Axes of kernel and outputs.
        positions: Axes of inputs and outputs, the batch apart.
    """

    inputs: str
    kernel: str
    outputs: str
    groups: str
    features: str
    units: str
    positions: str

    @property
    def batch(self) -> str:
        """The first axis of the inputs."""
        return self.inputs[0]


def parse(equation: str, rank: int | None = None) -> Axes:
    """The axes of an equation for inputs of a rank; if that is not known, `...` is one axis.

    Example:
    >>> axes = parse("...x,xhd->...hd", rank=3)
    >>> axes.features, axes.units, len(axes.positions), axes.groups
    ('x', 'hd', 1, '')
    """
    equation = equation.replace(" ", "")
    operands, outputs = equation.split("->")
    inputs, kernel = operands.split(",")
    if "..." in inputs:
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        count = 1 if rank is None else rank - len(inputs.replace("...", ""))
        between = "".join(unused[:count])
        inputs, outputs = (part.replace("...", between) for part in (inputs, outputs))
    groups = "".join(c for c in kernel if c in inputs and c in outputs)
    features = "".join(c for c in kernel if c in inputs and c not in outputs)
    units = "".join(c for c in kernel if c not in inputs)
    positions = "".join(c for c in inputs[1:] if c in outputs and c not in kernel)
    return Axes(inputs, kernel, outputs, groups, features, units, positions)


class EinsumDenseAdapter(AffineAdapter):
    """An einsum with one kernel: a dense layer once its axes are sorted.

    Axes that inputs, kernel and outputs share make groups, a block for each index. Axes of the
    inputs that neither kernel nor outputs have are summed over first.
    """

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        self._axes = parse(layer.equation, layer.input_spec.ndim)
        if not _bias_is_for_all(layer, self._axes):
            self.bias_name, self.part = None, "kernel"  # The bias has a block of its own.
        super().__init__(layer, trained)
        self._sizes = dict(zip(self._axes.kernel, layer.kernel.shape))
        self.has_masks = self._axes.positions.startswith(self._axes.inputs[1])

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @classmethod
    def unsupported_reason(cls, layer: keras.Layer, base: type[keras.Layer]) -> str | None:
        """Why `layer` can't be adapted; `None` if it can."""
        axes = parse(layer.equation)  # The layer may not be built yet.
        if axes.batch in axes.kernel or axes.outputs[0] != axes.batch:
            return f"the first axis in {layer.equation!r} is no batch of independent examples"
        return super().unsupported_reason(layer, base)

    @property
    def groups(self) -> int | None:
        """Number of indices of the axes that inputs, kernel and outputs share."""
        return self._size(self._axes.groups) if self._axes.groups else None

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel, of one group."""
        return self._size(self._axes.features), self._size(self._axes.units)

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows that the kernel multiplies."""
        return self._rows(inputs, self._axes.inputs, self._axes.features)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of pre-activation gradients."""
        return self._rows(gradients, self._axes.outputs, self._axes.units)

    def kernel_matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """A tensor shaped as the kernel as `[..., *kernel_dims]`."""
        axes = self._axes
        ordered = tf.einsum(f"{axes.kernel}->{axes.groups}{axes.features}{axes.units}", kernel)
        return tf.reshape(ordered, [*self._leading, *self.kernel_dims])

    def kernel_tensor(self, matrix: tf.Tensor) -> tf.Tensor:
        """Inverse of `kernel_matrix`."""
        axes = self._axes
        order = axes.groups + axes.features + axes.units
        ordered = tf.reshape(matrix, [self._sizes[axis] for axis in order])
        return tf.einsum(f"{order}->{axes.kernel}", ordered)

    def bias_row(self, bias: tf.Tensor) -> tf.Tensor:
        """A tensor shaped as the bias as `[..., 1, kernel_dims[1]]`."""
        given, order = self._bias_axes, self._axes.groups + self._axes.units
        plain = tf.reshape(bias, [self._sizes[axis] for axis in given])
        return tf.reshape(
            tf.einsum(f"{given}->{order}", plain), [*self._leading, 1, self.kernel_dims[1]]
        )

    def bias_tensor(self, row: tf.Tensor) -> tf.Tensor:
        """Inverse of `bias_row`."""
        given, order = self._bias_axes, self._axes.groups + self._axes.units
        ordered = tf.reshape(row, [self._sizes[axis] for axis in order])
        return tf.reshape(tf.einsum(f"{order}->{given}", ordered), self.layer.bias.shape)

    @property
    def _bias_axes(self) -> str:
        """Those of its axes that are not of size 1 for broadcasting only, as they lie."""
        return "".join(axis for axis in self._axes.outputs if axis in self.layer.bias_axes)

    def _size(self, axes: str) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _rows(self, tensor: tf.Tensor, axes: str, last: str) -> tf.Tensor:
        """`[..., batch, positions, last]`."""
        a = self._axes
        ordered = tf.einsum(f"{axes}->{a.groups}{a.batch}{a.positions}{last}", tensor)
        shape = tf.shape(ordered)
        batch = shape[len(a.groups)]
        places = ordered.shape[len(a.groups) + 1 : len(a.groups) + 1 + len(a.positions)]
        positions = places.num_elements() if places.is_fully_defined() else -1
        return tf.reshape(ordered, [*self._leading, batch, positions, self._size(last)])


class EinsumBiasAdapter(PerExampleAdapter):
    """A bias along some axes only of those that kernel and outputs of an einsum share."""

    part = "bias"

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        self._axes = parse(layer.equation, layer.input_spec.ndim)
        has_own = not _bias_is_for_all(layer, self._axes)
        super().__init__(layer, lambda v: has_own and v is layer.bias and trained(v))

    def example_gradients(self, gradients: tf.Tensor, *observed: Any) -> Gradients:
        """Gradients of the bias for each example: sums over all axes that it does not have."""
        outputs = self._axes.outputs
        axes = [outputs.index(axis) for axis in self.layer.bias_axes if axis in outputs]
        return {id(self.layer.bias): sum_over_others(gradients, axes)}


def _bias_is_for_all(layer: keras.Layer, axes: Axes) -> bool:
    return not layer.bias_axes or set(layer.bias_axes) == set(axes.groups + axes.units)
