"""One training forward pass, recorded: inputs and outputs of layers, outputs of the model.

While a pass is being recorded, and only then, each adapted layer has an instance-level `call`
that notes its input and its output. The output of a layer with an activation is what that is
applied to: `layer.activation` is swapped for a function that sees it first. A `tf.GradientTape`
records from the first of them on, so that gradients of the model's outputs with respect to those
of all layers can be taken later, without a second forward pass.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.losses import Score, Term
from keras_kfac.introspection.observed_losses import AddedLoss
from keras_kfac.introspection.replay import Replay, batches_among
from keras_kfac.math.linalg import shaped_like


class LayerCall(NamedTuple):
    """What one call of a layer showed.

    Attributes:
        inputs: Its input; the first, if it has several.
        outputs: Its output, before the activation if the layer has one; or several.
        replay: Runs the call again.
        mask: Which positions of the inputs count, `[batch, positions]`; `None` if all do.
        memo: What has been found out about it, by keys of those who did.
        loses_mask: Whether what a mask hides counts all the same, bool scalar: see `lost_masks.py`.
    """

    inputs: tf.Tensor
    outputs: Any
    replay: Replay
    mask: tf.Tensor | None
    memo: dict[Any, Any]
    loses_mask: tf.Tensor | None = None


class ForwardPass:
    """The record of one forward pass.

    Attributes:
        calls: The calls of each layer, by `id` of the layer, in order.
        unreachable: Reasons why a layer's tensors can't be used, by `id` of the layer.
        masks: Of the inputs of layers that Keras keeps them from, by `id` of the layer.
        outputs: What the model returned.
        is_seen: Whether `compute_loss` ran since.
        totals: What it returned, each time: by way of the outputs it depends on the layers'.
        scores: The losses of its outputs, as `compute_loss` took them.
        unscored: Outputs that the total depends on, though it has no loss of them as they are.
        other_losses: Names of losses in the total of tensors that are no outputs.
        terms: The same, understood: what the step goes by.
        added: Losses that layers added, which count in the same total.
        replay: Runs the same forward pass again.
    """

    def __init__(self) -> None:
        self.calls: dict[int, list[LayerCall]] = {}
        self.unreachable: dict[int, str] = {}
        self.masks: dict[int, tf.Tensor | None] = {}
        self.outputs: Any = None
        self.is_seen = False
        self.totals: list[tf.Tensor] = []
        self.scores: list[Score] = []
        self.unscored: list[tf.Tensor] = []
        self.other_losses: list[str] = []
        self.terms: list[Term] = []
        self.added: list[AddedLoss] = []
        self.replay: Replay | None = None
        self.tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        self._graph = _keras_internals.current_graph()

    @property
    def has_unknown_batch(self) -> bool:
        """Whether the number of examples is not known before the pass runs.

        By the outputs: on the way, a layer for batches of one size may have told it.
        """
        shapes = [output.shape for output in batches_among(self.outputs)]
        return bool(shapes) and all(shape.rank and shape[0] is None for shape in shapes)

    @property
    def is_eager(self) -> bool:
        """Whether the recorded tensors have values."""
        return self._graph is None

    def is_usable(self) -> bool:
        """Whether the recorded tensors belong to the computation under way.

        In a graph, those with values would be constants.
        """
        return _keras_internals.is_within(self._graph)

    @property
    def again(self) -> Replay:
        """The replay of this pass.

        Raises:
            RuntimeError: If none was prepared.
        """
        if self.replay is None:
            raise RuntimeError("This forward pass was recorded without a replay.")
        return self.replay

    def add_call(self, layer: keras.Layer, call: LayerCall) -> None:
        """Notes a call of `layer`."""
        if _keras_internals.current_graph() is not self._graph:
            self.unreachable[id(layer)] = (
                "called inside a loop or tf.function of its own, where its tensors are out of reach"
            )
            return
        outputs = tf.nest.flatten(call.outputs)
        if not all(map(tf.is_tensor, outputs)):
            self.unreachable[id(layer)] = "it returns other things than tensors"
            return
        self.tape.watch(outputs)
        self.calls.setdefault(id(layer), []).append(call)

    def output_gradients(
        self, layers: Iterable[keras.Layer], targets: Any, vectors: Any
    ) -> dict[int, list[tf.Tensor]]:
        """Back-propagates `vectors` from `targets` to the outputs of `layers`.

        Returns:
            Gradients of each layer's calls, shaped as their outputs, by `id` of the layer; zero
            where the targets do not depend on the layer.
        """
        sources = {
            id(layer): [call.outputs for call in self.calls.get(id(layer), [])] for layer in layers
        }
        found = self.tape.gradient(
            targets,
            sources,
            output_gradients=vectors,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return tf.nest.map_structure(shaped_like, found, sources)

    def layers_behind(self, targets: tf.Tensor | Sequence[tf.Tensor]) -> set[int]:
        """The layers that a tensor depends on, or one of several, by `id`."""
        sources = {key: [call.outputs for call in calls] for key, calls in self.calls.items()}
        found = self.tape.gradient(targets, sources)
        return {
            key
            for key, gradients in found.items()
            if any(gradient is not None for gradient in tf.nest.flatten(gradients))
        }


class _Recording(threading.local):
    """Whether a pass is being recorded on this thread: models nest, recordings don't."""

    active = False


