"""Adapters of recurrent layers: every time step is a position (Martens, Ba & Johnson 2018).

What happens inside the loop over time is out of reach, so the layer is run again with a probe in
place of its cell. The probe puts out the state that each step begins with beside what the cell puts
out, and adds a shift of zeros to the cell's bias: the gradient by the shift is that by the
pre-activations, at every step.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Gradients, LayerAdapter, layer_path
from keras_kfac.introspection.forward_pass import LayerCall, instance_attribute
from keras_kfac.math import factors

layers = keras.layers


class _Probe:
    """Stands in for a cell; takes inputs and shift side by side, puts out output and state so.

    Args:
        cell: The cell.
        shift_size: Columns of the shift.
        kwargs: More arguments for the cell.
    """

    def __init__(self, cell: keras.Layer, shift_size: int, kwargs: dict[str, Any]) -> None:
        self._cell = cell
        self._shift_size = shift_size
        self._kwargs = kwargs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def __call__(self, inputs: tf.Tensor, states: Any, **kwargs: Any) -> tuple[tf.Tensor, Any]:
        inputs, shift = tf.split(inputs, [-1, self._shift_size], axis=-1)
        with contextlib.ExitStack() as stack:
            # Implementation 2 adds the bias whole; 1 would cut it up, for dropout of the states.
            changes = {"use_bias": True, "bias": self._bias(shift), "implementation": 2}
            for name, value in changes.items():
                stack.enter_context(instance_attribute(self._cell, name, value))
            output, new_states = self._cell(inputs, states, **self._kwargs)
        return tf.concat([output, tf.nest.flatten(states)[0]], axis=-1), new_states

    def _bias(self, shift: tf.Tensor) -> tf.Tensor:
        """The bias plus the shift, for each example; two of them for a GRU that resets later."""
        given = self._cell.bias
        bias = tf.zeros([1, self._shift_size], shift.dtype)
        if given is not None:
            bias = tf.reshape(tf.cast(tf.convert_to_tensor(given), shift.dtype), [1, -1])
        shifted = bias + shift
        if not _resets_after(self._cell):
            return shifted
        return tf.stack(tf.split(shifted, 2, axis=-1))


def _resets_after(cell: keras.Layer) -> bool:
    return isinstance(cell, layers.GRUCell) and cell.reset_after


class RecurrentAdapter(LayerAdapter):
    """Weights of the cell of a recurrent layer that multiply the same rows.

    Where the cell drops parts of its inputs, rows are those before; where it drops states, the
    gradients are those without.
    """

    cells: tuple[type[keras.Layer], ...]  # The cells that have this part.
    with_activation = True

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        super().__init__(layer, trained)
        self._cell = layer.cell
        self._weights: dict[str, keras.Variable] = {}
        if isinstance(self._cell, self.cells):
            found = {name: getattr(self._cell, name) for name in self.names(self._cell)}
            self._weights = {k: v for k, v in found.items() if v is not None and trained(v)}

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
        if type(layer.cell) not in (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell):
            return f"no curvature block for cells of class {type(layer.cell).__name__} yet"
        if layer.return_state:
            return "it returns its states, too"
        return super().unsupported_reason(layer, base)

    @property
    def path(self) -> str:
        """What the block is called in reports."""
        return f"{layer_path(self._cell)}/{self.part}".rstrip("/")

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""
        return list(self._weights.values())

    @property
    def dims(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the block."""
        rows = {"kernel": self._features, "recurrent_kernel": self._cell.units, "bias": 1}
        return sum(rows[name] for name in self._weights), self._columns // (self.groups or 1)

    @property
    def _features(self) -> int:
        return self._cell.kernel.shape[0]

    @property
    def _columns(self) -> int:
        """Columns of all gates."""
        return self._cell.kernel.shape[-1]

    @property
    def _shift_size(self) -> int:
        return self._cell.kernel.shape[-1] * (2 if _resets_after(self._cell) else 1)

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """Inputs and states at the beginning of each step, and what finds gradients from there."""
        inputs = call.inputs
        shift = tf.zeros([*tf.unstack(tf.shape(inputs)[:2]), self._shift_size], inputs.dtype)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(shift)
            both = self._probed(call, tf.concat([inputs, shift], axis=-1))
            outputs, states = tf.split(both, [self._cell.output_size, -1], axis=-1)
            if not self.layer.return_sequences:
                outputs = outputs[:, -1]
        if self.layer.go_backwards:
            states = tf.reverse(states, axis=[1])
        back = functools.partial(_gradient_of_first, tape, outputs, shift)
        return inputs, states, back, *([] if call.mask is None else [call.mask])

    def _probed(self, call: LayerCall, inputs: tf.Tensor) -> tf.Tensor:
        """Output and state of each step, side by side."""
        cell = self._cell
        takes_training = "training" in inspect.signature(cell.call).parameters
        probe = _Probe(cell, self._shift_size, {"training": True} if takes_training else {})
        changes = {"cell": probe, "return_sequences": True, "use_cudnn": False}
        with contextlib.ExitStack() as stack:
            for name, value in changes.items():
                stack.enter_context(instance_attribute(self.layer, name, value))
            stack.enter_context(_dropout_mask(cell, call))
            return call.replay.with_inputs(inputs).outputs({})

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The second moment of the input rows, and its weight."""
        inputs, states, _, *mask = observed
        weights = factors.row_weights(example_weights, *mask) if mask else example_weights
        return factors.input_moment(self.input_rows(inputs, states), weights, self.diagonal[0])

    def input_rows(self, inputs: tf.Tensor, states: tf.Tensor) -> tf.Tensor:
        """What the weights multiply, `[..., batch, steps, d_in]`."""
        rows = {"kernel": inputs, "recurrent_kernel": states, "bias": tf.ones_like(states[..., :1])}
        return tf.concat([rows[name] for name in self._weights], axis=-1)

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


def _gradient_of_first(
    tape: tf.GradientTape, outputs: tf.Tensor, shift: tf.Tensor, gradients: tf.Tensor
) -> tf.Tensor:
    """Back-propagates gradients of the first outputs to the same part of the shift."""
    used, batch = tf.shape(gradients)[0], tf.shape(outputs)[0]
    padding = [[0, batch - used]] + [[0, 0]] * (gradients.shape.rank - 1)
    vector = tf.pad(tf.cast(gradients, outputs.dtype), padding)
    vector = tf.ensure_shape(vector, outputs.shape)
    return tf.cast(tape.gradient(outputs, shift, output_gradients=vector)[:used], gradients.dtype)


@contextlib.contextmanager
def _dropout_mask(cell: keras.Layer, call: LayerCall) -> Iterator[None]:
    """The mask that the layer would prepare before its loop, if it knew the cell."""
    # One for all gates, as implementation 2 has it.
    with call.replay.scope({}), instance_attribute(cell, "dropout_mask_count", None):
        cell.get_dropout_mask(call.inputs[:, 0])
    try:
        yield
    finally:
        cell.reset_dropout_mask()


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
        return self._shift_size
