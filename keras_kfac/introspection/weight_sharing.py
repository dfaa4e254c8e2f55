"""Where a model averages over positions: what decides how shared weights are treated.

The Fisher block of a layer that applies its weights at many positions (pixels, time steps) is no
Kronecker product. Two approximations are each exact for linear networks: *expand* if the loss has a
term for each position, *reduce* if what the layer puts out is averaged over positions before the
loss. Source: Eschenhagen et al. (2023), arXiv:2311.00636.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import LayerAdapter, layer_path

EXPAND, REDUCE, AUTO = "expand", "reduce", "auto"

Choice = str | Mapping[str, str]
"""`"expand"`, `"reduce"` or `"auto"`; or which of the first two for some layers by name or path."""

_POOLING = (
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
)


class WeightSharing:
    """Which layers of a model treat shared weights by "reduce", and why.

    Args:
        model: A built model.
        choice: What the user chose.

    Raises:
        ValueError: If the choice names layers that the model does not have.
    """

    def __init__(self, model: keras.Model, choice: Choice) -> None:
        self._choice = EXPAND if isinstance(choice, Mapping) else choice
        self._by_name = choice if isinstance(choice, Mapping) else {}
        self._pooled = pooled_layers(model) if self._choice == AUTO else {}
        names = {
            name
            for layer in _keras_internals.flatten_layers(model)
            for name in (layer.name, layer_path(layer))
        }
        unknown = sorted(self._by_name.keys() - names)
        if unknown:
            raise ValueError(
                "`weight_sharing` names layers that the model does not have. Use names that "
                f"`model.summary()` shows. Received: {unknown} for model {model.name!r}"
            )

    def _chosen(self, layer: keras.Layer) -> str:
        by_name = self._by_name.get(layer.name, self._choice)
        return self._by_name.get(layer_path(layer), by_name)

    def check(self, layer: keras.Layer, adapters: Sequence[LayerAdapter]) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: If the layer was chosen by name, and none of its adapters can reduce.
        """
        is_named = self._by_name and self._chosen(layer) == REDUCE
        if is_named and adapters and not any(adapter.can_reduce for adapter in adapters):
            raise ValueError(
                "`weight_sharing` can't be 'reduce' for recurrent layers, embeddings and layers "
                f"with exact blocks. Leave them out. Received: {layer_path(layer)!r}, a "
                f"{type(layer).__name__}"
            )

    def reduces(self, layer: keras.Layer) -> str:
        """Why a layer is to be treated by "reduce"; empty if it is not."""
        chosen = self._chosen(layer)
        if chosen == AUTO:
            pooling = self._pooled.get(id(layer))
            return f"reduce: {pooling!r} averages over positions" if pooling else ""
        return "reduce: as set" if chosen == REDUCE else ""


def pooled_layers(model: keras.Model) -> dict[int, str]:
    """Layers all of whose uses lead to the outputs by averages over positions.

    Only the graphs of functional and sequential models tell; what a subclass does in its `call` is
    not known.

    Returns:
        The name of such an average for each of these layers, by `id` of the layer.
    """
    follows: dict[int, list[str | None]] = defaultdict(list)
    _walk(model, [None], follows)
    return {key: names[0] for key, names in follows.items() if names[0] and all(names)}


def _walk(
    model: keras.Layer, after: Sequence[str | None], follows: dict[int, list[str | None]]
) -> str | None:
    """Notes for each layer of a model which average follows it, one for each use.

    Args:
        model: The model, or a layer.
        after: The averages that follow the outputs of the model.
        follows: Averages by `id` of the layer, to be extended.

    Returns:
        The average that follows all inputs of the model, if one does.
    """
    last = _common(after)
    follows[id(model)].append(last)
    graph = _keras_internals.graph_of(model)
    if graph is None:
        for layer in _keras_internals.layers_below(model):
            _walk(layer, [last], follows)
        return last
    uses: dict[int, list[str | None]] = defaultdict(list)
    for tensor, name in zip(graph.outputs, [*after, *[last] * len(graph.outputs)]):
        uses[id(tensor)].append(name)
    for node in reversed(graph.nodes):
        after_node = [_common(uses[id(tensor)]) for tensor in node.outputs]
        before = _common(after_node)
        if isinstance(node.operation, keras.Layer):
            before = _walk(node.operation, after_node, follows)
        if _averages_positions(node):
            before = node.operation.name
        for tensor in node.inputs:
            uses[id(tensor)].append(before)
    return _common([_common(uses[id(tensor)]) for tensor in graph.inputs])


def _common(names: Sequence[str | None]) -> str | None:
    """The first of the names, if there is no gap among them."""
    return names[0] if names and all(names) else None


def _averages_positions(node: _keras_internals.GraphNode) -> bool:
    """Whether an operation averages over all axes but the first and the last."""
    if isinstance(node.operation, _POOLING):
        return True
    if type(node.operation).__name__ not in ("Mean", "Sum"):
        return False
    (tensor,) = node.inputs
    rank = len(tensor.shape)
    axes = node.operation.axis
    axes = range(rank) if axes is None else [axis % rank for axis in tf.nest.flatten(axes)]
    return rank > 2 and set(axes) == set(range(1, rank - 1))
