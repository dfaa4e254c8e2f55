"""The Fisher matrix as a linear operator."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac import KFAC, FisherMatrix, GaussNewtonMatrix, NegativeLogLikelihood
from tests import helpers
from tests.cases import LOSS, LOSSES, mlp, without_head_activation
from tests.reference import assert_close, dense_ggn, loss_value
from tests.test_information import CASES, KL_CASES, LAPLACE
from tests.test_outputs import LOSSES as LOSS_OF
from tests.test_outputs import ggn, network, targets

tfd = tfp.distributions
RNG = np.random.default_rng(0)


def fisher_of(case, examples=5, **kwargs):
    model = mlp((4, 3, 3), head=case)
    model.compile("sgd", case.make())
    x = RNG.normal(size=(examples, 4))
    return FisherMatrix(model, x, **kwargs), model, x


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_equals_the_ggn(case, weighted):
    weights = RNG.uniform(0.5, 2, 5) if weighted else None
    fisher, model, x = fisher_of(case, sample_weight=weights)
    y = case.targets(RNG, (5, 3))
    logits_of = without_head_activation if case.activation else None
    variables = model.trainable_variables
    expected = dense_ggn(model, case.make(), x, y, variables, weights, logits_of=logits_of)
    assert fisher.shape == expected.shape
    assert_close(fisher.to_dense(), expected)
    vector = RNG.normal(size=len(expected))
    assert_close(fisher.matvec(vector), expected @ vector)


def test_several_outputs_add_up():
    names = ["classes", "numbers"]
    with helpers.precision("float64"):
        model = network(names, as_dict=True)
        losses = {name: LOSS_OF[name]() for name in names}
        model.compile("sgd", losses, loss_weights={"classes": 0.5, "numbers": 2.0})
        x, y = RNG.normal(size=(6, 4)), targets(names, 6)
        dense = FisherMatrix(model, x, y).to_dense().numpy()
        start = 0
        for layer in (model.get_layer(name) for name in ("trunk", *names)):
            size = layer.count_params()
            part = dense[start : start + size, start : start + size]
            assert_close(part, ggn(model, tf.constant(x), y, None, layer))
            start += size
        assert start == len(dense)
        with pytest.raises(ValueError, match=r"needs targets.* Received: y=None for 2 outputs"):
            FisherMatrix(model, x)


def test_training_pass_leaves_no_trace():
    """Identity 29; the matrix is that of the batch's statistics and the dropout mask to come."""
    with helpers.precision("float64"):
        model = mlp((4, 3))
        norm, drop = keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=3)
        model = keras.Sequential([*model.layers, norm, drop, keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        inputs, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 2))
        model(inputs, training=True)  # State that is not that of a start.
        before = [v.numpy() for v in model.variables]
        fisher = FisherMatrix(model, inputs, y, training=True)
        dense = fisher.to_dense().numpy()
        helpers.assert_same([v.numpy() for v in model.variables], before)
        assert_close(dense, dense.T)
        helpers.assert_same(fisher.to_dense(), dense)
        # The first call from here on has the same mask, and leaves its traces.
        loss = keras.losses.MeanSquaredError()
        assert_close(dense, dense_ggn(model, loss, inputs, y, model.trainable_variables))
        assert any((v.numpy() != old).any() for v, old in zip(model.variables, before))


def test_metrics_of_outputs_stay():
    """Keras counts the losses of single outputs while it computes their sum."""
    names = ["classes", "numbers"]
    model = network(names, as_dict=True)
    model.compile("sgd", {name: LOSS_OF[name]() for name in names})
    x, y = RNG.normal(size=(6, 4)), targets(names, 6)
    model.evaluate(x, y, verbose=0)
    before = model.get_metrics_result()
    FisherMatrix(model, x, y)
    assert model.get_metrics_result() == before


