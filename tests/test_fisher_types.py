"""Estimates of the true Fisher matrix agree on average; others are what theory says."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC
from keras_kfac.introspection.known_losses import likelihoods_of
from keras_kfac.math.likelihood import Likelihood, categorical, normal
from tests import helpers
from tests.cases import CCE, LOSS, MSE, factors, mlp
from tests.reference import assert_close, kron, layer_block

layers = keras.layers
RNG = np.random.default_rng(0)
CASES = ["cce-logits", "bce-logits", "mse"]


def output_factors(model, loss, x, **kwargs):
    return [g.numpy() for _, g in factors(model, loss, x, **kwargs)]


def repeated(examples, copies):
    """Each example so often that a draw for each copy is an average for the example."""
    return np.tile(RNG.normal(size=(examples, 4)), (copies, 1))


@pytest.mark.parametrize("fisher", ["sampled", "curvature_propagation"])
@pytest.mark.parametrize("name", CASES)
def test_is_exact_on_average(name, fisher):
    """Identity 4: half of the copies are drawn for, and errors fall as the root of their number."""
    model, loss, x = mlp((4, 5, 3)), LOSS[name].make(), repeated(3, 20_000)
    exact = output_factors(model, loss, x[:3])
    for g, expected in zip(output_factors(model, loss, x, fisher=fisher), exact):
        assert_close(g / np.abs(expected).max(), expected / np.abs(expected).max(), 0.03)


@pytest.mark.parametrize("fisher", ["sampled", "curvature_propagation"])
@pytest.mark.parametrize("name", CASES)
def test_error_falls_as_the_root_of_the_samples(name, fisher):
    model, loss, x = mlp((4, 3)), LOSS[name].make(), repeated(8, 4)
    (exact,) = output_factors(model, loss, x)

    def squared_error(samples):
        draws = [
            output_factors(model, loss, x, fisher=fisher, samples=samples, seed=(seed, 0))[0]
            for seed in range(15)
        ]
        return np.mean([np.square(draw - exact).sum() for draw in draws])

    assert squared_error(9) < squared_error(1) / 4


def test_propagated_is_exact_for_one_output():
    """There is one column, and its sign does not matter."""
    model, x = mlp((4, 5, 1)), RNG.normal(size=(6, 4))
    loss = LOSS["bce-logits"].make()
    exact = output_factors(model, loss, x)
    for g, expected in zip(output_factors(model, loss, x, fisher="curvature_propagation"), exact):
        assert_close(g, expected)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_forward_only_is_exact_for_one_layer_with_squared_loss(reduction):
    """Identity 27: `(2/d) A ⊗ I`, and not so with a nonlinearity above."""
    x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3))
    model, loss = mlp((4, 3)), LOSS["mse"].make(reduction)
    ((a, g),) = factors(model, loss, x, fisher="forward_only")
    assert_close(g, np.eye(3) * 2 / 3 * (6 if reduction == "sum" else 1))
    assert_close(kron(a, g), layer_block(model, loss, x, y, model.layers[-1]))
    deep = mlp((4, 5, 3))
    (a, g), _ = factors(deep, loss, x, fisher="forward_only")
    block = layer_block(deep, loss, x, y, deep.layers[0])
    assert np.abs(kron(a, g) - block).max() > 0.1 * np.abs(block).max()


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"fisher": "curvature_propagation"},
        {"fisher": "forward_only"},
        {"fisher": "sampled", "fisher_samples": 3},
    ],
    ids=str,
)
def test_learns(kwargs, jit_compile):
    model = helpers.compiled(helpers.mlp(), KFAC(**kwargs), jit_compile=jit_compile)
    history = helpers.fit(model, helpers.vectors(8 * helpers.BATCH), epochs=5).history["loss"]
    assert history[-1] < 0.7 * history[0]


# ---- Likelihoods that are given -----------------------------------------------------------------


def focal(y_true, y_pred):
    """Focal loss of logits: no likelihood, but that of its classes is known."""
    p = tf.reduce_sum(y_true * tf.nn.softmax(y_pred), axis=-1)
    return -((1 - p) ** 2) * tf.math.log(p)


def test_given_likelihood_takes_the_place_of_the_loss():
    model, x = mlp((4, 5, 3)), RNG.normal(size=(6, 4))
    loss = keras.losses.CosineSimilarity(dtype="float64")
    given = factors(model, loss, x, likelihood=Likelihood(categorical))
    expected = factors(model, CCE(from_logits=True, dtype="float64"), x)
    for (a, g), (b, h) in zip(given, expected):
        assert_close(a, b)
        assert_close(g, h)


@pytest.mark.parametrize(
    "likelihood",
    [categorical, "categorical_crossentropy", CCE(from_logits=True), [categorical]],
    ids=["function", "name", "loss", "list"],
)
def test_own_loss_learns_with_a_likelihood(likelihood):
    model = helpers.compiled(helpers.mlp(), KFAC(likelihood=likelihood), focal)
    x, y = helpers.vectors(8 * helpers.BATCH)
    history = helpers.fit(model, (x, np.eye(helpers.CLASSES)[y]), epochs=5).history["loss"]
    assert history[-1] < 0.8 * history[0]
    assert not model.optimizer.coverage().empirical_losses


def test_one_for_some_of_the_outputs():
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    outputs = {"a": layers.Dense(3, name="a")(x), "b": layers.Dense(2, name="b")(x)}
    model = keras.Model(x, outputs)
    optimizer = KFAC(likelihood={"a": categorical}, fisher="exact")
    model.compile(optimizer, {"a": focal, "b": "mse"})
    inputs = RNG.normal(size=(64, 4))
    y = {"a": np.eye(3)[np.argmax(inputs[:, :3], axis=1)], "b": inputs[:, :2]}
    history = helpers.fit(model, (inputs, y), epochs=5).history["loss"]
    assert history[-1] < 0.7 * history[0]


@pytest.mark.parametrize("likelihood", [{"c": categorical}, [categorical, categorical]])
def test_likelihoods_of_other_outputs_are_refused(likelihood):
    model = helpers.compiled(helpers.mlp(), KFAC(likelihood=likelihood))
    with pytest.raises(ValueError, match=r"an entry for each output.* Received: likelihood="):
        helpers.fit(model, helpers.vectors())


def test_likelihoods_are_nested_as_the_outputs():
    outputs = {"a": {"z": tf.zeros([2, 3]), "b": tf.zeros([2, 2])}, "c": tf.zeros([2, 1])}
    given = {"a": {"b": MSE(), "z": None}, "c": categorical}
    found = likelihoods_of(given, outputs, None)
    assert [one and one.make for one in found] == [normal, None, categorical]
    lists = [[tf.zeros([2, 3]), tf.zeros([2, 2])], tf.zeros([2, 1])]
    for given in ([[None, MSE()], categorical], [None, MSE(), categorical]):
        found = likelihoods_of(given, lists, None)
        assert [one and one.make for one in found] == [None, normal, categorical]
    for wrong in ([[None], categorical], [None, [MSE(), MSE()], categorical]):
        with pytest.raises(ValueError, match=r"each output.* Received: likelihood=.*for 3 outputs"):
            likelihoods_of(wrong, lists, None)
    for wrong in ({"a": categorical}, {"a": {"y": categorical}}, {"d": categorical}, categorical):
        with pytest.raises(ValueError, match=r"each output.* Received: likelihood=.*for 3 outputs"):
            likelihoods_of(wrong, outputs, None)


@pytest.mark.parametrize("likelihood", ["cosine_similarity", "mmse", {"a": "mmse"}])
def test_a_loss_without_likelihood_is_none(likelihood):
    match = r"known predictive distribution.*MeanSquaredError.* Received: likelihood='"
    with pytest.raises(ValueError, match=match):
        KFAC(likelihood=likelihood)


def test_no_likelihood_at_all_is_refused():
    with pytest.raises(ValueError, match=r"function from outputs to a .*Received: likelihood=3"):
        KFAC(likelihood=3)


@keras.saving.register_keras_serializable("keras_kfac_tests")
def own_likelihood(outputs):
    return categorical(outputs)


@pytest.mark.parametrize(
    "likelihood", [None, "mse", MSE(), own_likelihood, {"a": own_likelihood, "b": MSE()}]
)
def test_config_of_likelihoods(likelihood):
    again = KFAC.from_config(KFAC(likelihood=likelihood).get_config()).likelihood
    either = keras.saving.serialize_keras_object
    assert either(again) == either(likelihood)
