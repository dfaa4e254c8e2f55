"""Masked sequences: what is padded is as if it were not there."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, _keras_internals
from keras_kfac.math import factors as kronecker_factors
from keras_kfac.math.rows import stretched
from tests.cases import LOSS, factors
from tests.reference import assert_close, relative_difference

layers = keras.layers
FLOAT = {"dtype": "float64"}
MIDDLE = {
    "dense": lambda x: layers.Dense(3, "tanh", **FLOAT)(x),
    "relu": lambda x: layers.Dense(2, "relu", **FLOAT)(x),
    "lstm": lambda x: layers.LSTM(3, return_sequences=True, **FLOAT)(x),
    "gru": lambda x: layers.GRU(3, return_sequences=True, **FLOAT)(x),
    "multi-head": lambda x: layers.MultiHeadAttention(2, 3, **FLOAT)(x, x),
    "multi-head-key": lambda x: layers.MultiHeadAttention(2, 3, **FLOAT)(x, x, x),
    "grouped-query": lambda x: layers.GroupQueryAttention(2, 4, 2, **FLOAT)(x, x),
}
TOKENS = [[1, 2, 3, 4], [5, 6], [2, 2, 1]]
PADDED = np.array([row + [0] * (4 - len(row)) for row in TOKENS])


def network(name, is_masked=True, pools=False):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    normal = keras.initializers.RandomNormal(stddev=1.0, seed=1)
    embedding = layers.Embedding(7, 4, mask_zero=is_masked, embeddings_initializer=normal, **FLOAT)
    x = MIDDLE[name](embedding(tokens))
    if pools:
        x = layers.GlobalAveragePooling1D(**FLOAT)(x)
    return keras.Model(tokens, layers.Dense(2, **FLOAT)(x))


def adapted_layers(model):
    """Those with blocks, inside attention, too."""
    attention = (layers.MultiHeadAttention, layers.GroupQueryAttention)
    within = _keras_internals.flatten_layers(model)[1:]
    return [layer for layer in within if layer.weights and not isinstance(layer, attention)]


def averages(model, loss, weights, layers_of):
    """Factors of each sequence by itself, averaged."""
    results = [factors(model, loss, np.array([row]), layers=layers_of) for row in TOKENS]
    return [
        [sum(w * part for w, part in zip(weights, parts)) for parts in zip(*each)]
        for each in zip(*results)
    ]


# Keras's own warning: the projections of grouped queries see a mask that they do not pass on.
@pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning")
@pytest.mark.parametrize("name", MIDDLE)
def test_padded_batch_equals_the_sequences_one_by_one(name):
    """Identity 26, the bias's corner included: every token counts the same."""
    model, loss = network(name), LOSS["mse"].make()
    adapted = adapted_layers(model)
    together = factors(model, loss, PADDED, layers=adapted)
    weights = [len(row) / sum(map(len, TOKENS)) for row in TOKENS]
    for padded, alone in zip(together, averages(model, loss, weights, adapted)):
        assert_close(padded.input_factor, alone[0], 1e-12)
        assert_close(padded.output_factor, alone[1], 1e-12)
    unmasked = network(name, is_masked=False)
    unmasked.set_weights(model.get_weights())
    wrong = factors(unmasked, loss, PADDED, layers=adapted_layers(unmasked))
    for padded, other in zip(together, wrong):
        if padded.input_factor.shape[0] > 1:  # Not that of a bias by itself.
            assert relative_difference(other.input_factor, padded.input_factor) > 0.01


@pytest.mark.parametrize("name", ["lstm", "multi-head"])
def test_in_graphs_of_unknown_size(name):
    """As `fit` has them."""
    model, loss = network(name), LOSS["mse"].make()
    adapted = adapted_layers(model)
    graph = tf.function(
        lambda tokens: [tuple(own) for own in factors(model, loss, tokens, layers=adapted)],
        input_signature=[tf.TensorSpec([None, None], "int32")],
    )
    eager = factors(model, loss, PADDED, layers=adapted)
    for found, expected in zip(graph(tf.constant(PADDED, "int32")), eager):
        for actual, own in zip(found, expected):
            assert_close(actual, own, 1e-12)


