"""What the cells of a recurrent layer see at each step.

What happens inside the loop over time is out of reach, so the loop is run again with a probe around
the cell. The probe puts out what the cell is given beside what it returns, and shifts the cell's
pre-activations by zeros: the gradient by the shift is that by the pre-activations, at every step.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.introspection.forward_pass import LayerCall, instance_attribute

Shifted = Callable[[tf.Tensor], contextlib.AbstractContextManager[None]]
"""Within it, a tensor is added to the pre-activations of a cell."""


class Steps(NamedTuple):
    """The steps of a cell in one call of its layer, in the order of the inputs.

    Attributes:
        inputs: What the cell is given, `[batch, steps, ...]`.
        states: The state that each step begins with, likewise; the first if there are several.
        back: From gradients of the layer's outputs to those of the pre-activations, likewise.
    """

    inputs: tf.Tensor
    states: tf.Tensor
    back: "Back"


@dataclasses.dataclass(frozen=True)
class Back:
    """Back-propagates gradients of outputs to the shift of pre-activations.

    Attributes:
        tape: Knows how.
        outputs: The outputs.
        shift: The shift.
        shift_shape: That of one step and example.
        places: Of which examples the gradients are, `[used]`; `None` for all.
    """

    tape: tf.GradientTape
    outputs: list[tf.Tensor]
    shift: tf.Tensor
    shift_shape: Sequence[int]
    places: tf.Tensor | None = None

    def of_examples(self, places: tf.Tensor) -> "Back":
        """The same for some examples of the batch."""
        return dataclasses.replace(self, places=places)

    def __call__(self, gradients: Any) -> tf.Tensor:
        """The gradients of the shift, of the same examples."""
        flat = tf.nest.flatten(gradients)
        vectors = [self._of_all(*pair) for pair in zip(flat, self.outputs)]
        found = self.tape.gradient(self.outputs, self.shift, output_gradients=vectors)
        if self.places is not None:
            found = tf.gather(found, self.places)
        (found,) = _side_by_side(tf.cast(found, flat[0].dtype), [self.shift_shape])
        return found

    def _of_all(self, gradient: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
        gradient = tf.cast(gradient, output.dtype)
        if self.places is not None:
            gradient = tf.scatter_nd(self.places[:, tf.newaxis], gradient, tf.shape(output))
        return tf.ensure_shape(gradient, output.shape)


class _Probe:
    """Stands in for the cell of a layer. Inputs and shift come side by side, and flat.

    So it puts out three things: the cell's output, and what the watched cell (it, or one of those
    that it consists of) is given as inputs and as state.
    """

    def __init__(
        self, root: keras.Layer, watched: keras.Layer, shapes: Sequence[Any], shifted: Shifted
    ) -> None:
        self._root = root
        self._watched = watched
        self._shapes = shapes  # Of inputs and shift.
        self._shifted = shifted
        self.state_size = root.state_size
        self.output_shapes: list[tf.TensorShape] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root, name)

    def call(self, inputs: tf.Tensor, states: Any) -> tuple[tf.Tensor, Any]:
        """One step."""
        given: list[tf.Tensor] = []
        call = self._watched.call

        def noted_call(inputs: tf.Tensor, states: Any, **kwargs: Any) -> Any:
            given.extend([inputs, tf.nest.flatten(states)[0]])
            return call(inputs, states, **kwargs)

        inputs, shift = _side_by_side(inputs, self._shapes)
        with instance_attribute(self._watched, "call", noted_call), self._shifted(shift):
            output, new_states = self._root(inputs, states, training=True)
        self.output_shapes = [tensor.shape[1:] for tensor in (output, *given)]
        return tf.concat([_flat(tensor, 1) for tensor in (output, *given)], axis=-1), new_states

    __call__ = call


def _flat(tensor: tf.Tensor, leading: int) -> tf.Tensor:
    """Joins all but so many leading axes."""
    size = math.prod(tensor.shape[leading:])
    flat = tf.reshape(tensor, [*tf.unstack(tf.shape(tensor)[:leading]), size])
    return tf.ensure_shape(flat, [*tensor.shape[:leading], size])


def _side_by_side(flat: tf.Tensor, shapes: Sequence[Any]) -> list[tf.Tensor]:
    """Tensors of given shapes that are side by side in the last axis."""
    parts = tf.split(flat, [math.prod(shape) for shape in shapes], axis=-1)
    leading = tf.unstack(tf.shape(flat)[:-1])
    return [tf.reshape(part, [*leading, *shape]) for part, shape in zip(parts, shapes)]


def steps_of(
    call: LayerCall,
    layer: keras.layers.RNN,
    cell: keras.Layer,
    shift_shape: Sequence[int],
    shifted: Shifted,
) -> Steps:
    """Runs a recurrent layer again to see the steps of one of its cells.

    Args:
        call: The call of the layer.
        layer: The layer.
        cell: Its cell, or one of those that this consists of.
        shift_shape: Shape of the pre-activations of one step and example.
        shifted: Shifts them.
    """
    inputs = tf.cast(call.inputs, layer.compute_dtype)
    shift = tf.zeros([*tf.unstack(tf.shape(inputs)[:2]), math.prod(shift_shape)], inputs.dtype)
    shift = tf.ensure_shape(shift, [*inputs.shape[:2], shift.shape[-1]])
    probe = _Probe(layer.cell, cell, [inputs.shape[2:], shift_shape], shifted)
    options = ("go_backwards", "unroll", "zero_output_for_mask")
    again = keras.layers.RNN(
        probe,
        return_sequences=True,
        return_state=True,
        name="steps",
        dtype=layer.dtype_policy,
        **{name: getattr(layer, name) for name in options},
    )
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(shift)
        with call.replay.scope({}), _dropout_masks(layer.cell, inputs):
            state = call.replay.argument("initial_state")
            if state is None and layer.stateful:
                state = tf.nest.map_structure(tf.convert_to_tensor, layer.states)
            both = tf.concat([_flat(inputs, 2), shift], axis=-1)
            seen, *final = again(both, initial_state=state, mask=call.mask)
        outputs, inputs, states = _side_by_side(seen, probe.output_shapes)
        results = [outputs if layer.return_sequences else outputs[:, -1]]
        results += tf.nest.flatten(final) if layer.return_state else []
    if layer.go_backwards:
        inputs, states = (tf.reverse(rows, axis=[1]) for rows in (inputs, states))
    return Steps(inputs, states, Back(tape, results, shift, shift_shape))


@contextlib.contextmanager
def _dropout_masks(root: keras.Layer, inputs: tf.Tensor) -> Iterator[None]:
    """The masks that the layer would prepare before its loop, if it knew the cells."""
    cells = root.cells if isinstance(root, keras.layers.StackedRNNCells) else [root]
    batch = tf.shape(inputs)[0]
    for cell in cells:
        if hasattr(cell, "input_conv"):
            cell.get_dropout_mask(inputs[:, 0])
            cell.get_recurrent_dropout_mask(cell.get_initial_state(batch)[0])
        else:
            # One for all gates: the probe has the cell use implementation 2.
            with instance_attribute(cell, "dropout_mask_count", None):
                cell.get_dropout_mask(tf.zeros([batch, cell.kernel.shape[0]], inputs.dtype))
    try:
        yield
    finally:
        for cell in cells:
            cell.reset_dropout_mask()
            cell.reset_recurrent_dropout_mask()
