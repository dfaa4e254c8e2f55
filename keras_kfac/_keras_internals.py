"""Every use of a name that Keras or TensorFlow does not document, in one place.

Each function says why no public way exists. Outside this module the package uses public API
only, with exceptions that Keras intends to be overridden: `Optimizer._backend_update_step` (and its
helper `_var_key`), the only place that sees all gradients after clipping and accumulation;
`update_step` sees one variable at a time. And `Optimizer._apply_weight_decay`, to have the decay
with the step and not before the step is modelled.
"""

import contextlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.python.eager import record


def flatten_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model and all layers below it, each once. `Model.layers` lists one level only."""
    seen: dict[int, keras.Layer] = {}
    for layer in model._flatten_layers(include_self=True, recursive=True):
        seen.setdefault(id(layer), layer)
    return list(seen.values())


def layers_below(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds, one level down."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


class GraphNode(NamedTuple):
    """A call of an operation or layer in the graph of a model."""

    operation: Any
    inputs: list[Any]
    outputs: list[Any]


class Graph(NamedTuple):
    """The graph of a model: its symbolic tensors, and what makes one out of the other, in order."""

    inputs: list[Any]
    outputs: list[Any]
    nodes: list[GraphNode]


def graph_of(model: keras.Layer) -> Graph | None:
    """The graph of a functional or sequential model. `Model.operations` does not tell the edges."""
    functional = getattr(model, "_functional", None) or model
    by_depth = getattr(functional, "_nodes_by_depth", None)
    if by_depth is None:
        return None
    nodes = [
        GraphNode(node.operation, node.input_tensors, node.output_tensors)
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
    ]
    return Graph(functional.inputs, functional.outputs, nodes)


def loss_logits(
    outputs: tf.Tensor, operations: Collection[str] = ("Softmax", "Sigmoid")
) -> tf.Tensor | None:
    """The logits that Keras's crossentropies use in place of softmax or sigmoid outputs.

    Keras marks such outputs and then ignores the probabilities (and `from_logits`): the loss that
    is minimised is a function of these logits. In graphs it looks for TensorFlow's operations, too.

    Args:
        outputs: Of a model.
        operations: What Keras looks for in a graph: softmax if the loss is categorical, sigmoid if
            it is binary.
    """
    logits = getattr(outputs, "_keras_logits", None)
    if logits is not None or tf.executing_eagerly() or not tf.is_symbolic_tensor(outputs):
        return logits
    return outputs.op.inputs[0] if outputs.op.type in operations else None


def function_of(loss: keras.losses.Loss) -> tuple[Any, dict[str, Any]]:
    """The function that a loss of Keras's calls, and the options that it calls it with.

    The config of a subclass need not tell them, and its attributes may have been set afterwards.
    """
    return getattr(loss, "fn", None), getattr(loss, "_fn_kwargs", {})


def mask_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """Which positions Keras counts, in layers and in the loss. The mask travels on the tensor."""
    return getattr(tensor, "_keras_mask", None)


def with_mask(tensor: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The same tensor, with a mask in addition to the one that it has."""
    present = mask_of(tensor)
    tensor = tf.identity(tensor)
    tensor._keras_mask = mask if present is None else tf.logical_and(present, mask)
    return tensor


def projections_of(layer: keras.Layer) -> dict[str, list[keras.Layer]]:
    """The projections in an attention layer, by the argument whose positions they are applied to.

    `MultiHeadAttention` deletes the masks of its arguments before it calls them, and has no public
    names for them.
    """
    if not isinstance(layer, (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)):
        return {}
    names = {
        "query": ("_query_dense", "_gate_dense", "_output_dense"),
        "value": ("_key_dense", "_value_dense"),
    }
    return {k: [getattr(layer, n) for n in v if hasattr(layer, n)] for k, v in names.items()}


def around_next_batch(
    model: keras.Model, context: Callable[[Any], contextlib.AbstractContextManager]
) -> None:
    """Has `fit` train its next batch within a context, made of the specs of its data.

    Callbacks are not told when a batch fails, or when the data end where one was about to begin,
    and those before this one in the list would see its changes. `fit` looks `train_function` up for
    each batch; it is put back before that begins, so that no failure leaves anything behind.
    """
    present = model.train_function
    original = getattr(present, "within_context", present)  # One may be left of another failure.

    def train_function(iterator: Any) -> Any:
        model.train_function = original
        with context(iterator.element_spec):
            return original(iterator)

    train_function.within_context = original  # type: ignore[attr-defined]
    model.train_function = train_function


def current_graph() -> Any:
    """Identity of the graph being built; `None` when executing eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def is_within(graph: Any) -> bool:
    """Whether what is computed in `graph` is computed here, too: it is this one or one around it.

    Tensors of an eager computation can be used in graphs, but stay as they are there.
    """
    current = current_graph()
    while graph is not None and current is not None and current is not graph:
        current = getattr(current, "outer_graph", None)
    return current is graph


def is_taped() -> bool:
    """Whether a tape on this thread may record what is computed; if not, it is in no gradient.

    A tape tells no more than which of its own variables it has seen.
    """
    return record.could_possibly_record()
