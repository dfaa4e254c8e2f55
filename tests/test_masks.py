"""Masked sequences: what is padded is as if it were not there."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac.math import factors as kronecker_factors
from tests.cases import LOSS, factors
from tests.reference import assert_close, relative_difference

layers = keras.layers
FLOAT = {"dtype": "float64"}
MIDDLE = {
    "dense": lambda: layers.Dense(3, "tanh", **FLOAT),
    "lstm": lambda: layers.LSTM(3, return_sequences=True, **FLOAT),
    "gru": lambda: layers.GRU(3, return_sequences=True, **FLOAT),
}
TOKENS = [[1, 2, 3, 4], [5, 6], [2, 2, 1]]
PADDED = np.array([row + [0] * (4 - len(row)) for row in TOKENS])


def network(name, is_masked=True, pools=False):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    normal = keras.initializers.RandomNormal(stddev=1.0, seed=1)
    embedding = layers.Embedding(7, 4, mask_zero=is_masked, embeddings_initializer=normal, **FLOAT)
    x = MIDDLE[name]()(embedding(tokens))
    if pools:
        x = layers.GlobalAveragePooling1D(**FLOAT)(x)
    return keras.Model(tokens, layers.Dense(2, **FLOAT)(x))


def averages(model, loss, weights, layers_of):
    """Factors of each sequence by itself, averaged."""
    results = [factors(model, loss, np.array([row]), layers=layers_of) for row in TOKENS]
    return [
        [sum(w * part for w, part in zip(weights, parts)) for parts in zip(*each)]
        for each in zip(*results)
    ]


@pytest.mark.parametrize("name", MIDDLE)
def test_padded_batch_equals_the_sequences_one_by_one(name):
    """Identity 26, the bias's corner included: every token counts the same."""
    model, loss = network(name), LOSS["mse"].make()
    adapted = [layer for layer in model.layers if layer.weights]
    together = factors(model, loss, PADDED, layers=adapted)
    weights = [len(row) / sum(map(len, TOKENS)) for row in TOKENS]
    for padded, alone in zip(together, averages(model, loss, weights, adapted)):
        assert_close(padded.input_factor, alone[0], 1e-12)
        assert_close(padded.output_factor, alone[1], 1e-12)
    unmasked = network(name, is_masked=False)
    unmasked.set_weights(model.get_weights())
    adapted = [layer for layer in unmasked.layers if layer.weights]
    wrong = factors(unmasked, loss, PADDED, layers=adapted)
    for padded, other in zip(together, wrong):
        if padded.input_factor.shape[0] > 1:  # Not that of a bias by itself.
            assert relative_difference(other.input_factor, padded.input_factor) > 0.01


@pytest.mark.parametrize("name", ["dense", "lstm"])
def test_every_sequence_counts_the_same_where_the_loss_pools(name):
    model, loss = network(name, pools=True), LOSS["mse"].make()
    adapted = [layer for layer in model.layers if layer.weights]
    together = factors(model, loss, PADDED, layers=adapted)
    weights = [1 / len(TOKENS)] * len(TOKENS)
    for padded, alone in zip(together, averages(model, loss, weights, adapted)):
        assert_close(padded.input_factor, alone[0], 1e-12)
        assert_close(padded.output_factor, alone[1], 1e-12)


def test_an_example_that_is_masked_whole_counts_for_nothing():
    mask = tf.constant([[1.0, 0.0], [0.0, 0.0]])
    rows = tf.constant([[[1.0], [np.nan]], [[np.nan], [np.inf]]])
    moment, weight = kronecker_factors.input_moment(rows, kronecker_factors.row_weights(None, mask))
    np.testing.assert_allclose(moment[0, 0] / weight, 1.0, rtol=1e-6)
