"""Whether layers form a chain."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import keras

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import layer_path


def chain_break(model: keras.Model, layers: Sequence[keras.Layer]) -> str | None:
    """Why layers are no chain; `None` if each one's outputs lead to the next one alone.

    Only the graphs of functional and sequential models tell.

    Args:
        model: A built model.
        layers: Layers of the model, in its order.
    """
    graph = _keras_internals.graph_of(model)
    if graph is None:
        return "only functional and sequential models tell what follows a layer"
    nodes = defaultdict(list)
    consumers = defaultdict(list)
    for node in graph.nodes:
        nodes[id(node.operation)].append(node)
        for tensor in node.inputs:
            consumers[id(tensor)].append(node)
    outputs = {id(tensor) for tensor in graph.outputs}
    for layer in layers:
        if not nodes[id(layer)]:
            return f"{layer_path(layer)!r} is inside another layer"
        if len(nodes[id(layer)]) > 1:
            return f"{layer_path(layer)!r} is called more than once"
    for layer, following in itertools.pairwise(layers):
        (node,) = nodes[id(layer)]
        while node.operation is not following:
            if any(id(tensor) in outputs for tensor in node.outputs):
                return (
                    f"{layer_path(layer)!r} does not lead to {layer_path(following)!r} alone: "
                    f"what {node.operation.name!r} puts out is an output of the model, too"
                )
            after = consumers[id(node.outputs[0])] if len(node.outputs) == 1 else []
            if len(after) != 1 or len(after[0].inputs) != 1:
                return (
                    f"{layer_path(layer)!r} does not lead to {layer_path(following)!r} alone: "
                    f"there is a branch or an end behind {node.operation.name!r}"
                )
            (node,) = after
    return None
