"""Whether layers form a chain."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import keras

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import layer_path

_LAYERS = (
    keras.layers.Activation,
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.BatchNormalization,
    keras.layers.Dense,
    keras.layers.Dropout,
    keras.layers.ELU,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.GroupNormalization,
    keras.layers.Identity,
    keras.layers.LayerNormalization,
    keras.layers.LeakyReLU,
    keras.layers.Masking,
    keras.layers.Normalization,
    keras.layers.PReLU,
    keras.layers.ReLU,
    keras.layers.Rescaling,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.UnitNormalization,
)
# Of `keras.ops` and `keras.activations`: the names of classes that Keras does not document.
_NAMES = (
    "Absolute Add Cast Celu Clip Divide Elu Erf Exp Expm1 Gelu HardSigmoid HardSilu HardTanh "
    "LeakyRelu Log Log1p LogSigmoid LogSoftmax Maximum Minimum Multiply Negative Power Relu Relu6 "
    "Selu Sigmoid Silu Sin Softmax Softplus Softsign Sqrt Square StopGradient Subtract Tanh "
    "TrueDivide"
)
_OPERATIONS = frozenset(_NAMES.split())


def _keeps_positions(node: _keras_internals.GraphNode) -> bool:
    """Whether each row that comes out is of the same position as the one that went in."""
    if all(len(tensor.shape) == 2 for tensor in (*node.inputs, *node.outputs)):
        return True  # An example has one.
    if isinstance(node.operation, keras.Layer):
        return isinstance(node.operation, _LAYERS)
    # A constant that is added can have more positions.
    is_alike = node.inputs[0].shape == node.outputs[0].shape
    return is_alike and type(node.operation).__name__ in _OPERATIONS


def chain_break(model: keras.Model, layers: Sequence[keras.Layer]) -> str | None:
    """Why layers are no chain; `None` if each one's outputs lead to the next one alone.

    And position by position. Only the graphs of functional and sequential models tell, and of
    operations that are not known none is taken to leave positions as they are.

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
            if node.operation is not following and not _keeps_positions(node):
                return (
                    f"{layer_path(layer)!r} does not lead to {layer_path(following)!r} position by "
                    f"position: {node.operation.name!r}, a {type(node.operation).__name__}, lies "
                    "in between"
                )
    return None
