"""Which layers read what a layer puts out, where all of them are affine maps of it."""

from collections.abc import Sequence

import keras

from keras_kfac import _keras_internals
from keras_kfac._keras_internals import GraphNode
from keras_kfac.introspection import registry
from keras_kfac.introspection.adapters import layer_path
from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.introspection.einsum import parse

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def affine_readers(model: keras.Model, layer: keras.Layer) -> list[AffineAdapter]:
    """The layers that read a layer's output, so that they can undo an affine map of its features.

    Args:
        model: A built model. It, or a model in it, is functional or sequential and has the layer.
        layer: Its features are on the last axis of its output.

    Returns:
        Adapters of all weights of these layers, whether they are trained or not: kernel and bias.

    Raises:
        ValueError: If anything else reads the output, or these layers read anything else.
    """
    every = map(_keras_internals.graph_of, _keras_internals.flatten_layers(model))
    graphs = [graph for graph in every if graph is not None]
    nodes = [node for graph in graphs for node in graph.nodes]
    calls = [node for node in nodes if node.operation is layer]
    if len(calls) != 1:
        raise ValueError(
            f"{layer_path(layer)!r} must be called once in the graph of a functional or sequential "
            f"model, where it can be seen what reads its output. Received: {len(calls)} calls"
        )
    (output,) = calls[0].outputs
    readers = [node for node in nodes if any(tensor is output for tensor in node.inputs)]
    problems = [_problem(node, nodes) for node in readers]
    if any(tensor is output for graph in graphs for tensor in graph.outputs):
        problems.append("an output of a model")
    if any(problems):
        raise ValueError(
            f"What reads the output of {layer_path(layer)!r} must be affine in its features, "
            "without an activation or anything else in between: Dense, EinsumDense or convolution "
            f"layers with a bias, that read nothing else. Received: {next(filter(None, problems))}"
        )
    return [adapter for node in readers for adapter in _with_bias(node.operation)]


def _problem(node: GraphNode, nodes: Sequence[GraphNode]) -> str | None:
    """Why a layer can't undo an affine map of the features that it reads at a node."""
    reader = node.operation
    name = f"{layer_path(reader)!r}, a {type(reader).__name__} layer"
    if isinstance(reader, keras.layers.EinsumDense):
        axes = parse(reader.equation, len(node.inputs[0].shape))
        summed = [axis for axis in axes.inputs if axis not in axes.outputs]
        if not summed == list(axes.features) == [axes.inputs[-1]]:
            return f"{name} that sums over other axes than the last"
    elif isinstance(reader, _CONVOLUTIONS):
        if reader.groups > 1 or reader.data_format == "channels_first":
            return f"{name} of several groups, or with its channels first"
        if reader.padding != "valid" and max(reader.kernel_size) > 1:
            return f"{name} that pads its inputs: use padding='valid'"
    elif not isinstance(reader, keras.layers.Dense):
        return name
    if reason := registry.find_adapters(reader)[1]:
        return f"{name}: {reason}"
    if not _with_bias(reader):
        return f"{name} without a bias for each of its units"
    if sum(other.operation is reader for other in nodes) > 1:
        return f"{name} that is called several times"
    return None


def _with_bias(reader: keras.Layer) -> list[AffineAdapter]:
    """The adapter of kernel and bias, if the layer has both and they belong together."""
    adapters = (a for a in registry.adapt(reader, lambda _: True) if isinstance(a, AffineAdapter))
    return [a for a in adapters if a.kernel is not None and a.bias is not None]