def test_likelihood_is_that_of_the_optimizer_or_given():
    def own_loss(y_true, y_pred):
        return tf.reduce_mean(tf.abs(y_true - y_pred) ** 3, axis=-1)

    _, model, x = fisher_of(LOSS["mse"])
    expected = FisherMatrix(model, x).to_dense()
    model.compile(KFAC(likelihood="mse"), own_loss)
    # Keras's reduction of a function is in float32.
    assert_close(FisherMatrix(model, x).to_dense(), expected, 1e-7)
    model.compile("sgd", own_loss)
    assert_close(FisherMatrix(model, x, likelihood="mse").to_dense(), expected, 1e-7)
    with pytest.raises(ValueError, match=r"no predictive distribution.* Received: loss=.*own_loss"):
        FisherMatrix(model, x)


@pytest.mark.parametrize("name", ["mse", "cce-logits", "bce-logits"])
def test_blocks_of_a_relu_network_are_those_of_the_hessian(name):
    """Identity 19: within a layer, outputs are linear in the weights but where a relu bends."""
    case = LOSS[name]
    model, loss = mlp((4, 6, 3), activation="relu"), case.make()
    model.compile("sgd", loss)
    x, y = RNG.normal(size=(5, 4)), case.targets(RNG, (5, 3))
    dense, start = FisherMatrix(model, x).to_dense().numpy(), 0
    for layer in model.layers:
        values = [v.value for v in layer.weights]
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                value = loss_value(model, loss, x, y)
            parts = [tf.reshape(g, [-1]) for g in inner.gradient(value, values)]
            gradient = tf.concat(parts, axis=0)
        size = len(gradient)
        hessian = [np.reshape(h, [size, -1]) for h in outer.jacobian(gradient, values)]
        part = dense[start : start + size, start : start + size]
        assert_close(part, np.concatenate(hessian, axis=1))
        start += size


def test_natural_gradient_solves():
    fisher, model, _ = fisher_of(LOSSES[0], damping=0.1)
    gradients = [RNG.normal(size=v.shape) for v in model.trainable_variables]
    found = fisher.natural_gradient(gradients, tolerance=1e-12, max_iterations=500)
    expected = np.linalg.solve(fisher.to_dense(), fisher.flatten(gradients))
    assert_close(fisher.flatten(found), expected, 1e-8)
    with pytest.raises(ValueError, match=r"positive definite.* Received: damping=0"):
        fisher_of(LOSSES[0])[0].natural_gradient(gradients)


def test_trace_and_eigenvalues():
    fisher, *_ = fisher_of(LOSSES[0])
    dense = fisher.to_dense().numpy()
    estimate, error = fisher.trace_estimate(draws=200)
    assert abs(estimate - np.trace(dense)) < 4 * error < 0.5 * np.trace(dense)
    values = np.linalg.eigvalsh(dense)[::-1]
    assert_close(fisher.largest_eigenvalues(3), values[:3], 1e-8)


