"""Which adapters serve which layer class."""

from collections.abc import Callable

import keras

from keras_kfac.introspection import convolutions as conv
from keras_kfac.introspection import per_example, recurrent
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.affine import DenseAdapter
from keras_kfac.introspection.einsum import EinsumBiasAdapter, EinsumDenseAdapter
from keras_kfac.introspection.embedding import (
    EmbeddingAdapter,
    ReverseAdapter,
    ReversibleEmbeddingAdapter,
)

_TRANSPOSED = (conv.TransposedKernelAdapter, conv.ConvBiasAdapter)
_SEPARABLE = (conv.DepthwisePartAdapter, conv.PointwisePartAdapter)

_GRU = (recurrent.GRUInputAdapter, recurrent.GRURecurrentAdapter, recurrent.GRUBiasAdapter)

# A layer that is several affine maps has an adapter, and a block, for each.
ADAPTERS: dict[type[keras.Layer], tuple[type[LayerAdapter], ...]] = {
    keras.layers.Dense: (DenseAdapter,),
    keras.layers.EinsumDense: (EinsumDenseAdapter, EinsumBiasAdapter),
    keras.layers.Embedding: (EmbeddingAdapter,),
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
    keras.layers.BatchNormalization: (per_example.NormalizationAdapter,),
    keras.layers.LayerNormalization: (per_example.NormalizationAdapter,),
    keras.layers.GroupNormalization: (per_example.NormalizationAdapter,),
    keras.layers.RMSNormalization: (per_example.RMSNormalizationAdapter,),
    keras.layers.PReLU: (per_example.PReLUAdapter,),
    keras.layers.SimpleRNN: (recurrent.JointAdapter,),
    keras.layers.LSTM: (recurrent.JointAdapter,),
    keras.layers.GRU: _GRU,
    keras.layers.RNN: (recurrent.JointAdapter, *_GRU),
    keras.layers.ConvLSTM1D: (recurrent.ConvLSTMAdapter,),
    keras.layers.ConvLSTM2D: (recurrent.ConvLSTMAdapter,),
    keras.layers.ConvLSTM3D: (recurrent.ConvLSTMAdapter,),
    keras.layers.Attention: (per_example.RawWeightsAdapter,),
    keras.layers.AdditiveAttention: (per_example.RawWeightsAdapter,),
}
if hasattr(keras.layers, "ReversibleEmbedding"):  # Not in the oldest Keras that we support.
    ADAPTERS[keras.layers.ReversibleEmbedding] = (ReversibleEmbeddingAdapter, ReverseAdapter)


def has_entry(layer: keras.Layer) -> bool:
    """Whether there are adapters for layers of its class, be it for this one or not."""
    return any(base in ADAPTERS for base in type(layer).__mro__)


def find_adapters(layer: keras.Layer) -> tuple[tuple[type[LayerAdapter], ...], str]:
    """The adapter classes for `layer`, or none and the reason."""
    for base in type(layer).__mro__:
        if base in ADAPTERS:
            reason = ADAPTERS[base][0].unsupported_reason(layer, base)
            return (ADAPTERS[base], "") if reason is None else ((), reason)
    return (), f"no curvature block for {type(layer).__name__}: see keras_kfac.register"


def adapt(layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> list[LayerAdapter]:
    """The adapters of a layer that has any, for those of its weights that are trained."""
    classes, _ = find_adapters(layer)
    return [a for cls in classes for a in cls.of(layer, trained) if a.variables]


def register(layer_class: type[keras.Layer], *adapters: type[LayerAdapter]) -> None:
    """Gives the layers of a class, and of its subclasses, curvature blocks.

    It is for layers of your own, and takes effect for optimizers that have not made a step yet. The
    adapter of the nearest base class counts, so that a subclass of `Dense` can have one of its own.

    Args:
        layer_class: The class.
        adapters: Classes, one for each block. `RawWeightsAdapter` serves any layer that treats
            examples apart from each other. `AffineAdapter` is the base for layers that multiply by
            a matrix, which then have a Kronecker-factored block; `PerExampleAdapter` for those
            that know the gradients of their weights for each example.

    Raises:
        TypeError: For anything but such classes.

    Example:
    >>> class Gate(keras.Layer):
    ...     def build(self, input_shape):
    ...         self.gate = self.add_weight(shape=input_shape[1:], initializer="ones")
    ...     def call(self, inputs):
    ...         return keras.ops.sigmoid(self.gate) * inputs
    >>> register(Gate, RawWeightsAdapter)
    >>> model = keras.Sequential([keras.Input((3,)), Gate(), keras.layers.Dense(1)])
    >>> model.compile(KFAC(), "mse")
    >>> [row.block for row in model.optimizer.attach(model).coverage()]
    ['full', 'kronecker']
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(
            "`layer_class` must be a subclass of keras.Layer. Received: "
            f"layer_class={layer_class!r}"
        )
    wrong = [a for a in adapters if not (isinstance(a, type) and issubclass(a, LayerAdapter))]
    if wrong or not adapters:
        raise TypeError(
            "`adapters` must be one or more subclasses of keras_kfac.AffineAdapter or "
            f"keras_kfac.PerExampleAdapter. Received: adapters={adapters!r}"
        )
    ADAPTERS[layer_class] = adapters
