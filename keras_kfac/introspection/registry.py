"""Which adapters serve which layer class."""

from collections.abc import Callable

import keras

from keras_kfac.introspection import convolutions as conv
from keras_kfac.introspection.adapters import DenseAdapter, LayerAdapter
from keras_kfac.introspection.einsum import EinsumDenseAdapter

_TRANSPOSED = (conv.TransposedKernelAdapter, conv.ConvBiasAdapter)
_SEPARABLE = (conv.DepthwisePartAdapter, conv.PointwisePartAdapter)

# A layer that is several affine maps has an adapter, and a block, for each.
ADAPTERS: dict[type[keras.Layer], tuple[type[LayerAdapter], ...]] = {
    keras.layers.Dense: (DenseAdapter,),
    keras.layers.EinsumDense: (EinsumDenseAdapter,),
    keras.layers.Conv1D: (conv.ConvAdapter,),
    keras.layers.Conv2D: (conv.ConvAdapter,),
    keras.layers.Conv3D: (conv.ConvAdapter,),
    keras.layers.DepthwiseConv1D: (conv.DepthwiseConvAdapter,),
    keras.layers.DepthwiseConv2D: (conv.DepthwiseConvAdapter,),
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
    keras.layers.Conv1DTranspose: _TRANSPOSED,
    keras.layers.Conv2DTranspose: _TRANSPOSED,
    keras.layers.Conv3DTranspose: _TRANSPOSED,
}


def find_adapters(layer: keras.Layer) -> tuple[tuple[type[LayerAdapter], ...], str]:
    """The adapter classes for `layer`, or none and the reason."""
    for base, adapters in ADAPTERS.items():
        if isinstance(layer, base):
            reason = adapters[0].unsupported_reason(layer, base)
            return (adapters, "") if reason is None else ((), reason)
    return (), f"no curvature block for {type(layer).__name__} yet"


def adapt(layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> list[LayerAdapter]:
    """The adapters of a layer that has any, for those of its weights that are trained."""
    classes, _ = find_adapters(layer)
    return [a for a in (cls(layer, trained) for cls in classes) if a.variables]