# Those whose divergence TFP knows in closed form.
DIVERGENCES = {
    **KL_CASES,
    "laplace": LAPLACE,
    **{
        name: CASES[name]
        for name in ("normal", "gumbel", "cauchy", "beta", "bernoulli", "categorical", "bits")
    },
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_half_the_square_to_third_order(name):
    """Identity 18: of twice the step, relative to its square, twice the rest."""
    case = DIVERGENCES[name]
    model = mlp((3, 4, case.width))
    model.compile("sgd", NegativeLogLikelihood(case.make, dtype="float64"))
    fisher = FisherMatrix(model, RNG.normal(size=(4, 3)))
    step = fisher.unflatten(RNG.normal(size=fisher.shape[0]))
    vector = fisher.flatten(step)
    half = 0.5 * tf.tensordot(vector, fisher.matvec(vector), 1)
    rests = []
    for size in (4e-3, 2e-3, 1e-3):
        divergence = fisher.kl_divergence([size * part for part in step])
        rests.append(abs(float(divergence / size**2 / half) - 1))
    assert rests[0] < 0.3
    assert rests[2] < 0.6 * rests[1] + 1e-6 and rests[1] < 0.6 * rests[0] + 1e-6


def test_divergence_by_draws():
    case = CASES["student-t"]
    model = mlp((3, 4, case.width))
    model.compile("sgd", NegativeLogLikelihood(case.make, dtype="float64"))
    fisher = FisherMatrix(model, RNG.normal(size=(4, 3)))
    step = [np.full(v.shape, 0.1) for v in model.trainable_variables]
    vector = fisher.flatten(step)
    half = 0.5 * tf.tensordot(vector, fisher.matvec(vector), 1)
    estimate, error = fisher.kl_estimate(step, draws=100_000)
    assert 0 < error < 0.02 * half
    assert abs(estimate - half) < 4 * error + 0.1 * half  # And terms of third order.
    with pytest.raises(ValueError, match=r"use `kl_estimate`. Received: .*StudentT"):
        fisher.kl_divergence(step)


def test_estimate_of_the_divergence_has_its_error():
    """Of one whose closed form is known: within its standard error, which falls as the root."""
    fisher, model, _ = fisher_of(LOSSES[0])
    step = [np.full(v.shape, 0.3) for v in model.trainable_variables]
    step[0] = RNG.normal(size=step[0].shape)
    exact, errors = fisher.kl_divergence(step), []
    for draws in (400, 40_000):
        estimate, error = fisher.kl_estimate(step, draws, seed=3)
        assert abs(estimate - exact) < 4 * error
        errors.append(float(error))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


def test_one_draw_has_no_error():
    fisher, model, _ = fisher_of(LOSSES[0])
    with pytest.raises(ValueError, match=r"`draws` must be at least 2. Received: draws=1"):
        fisher.trace_estimate(draws=1)
    with pytest.raises(ValueError, match=r"`draws` must be at least 2. Received: draws=1"):
        fisher.kl_estimate([np.zeros(v.shape) for v in model.trainable_variables], draws=1)


def test_eigenvalues_that_occur_several_times_are_all_found():
    """Of a dense layer with squared loss, each occurs as often as there are outputs."""
    model = mlp((30, 4))
    model.compile("sgd", LOSS["mse"].make())
    fisher = FisherMatrix(model, RNG.normal(size=(60, 30)))
    values = np.linalg.eigvalsh(fisher.to_dense())[::-1]
    assert_close(values[0], values[3])
    assert_close(fisher.largest_eigenvalues(6, steps=18), values[:6], 1e-8)
    assert_close(fisher.largest_eigenvalues(40), values[:40], 1e-8)  # By the matrix.


def test_eigenvalues_of_a_matrix_of_few():
    """Of rank 6: blocks that have found all look on elsewhere."""
    model = mlp((30, 2))
    model.compile("sgd", LOSS["mse"].make())
    fisher = FisherMatrix(model, RNG.normal(size=(3, 30)), damping=0.5)
    values = np.linalg.eigvalsh(fisher.to_dense())[::-1]
    assert_close(fisher.largest_eigenvalues(8, steps=4), values[:8], 1e-8)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: x], ids=["list", "plain"])
def test_loss_weight_counts_without_targets(wrap):
    model, x = mlp((4, 3)), RNG.normal(size=(5, 4))
    model.compile("sgd", LOSS["mse"].make())
    plain = FisherMatrix(model, x).to_dense()
    model.compile("sgd", wrap(LOSS["mse"].make()), loss_weights=wrap(3.0))
    assert_close(FisherMatrix(model, x).to_dense(), 3 * plain, 1e-7)


def test_targets_are_asked_for_where_they_matter():
    model = mlp((4, 3))
    model.compile("sgd", keras.losses.SquaredHinge())
    with pytest.raises(ValueError, match=r"depends on the targets. Received: y=None"):
        FisherMatrix(model, RNG.normal(size=(5, 4)))


def test_models_may_compute_their_loss_themselves():
    class Own(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None):
            return super().compute_loss(x, y, y_pred, sample_weight)

    model = Own(mlp((4, 3)).layers)
    model.compile("sgd", LOSS["mse"].make())
    x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
    assert_close(FisherMatrix(model, x, y).to_dense(), FisherMatrix(model, x).to_dense())


@pytest.mark.parametrize("matrix", [FisherMatrix, GaussNewtonMatrix])
def test_losses_that_are_not_seen_are_refused(matrix):
    class Own(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight=None):
            first, *others = (
                keras.ops.mean(keras.losses.mean_squared_error(a, b)) for a, b in zip(y, y_pred)
            )
            return sum(
                others, keras.losses.MeanSquaredError()(y[0], y_pred[0]) if others else first
            )

    x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(3, name=name)(inputs) for name in ("a", "b")]
    for count, name in ((1, "a"), (2, "b")):
        model = Own(inputs, outputs[:count])
        model.compile("sgd", ["mse"] * count)
        with pytest.raises(
            ValueError, match=rf"keras.losses.Loss.* Received: .*\['{name}'\] without"
        ):
            matrix(model, x, [y] * count)


