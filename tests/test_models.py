"""Whole models: nearly all their weights have a curvature block, and they learn."""

import inspect
from functools import partial

import keras
import numpy as np
import pytest

from keras_kfac import KFAC, RawWeightsAdapter, WeightNoise, laplace, register
from keras_kfac.introspection import registry
from tests import helpers
from tests.cases import LOSS, factors
from tests.reference import assert_close, dense_ggn, kron, relative_difference

layers = keras.layers
RNG = np.random.default_rng(0)


class AddedWeights(keras.Layer):
    """Weights added to the inputs: embeddings of positions, or a token for the class."""

    def build(self, input_shape):
        self.added = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, inputs):
        return inputs + self.added


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "ADAPTERS", dict(registry.ADAPTERS))
    register(AddedWeights, RawWeightsAdapter)


def block(x, width, causal, norm=layers.LayerNormalization):
    h = norm()(x)
    x = x + layers.MultiHeadAttention(2, width // 2)(h, h, use_causal_mask=causal)
    h = layers.Dense(2 * width, "gelu")(norm()(x))
    return x + layers.Dense(width)(h)


def bert():
    """An encoder with a pooled head; dropout as usual."""
    tokens = keras.Input((8,), dtype="int32")
    x = AddedWeights()(layers.Embedding(11, 16)(tokens))
    x = layers.Dropout(0.1)(layers.LayerNormalization()(x))
    x = block(block(x, 16, causal=False), 16, causal=False)
    pooled = layers.Dense(16, "tanh")(x[:, 0])
    return keras.Model(tokens, layers.Dense(3)(pooled))


def gpt():
    """A decoder with a head at each position."""
    tokens = keras.Input((8,), dtype="int32")
    x = AddedWeights()(layers.Embedding(11, 16)(tokens))
    x = block(x, 16, causal=True, norm=layers.RMSNormalization)
    return keras.Model(tokens, layers.Dense(11)(layers.LayerNormalization()(x)))


def unet():
    """Down, up, and across; a class for each pixel."""
    images = keras.Input((8, 8, 1))

    def double(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    fine = double(images, 4)
    coarse = double(layers.MaxPooling2D()(fine), 8)
    up = layers.Conv2DTranspose(4, 2, strides=2)(coarse)
    return keras.Model(images, layers.Conv2D(3, 1)(double(layers.Concatenate()([up, fine]), 4)))


class Sampling(keras.Layer):
    """Draws a latent code, and adds its divergence from the prior to the loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, inputs):
        mean, log_variance = keras.ops.split(inputs, 2, axis=-1)
        kl = -0.5 * (1 + log_variance - mean**2 - keras.ops.exp(log_variance))
        self.add_loss(0.01 * keras.ops.mean(keras.ops.sum(kl, axis=-1)))
        noise = keras.random.normal(keras.ops.shape(mean), seed=self.seeds)
        return mean + keras.ops.exp(log_variance / 2) * noise


def vae():
    x = keras.Input((6,))
    code = Sampling()(layers.Dense(4)(layers.Dense(8, "tanh")(x)))
    return keras.Model(x, layers.Dense(6)(layers.Dense(8, "tanh")(code)))


def two_towers():
    """Users and items that share a projection; their match is a logit."""
    users, items = keras.Input((1,), dtype="int32"), keras.Input((1,), dtype="int32")
    project = layers.Dense(8, "tanh")
    towers = [
        project(layers.Flatten()(layers.Embedding(20, 8)(tokens))) for tokens in (users, items)
    ]
    return keras.Model([users, items], layers.Dense(1)(layers.Multiply()(towers)))


def tokens(model):
    steps = np.random.default_rng(0).integers(1, 3, (128, 9))
    both = np.cumsum(steps, axis=1) % 11
    return both[:, :-1], both[:, 1:] if len(model.output.shape) == 3 else both[:, 3] % 3


def pictures(model):
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 1))
    return x, np.digitize(x[..., 0], [-0.5, 0.5])


def codes(model):
    x = np.random.default_rng(0).normal(size=(128, 2)) @ np.ones((2, 6))
    return x, x


def matches(model):
    x = np.random.default_rng(0).integers(0, 20, (256, 2))
    return [x[:, :1], x[:, 1:]], ((x[:, 0] + x[:, 1]) % 2).astype("float32")[:, None]


CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
MODELS = {
    "bert": (bert, tokens, CROSSENTROPY),
    "gpt": (gpt, tokens, CROSSENTROPY),
    "u-net": (unet, pictures, CROSSENTROPY),
    "vae": (vae, codes, keras.losses.MeanSquaredError()),
    "two-towers": (two_towers, matches, keras.losses.BinaryCrossentropy(from_logits=True)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("gpt", "u-net") else []) for n in MODELS],
)
def test_models_are_covered_and_learn(name):
    keras.utils.set_random_seed(0)
    make, data, loss = MODELS[name]
    model = helpers.compiled(make(), KFAC(), loss)
    x, y = data(model)
    history = model.fit(x, y, 32, 6, verbose=0, callbacks=[helpers.KFACCallback()]).history["loss"]
    assert history[-1] < 0.85 * history[0]
    assert model.optimizer.coverage().fraction == 1
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


SMALL = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 8,
}


def hub_classifier(hub):
    backbone = hub.models.BertBackbone(**SMALL)
    return keras.Model(backbone.input, layers.Dense(3)(backbone.output["pooled_output"]))


def hub_language_model(hub):
    backbone = hub.models.GPT2Backbone(**SMALL)
    logits = backbone.token_embedding(backbone.output, reverse=True)
    return keras.Model(backbone.input, logits)


@pytest.mark.slow
@pytest.mark.parametrize("make", [hub_classifier, hub_language_model])
def test_models_of_keras_hub(make):
    hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    register(hub.layers.PositionEmbedding, RawWeightsAdapter)
    keras.utils.set_random_seed(0)
    model = helpers.compiled(make(hub), KFAC(), CROSSENTROPY)
    x, y = tokens(model)
    x = {
        "token_ids": x,
        "padding_mask": np.ones_like(x),
        **({"segment_ids": np.zeros_like(x)} if "segment_ids" in model.input else {}),
    }
    callbacks = [helpers.KFACCallback()]
    history = model.fit(x, y, 32, 20, verbose=0, callbacks=callbacks).history["loss"]
    assert history[-1] < 0.85 * history[0]
    assert model.optimizer.coverage().fraction == 1


class Twins(keras.Model):
    """Two layers of one name; Keras only sees to those of functional and sequential models."""

    def __init__(self):
        super().__init__()
        prior = dict.fromkeys(("kernel_regularizer", "bias_regularizer"), keras.regularizers.L2(1))
        self.first = layers.Dense(4, "tanh", name="twin", **prior)
        self.second = layers.Dense(helpers.CLASSES, name="twin", **prior)

    def call(self, inputs):
        return self.second(self.first(inputs))


def test_layers_of_one_name_are_numbered():
    """In all that is said of them by name; the state of an optimizer goes by their places."""
    x, y = helpers.vectors(8)
    model, optimizer = Twins(), helpers.kfac()
    model(x)
    helpers.compiled(model, optimizer, run_eagerly=True)
    noise = WeightNoise(8)
    expected = [row.layer for row in optimizer.attach(model).coverage()]
    helpers.fit(model, (x, y), 2, callbacks=[noise])
    assert len(expected) == 2 and expected[1] == f"{expected[0]} (2)"
    assert [row.layer for row in optimizer.coverage()] == expected
    assert [row.layer for row in optimizer.curvature_summary()] == expected
    posterior = laplace(model, x, y, prior_precision=1.0)
    assert posterior.coverage[1].layer == expected[1]
    known = (optimizer.condition_numbers(), optimizer.staleness(), noise.prior_precisions)
    for found in (*known, posterior.weights()):
        assert list(found) == expected
    paths = [v.path for v in optimizer.variables]
    assert len(set(paths)) == len(paths)


class TestWrappers:
    def test_time_distributed_is_the_layer_on_sequences(self):
        x, y = RNG.normal(size=(3, 4, 5)), RNG.normal(size=(3, 4, 2))
        found = []
        for wrap in (partial(layers.TimeDistributed, dtype="float64"), lambda layer: layer):
            keras.utils.set_random_seed(0)
            dense = layers.Dense(2, "tanh", dtype="float64")
            inputs = keras.Input((4, 5), dtype="float64")
            outputs = layers.Dense(2, dtype="float64")(wrap(dense)(inputs))
            model = keras.Model(inputs, outputs)
            (row, _) = KFAC().attach(model, loss="mse").coverage()
            assert row.block == "kronecker"
            found.append(factors(model, LOSS["mse"].make(), x, y, layers=[dense])[0])
        assert_close(found[0].input_factor, found[1].input_factor, 1e-13)
        assert_close(found[0].output_factor, found[1].output_factor, 1e-13)

    def test_spectral_normalization(self):
        keras.utils.set_random_seed(0)
        inner = layers.Dense(8, "tanh")
        model = keras.Sequential(
            [keras.Input((5,)), layers.SpectralNormalization(inner), layers.Dense(3)]
        )
        model = helpers.compiled(model, KFAC())
        history = helpers.fit(model, helpers.vectors(64), epochs=10).history["loss"]
        assert history[-1] < 0.3 * history[0]
        assert model.optimizer.coverage().fraction == 1
        assert model.optimizer.rejected_steps < 10


class TestSharedLayers:
    @staticmethod
    def siamese(activation):
        keras.utils.set_random_seed(0)
        left, right = (keras.Input((4,), dtype="float64") for _ in range(2))
        shared = layers.Dense(3, activation, dtype="float64", bias_initializer="random_normal")
        both = layers.Concatenate(dtype="float64")([shared(left), shared(right)])
        return keras.Model([left, right], both), shared

    @pytest.mark.parametrize("activation", [None, "tanh"])
    def test_uses_are_terms_of_one_block(self, activation):
        """Identity 28: exact if the Jacobians of the uses agree, as those of a linear layer."""
        model, shared = self.siamese(activation)
        x = [RNG.normal(size=(2, 4)) for _ in range(2)]
        y, loss = RNG.normal(size=(2, 6)), LOSS["mse"].make()
        a, g = factors(model, loss, x)[0]
        dense = dense_ggn(model, loss, x, y, [shared.kernel, shared.bias])
        if activation is None:
            assert_close(kron(a, g), dense)
        else:
            assert relative_difference(kron(a, g), dense) > 0.01

    def test_nested_model_used_twice(self):
        keras.utils.set_random_seed(0)
        part = keras.Sequential([keras.Input((4,)), layers.Dense(4, "tanh"), layers.Dense(4)])
        x = keras.Input((4,))
        model = keras.Model(x, layers.Dense(3)(part(part(x))))
        model = helpers.compiled(model, KFAC())
        features, labels = helpers.vectors(64)
        history = helpers.fit(model, (features[:, :4], labels), epochs=10).history["loss"]
        assert history[-1] < 0.3 * history[0]
        assert model.optimizer.coverage().fraction == 1


APPLICATIONS = [
    name
    for name, thing in vars(keras.applications).items()
    if inspect.isfunction(thing) and name[0].isupper()
]


@pytest.mark.parametrize(
    "name",
    [
        name if name == "MobileNetV3Small" else pytest.param(name, marks=pytest.mark.slow)
        for name in APPLICATIONS
    ],
)
def test_architectures_are_covered(name):
    """Computed from shapes: nothing is allocated."""
    model = getattr(keras.applications, name)(weights=None)
    optimizer = KFAC().attach(model, loss=CROSSENTROPY)
    before = len(optimizer.variables)
    assert optimizer.coverage().fraction > 0.95
    assert len(optimizer.variables) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["MobileNetV3Small", "ResNet50", "EfficientNetV2B0", "ConvNeXtTiny"]
)
def test_architectures_take_finite_steps(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, classes=10, input_shape=(32, 32, 3))
    model.compile(KFAC(), "sparse_categorical_crossentropy")
    x, y = RNG.uniform(0, 255, (32, 32, 32, 3)), RNG.integers(0, 10, 32)
    history = model.fit(x, y, 16, 2, 0, [helpers.KFACCallback()]).history["loss"]
    assert np.isfinite(history).all()
    assert all(np.isfinite(weights).all() for weights in model.get_weights())
