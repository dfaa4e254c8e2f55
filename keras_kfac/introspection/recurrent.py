"""Adapters of recurrent layers: every time step is a position (Martens, Ba & Johnson 2018)."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Self

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.forward_pass import LayerCall, instance_attribute
from keras_kfac.introspection.recurrent_steps import Steps, steps_of
from keras_kfac.math import patches
from keras_kfac.math.rows import masked_moment, rows_of_positions, stretched

layers = keras.layers


def _resets_after(cell: keras.Layer) -> bool:
    return isinstance(cell, layers.GRUCell) and cell.reset_after


def _cells(layer: keras.Layer) -> list[keras.Layer]:
    stacked = isinstance(layer.cell, layers.StackedRNNCells)
    return layer.cell.cells if stacked else [layer.cell]


class RecurrentAdapter(LayerAdapter):
    """Weights of the cell of a recurrent layer that multiply the same rows.

    Where the cell drops parts of its inputs, rows are those before; where it drops states, the
    gradients are those without.
    """

    cells: tuple[type[keras.Layer], ...]  # The cells that have this part.
    with_activation = True
    has_row_pairs = True

    def __init__(
        self,
        layer: keras.Layer,
        trained: Callable[[keras.Variable], bool],
        cell: keras.Layer | None = None,
    ) -> None:
        super().__init__(layer, trained)
        self._cell = cell or layer.cell
        self._weights: dict[str, keras.Variable] = {}
        if isinstance(self._cell, self.cells):
            found = {name: getattr(self._cell, name) for name in self.names(self._cell)}
            self._weights = {k: v for k, v in found.items() if v is not None and trained(v)}

    @classmethod
    def of(cls, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> list[Self]:
        """One for each cell."""
        return [cls(layer, trained, cell) for cell in _cells(layer)]

    @staticmethod
    def names(cell: keras.Layer) -> tuple[str, ...]:
        """The names of the weights in this part of a cell, in the order of their rows."""
        return "kernel", "recurrent_kernel", "bias"

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call", "inner_loop")

    @classmethod
    def unsupported_reason(cls, layer: keras.Layer, base: type[keras.Layer]) -> str | None:
        """Why `layer` can't be adapted; `None` if it can."""
        for cell in _cells(layer):
            if type(cell) not in (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell):
                return f"no curvature block for cells of class {type(cell).__name__}"
        return super().unsupported_reason(layer, base)

    @property
    def path(self) -> str:
        """What the block is called in reports."""
        return self._path_of(self._cell)

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""
        return list(self._weights.values())

    @property
    def dims(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the block."""
        weights = self._weights.items()
        rows = [1 if name == "bias" else math.prod(v.shape[:-1]) for name, v in weights]
        return sum(rows), self._columns // (self.groups or 1)

    @property
    def _columns(self) -> int:
        """Columns of all gates."""
        return self._cell.kernel.shape[-1]

    @property
    def _shift_shape(self) -> tuple[int, ...]:
        """Shape of the pre-activations of one step and example."""
        return (self._cell.kernel.shape[-1] * (2 if _resets_after(self._cell) else 1),)

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """Inputs and states at the beginning of each step, and what finds gradients from there."""
        key = (id(self._cell), _keras_internals.current_graph())
        if key not in call.memo:  # All blocks of a cell look at the same steps.
            call.memo[key] = steps_of(
                call, self.layer, self._cell, self._shift_shape, self._shifted
            )
        steps: Steps = call.memo[key]
        return (*steps, *([] if call.mask is None else [call.mask]))

    def row_mask(self, rows: tf.Tensor, *observed: Any) -> tf.Tensor | None:
        """That of the steps, if there is one."""
        return stretched(observed[3], rows) if len(observed) > 3 else None

    @contextlib.contextmanager
    def _shifted(self, shift: tf.Tensor) -> Iterator[None]:
        """The cell with a bias for each example: two of them for a GRU that resets later."""
        bias = tf.zeros([1, *self._shift_shape], shift.dtype)
        if self._cell.bias is not None:
            bias = tf.reshape(tf.cast(tf.convert_to_tensor(self._cell.bias), shift.dtype), [1, -1])
        bias += shift
        if _resets_after(self._cell):
            bias = tf.stack(tf.split(bias, 2, axis=-1))
        with contextlib.ExitStack() as stack:
            # Implementation 2 adds the bias whole; 1 would cut it up, for dropout of the states.
            changes = {"use_bias": True, "bias": bias, "implementation": 2}
            for name, value in changes.items():
                stack.enter_context(instance_attribute(self._cell, name, value))
            yield

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The second moment of the input rows, and its weight."""
        inputs, states, _, *mask = observed
        rows = self.input_rows(inputs, states)
        return masked_moment(rows, example_weights, mask, self.structures[0])

    def input_rows(self, inputs: tf.Tensor, states: tf.Tensor) -> tf.Tensor:
        """What the weights multiply, `[..., batch, steps, d_in]`."""
        rows = {"kernel": inputs, "recurrent_kernel": states, "bias": tf.ones_like(states[..., :1])}
        return tf.concat([rows[name] for name in self._weights], axis=-1)

    def row_pairs(
        self, inputs: tf.Tensor, gradients: tf.Tensor, *observed: Any
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rows of inputs and states, and of gradients."""
        return self.input_rows(*observed[:2]), self.output_rows(gradients, *observed)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Gradients by what the weights add to: `[..., batch, steps, d_out]`."""
        return self.gate_rows(observed[2](gradients))

    def gate_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Those of this part of the cell."""
        return gradients

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins the gradients of the variables by rows into `[..., d_in, d_out]`."""
        parts = [tf.reshape(gradients[id(v)], [-1, self._columns]) for v in self.variables]
        matrix = tf.concat(parts, axis=0)
        if self.groups is None:
            return matrix
        return tf.transpose(tf.reshape(matrix, [-1, self.groups, self.dims[1]]), [1, 0, 2])

    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`."""
        if self.groups is not None:
            matrix = tf.reshape(tf.transpose(matrix, [1, 0, 2]), [-1, self._columns])
        sizes = [v.value.shape.num_elements() // self._columns for v in self.variables]
        parts = zip(self.variables, tf.split(matrix, sizes, axis=0))
        return {id(v): tf.reshape(part, v.shape) for v, part in parts}


class JointAdapter(RecurrentAdapter):
    """Kernels and bias of a cell that adds up their products: one matrix, inputs beside states."""

    cells = (layers.SimpleRNNCell, layers.LSTMCell)


class GRUInputAdapter(RecurrentAdapter):
    """The kernel of a GRU, and its bias unless that is two."""

    cells = (layers.GRUCell,)
    part = "kernel"

    @staticmethod
    def names(cell: keras.Layer) -> tuple[str, ...]:
        """The names of the weights in this part."""
        return ("kernel",) if cell.reset_after else ("kernel", "bias")

    def gate_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Those by what the inputs add to."""
        return gradients[..., : self._columns]


class GRURecurrentAdapter(RecurrentAdapter):
    """The recurrent kernel of a GRU. The states are reset before that, or after.

    Before: each gate has a block of its own, for that of the candidate sees other states.
    """

    cells = (layers.GRUCell,)
    part = "recurrent_kernel"

    @staticmethod
    def names(cell: keras.Layer) -> tuple[str, ...]:
        """The names of the weights in this part."""
        return ("recurrent_kernel",)

    @property
    def groups(self) -> int | None:
        """The gates."""
        return None if self._cell.reset_after else 3

    def input_rows(self, inputs: tf.Tensor, states: tf.Tensor) -> tf.Tensor:
        """The states, reset for the candidate if that comes first."""
        if self.groups is None:
            return states
        return tf.stack([states, states, self._reset(inputs, states) * states])

    def _reset(self, inputs: tf.Tensor, states: tf.Tensor) -> tf.Tensor:
        """How much the reset gate lets through at each step."""
        cell = self._cell
        gate = slice(cell.units, 2 * cell.units)

        def of_gate(variable: keras.Variable) -> tf.Tensor:
            return tf.cast(tf.convert_to_tensor(variable), states.dtype)[..., gate]

        total = tf.matmul(inputs, of_gate(cell.kernel))
        total += tf.matmul(states, of_gate(cell.recurrent_kernel))
        if cell.bias is not None:
            total += of_gate(cell.bias)
        return cell.recurrent_activation(total)

    def gate_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Those by what the states add to."""
        if self.groups is None:
            return gradients[..., self._columns :]
        return tf.stack(tf.split(gradients, self.groups, axis=-1))


class GRUBiasAdapter(RecurrentAdapter):
    """The two biases of a GRU that resets after the product."""

    cells = (layers.GRUCell,)
    part = "bias"

    @staticmethod
    def names(cell: keras.Layer) -> tuple[str, ...]:
        """The names of the weights in this part."""
        return ("bias",) if cell.reset_after else ()

    @property
    def _columns(self) -> int:
        """Columns of both."""
        return self._shift_shape[0]


class ConvLSTMAdapter(RecurrentAdapter):
    """`keras.layers.ConvLSTM1D`, `2D`, `3D`: every pixel of every step is a position."""

    cells = (keras.Layer,)

    @classmethod
    def unsupported_reason(cls, layer: keras.Layer, base: type[keras.Layer]) -> str | None:
        """Why `layer` can't be adapted; `None` if it can."""
        return super(RecurrentAdapter, cls).unsupported_reason(layer, base)

    @property
    def _shift_shape(self) -> tuple[int, ...]:
        """Shape of all gates of one step and example, channels last."""
        return (*self._channels_last(self._cell.get_initial_state(1)[0]).shape[1:-1], self._columns)

    @contextlib.contextmanager
    def _shifted(self, shift: tf.Tensor) -> Iterator[None]:
        """The cell with something added to the first convolution of each gate."""
        shifts = iter(tf.split(shift, 4, axis=-1))
        convolution = self._cell.input_conv

        def shifted_convolution(*args: Any, **kwargs: Any) -> tf.Tensor:
            return convolution(*args, **kwargs) + self._channels_first(next(shifts))

        with instance_attribute(self._cell, "input_conv", shifted_convolution):
            yield

    def input_rows(self, inputs: tf.Tensor, states: tf.Tensor) -> tf.Tensor:
        """What the weights multiply: patches of inputs beside patches of states."""
        cell, window = self._cell, self._cell.kernel_size
        ones = [1] * len(window)
        rows = {
            "kernel": self._patches(inputs, window, cell.strides, cell.padding, cell.dilation_rate),
            "recurrent_kernel": self._patches(states, window, ones, "same", ones),
        }
        rows["bias"] = tf.ones_like(rows["kernel"][..., :1])
        return tf.concat([rows[name] for name in self._weights], axis=-1)

    def _patches(self, images: tf.Tensor, *how: Any) -> tf.Tensor:
        """Patches of all steps: `[batch, steps * positions, window * channels]`."""
        batch, steps = tf.unstack(tf.shape(images)[:2])
        merged = tf.reshape(images, [batch * steps, *images.shape[2:]])
        rows = patches.extract(self._channels_last(merged), *how)
        return tf.reshape(rows, [batch, -1, rows.shape[-1]])

    def gate_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Gradients by the gates of each step and pixel."""
        return rows_of_positions(gradients)

    def _channels_last(self, images: tf.Tensor) -> tf.Tensor:
        if self._cell.data_format == "channels_last":
            return images
        return tf.transpose(images, [0, *range(2, images.shape.rank), 1])

    def _channels_first(self, images: tf.Tensor) -> tf.Tensor:
        if self._cell.data_format == "channels_last":
            return images
        return tf.transpose(images, [0, images.shape.rank - 1, *range(1, images.shape.rank - 1)])