def test_a_forward_pass_of_training_before_has_no_part():
    """The optimizer's hooks wait for its loss."""
    model, x, y = mlp((4, 3)), RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
    model.compile(KFAC(), LOSS["mse"].make())
    expected = FisherMatrix(model, x, y).to_dense()
    model.optimizer.attach(model)
    with tf.GradientTape():
        model(x, training=True)
    assert_close(FisherMatrix(model, x, y).to_dense(), expected)


@pytest.mark.parametrize("matrix", [FisherMatrix, GaussNewtonMatrix])
def test_compute_loss_of_an_attached_model_is_not_that_of_training(matrix):
    class Weighs(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return 3.0 * loss if training else loss

    model = Weighs([keras.Input((4,)), keras.layers.Dense(3)])
    x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
    model.compile(KFAC(), LOSS["mse"].make())
    expected = matrix(model, x, y).to_dense()
    model.optimizer.attach(model)
    helpers.assert_same(matrix(model, x, y).to_dense(), expected)


class OfTensorFlow(keras.layers.Layer):
    """A function of TensorFlow's."""

    def __init__(self, name):
        super().__init__()
        self.function = getattr(tf.nn, name)

    def call(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_operations_of_tensorflow(name):
    """Keras finds the logits behind these in graphs, where products are made, but not without."""
    found = []
    for last in (keras.layers.Activation(name), OfTensorFlow(name)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), last])
        loss = keras.losses.CategoricalCrossentropy()
        if name == "sigmoid":
            loss = keras.losses.BinaryCrossentropy()
        model.compile("sgd", loss)
        x, y = np.linspace(-1, 1, 20).reshape(5, 4), np.eye(3)[[0, 1, 2, 0, 1]]
        fisher = FisherMatrix(model, x, y)
        steps = [1e-2 * np.cumsum(np.ones(v.shape), -1) for v in model.trainable_variables]
        found.append([fisher.to_dense(), fisher.kl_divergence(steps)])
        by_probabilities = GaussNewtonMatrix(model, x, y).to_dense()
    assert_close(found[0][0], found[1][0], 1e-5)
    assert_close(found[0][1], found[1][1], 1e-3)
    expected = dense_ggn(model, loss, x, y, model.trainable_variables)
    assert_close(by_probabilities, expected, 1e-4)


def test_half_precision():
    """Products in float16 throughout, where coefficients have a unit of their own."""
    found = []
    for dtype in ("float32", "float16"):
        with helpers.precision(dtype):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            model.compile("sgd", "mse")
            x, y = np.linspace(-1, 1, 15).reshape(5, 3), np.ones((5, 2))
            matrices = FisherMatrix(model, x, y), GaussNewtonMatrix(model, x, y)
            found.append([matrix.to_dense().numpy().astype("float64") for matrix in matrices])
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)


def test_only_weights_may_be_in_a_dict_without_targets():
    model = mlp((4, 3))
    model.compile("sgd", "mse")
    x, weights = RNG.normal(size=(5, 4)), RNG.uniform(0.5, 2, 5)
    found = [FisherMatrix(model, x, sample_weight=w).to_dense() for w in (weights, {"y": weights})]
    assert_close(*found)


def test_model_without_trained_weights_is_refused():
    model = mlp((4, 3))
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"of the trained weights.*Received: model .* without"):
        FisherMatrix(model, RNG.normal(size=(5, 4)))


def test_model_without_loss_is_refused():
    with pytest.raises(ValueError, match=r"compile the model with one. Received: model"):
        FisherMatrix(mlp((3, 2)), RNG.normal(size=(4, 3)))


def mixture(outputs):
    """Of as many normal distributions as the outputs have triples."""
    means, scales, logits = tf.split(outputs, 3, axis=-1)
    return tfd.MixtureSameFamily(tfd.Categorical(logits), tfd.Normal(means, tf.exp(scales)))


