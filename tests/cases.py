"""Test cases as data: models, losses and batches in float64."""

import dataclasses
import inspect
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection import forward_pass, registry, statistics
from keras_kfac.introspection.batch_part import places_of
from keras_kfac.introspection.losses import Score, understood

layers = keras.layers


@dataclasses.dataclass(frozen=True)
class LossCase:
    """A loss with the last activation it goes with and a way to draw targets."""

    name: str
    make: Callable[..., keras.losses.Loss]
    targets: Callable
    activation: str | None = None
    separate: bool = False  # the activation as a layer of its own

    def __str__(self):
        return self.name


def one_hot(rng, shape):
    return np.eye(shape[-1])[rng.integers(0, shape[-1], shape[:-1])]


def sparse(rng, shape):
    return rng.integers(0, shape[-1], shape[:-1])


def binary(rng, shape):
    return rng.integers(0, 2, shape).astype("float64")


def real(rng, shape):
    return rng.normal(size=shape)


def _loss(cls, **config):
    return lambda reduction="sum_over_batch_size": cls(
        reduction=reduction, dtype="float64", **config
    )


CCE, SCE = keras.losses.CategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy
BCE, MSE = keras.losses.BinaryCrossentropy, keras.losses.MeanSquaredError

LOSSES = [
    LossCase("cce-logits", _loss(CCE, from_logits=True), one_hot),
    LossCase("cce-smooth", _loss(CCE, from_logits=True, label_smoothing=0.1), one_hot),
    LossCase("cce-softmax", _loss(CCE), one_hot, "softmax"),
    LossCase("cce-softmax-layer", _loss(CCE), one_hot, "softmax", separate=True),
    LossCase("sce-logits", _loss(SCE, from_logits=True), sparse),
    LossCase("sce-softmax", _loss(SCE), sparse, "softmax"),
    LossCase("bce-logits", _loss(BCE, from_logits=True), binary),
    LossCase("bce-smooth", _loss(BCE, from_logits=True, label_smoothing=0.2), binary),
    LossCase("bce-sigmoid", _loss(BCE), binary, "sigmoid"),
    LossCase("bce-sigmoid-layer", _loss(BCE), binary, "sigmoid", separate=True),
    LossCase("mse", _loss(MSE), real),
]
LOSS = {case.name: case for case in LOSSES}


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer with a curvature block, and the shape of one example of its input."""

    name: str
    layer_class: type[keras.Layer]
    config: dict
    input_shape: tuple[int, ...]

    def __str__(self):
        return self.name

    def make(self, **config):
        """A new layer in float64, without activation, with a bias that is not zero."""
        parameters = inspect.signature(self.layer_class.__init__).parameters
        bias = {"bias_initializer": "random_normal"} if "bias_initializer" in parameters else {}
        return self.layer_class(**{"dtype": "float64"} | bias | self.config | config)


def _conv(rank, name, shape, **config):
    config = {"filters": 4, "kernel_size": 3} | config
    return LayerCase(f"conv{rank}d-{name}", getattr(layers, f"Conv{rank}D"), config, shape)


def _depthwise(rank, name, shape, **config):
    layer_class = getattr(layers, f"DepthwiseConv{rank}D")
    return LayerCase(f"depthwise{rank}d-{name}", layer_class, {"kernel_size": 3} | config, shape)


def _separable(rank, name, shape, **config):
    layer_class = getattr(layers, f"SeparableConv{rank}D")
    return LayerCase(
        f"separable{rank}d-{name}", layer_class, {"filters": 3, "kernel_size": 3} | config, shape
    )


def _transposed(rank, name, shape, **config):
    layer_class = getattr(layers, f"Conv{rank}DTranspose")
    config = {"filters": 3, "kernel_size": 2, "strides": 2} | config
    return LayerCase(f"transposed{rank}d-{name}", layer_class, config, shape)


def _einsum(name, equation, output_shape, bias_axes, shape):
    config = {"equation": equation, "output_shape": output_shape, "bias_axes": bias_axes}
    return LayerCase(f"einsum-{name}", layers.EinsumDense, config, shape)


LAYERS = [
    LayerCase("dense", layers.Dense, {"units": 3}, (5,)),
    LayerCase("dense-positions", layers.Dense, {"units": 3}, (2, 3, 5)),
    _conv(1, "valid", (7, 2)),
    _conv(1, "same-strided", (8, 2), strides=2, padding="same"),
    _conv(1, "causal", (7, 2), padding="causal"),
    _conv(1, "causal-dilated", (9, 2), padding="causal", dilation_rate=2),
    _conv(1, "causal-strided", (9, 2), padding="causal", strides=3),
    _conv(1, "grouped", (6, 4), groups=2),
    _conv(2, "valid", (5, 4, 2)),
    _conv(2, "same-strided", (6, 5, 2), kernel_size=(2, 3), strides=(2, 1), padding="same"),
    _conv(2, "dilated", (6, 6, 2), kernel_size=(3, 2), dilation_rate=2),
    _conv(2, "grouped", (4, 4, 6), filters=6, kernel_size=2, groups=3),
    _conv(3, "valid", (3, 4, 3, 2), filters=2, kernel_size=(2, 3, 2)),
    _conv(3, "same-strided", (4, 3, 5, 2), filters=2, strides=(2, 1, 3), padding="same"),
    _conv(3, "dilated", (3, 5, 3, 1), filters=2, kernel_size=(1, 2, 2), dilation_rate=(1, 3, 2)),
    _conv(3, "grouped", (2, 3, 2, 4), filters=2, kernel_size=2, groups=2),
    _depthwise(1, "valid", (6, 3)),
    _depthwise(1, "same-strided", (7, 2), padding="same", strides=2, depth_multiplier=2),
    _depthwise(2, "valid", (4, 5, 3), kernel_size=(2, 3)),
    _depthwise(2, "same-strided", (5, 6, 2), padding="same", strides=2, depth_multiplier=3),
    _depthwise(2, "dilated", (6, 5, 2), kernel_size=2, dilation_rate=2),
    _depthwise(2, "one-channel", (4, 4, 1), depth_multiplier=2),
    _einsum("plain", "ab,bc->ac", 3, "c", (4,)),
    _einsum("no-bias", "ab,bc->ac", 3, None, (4,)),
    _einsum("query", "abc,cde->abde", (None, 2, 3), "de", (3, 4)),
    _einsum("output", "abcd,cde->abe", (None, 5), "e", (3, 2, 2)),
    _einsum("ellipsis", "...x,xy->...y", 3, "y", (2, 3, 4)),
    _einsum("ellipsis-heads", "...xh,hyx->...y", 3, "y", (3, 2, 2)),
    _einsum("ellipsis-last", "ab...,bc->ac...", (3, 2), None, (4, 2)),
    _einsum("grouped", "abgc,gcd->abdg", (None, 2, 3), "gd", (2, 3, 3)),
    _einsum("grouped-only", "abc,c->abc", (2, 3), "c", (2, 3)),
    _einsum("turned", "abc,dcb->ad", 4, "d", (2, 3)),
    _einsum("positions-last", "abc,bd->adc", (4, 3), None, (2, 3)),
    _einsum("summed", "abc,cd->ad", 4, "d", (2, 3)),
]
# Layers whose weights scale and shift. Blocks of gradients example by example are exact.
SCALES = [
    LayerCase("batch", layers.BatchNormalization, {}, (4,)),
    LayerCase("batch-pixels", layers.BatchNormalization, {}, (2, 3, 2)),
    LayerCase("batch-axis", layers.BatchNormalization, {"axis": 1}, (3, 2)),
    LayerCase("batch-scale", layers.BatchNormalization, {"center": False}, (3,)),
    LayerCase("batch-offset", layers.BatchNormalization, {"scale": False}, (3,)),
    LayerCase("batch-renorm", layers.BatchNormalization, {"renorm": True}, (3,)),
    LayerCase("layer", layers.LayerNormalization, {}, (5,)),
    LayerCase("layer-positions", layers.LayerNormalization, {}, (3, 4)),
    LayerCase("layer-axes", layers.LayerNormalization, {"axis": (-1, 1)}, (2, 3, 2)),
    LayerCase("group", layers.GroupNormalization, {"groups": 2}, (3, 4)),
    LayerCase("instance", layers.GroupNormalization, {"groups": -1}, (2, 3, 3)),
    LayerCase("rms", layers.RMSNormalization, {}, (3, 4)),
    LayerCase("rms-other-axis", layers.RMSNormalization, {"axis": 1}, (3, 3)),
    LayerCase("prelu", layers.PReLU, {}, (2, 3)),
    LayerCase("prelu-shared", layers.PReLU, {"shared_axes": [1, 2]}, (2, 2, 3)),
]
# Layers of several affine maps, whose blocks are exact in fewer cases: see `test_layers.py`.
COMPOSED_LAYERS = [
    _separable(1, "valid", (6, 2)),
    _separable(1, "same-strided", (7, 2), strides=2, padding="same", depth_multiplier=2),
    _separable(2, "valid", (4, 5, 2), depth_multiplier=2),
    _separable(2, "same-strided", (5, 4, 3), strides=2, padding="same"),
    _separable(2, "dilated", (5, 5, 1), kernel_size=2, dilation_rate=2),
    _transposed(1, "valid", (4, 2)),
    _transposed(1, "same", (4, 2), padding="same", kernel_size=3),
    _transposed(1, "output-padding", (4, 2), kernel_size=3, output_padding=1),
    _transposed(2, "valid", (3, 2, 2)),
    _transposed(2, "sparse", (3, 2, 2), kernel_size=(2, 1), strides=3),
    _transposed(2, "same-overlapping", (3, 3, 2), padding="same", kernel_size=3),
    _transposed(2, "no-bias", (2, 3, 2), use_bias=False),
    _transposed(3, "valid", (2, 2, 2, 2)),
    _transposed(3, "same", (1, 2, 2, 2), padding="same", strides=(2, 1, 2)),
]


def mlp(widths, activation="tanh", head=None, seed=0, use_bias=True):
    """A chain of Dense layers in float64 with non-zero biases."""
    keras.utils.set_random_seed(seed)
    hidden = [
        layers.Dense(
            width, activation, use_bias=use_bias, bias_initializer="random_normal", dtype="float64"
        )
        for width in widths[1:-1]
    ]
    separate = head is not None and head.separate
    last_activation = None if head is None or separate else head.activation
    last = layers.Dense(
        widths[-1],
        last_activation,
        use_bias=use_bias,
        bias_initializer="random_normal",
        dtype="float64",
    )
    tail = [layers.Activation(head.activation, dtype="float64")] if separate else []
    return keras.Sequential([keras.Input((widths[0],), dtype="float64"), *hidden, last, *tail])


def without_head_activation(model):
    """A model of the same layers that puts out the logits of the last Dense."""
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]

    def logits(x, training=True):
        for layer in dense[:-1]:
            x = layer(x)
        return tf.matmul(x, dense[-1].kernel.value) + dense[-1].bias.value

    return logits


def factors(
    model,
    loss,
    x,
    y=None,
    fisher="exact",
    sample_weight=None,
    seed=(0, 0),
    loss_weight=1.0,
    layers=None,
    reduce=False,
    samples=1,
    likelihood=None,
):
    """Factors of all adapted layers on one batch, as the optimizer computes them."""
    adapters = [
        adapter
        for layer in layers or model.layers
        if layer.weights
        for adapter in registry.adapt(layer, lambda v: v.trainable)
    ]
    for adapter in adapters:
        adapter.reduces = adapter.can_reduce and reduce
    options = (y, fisher, sample_weight, seed, loss_weight, samples, likelihood)
    return collected(model, loss, x, adapters, *options)


def first_places(*arguments):
    """As many of the first examples as `places_of` draws of all: in place of it."""
    return tf.range(tf.size(places_of(*arguments)))


def collected(
    model,
    loss,
    x,
    adapters,
    y=None,
    fisher="exact",
    sample_weight=None,
    seed=(0, 0),
    loss_weight=1.0,
    samples=1,
    likelihood=None,
):
    """What some adapters see of one batch."""
    adapted = {id(layer): layer for a in adapters for layer in a.layers}.values()
    whole = {id(a.layer) for a in adapters if a.with_activation}
    around = _keras_internals.flatten_layers(model)
    with forward_pass.recording(adapted, whole, around) as recorded:
        recorded.outputs = model(x, training=True)
    score = Score(loss, recorded.outputs, y, sample_weight, loss_weight, y is not None)
    recorded.terms = [understood(score, 0, likelihood)]
    batch = statistics.collect(
        [recorded],
        adapters,
        statistics.Fisher(fisher),
        tf.convert_to_tensor(seed, tf.int32),
        tf.float64,
        samples,
    )
    return [batch.layers[id(a)] for a in adapters if id(a) in batch.layers]