@pytest.mark.parametrize("name", ["dense", "lstm"])
def test_every_sequence_counts_the_same_where_the_loss_pools(name):
    model, loss = network(name, pools=True), LOSS["mse"].make()
    adapted = adapted_layers(model)
    together = factors(model, loss, PADDED, layers=adapted)
    weights = [1 / len(TOKENS)] * len(TOKENS)
    for padded, alone in zip(together, averages(model, loss, weights, adapted)):
        assert_close(padded.input_factor, alone[0], 1e-12)
        assert_close(padded.output_factor, alone[1], 1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 4), (4,)], ids=["images", "examples"])
def test_masks_may_have_other_axes(shape):
    """An entry for each pixel, or for each example: what they hide has no part."""
    rng = np.random.default_rng(0)
    dense = layers.Dense(2, **FLOAT)
    body = [keras.Input(shape, dtype="float64"), layers.Masking(**FLOAT), dense]
    x = rng.normal(size=(6, *shape))
    counts = rng.random(size=x.shape[:-1]) < 0.6
    x *= counts[..., np.newaxis]
    model, loss = keras.Sequential(body), LOSS["mse"].make()
    ((a, _),) = factors(model, loss, x, layers=[dense])
    rows = np.c_[x[counts], np.ones(counts.sum())]
    assert_close(a, rows.T @ rows / len(rows))