class TestWithoutClosedForm:
    def fisher(self, parts=1, **kwargs):
        model = mlp((3, 3 * parts))
        model.compile("sgd", NegativeLogLikelihood(mixture, dtype="float64"))
        return FisherMatrix(model, np.random.default_rng(0).normal(size=(4, 3)), **kwargs), model

    def test_draws_are_asked_for(self):
        with pytest.raises(ValueError, match=r"FisherMatrix\(draws=.*Received: .*Mixture"):
            self.fisher(2)
        with pytest.raises(ValueError, match=r"`draws` must be at least 1. Received: draws=0"):
            self.fisher(2, draws=0)

    def test_draws_are_the_same_for_all_products(self):
        fisher, _ = self.fisher(2, draws=3)
        dense = fisher.to_dense().numpy()
        assert_close(dense, dense.T)
        assert np.linalg.eigvalsh(dense).min() > -1e-12 * np.linalg.eigvalsh(dense).max()
        vector = RNG.normal(size=len(dense))
        assert_close(fisher.matvec(vector), dense @ vector)
        other, _ = self.fisher(2, draws=4)
        assert np.abs(other.to_dense() - dense).max() > 0.01 * np.abs(dense).max()

    def test_draws_converge(self):
        """To the matrix of the normal distribution that a mixture of one is, as 1 / sqrt(k)."""
        _, model = self.fisher(draws=1)
        x = np.random.default_rng(0).normal(size=(4, 3))
        exact = FisherMatrix(
            model, x, likelihood=lambda o: tfd.Normal(o[..., 0], tf.exp(o[..., 1]))
        ).to_dense()
        errors = [
            np.linalg.norm(self.fisher(draws=draws)[0].to_dense() - exact) / np.linalg.norm(exact)
            for draws in (100, 3_000)
        ]
        assert errors[1] < 0.25 and 2 < errors[0] / errors[1] < 15


# ---- The Gauss-Newton matrix --------------------------------------------------------------------

FOCAL = keras.losses.CategoricalFocalCrossentropy
OTHER_LOSSES = {
    "huber": lambda: keras.losses.Huber(dtype="float64"),
    "log-cosh": lambda: keras.losses.LogCosh(dtype="float64", reduction="sum"),
    "poisson": lambda: keras.losses.Poisson(dtype="float64"),
    "squared-hinge": lambda: keras.losses.SquaredHinge(dtype="float64"),
    "kl-divergence": lambda: keras.losses.KLDivergence(dtype="float64"),
    "focal": lambda: FOCAL(dtype="float64"),
    "cosine": lambda: keras.losses.CosineSimilarity(dtype="float64"),
}


