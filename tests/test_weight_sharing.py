"""Layers that use their weights at many positions: "expand" and "reduce"."""

import keras
import numpy as np
import pytest

from keras_kfac import KFAC
from tests import helpers
from tests.cases import LAYERS, LOSS, factors
from tests.reference import assert_close, kron, layer_block, relative_difference

layers = keras.layers
RNG = np.random.default_rng(0)
FLOAT = {"dtype": "float64"}


class Mean(keras.Layer):
    """The mean over axes."""

    def __init__(self, axis):
        super().__init__(**FLOAT)
        self.axis = axis

    def call(self, inputs):
        return keras.ops.mean(inputs, axis=self.axis)


SHARED = {
    "dense-positions": (1, 2),
    "conv1d-same-strided": 1,
    "conv1d-causal": 1,
    "conv2d-same-strided": (1, 2),
    "conv2d-dilated": (1, 2),
    "conv3d-valid": (1, 2, 3),
    "einsum-query": 1,
}


@pytest.mark.parametrize("name", SHARED)
def test_reduce_is_exact_where_the_loss_averages(name):
    """Identity 11b: a linear layer, the mean over its positions, squared loss."""
    keras.utils.set_random_seed(0)
    (case,) = [case for case in LAYERS if case.name == name]
    layer = case.make()
    inputs = keras.Input(case.input_shape, **FLOAT)
    model = keras.Model(inputs, layers.Flatten(**FLOAT)(Mean(SHARED[name])(layer(inputs))))
    x, loss = RNG.normal(size=(3, *case.input_shape)), LOSS["mse"].make()
    y = RNG.normal(size=model(x).shape)
    dense = layer_block(model, loss, x, y, layer)
    assert_close(kron(*factors(model, loss, x, layers=[layer], reduce=True)[0]), dense)
    expand = kron(*factors(model, loss, x, layers=[layer])[0])
    assert relative_difference(expand, dense) > 0.1


def test_reduce_is_not_exact_where_each_position_has_a_target():
    keras.utils.set_random_seed(0)
    layer = layers.Dense(3, **FLOAT)
    model = keras.Sequential([keras.Input((5, 4), **FLOAT), layer])
    x, y, loss = RNG.normal(size=(3, 5, 4)), RNG.normal(size=(3, 5, 3)), LOSS["mse"].make()
    dense = layer_block(model, loss, x, y, layer)
    assert_close(kron(*factors(model, loss, x)[0]), dense)
    assert relative_difference(kron(*factors(model, loss, x, reduce=True)[0]), dense) > 0.1


def test_mean_in_the_middle_of_a_linear_network():
    """Identity 12."""
    keras.utils.set_random_seed(0)
    dense = [layers.Dense(n, bias_initializer="random_normal", **FLOAT) for n in (3, 3, 3, 2)]
    body = [*dense[:2], layers.GlobalAveragePooling1D(**FLOAT), *dense[2:]]
    model = keras.Sequential([keras.Input((5, 7), **FLOAT), *body])
    x, y, loss = RNG.normal(size=(6, 5, 7)), RNG.normal(size=(6, 2)), LOSS["mse"].make()
    expand = factors(model, loss, x, layers=dense)
    reduce = factors(model, loss, x, layers=dense, reduce=True)
    for index, layer in enumerate(dense):
        block = layer_block(model, loss, x, y, layer)
        assert_close(kron(*reduce[index]), block)
        if index < 2:
            assert relative_difference(kron(*expand[index]), block) > 0.01
            assert relative_difference(expand[index][0], reduce[index][0]) > 0.01
        else:
            assert_close(expand[index][0], reduce[index][0], 1e-14)
            assert_close(expand[index][1], reduce[index][1], 1e-14)
    rows = KFAC(weight_sharing="auto").attach(model, loss=loss).coverage()
    reason = f"reduce: {body[2].name!r} averages over positions"
    assert [row.reason for row in rows] == [reason, reason, "", ""]


def test_masked_positions_do_not_count():
    """Identity 26: as each sequence by itself, without its padding."""
    keras.utils.set_random_seed(0)
    layer = layers.Dense(3, bias_initializer="random_normal", **FLOAT)
    body = [layers.Masking(**FLOAT), layer, layers.GlobalAveragePooling1D(**FLOAT)]
    model = keras.Sequential([keras.Input((None, 4), **FLOAT), *body])
    x, loss = RNG.normal(size=(2, 5, 4)), LOSS["mse"].make()
    x[1, 3:] = 0
    both = factors(model, loss, x, layers=[layer], reduce=True)[0]
    first = factors(model, loss, x[:1], layers=[layer], reduce=True)[0]
    second = factors(model, loss, x[1:, :3], layers=[layer], reduce=True)[0]
    for index in range(2):
        assert_close(both[index], (first[index] + second[index]) / 2, 1e-12)


# ---- Which layers -------------------------------------------------------------------------------


def conv(filters=2, **kwargs):
    return layers.Conv2D(filters, 3, padding="same", **kwargs)


def pooled_twice():
    x = inputs = keras.Input((4, 4, 1))
    x = conv(activation="relu", name="first")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(2, 1, activation="sigmoid", name="gate")(gate)
    x = layers.Add()([x, conv(name="branch")(layers.Multiply()([x, gate]))])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x)), {"first", "branch", "gate"}


def flattened():
    x = inputs = keras.Input((4, 4, 1))
    x = layers.Flatten()(layers.AveragePooling2D(2)(conv(name="first")(x)))
    return keras.Model(inputs, layers.Dense(3, name="head")(x)), set()


