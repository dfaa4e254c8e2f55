"""Which structure the curvature of each layer has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_kfac import _keras_internals
from keras_kfac.curvature.block import KroneckerBlock
from keras_kfac.curvature.dense import BatchBlock, DenseBlock
from keras_kfac.curvature.eigenbasis import EigenbasisBlock
from keras_kfac.curvature.exact import DiagonalBlock, FullBlock
from keras_kfac.curvature.input_only import InputBlock
from keras_kfac.curvature.inverse_free import InverseFreeBlock
from keras_kfac.curvature.linear_exact import LinearExactBlock
from keras_kfac.curvature.tridiagonal import TridiagonalBlock
from keras_kfac.introspection.adapters import LayerAdapter, layer_path
from keras_kfac.introspection.per_example import ExactAdapter
from keras_kfac.introspection.registry import has_entry

STRUCTURES: dict[str, type[KroneckerBlock]] = {
    "kfac": KroneckerBlock,
    "ekfac": EigenbasisBlock,
    "input": InputBlock,
    "inverse_free": InverseFreeBlock,
    "linear_exact": LinearExactBlock,
    "diagonal": DiagonalBlock,
    "full": FullBlock,
    "dense": DenseBlock,
    "sample_space": BatchBlock,
    "tridiagonal": TridiagonalBlock,
}
KFAC = "kfac"

Curvature = str | Mapping[str | type[keras.Layer], str] | Callable[[keras.Layer], str | None]
"""A structure for all layers; for some by name, path or class; or a function of the layer."""


class CurvatureChoice:
    """The structure of each layer's block.

    Args:
        model: A built model.
        curvature: What the user chose.

    Raises:
        ValueError: If the choice names layers that the model does not have, or classes of layers
            without blocks.
    """

    def __init__(self, model: keras.Model, curvature: Curvature) -> None:
        self._curvature = curvature
        if not isinstance(curvature, Mapping):
            return
        layers = _keras_internals.flatten_layers(model)
        keys = {k for layer in layers for k in _keys(layer)}
        unknown = [key for key in curvature if key not in keys]
        if unknown:
            raise ValueError(
                "`curvature` names layers that the model does not have. Use names that "
                "`model.summary()` shows, or classes of layers. Received: "
                f"{unknown} for model {model.name!r}"
            )
        _check_classes(curvature, layers)

    def check(
        self,
        layer: keras.Layer,
        weights: Sequence[keras.Variable],
        adapters: Sequence[LayerAdapter],
        reason: str,
    ) -> None:
        """Refuses a layer that is named, but has no block to choose for.

        Args:
            layer: A layer of the model.
            weights: Its own.
            adapters: Likewise.
            reason: Why it can have none; empty if it can, or is not trained.

        Raises:
            ValueError: If the choice names it.
        """
        if not isinstance(self._curvature, Mapping):
            return
        name, is_own = self._chosen(layer)
        are_exact = adapters and all(isinstance(a, ExactAdapter) for a in adapters)
        if are_exact and name != KFAC and not STRUCTURES[name].replaces_exact:
            others = [other for other, block in STRUCTURES.items() if block.replaces_exact]
            reason = f"it has an exact block, for which there are {others}"
        elif layer.built and not weights:
            reason = "name the layers in it" if layer.weights else "it has no weights"
        if is_own and reason:
            raise _refused(name, layer, reason)

    def of(self, adapter: LayerAdapter) -> tuple[type[KroneckerBlock], str]:
        """The class of the block of a layer, and why it is not the chosen one, or nothing.

        Raises:
            ValueError: If a function says what is no structure, or a layer chosen by itself can't
                have the structure.
        """
        name, is_own = self._chosen(adapter.layer)
        if name not in STRUCTURES:
            raise ValueError(
                f"A function as `curvature` must return one of {list(STRUCTURES)} or None. "
                f"Received: {name!r} for layer {layer_path(adapter.layer)!r}"
            )
        block = STRUCTURES[name]
        if isinstance(adapter, ExactAdapter) and not block.replaces_exact:
            return STRUCTURES[KFAC], ""
        reason = block.unsuitable(adapter)
        if reason is None:
            return block, ""
        if is_own:
            raise _refused(name, adapter.layer, reason)
        return STRUCTURES[KFAC], f"not {name!r}: {reason}"

    def _chosen(self, layer: keras.Layer) -> tuple[str, bool]:
        """The name of a structure, and whether it was chosen for this layer by itself."""
        curvature = self._curvature
        if isinstance(curvature, str):
            return curvature, False
        if not isinstance(curvature, Mapping):
            return curvature(layer) or KFAC, False
        for key in _keys(layer):
            if key in curvature:
                return curvature[key], key in (layer.name, layer_path(layer))
        return KFAC, False


def _check_classes(keys: Iterable[str | type], layers: Sequence[keras.Layer]) -> None:
    """Refuses classes that choose nothing, as none of their layers can have a block.

    Raises:
        ValueError: If there is one.
    """
    own_names = {name for layer in layers for name in (layer_path(layer), layer.name)}
    for key in keys:
        chosen = [layer for layer in layers if key in _keys(layer)]
        if key in own_names or any(map(has_entry, chosen)):
            continue
        within = (part for layer in chosen for part in _keras_internals.flatten_layers(layer))
        others = sorted({type(part).__name__ for part in within if has_entry(part)})
        hint = f"Choose those of the layers in them, {others}"
        if not others:
            hint = "In place of a cell, choose its recurrent layer"
        raise ValueError(
            "`curvature` has a class of layers that have no curvature block of their own. "
            f"{hint}; see keras_kfac.register for layers of yours. Received: {key!r}"
        )


def _refused(name: str, layer: keras.Layer, reason: str) -> ValueError:
    return ValueError(
        f"`curvature` can't be {name!r} for a {type(layer).__name__}: {reason}. Received: "
        f"{name!r} for layer {layer_path(layer)!r}"
    )


def _keys(layer: keras.Layer) -> list[str | type]:
    """What a user can call a layer, the most precise first."""
    classes = [c for c in type(layer).__mro__ if issubclass(c, keras.Layer)]
    return [layer_path(layer), layer.name, *(key for c in classes for key in (c, c.__name__))]


def curvature_to_config(curvature: Curvature) -> Any:
    """What a config can hold of a choice: names for classes, functions as Keras saves them."""
    if isinstance(curvature, Mapping):
        return {k if isinstance(k, str) else k.__name__: name for k, name in curvature.items()}
    return keras.saving.serialize_keras_object(curvature)