class Pool(layers.Layer):
    """Averages pairs of steps, or all, and hands on the mask of single ones: Keras lets it."""

    supports_masking = True

    def __init__(self, window):
        super().__init__(dtype="float64")
        self.window = window

    def call(self, x):
        return tf.reduce_mean(tf.reshape(x, [-1, 6 // self.window, self.window, 4]), axis=2)

    def compute_mask(self, inputs, mask=None):
        return mask


@pytest.mark.parametrize("window", [2, 6])
def test_masks_may_be_of_what_was_pooled(window):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 6, 4))
    x[rng.random(size=(5, 6)) < 0.7] = 0
    x[0] = 0
    pooled = x.reshape(5, -1, window, 4).mean(axis=2)
    counts = (pooled != 0).any(axis=-1)
    assert not counts.all()
    dense = layers.Dense(2, **FLOAT)
    # No loss takes such a mask; but what it hides is not to arrive there.
    without = tf.constant(counts[..., np.newaxis], "float64")
    drop = layers.Lambda(lambda x: x * without, mask=lambda x, mask: None, **FLOAT)
    body = [layers.Masking(**FLOAT), Pool(window), dense, drop]
    model = keras.Sequential([keras.Input((6, 4), dtype="float64", batch_size=5), *body])
    ((a, _),) = factors(model, LOSS["mse"].make(), x, layers=[dense])
    # The loss counts all positions: examples count alike, if any of their positions does.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = np.c_[pooled[counts], np.ones(counts.sum())]
    assert_close(a, rows.T @ (rows * shares[counts][:, np.newaxis]) / counts.any(axis=1).sum())


@pytest.mark.parametrize("positions", [50_000, 25_000, 100_000])
def test_masks_may_be_long(positions):
    mask = tf.constant(np.random.default_rng(0).random((1, 50_000)) < 0.3)

    @tf.function(input_signature=[tf.TensorSpec([1, None], tf.bool)])
    def of_unknown_size(mask):
        return stretched(mask, tf.zeros([1, positions, 1]))

    known = stretched(mask, tf.zeros([1, positions, 1]))
    expected = np.repeat(mask, max(positions // 50_000, 1), axis=1)
    if positions < 50_000:
        expected = expected.reshape(1, positions, 2).any(axis=2)
    np.testing.assert_array_equal(known, expected)
    np.testing.assert_array_equal(of_unknown_size(mask), expected)


def losing(is_masked, operation):
    """A network in which something that is no layer drops the mask behind two layers."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    normal = keras.initializers.RandomNormal(stddev=1.0, seed=1)
    embedding = layers.Embedding(7, 4, mask_zero=is_masked, embeddings_initializer=normal, **FLOAT)
    x = layers.Dense(3, "relu", **FLOAT)(embedding(tokens))
    return keras.Model(tokens, layers.Dense(2, **FLOAT)(operation(x)))


LOSING = {
    "sum": lambda x: x + keras.ops.ones((4, 3), "float64"),
    "mean": lambda x: keras.ops.mean(x, axis=1, keepdims=True),
}


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", LOSING)
def test_masks_that_are_lost_hide_nothing(name, in_graph):
    def found(is_masked):
        model = losing(is_masked, LOSING[name])
        assert _keras_internals.mask_of(model(PADDED)) is None

        def of_batch():
            loss, adapted = LOSS["mse"].make(), adapted_layers(model)
            return [tuple(own) for own in factors(model, loss, PADDED, layers=adapted)]

        return tf.function(of_batch)() if in_graph else of_batch()

    for own, other in zip(found(True), found(False), strict=True):
        for actual, expected in zip(own, other, strict=True):
            assert_close(actual, expected, 1e-12)


def of_two_features(y_true, y_pred):
    return tf.square(y_true - y_pred[:, :2])


# That there is no likelihood.
@pytest.mark.filterwarnings("ignore:K-FAC knows no predictive:UserWarning")
@pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "graph"])
def test_losses_of_other_values_than_positions(run_eagerly):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    x = layers.LSTM(3)(layers.Embedding(7, 4, mask_zero=True)(tokens))
    model = keras.Model(tokens, layers.Dense(3)(x))
    optimizer = KFAC(0.1, damping=0.1, momentum=0.9, fisher="empirical").attach(model)
    model.compile(optimizer, of_two_features, run_eagerly=run_eagerly)
    before = float(model.train_on_batch(PADDED, np.ones((3, 2))))
    assert float(model.train_on_batch(PADDED, np.ones((3, 2)))) < before
    table = next(v for name, v in optimizer.model_variables.items() if "input_factor" in name)
    assert table.numpy()[0] == 0 < table.numpy()[1]


def test_weights_may_hide_what_a_lost_mask_should():
    model, loss = losing(True, LOSING["sum"]), LOSS["mse"].make()
    options = {"layers": adapted_layers(model), "sample_weight": (PADDED > 0).astype("float64")}
    table, *others = factors(model, loss, PADDED, **options)
    assert table.input_factor[0] == 0 < table.input_factor[1]
    for own in others:
        assert_close(own.input_factor[-1, -1], 1, 1e-12)


def test_masks_of_single_steps():
    """Keras hands a model within `TimeDistributed` an entry for each example."""
    dense = layers.Dense(2, **FLOAT)
    inner = keras.Sequential([keras.Input((4,), dtype="float64"), dense])
    body = [layers.Masking(**FLOAT), layers.TimeDistributed(inner, **FLOAT)]
    model = keras.Sequential([keras.Input((5, 4), dtype="float64"), *body])
    x = np.random.default_rng(0).normal(size=(6, 5, 4))
    x[:3, 3:] = 0
    ((a, g),) = factors(model, LOSS["mse"].make(), x, layers=[dense])
    counts = (x != 0).any(axis=-1)
    rows = np.c_[x[counts], np.ones(counts.sum())]
    assert_close(a, rows.T @ rows / len(rows))
    assert np.isfinite(g).all() and np.trace(g) > 0


def test_an_example_that_is_masked_whole_counts_for_nothing():
    mask = tf.constant([[1.0, 0.0], [0.0, 0.0]])
    rows = tf.constant([[[1.0], [np.nan]], [[np.nan], [np.inf]]])
    moment, weight = kronecker_factors.input_moment(rows, kronecker_factors.row_weights(None, mask))
    np.testing.assert_allclose(moment[0, 0] / weight, 1.0, rtol=1e-6)


def test_what_stands_at_masked_positions_does_not_matter():
    """The whole way: through the model's hooks and into the projections inside attention."""

    def input_factors(padding):
        model = network("multi-head")
        (table,) = model.layers[1].get_weights()
        table[0] = padding
        model.layers[1].set_weights([table])
        optimizer = KFAC(0.1, damping=1.0, momentum=0.0, fisher="exact").attach(model)
        model.compile(optimizer, "mse")
        model.train_on_batch(PADDED, np.zeros((3, 4, 2)))
        variables = optimizer.model_variables.items()
        return [v.numpy() for name, v in variables if "input_factor" in name]

    zero, one = input_factors(0.0), input_factors(1.0)
    assert len(zero) == 6
    for a, b in zip(zero, one):
        np.testing.assert_allclose(a, b, rtol=1e-6)
