"""Identity 29: estimating curvature changes nothing but the weights it is there to change."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC

layers = keras.layers


def model_with_state(seed=0):
    """Dropout and batch normalisation: random state and moving statistics."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=3),
            layers.Dense(3),
        ]
    )


def state_after_a_step(optimizer):
    """Everything but trained weights: moving statistics, dropout's seed, metrics, global draws."""
    model = model_with_state()
    if isinstance(optimizer, KFAC):
        optimizer.attach(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    rng = np.random.default_rng(0)
    tf.random.set_seed(7)
    logs = model.train_on_batch(rng.normal(size=(16, 6)), rng.integers(0, 3, 16), return_dict=True)
    return {
        "non-trainable variables": [v.numpy() for v in model.non_trainable_variables],
        "metrics": list(logs.values()),
        "global draw": tf.random.uniform([4]).numpy(),
        "python draw": keras.random.uniform([4], seed=keras.random.SeedGenerator(1)).numpy(),
    }


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_all_but_weights_is_as_after_sgd(fisher):
    expected = state_after_a_step(keras.optimizers.SGD())
    actual = state_after_a_step(KFAC(fisher=fisher))
    for name, value in expected.items():
        for a, b in zip(actual[name], value, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


def test_iterations_count_steps():
    optimizer = KFAC()
    state_after_a_step(optimizer)
    assert int(optimizer.iterations.numpy()) == 1


def test_factors_see_the_dropout_mask_of_the_training_pass():
    """One forward pass serves gradient and curvature: a dropped input is dropped in A too."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((50,)), layers.Dropout(0.5, seed=1), layers.Dense(2, use_bias=False)]
    )
    optimizer = KFAC(fisher="exact", momentum=0.0, kl_clip=None).attach(model)
    model.compile(optimizer, "mse")
    before = model.get_weights()[0]
    model.train_on_batch(np.ones((1, 50)), np.ones((1, 2)))
    input_factor = next(
        v.numpy() for name, v in optimizer.model_variables.items() if "input_factor" in name
    )
    kept = np.diag(input_factor) > 0
    assert 0 < kept.sum() < 50
    # The gradient of a dropped input is zero, so its weights stay; those of the others move.
    moved = np.abs(model.get_weights()[0] - before).max(axis=1) > 0
    np.testing.assert_array_equal(kept, moved)