class TestGaussNewtonMatrix:
    @pytest.mark.parametrize("case", LOSSES, ids=str)
    def test_is_the_fisher_matrix_of_natural_parameters(self, case):
        fisher, model, x = fisher_of(case)
        y = case.targets(RNG, (5, 3))
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), fisher.to_dense())

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("name", OTHER_LOSSES)
    def test_is_that_of_any_loss(self, name, weighted):
        """Against the Hessian matrix of Keras's loss by autodiff, which is none of a likelihood."""
        model, loss = mlp((4, 3, 3), head=LOSS["cce-softmax"]), OTHER_LOSSES[name]()
        model.compile("sgd", loss)
        x, y = RNG.normal(size=(5, 4)), RNG.uniform(0.1, 1, size=(5, 3))
        weights = RNG.uniform(0.5, 2, 5) if weighted else None
        expected = dense_ggn(model, loss, x, y, model.trainable_variables, weights)
        assert_close(GaussNewtonMatrix(model, x, y, weights).to_dense(), expected)
        if name in ("huber", "log-cosh", "poisson"):
            other = FisherMatrix(model, x, y, weights).to_dense()
            assert np.abs(other - expected).max() > 0.01 * np.abs(expected).max()

    @pytest.mark.parametrize("name", ["own", "focal"])
    def test_does_not_look_through_activations(self, name):
        """Keras does, in cross-entropies of a softmax's or a sigmoid's outputs."""

        def own(y_true, y_pred):
            return 3 * keras.losses.categorical_crossentropy(y_true, y_pred)

        loss = own if name == "own" else keras.losses.BinaryFocalCrossentropy(dtype="float64")
        model = mlp((4, 3, 3), head=LOSS["cce-softmax" if name == "own" else "bce-sigmoid"])
        model.compile("sgd", loss)
        x, y = RNG.normal(size=(5, 4)), np.eye(3)[RNG.integers(0, 3, 5)]

        def hidden(x, training):
            return tf.identity(model(x, training=training))

        keras_loss = loss if name == "focal" else lambda y, p, **_: tf.reduce_mean(own(y, p))
        expected = dense_ggn(hidden, keras_loss, x, y, model.trainable_variables)
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), expected, 1e-6)

    def test_logits_count_where_the_loss_sees_them(self):
        """Keras casts the outputs to the dtype of the loss, and loses what is behind them."""
        model = mlp((4, 3, 3), head=LOSS["cce-softmax"])
        x, y = RNG.normal(size=(5, 4)), np.eye(3)[RNG.integers(0, 3, 5)]
        model.compile("sgd", keras.losses.CategoricalCrossentropy())
        found = GaussNewtonMatrix(model, x, y).to_dense()

        def loss(y, p, **_):
            return -tf.reduce_mean(tf.math.log(tf.reduce_sum(y * p, axis=-1)))

        expected = dense_ggn(model, loss, x, y, model.trainable_variables)
        assert_close(found, expected, 1e-5)  # Keras computes the loss in float32.
        fisher = FisherMatrix(model, x, y).to_dense()
        assert np.abs(fisher - found).max() > 0.01 * np.abs(found).max()

    def test_logits_that_keras_squeezes(self):
        """It drops the last axis of the outputs for targets without, and what is behind them."""
        last = keras.layers.Dense(1, "sigmoid", dtype="float64")
        model = keras.Sequential([keras.Input((6, 4), dtype="float64"), last])
        loss = keras.losses.BinaryCrossentropy(dtype="float64")
        model.compile("sgd", loss)
        x, y = RNG.normal(size=(5, 6, 4)), RNG.uniform(size=(5, 6))
        expected = dense_ggn(model, loss, x, y, model.trainable_variables)
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), expected, 1e-6)
        other = GaussNewtonMatrix(model, x, y[..., np.newaxis]).to_dense()
        assert np.abs(other - expected).max() > 0.01 * np.abs(expected).max()

    def test_logits_of_vectors(self):
        """Keras adds a last axis to outputs `[batch]` for targets `[batch, 1]`, likewise."""
        inputs = keras.Input((4,), dtype="float64")
        head = keras.layers.Dense(1, dtype="float64")(inputs)[:, 0]
        model = keras.Model(inputs, keras.layers.Activation("sigmoid", dtype="float64")(head))
        loss = keras.losses.BinaryCrossentropy(dtype="float64")
        model.compile("sgd", loss)
        x, y = RNG.normal(size=(5, 4)), RNG.uniform(size=(5, 1))
        expected = dense_ggn(model, loss, x, y, model.trainable_variables)
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), expected, 1e-6)
        other = GaussNewtonMatrix(model, x, y[:, 0]).to_dense()
        assert_close(other, FisherMatrix(model, x, y[:, 0]).to_dense())
        assert np.abs(other - expected).max() > 0.01 * np.abs(expected).max()

    @pytest.mark.parametrize("name", ["cce-softmax", "bce-sigmoid"])
    def test_of_targets_that_are_no_probabilities(self, name):
        """By autodiff of Keras's loss, which TensorFlow takes for targets that sum to 1."""
        y = np.array([[0, 0, 0], [1, 1, 0], [0.3, 1.9, 0.4]])
        case, x = LOSS[name], RNG.normal(size=(3, 4))
        model = mlp((4, 3, 3), head=case)
        loss = type(case.make())(label_smoothing=0.1, dtype="float64")
        model.compile("sgd", loss)

        def of_logits(y, logits, **_):
            return loss(y, getattr(keras.ops, case.activation)(logits))  # Keras looks through.

        head, variables = without_head_activation(model), model.trainable_variables
        expected = dense_ggn(head, of_logits, x, y, variables)
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), expected)

    def test_of_targets_that_make_no_tensor(self):
        """Of times and of whether something happened then, say, in a model's own total."""

        class Hazards(keras.losses.Loss):
            def call(self, y_true, y_pred):
                rates, happened = tf.exp(y_pred[..., 0]), y_true["happened"]
                return rates * tf.reduce_sum(y_true["times"], axis=-1) - happened * y_pred[..., 0]

        class Own(keras.Sequential):
            def compute_loss(self, x, y, y_pred, sample_weight=None):
                return Hazards(dtype="float64")(y, y_pred)

        inputs, x = keras.Input((4,), dtype="float64"), RNG.normal(size=(5, 4))
        model = Own([inputs, *mlp((4, 3, 1)).layers])
        model.compile("sgd", "mse")
        y = {"times": RNG.uniform(size=(5, 2)), "happened": RNG.integers(0, 2, 5)}
        expected = dense_ggn(model, Hazards(dtype="float64"), x, y, model.trainable_variables)
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), expected)

    @pytest.mark.parametrize("from_logits", [False, True])
    def test_logits_that_an_ignored_class_hides(self, from_logits):
        """Keras replaces the outputs there, and loses what is behind all of them."""
        model, x = mlp((4, 3, 3), head=LOSS["sce-softmax"]), RNG.normal(size=(5, 4))
        options = {"from_logits": from_logits, "ignore_class": -1, "dtype": "float64"}
        loss, y = keras.losses.SparseCategoricalCrossentropy(**options), np.array([0, 1, 2, -1, 1])
        model.compile("sgd", loss)

        def hidden(x, training):
            return tf.identity(model(x, training=training))

        expected = dense_ggn(hidden, loss, x, y, model.trainable_variables)
        assert_close(GaussNewtonMatrix(model, x, y).to_dense(), expected)
        fisher = FisherMatrix(model, x, y).to_dense()
        difference = np.abs(fisher - expected).max()
        # Of probabilities by the logits it is another than by themselves.
        assert difference < 1e-10 if from_logits else difference > 1e-3

    def test_is_that_of_the_loss_whatever_the_optimizer_goes_by(self):
        model = mlp((4, 3, 3), head=LOSS["cce-softmax"])
        x, y = RNG.normal(size=(5, 4)), np.eye(3)[RNG.integers(0, 3, 5)]
        found = []
        for optimizer in ("sgd", KFAC(likelihood=keras.losses.CategoricalCrossentropy())):
            model.compile(optimizer, FOCAL(dtype="float64"))
            found.append(GaussNewtonMatrix(model, x, y).to_dense())
        assert_close(*found)
        other = FisherMatrix(model, x, y).to_dense().numpy()
        assert np.abs(other - found[0]).max() > 0.01 * np.abs(other).max()

    def test_of_several_outputs(self):
        names = ["classes", "numbers"]
        with helpers.precision("float64"):
            model = network(names, as_dict=True)
            losses = {name: LOSS_OF[name]() for name in names}
            model.compile("sgd", losses, loss_weights={"classes": 0.5, "numbers": 2.0})
            x, y = RNG.normal(size=(6, 4)), targets(names, 6)
            ours = GaussNewtonMatrix(model, x, y).to_dense()
            assert_close(ours, FisherMatrix(model, x, y).to_dense())

    def test_step_solves(self):
        model = mlp((4, 3))
        model.compile("sgd", OTHER_LOSSES["log-cosh"]())
        x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
        matrix = GaussNewtonMatrix(model, x, y, damping=0.1)
        gradients = [RNG.normal(size=v.shape) for v in model.trainable_variables]
        found = matrix.gauss_newton_step(gradients, tolerance=1e-12, max_iterations=500)
        expected = np.linalg.solve(matrix.to_dense(), matrix.flatten(gradients))
        assert_close(matrix.flatten(found), expected, 1e-8)
        with pytest.raises(ValueError, match=r"positive definite.* Received: damping=0"):
            GaussNewtonMatrix(model, x, y).gauss_newton_step(gradients)

    def test_needs_targets(self):
        model = mlp((4, 3))
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match=r"depends on the targets. Received: y=None"):
            GaussNewtonMatrix(model, RNG.normal(size=(5, 4)), None)
