"""Which adapter serves which layer class."""

import keras

from keras_kfac.introspection.adapters import DenseAdapter, LayerAdapter
from keras_kfac.introspection.convolutions import ConvAdapter, DepthwiseConvAdapter
from keras_kfac.introspection.einsum import EinsumDenseAdapter

ADAPTERS: dict[type[keras.Layer], type[LayerAdapter]] = {
    keras.layers.Dense: DenseAdapter,
    keras.layers.EinsumDense: EinsumDenseAdapter,
    keras.layers.Conv1D: ConvAdapter,
    keras.layers.Conv2D: ConvAdapter,
    keras.layers.Conv3D: ConvAdapter,
    keras.layers.DepthwiseConv1D: DepthwiseConvAdapter,
    keras.layers.DepthwiseConv2D: DepthwiseConvAdapter,
}


def find_adapter(layer: keras.Layer) -> tuple[type[LayerAdapter] | None, str]:
    """The adapter class for `layer`, or `None` with the reason why there is none."""
    for base, adapter in ADAPTERS.items():
        if isinstance(layer, base):
            reason = adapter.unsupported_reason(layer, base)
            return (adapter, "") if reason is None else (None, reason)
    return None, f"no curvature block for {type(layer).__name__} yet"
