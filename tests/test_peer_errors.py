"""What tensorflow/kfac 0.2.4 gets wrong without a word, and which of our tests would see it."""

import importlib

import keras
import numpy as np
import pytest

from keras_kfac import KFAC
from tests import helpers
from tests.cases import LOSS, factors, mlp
from tests.reference import assert_close, kron, layer_block

RNG = np.random.default_rng(0)

SEEN_BY = {
    "losses that average over outputs are registered as sums": [
        "test_exactness.TestScale.test_mse_is_not_summed_over_outputs",
        "test_known_losses.test_fisher_matrix_of_the_outputs",
    ],
    "channels of grouped convolutions are mixed": ["test_layers.TestLayer.test_equals_ggn"],
    "dilation is left out of the number of locations": [
        "test_math.TestPatches.test_input_factor_against_loops"
    ],
    "probabilities of a Softmax layer are taken for logits": [
        "test_peer_errors.test_softmax_layer_leads_to_its_logits"
    ],
    "weights of examples or classes and masks do not reach the Fisher matrix": [
        "test_exactness.TestScale.test_sample_weights_are_counts",
        "test_known_losses.test_class_weights_are_sample_weights",
        "test_masks.test_padded_batch_equals_the_sequences_one_by_one",
    ],
    "a scale of zero makes all of a normalization NaN": [
        "test_peer_errors.test_normalization_whose_scale_starts_at_zero_learns"
    ],
    "a default decay is another one than the same decay given": [
        "test_peer_errors.test_defaults_are_what_they_say"
    ],
    "a batch that is not finite ends all training": [
        "test_failures.test_batch_that_is_not_finite_is_left_out_and_counted"
    ],
    "damping falls though the model promised a rise": [
        "test_step_control.test_ratio_says_nothing_without_a_predicted_decrease"
    ],
    "numbers of a float64 model go through float32": [
        "test_peer_errors.test_float64_keeps_its_digits"
    ],
    "adaptive damping without the loss dies of something else": [
        "test_step_control.test_custom_loop_without_targets_cannot_adapt_the_damping"
    ],
}


@pytest.mark.parametrize("error", SEEN_BY)
def test_every_error_would_be_seen(error):
    for path in SEEN_BY[error]:
        module, *names = path.split(".")
        found = importlib.import_module(f"tests.{module}")
        for name in names:
            found = getattr(found, name)


def test_softmax_layer_leads_to_its_logits():
    """The peer's G is off by 89 %."""
    logits = mlp((4, 3))
    model = keras.Sequential([*logits.layers, keras.layers.Softmax(dtype="float64")])
    model.build((None, 4))
    x, y = RNG.normal(size=(1, 4)), np.eye(3)[:1]
    loss = keras.losses.CategoricalCrossentropy(dtype="float64")
    ((a, g),) = factors(model, loss, x)
    of_logits = LOSS["cce-logits"].make()
    assert_close(kron(a, g), layer_block(logits, of_logits, x, y, logits.layers[-1]))


@pytest.mark.parametrize(
    "layer", [keras.layers.BatchNormalization, keras.layers.LayerNormalization]
)
def test_normalization_whose_scale_starts_at_zero_learns(layer):
    norm = layer(gamma_initializer="zeros")
    model = helpers.compiled(helpers.mlp(norm), KFAC())
    history = helpers.fit(model, helpers.vectors(8 * helpers.BATCH), epochs=5).history["loss"]
    assert history[-1] < 0.8 * history[0]
    assert np.abs(norm.gamma.numpy()).min() > 0


def test_defaults_are_what_they_say():
    """One that is given by name and value does the same."""
    weights = []
    for kwargs in ({}, {"factor_ema_decay": KFAC().factor_ema_decay}):
        model = helpers.compiled(helpers.mlp(), KFAC(**kwargs))
        helpers.fit(model, helpers.vectors(4 * helpers.BATCH))
        weights.append(helpers.weights(model))
    for one, other in zip(*weights):
        np.testing.assert_array_equal(one, other)


def test_float64_keeps_its_digits():
    """Python's floats are none of float32: a step is the formula's, to 12 digits."""
    damping, rate = 0.1, 0.3
    with helpers.precision("float64"):
        model = mlp((4, 3))
        x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3))
        before = [v.numpy() for v in model.trainable_variables]
        inputs = np.concatenate([x, np.ones((6, 1))], axis=1)
        gradient = 2 / 18 * inputs.T @ (model(x).numpy() - y)
        optimizer = helpers.kfac(damping=damping, learning_rate=rate, kl_clip=None, fisher="exact")
        model.compile(optimizer, "mse")
        optimizer.attach(model)
        model.train_on_batch(x, y)
    a, g = inputs.T @ inputs / 6, 2 / 3 * np.eye(3)
    pi = np.sqrt((np.trace(a) / 5) / (np.trace(g) / 3))
    a += pi * np.sqrt(damping) * np.eye(5)
    g += np.sqrt(damping) / pi * np.eye(3)
    expected = np.concatenate([before[0], before[1][None]])
    expected -= rate * np.linalg.solve(a, gradient) @ np.linalg.inv(g)
    actual = np.concatenate([model.layers[-1].kernel, [model.layers[-1].bias]])
    assert_close(actual, expected, 1e-12)