def one_use_of_two():
    x = inputs = keras.Input((4, 4, 1))
    x = conv(name="first")(x)
    pooled = layers.GlobalAveragePooling2D()(conv(name="second")(x))
    both = layers.Concatenate()([layers.Flatten()(x), pooled])
    return keras.Model(inputs, layers.Dense(3, name="head")(both)), {"second"}


def vision_transformer():
    x = inputs = keras.Input((4, 6))
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 3, name="attention")(h, h)
    x = x + layers.Dense(6, name="mlp")(layers.Dense(8, "gelu", name="wide")(x))
    x = keras.ops.mean(x, axis=1)
    names = {"query", "key", "value", "attention_output", "mlp", "wide"}
    return keras.Model(inputs, layers.Dense(3, name="head")(x)), names


def class_token():
    x = inputs = keras.Input((4, 6))
    x = layers.Dense(6, name="wide")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x[:, 0])), set()


def nested():
    x = inputs = keras.Input((4, 4, 2))
    body = keras.Sequential([keras.Input((4, 4, 2)), conv(name="inner"), layers.ReLU()])
    ending = keras.Sequential(
        [keras.Input((4, 4, 2)), conv(name="last"), layers.GlobalAveragePooling2D()]
    )
    x = ending(body(body(x)))
    return keras.Model(inputs, layers.Dense(3, name="head")(x)), {"inner", "last"}


class Subclass(keras.Model):
    """What its `call` does can't be seen, but what its parts do."""

    def __init__(self):
        super().__init__()
        self.first, self.head = conv(name="first"), layers.Dense(3, name="head")
        self.body = keras.Sequential(
            [keras.Input((4, 4, 2)), conv(name="inner"), layers.GlobalAveragePooling2D()]
        )

    def call(self, inputs):
        return self.head(self.body(self.first(inputs)))


def subclassed():
    model = Subclass()
    model(np.zeros((1, 4, 4, 1)))
    return model, {"inner"}


MODELS = [
    pooled_twice,
    flattened,
    one_use_of_two,
    vision_transformer,
    class_token,
    nested,
    subclassed,
]


def reducing(model):
    rows = KFAC(weight_sharing="auto").attach(model, loss="mse").coverage()
    return {row.layer.split("/")[-1] for row in rows if "reduce" in row.reason}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_layers_before_an_average_over_positions_reduce(make):
    model, names = make()
    assert reducing(model) == names


def test_choices():
    model, _ = pooled_twice()
    optimizer = KFAC(weight_sharing={"first": "expand", "branch": "reduce"})
    reasons = {row.layer: row.reason for row in optimizer.attach(model, loss="mse").coverage()}
    assert reasons == {"first": "", "gate": "", "branch": "reduce: as set", "head": ""}
    optimizer.detach()
    everywhere = KFAC(weight_sharing="reduce").attach(model, loss="mse")
    assert {row.reason for row in everywhere.coverage()} == {"reduce: as set"}
    everywhere.detach()
    nowhere = KFAC().attach(model, loss="mse")
    assert {row.reason for row in nowhere.coverage()} == {""}


def test_choice_takes_effect():
    model = keras.Sequential([keras.Input((4, 4, 1)), conv(), layers.GlobalAveragePooling2D()])
    x, y = RNG.normal(size=(8, 4, 4, 1)), RNG.normal(size=(8, 2))
    found = []
    for choice in ("auto", "reduce", "expand"):
        optimizer = helpers.kfac(weight_sharing=choice, learning_rate=0.0, fisher="exact")
        helpers.fit(helpers.compiled(model, optimizer, keras.losses.MeanSquaredError()), (x, y))
        found.append(optimizer.model_variables["block.0.input_factor"].numpy())
        optimizer.detach()
    np.testing.assert_array_equal(found[0], found[1])
    assert relative_difference(found[2], found[0]) > 0.1


@pytest.mark.parametrize("name", ["rnn", "cell", "norm"])
def test_what_can_only_expand_is_refused_by_name_and_expands_otherwise(name):
    rnn = layers.RNN(layers.SimpleRNNCell(3, name="cell"), name="rnn")
    body = [layers.LayerNormalization(name="norm"), rnn]
    model = keras.Sequential([keras.Input((4, 2)), *body, layers.Dense(1, name="head")])
    optimizer = KFAC(weight_sharing={name: "reduce"}).attach(model, loss="mse")
    with pytest.raises(ValueError, match=rf"Leave them out. Received: .*{name}', a "):
        optimizer.coverage()
    optimizer.detach()
    rows = KFAC(weight_sharing="reduce").attach(model, loss="mse").coverage()
    assert [row.layer.split("/")[-1] for row in rows if row.reason] == ["head"]


def test_unknown_layers_are_refused():
    model, _ = flattened()
    optimizer = KFAC(weight_sharing={"frist": "reduce"}).attach(model, loss="mse")
    with pytest.raises(ValueError, match=r"does not have. Use .* Received: \['frist'\]"):
        optimizer.coverage()


@pytest.mark.parametrize("value", ["both", None, {"first": "auto"}, 3])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="Received: weight_sharing="):
        KFAC(weight_sharing=value)


def test_config():
    optimizer = KFAC(weight_sharing={"first": "reduce"})
    assert KFAC.from_config(optimizer.get_config()).weight_sharing == {"first": "reduce"}


def test_pooled_network_learns():
    keras.utils.set_random_seed(0)
    body = [conv(8, activation="relu"), conv(8, activation="relu"), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((6, 6, 1)), *body, layers.Dense(3)])
    x = RNG.normal(size=(96, 6, 6, 1))
    y = np.digitize(np.abs(x).mean((1, 2, 3)), [0.75, 0.85])
    model = helpers.compiled(model, KFAC(weight_sharing="auto"))
    history = helpers.fit(model, (x, y), epochs=15).history["loss"]
    assert history[-1] < 0.7 * history[0]