_recording = _Recording()


def is_recording() -> bool:
    """Whether a forward pass is being recorded on this thread."""
    return _recording.active


@contextlib.contextmanager
def recording(
    layers: Iterable[keras.Layer],
    with_activation: Collection[int] = (),
    around: Iterable[keras.Layer] = (),
) -> Iterator[ForwardPass]:
    """Records what happens to `layers` in the body as one forward pass.

    Args:
        layers: The layers.
        with_activation: `id`s of the layers whose outputs are those after the activation.
        around: Layers that may hold some of them and keep masks from these.
    """
    forward_pass = ForwardPass()
    with contextlib.ExitStack() as stack:
        for layer in around:
            if projections := _keras_internals.projections_of(layer):
                stack.enter_context(_noted_masks(layer, projections, forward_pass))
        for layer in layers:
            is_whole = id(layer) in with_activation or not hasattr(layer, "activation")
            stack.enter_context(_recorded_calls(layer, forward_pass, is_whole))
        _recording.active = True
        stack.callback(setattr, _recording, "active", False)
        stack.enter_context(forward_pass.tape)
        yield forward_pass


@contextlib.contextmanager
def instance_attribute(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of the instance for the duration of the body.

    It goes past `__setattr__`, so that Keras and TensorFlow do not track the value, and leaves the
    instance's own dictionary exactly as it was.
    """
    own = vars(instance)
    missing = name not in own
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if missing:
            del own[name]
        else:
            own[name] = before


def _recorded_calls(
    layer: keras.Layer, forward_pass: ForwardPass, is_whole: bool
) -> contextlib.AbstractContextManager[None]:
    call = layer.call

    def recorded_call(*args: Any, **kwargs: Any) -> Any:
        inputs = tf.nest.flatten(args or kwargs)[0]
        replay = Replay(layer, args, kwargs)
        mask = kwargs.get("mask")
        if not tf.is_tensor(mask):
            mask = _keras_internals.mask_of(inputs)
        if mask is None:
            mask = forward_pass.masks.get(id(layer))

        def note(outputs: Any) -> None:
            forward_pass.add_call(layer, LayerCall(inputs, outputs, replay, mask, {}))

        if is_whole:
            outputs = call(*args, **kwargs)
            note(outputs)
            return outputs
        with instance_attribute(layer, "activation", _tap(layer.activation, note)):
            return call(*args, **kwargs)

    return instance_attribute(layer, "call", recorded_call)


def _noted_masks(
    attention: keras.Layer,
    projections: Mapping[str, Sequence[keras.Layer]],
    forward_pass: ForwardPass,
) -> contextlib.AbstractContextManager[None]:
    """Notes the masks that an attention layer is called with for its projections."""
    call = attention.call
    signature = inspect.signature(call)

    def noted_call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        masks = {"query": given.get("query_mask"), "value": given.get("value_mask")}
        key_mask = given.get("key_mask")
        if key_mask is not None:  # A position that either masks is attended to by none.
            value_mask = masks["value"]
            both = key_mask if value_mask is None else tf.logical_and(key_mask, value_mask)
            masks["value"] = both
        for name, layers in projections.items():
            forward_pass.masks.update({id(layer): masks[name] for layer in layers})
        return call(*args, **kwargs)

    return instance_attribute(attention, "call", noted_call)


def _tap(
    activation: Callable[[tf.Tensor], tf.Tensor] | None, note: Callable[[tf.Tensor], None]
) -> Callable[[tf.Tensor], tf.Tensor]:
    def tapped_activation(pre_activation: tf.Tensor) -> tf.Tensor:
        note(pre_activation)
        return pre_activation if activation is None else activation(pre_activation)

    return tapped_activation
