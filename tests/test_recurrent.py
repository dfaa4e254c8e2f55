"""Recurrent layers: their rows and gradients at each step, their blocks, and how they train."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kfac import KFAC, _keras_internals
from keras_kfac.introspection import forward_pass, registry, replay
from tests import helpers, strategies
from tests.cases import mlp
from tests.oracle import check_equals_ggn
from tests.reference import assert_close

layers = keras.layers
RNG = np.random.default_rng(0)
COMMON = {"dtype": "float64", "bias_initializer": "random_normal"}

LAYERS = {
    "simple": lambda **k: layers.SimpleRNN(3, **COMMON, **k),
    "simple-no-bias": lambda **k: layers.SimpleRNN(3, **COMMON, use_bias=False, **k),
    "lstm": lambda **k: layers.LSTM(3, **COMMON, **k),
    "lstm-no-bias": lambda **k: layers.LSTM(3, **COMMON, use_bias=False, **k),
    "gru": lambda **k: layers.GRU(3, **COMMON, **k),
    "gru-no-bias": lambda **k: layers.GRU(3, **COMMON, use_bias=False, **k),
    "gru-reset-before": lambda **k: layers.GRU(3, **COMMON, reset_after=False, **k),
    "gru-reset-before-no-bias": lambda **k: layers.GRU(
        3, **COMMON, reset_after=False, use_bias=False, **k
    ),
    "rnn-of-cell": lambda **k: layers.RNN(layers.GRUCell(3, **COMMON), dtype="float64", **k),
    "stacked": lambda **k: layers.RNN(
        layers.StackedRNNCells(
            [layers.LSTMCell(2, **COMMON), layers.GRUCell(3, **COMMON)], dtype="float64"
        ),
        dtype="float64",
        **k,
    ),
    "conv-lstm": lambda **k: layers.ConvLSTM1D(2, 3, padding="same", **COMMON, **k),
    "conv-lstm-strided": lambda **k: layers.ConvLSTM2D(2, (2, 3), strides=(1, 2), **COMMON, **k),
    "conv-lstm-no-bias": lambda **k: layers.ConvLSTM1D(
        2, 3, dilation_rate=2, use_bias=False, **COMMON, **k
    ),
}
SHAPES = {"conv-lstm": (4, 3), "conv-lstm-strided": (3, 5, 2), "conv-lstm-no-bias": (6, 2)}
OPTIONS = {
    "last": {},
    "sequences": {"return_sequences": True},
    "backwards": {"go_backwards": True},
    "backwards-sequences": {"go_backwards": True, "return_sequences": True},
    "unrolled": {"unroll": True},
    "states": {"return_state": True},
}


def inputs_for(name, examples, steps=4):
    return RNG.normal(size=(examples, steps, *SHAPES.get(name, (5,))))


def random_like(structure):
    return tf.nest.map_structure(lambda x: tf.constant(RNG.normal(size=x.shape)), structure)


def adapters_of(layer, trained=lambda v: True):
    return registry.adapt(layer, trained)


def recorded_call(layer, x, **kwargs):
    with forward_pass.recording([layer], with_activation=[id(layer)]) as recorded:
        outputs = layer(x, **kwargs)
    (call,) = recorded.calls[id(layer)]
    vector = random_like(outputs)
    (gradient,) = recorded.output_gradients([layer], outputs, vector)[id(layer)]
    return call, gradient, vector


def check_gradients_are_products_of_rows(layer, x, **kwargs):
    """The gradient of all weights is the sum over steps of input rows times output rows."""
    layer(x)
    kwargs["initial_state"] = random_like(layer.get_initial_state(len(x)))
    call, gradient, vector = recorded_call(layer, x, **kwargs)
    adapters = adapters_of(layer)
    covered = [id(v) for a in adapters for v in a.variables]
    assert sorted(covered) == sorted(id(v) for v in layer.trainable_weights)
    with tf.GradientTape() as tape:
        outputs = tf.nest.flatten(layer(x, **kwargs))
        value = sum(tf.reduce_sum(o * v) for o, v in zip(outputs, tf.nest.flatten(vector)))
    gradients = tape.gradient(value, {id(v): v.value for v in layer.trainable_weights})
    for adapter in adapters:
        inputs, states, back, *_ = adapter.observed(call)
        rows = adapter.output_rows(gradient, inputs, states, back)
        products = tf.einsum("...bpi,...bpo->...io", adapter.input_rows(inputs, states), rows)
        assert tuple(products.shape[-2:]) == adapter.dims
        assert_close(products, adapter.to_matrix(gradients), 1e-12)
        # A part of the batch has the same rows.
        last = tf.nest.map_structure(lambda g: g[1:], gradient)
        part = adapter.output_rows(last, inputs[1:], states[1:], back.of_examples(tf.constant([1])))
        np.testing.assert_array_equal(part, tf.gather(rows, [1], axis=rows.shape.rank - 3))


@pytest.mark.parametrize(
    ("name", "option", "masked"),
    [
        *((name, "backwards-sequences", True) for name in LAYERS),
        *((name, o, False) for name in ("lstm", "gru", "conv-lstm-strided") for o in OPTIONS),
    ],
)
def test_gradients_are_products_of_rows(name, option, masked):
    keras.utils.set_random_seed(0)
    layer, x = LAYERS[name](**OPTIONS[option]), tf.constant(inputs_for(name, 2))
    kwargs = {"mask": tf.constant([[True] * 4, [True, False, True, False]])} if masked else {}
    check_gradients_are_products_of_rows(layer, x, **kwargs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    make=strategies.recurrent(),
    mask=st.none() | st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_gradients_of_drawn_layers_are_products_of_rows(make, mask):
    keras.utils.set_random_seed(0)
    kwargs = {} if mask is None else {"mask": tf.constant([[True] * 3, mask])}
    x = tf.constant(RNG.normal(size=(2, 3, 3)))
    check_gradients_are_products_of_rows(make(), x, **kwargs)


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_go_back_to_tensors(name):
    layer = LAYERS[name]()
    layer(inputs_for(name, 1))
    for adapter in adapters_of(layer):
        values = {id(v): tf.constant(RNG.normal(size=v.shape)) for v in adapter.variables}
        matrix = adapter.to_matrix(values)
        assert tuple(matrix.shape[-2:]) == adapter.dims
        back = adapter.from_matrix(matrix)
        assert back.keys() == values.keys()
        for key, value in values.items():
            np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in SHAPES] + ["conv-lstm"])
def test_one_step_of_one_example_equals_the_ggn(name):
    """Identity 5; of a convolution with one pixel."""
    keras.utils.set_random_seed(0)
    layer = LAYERS[name]()
    data = tf.constant(RNG.normal(size=(1, 1, *((1, 3) if name in SHAPES else (5,)))))
    layer(data)
    state = random_like(layer.get_initial_state(1))
    inputs = tf.nest.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype="float64"), [data, state]
    )
    outputs = layers.Dense(2, dtype="float64")(layers.Flatten()(layer(*inputs)))
    model = keras.Model(inputs, outputs)
    data = [data, state]
    check_equals_ggn(model, [layer], data)


@pytest.mark.parametrize("trained", ["kernel", "recurrent_kernel", "bias"])
@pytest.mark.parametrize("name", ["lstm", "gru", "gru-reset-before"])
def test_frozen_weights_leave_the_block_of_the_others(name, trained):
    layer = LAYERS[name]()
    layer.build((None, 4, 5))
    variable = getattr(layer.cell, trained)
    (adapter,) = adapters_of(layer, lambda v: v is variable)
    assert adapter.variables == [variable]
    assert tuple(adapter.to_matrix({id(variable): variable.value}).shape[-2:]) == adapter.dims


def test_products_in_double_reverse_mode_are_those_in_forward_mode():
    model = mlp((4, 5, 3))
    x = tf.constant(RNG.normal(size=(6, 4)))
    primals = {id(v): tf.convert_to_tensor(v) for v in model.weights}
    directions = [
        {key: tf.constant(RNG.normal(size=value.shape)) for key, value in primals.items()},
        {id(model.weights[0]): tf.constant(RNG.normal(size=(4, 5)))},
    ]
    run = replay.Replay(model, (x,), {})
    function = lambda weights: [run.outputs(weights)]  # noqa: E731
    (outputs,), expected = replay._forward_mode(function, primals, directions)
    (same,), actual = replay._double_reverse_mode(function, primals, directions)
    np.testing.assert_array_equal(outputs, same)
    for (one,), (other,) in zip(actual, expected):
        assert_close(one, other, 1e-12)


# ---- Training -----------------------------------------------------------------------------------


def classifier(*body):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(7, 8), *body, layers.Dense(3)]
    )


def sequences(examples=64):
    x = np.random.default_rng(0).integers(0, 7, (examples, 6))
    return x, x[:, -1] % 3


def slow(name):
    """A parameter that only the slow tests take."""
    return pytest.param(name, marks=pytest.mark.slow)


DROPOUT = {"dropout": 0.1, "recurrent_dropout": 0.1}
BODIES = {
    "simple": lambda: [layers.SimpleRNN(8)],
    "both-ways": lambda: [layers.Bidirectional(layers.GRU(8, reset_after=False))],
    "stacked": lambda: [layers.RNN([layers.LSTMCell(8, **DROPOUT), layers.GRUCell(8)])],
    "convolutional": lambda: [
        layers.Reshape((6, 4, 2)),
        layers.ConvLSTM1D(4, 2, **DROPOUT),
        layers.Flatten(),
    ],
}


@pytest.mark.parametrize(
    "name", ["simple", *(slow(name) for name in ("both-ways", "stacked", "convolutional"))]
)
def test_learns(name):
    keras.utils.set_random_seed(0)
    model = helpers.compiled(classifier(*BODIES[name]()), KFAC())
    history = helpers.fit(model, sequences(), epochs=6).history["loss"]
    assert history[-1] < 0.3 * history[0]
    coverage = model.optimizer.coverage()
    assert coverage.fraction == 1, str(coverage)
    cells = [row for row in coverage if row.layer_type.endswith("Cell")]
    assert cells and {row.block for row in cells} == {"kronecker"}


@pytest.mark.slow
def test_learns_under_xla():
    model = helpers.compiled(classifier(layers.LSTM(8, unroll=True)), KFAC(), jit_compile=True)
    history = helpers.fit(model, sequences(), epochs=6).history["loss"]
    assert history[-1] < 0.3 * history[0]


def test_observing_draws_the_dropout_of_the_call_and_no_other():
    """Identity 29: the stream of random numbers stays where it is, and the masks are the same."""
    layer = layers.LSTM(3, dropout=0.5, return_sequences=True, **COMMON)
    x = tf.constant(RNG.normal(size=(2, 4, 5)))
    with forward_pass.recording([layer], with_activation=[id(layer)]) as recorded:
        outputs = layer(x, training=True)
    state = layer.cell.seed_generator.state.numpy()
    (adapter,) = adapters_of(layer)
    _, states, _ = adapter.observed(recorded.calls[id(layer)][0])
    np.testing.assert_array_equal(layer.cell.seed_generator.state, state)
    np.testing.assert_array_equal(states[:, 1:], outputs[:, :-1])


def test_recording_leaves_layer_and_cell_as_they_were():
    model = classifier(layers.LSTM(4, dropout=0.5, stateful=False))
    before = [dict(vars(layer)) for layer in _keras_internals.flatten_layers(model)]
    helpers.fit(helpers.compiled(model, KFAC()), sequences(16))
    model.optimizer.detach()
    for layer, own in zip(_keras_internals.flatten_layers(model), before):
        if layer is not model:
            for name in ("cell", "return_sequences", "bias", "use_bias", "implementation"):
                assert vars(layer).get(name) is own.get(name)


class SlowCell(layers.SimpleRNNCell):
    """A cell with mathematics of its own."""

    def call(self, sequence, states, training=False):
        output, new_states = super().call(sequence, states, training)
        return output, [(states[0] + new_states[0]) / 2]


def test_a_cell_of_a_user_says_why_it_has_no_block_and_trains():
    model = helpers.compiled(classifier(layers.RNN([layers.GRUCell(4), SlowCell(4)])), KFAC())
    history = helpers.fit(model, sequences(), epochs=4).history["loss"]
    assert history[-1] < history[0]
    rows = [row for row in model.optimizer.coverage() if row.block == "fallback"]
    assert rows and {row.reason for row in rows} == {
        "no curvature block for cells of class SlowCell"
    }


def test_encoder_whose_states_start_a_decoder_learns():
    keras.utils.set_random_seed(0)
    x = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(7, 8)(x)
    _, *state = layers.LSTM(8, return_state=True)(embedded)
    decoded = layers.LSTM(8, return_sequences=True)(embedded, initial_state=state)
    model = helpers.compiled(keras.Model(x, layers.Dense(7)(decoded)), KFAC())
    tokens, _ = sequences()
    history = helpers.fit(model, (tokens, tokens[:, ::-1]), epochs=20).history["loss"]
    assert history[-1] < 0.6 * history[0]  # .45 to .54 over six runs with different draws
    assert model.optimizer.coverage().fraction == 1
