"""The likelihoods behind Keras's losses: of the right family, and on the right scale."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC
from keras_kfac.introspection.losses import Score, understood
from keras_kfac.introspection.target_curvature import is_convex
from keras_kfac.introspection.value_shapes import checked_alike
from keras_kfac.math.likelihood import Likelihood, normal
from tests import helpers
from tests.cases import factors, mlp
from tests.reference import assert_close, kron, layer_block

losses = keras.losses
RNG = np.random.default_rng(0)
WIDTH = 3


def real():
    return RNG.normal(size=(6, WIDTH)) * 2


def positive():
    return RNG.uniform(0.5, 3, size=(6, WIDTH))


def counts():
    return RNG.integers(0, 5, (6, WIDTH)).astype(float)


def probabilities():
    values = RNG.uniform(0.1, 1, size=(6, WIDTH))
    return values / values.sum(axis=-1, keepdims=True)


def one_hot():
    return np.eye(WIDTH)[RNG.integers(0, WIDTH, 6)]


def bits():
    return RNG.integers(0, 2, (6, WIDTH)).astype(float)


def test_squared_hinge_of_squeezed_outputs_trains():
    """Keras drops the last axis of outputs `[N, T, 1]`: one value for an example."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    x = np.random.default_rng(0).normal(size=(32, 4, 3))
    helpers.compiled(model, KFAC(), losses.SquaredHinge())
    history = helpers.fit(model, (x, np.sign(x[..., 0])), epochs=10).history["loss"]
    assert history[-1] < 0.5 * history[0]


def test_weights_of_single_outputs_are_refused():
    model = mlp((4, 3))
    model.compile(KFAC(likelihood="mse").attach(model), lambda y, p: (y - p) ** 2)
    x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3))
    with pytest.raises(ValueError, match=r"not for single features.*Received: weights of shape"):
        model.train_on_batch(x, y, np.ones((6, 3)))


class SquaresOfFeatures(losses.Loss):
    def call(self, y_true, y_pred):
        return (y_true - y_pred) ** 2


class WeighsFeatures(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        values = SquaresOfFeatures(reduction="none")(y, y_pred)
        return tf.reduce_mean(values * self.weights_of_features)


@pytest.mark.parametrize("likelihood", ["mse", None])
def test_values_of_single_outputs_count_alike(likelihood):
    inputs = keras.Input((4,))
    model = WeighsFeatures(inputs, keras.layers.Dense(3)(inputs))
    optimizer = helpers.kfac(likelihood=likelihood, fisher="sampled" if likelihood else "empirical")
    model.compile(optimizer.attach(model), run_eagerly=True)
    x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3))
    model.weights_of_features = 2.0
    model.train_on_batch(x, y)
    model.weights_of_features = np.array([1.0, 2, 3])
    if likelihood is None:
        model.train_on_batch(x, y)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="not for single features"):
        model.train_on_batch(x, y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_that_count_alike_do_so_in_half_precision(dtype):
    """Their mean would not be the number itself. Of NaN steps are left out, without an error."""
    for size, number in ((10, 0.1), (100, 1 / 3), (1000, 7.77), (3, np.nan)):
        values = tf.fill([4, size], tf.cast(number, dtype))
        assert checked_alike(values, 1).shape == values.shape


def test_weights_of_single_outputs_are_none_of_positions():
    def weighs_positions(shape, *weights):
        score = Score(losses.MeanSquaredError(), tf.zeros(shape), weight=tf.ones(weights))
        return understood(score, 0).weighs_positions

    assert not weighs_positions([6, 3], 6, 3)
    assert not weighs_positions([6, 5, 3], 6, 1, 3)
    assert weighs_positions([6, 5, 3], 6, 5)


def test_weights_that_keras_pairs_with_the_last_axis_are_refused():
    """Weights of examples `[N]` for losses `[N, T]` count along `T`, where Keras does not fail."""
    model = keras.Sequential([keras.Input((6, 4)), keras.layers.Dense(3)])
    model.compile(KFAC().attach(model), "mse", run_eagerly=True)
    x, y = RNG.normal(size=(6, 6, 4)), RNG.normal(size=(6, 6, 3))
    with pytest.raises(ValueError, match=r"shape \(batch, 1\).*Received: sample weights of shape"):
        model.train_on_batch(x, y, np.ones(6))
    model.train_on_batch(x, y, np.ones((6, 1)))
    model.train_on_batch(x[:1], y[:1], np.ones(1))


def test_ignored_classes_are_for_losses_only():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    with pytest.raises(ValueError, match=r"not which targets count.*Received.*ignore_class=0"):
        KFAC(likelihood=loss)


def middle(threshold):
    """The probability that a draw is nearer than the threshold, by a sum."""
    z = (np.arange(-600_000, 600_000) + 0.5) * 1e-4
    h = np.where(np.abs(z) <= threshold, z**2 / 2, threshold * np.abs(z) - threshold**2 / 2)
    return np.exp(-h)[np.abs(z) <= threshold].sum() / np.exp(-h).sum()


def eye(f):
    return np.broadcast_to(np.eye(WIDTH), (*f.shape, WIDTH))


def diagonal(values):
    return values[..., None] * np.eye(WIDTH)


# Loss, targets, outputs, and the Fisher matrix of the outputs at each position.
CASES = {
    "mse": (losses.MeanSquaredError, real, real, lambda f: 2 / WIDTH * eye(f)),
    "mae": (losses.MeanAbsoluteError, real, real, lambda f: eye(f) / WIDTH),
    "log-cosh": (losses.LogCosh, real, real, lambda f: 2 / 3 / WIDTH * eye(f)),
    "huber": (losses.Huber, real, real, lambda f: middle(1.0) / WIDTH * eye(f)),
    "huber-wide": (
        lambda **k: losses.Huber(delta=2.5, **k),
        real,
        real,
        lambda f: middle(2.5) / WIDTH * eye(f),
    ),
    "poisson": (losses.Poisson, counts, positive, lambda f: diagonal(1 / f / WIDTH)),
    "msle": (
        losses.MeanSquaredLogarithmicError,
        positive,
        positive,
        lambda f: diagonal(2 / WIDTH / (1 + f) ** 2),
    ),
    "bce": (
        losses.BinaryCrossentropy,
        bits,
        probabilities,
        lambda f: diagonal(1 / (f * (1 - f)) / WIDTH),
    ),
    "kld": (losses.KLDivergence, one_hot, probabilities, None),
    "cce": (losses.CategoricalCrossentropy, one_hot, probabilities, None),
}


def term_of(name, targets, outputs):
    loss = CASES[name][0](dtype="float64")
    return understood(Score(loss, tf.constant(outputs), tf.constant(targets)), 0)


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_negative_log_likelihood_but_for_scale_and_constant(name):
    _, draw_targets, draw_outputs, _ = CASES[name]
    targets, first, second = draw_targets(), draw_outputs(), draw_outputs()
    term = term_of(name, targets, first)
    likelihood = term.likelihood
    y = np.argmax(targets, axis=-1) if name in ("kld", "cce") else targets
    y = np.log1p(targets) if name == "msle" else y  # What the distribution is of.
    changes = []
    for outputs in (first, second):
        outputs = tf.constant(outputs)
        log_prob = likelihood.distribution(outputs).log_prob(y)
        changes.append((term.values(outputs), likelihood.weight(outputs) * log_prob))
    (loss_1, log_1), (loss_2, log_2) = changes
    # Keras adds 1e-7 here and there.
    assert_close(loss_2 - loss_1, log_1 - log_2, 2e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_fisher_matrix_of_the_outputs(name):
    _, draw_targets, draw_outputs, expected = CASES[name]
    outputs = draw_outputs()
    term = term_of(name, draw_targets(), outputs)
    columns = [
        term.likelihood.root_column(term.outputs, i).numpy()
        for i in range(term.likelihood.columns(term.outputs))
    ]
    actual = sum(c[..., :, None] * c[..., None, :] for c in columns)
    assert_close(actual, expected(outputs), 2e-6)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
def test_draws_of_hubers_distribution(threshold):
    from keras_kfac.math.huber import Huber

    distribution = Huber(tf.constant([2.0, -1.0], tf.float64), threshold)
    draws = distribution.sample(200_000, seed=tf.constant([1, 2])).numpy() - [2.0, -1.0]
    z = np.linspace(-60, 60, 2_000_001)
    density = np.exp(distribution.log_prob(2.0 + z[:, None]))[:, 0] * (z[1] - z[0])
    assert density.sum() == pytest.approx(1, abs=1e-6)
    for power in (1, 2, 4):
        moments = (np.abs(draws) ** power).mean(axis=0)
        expected = (np.abs(z) ** power * density).sum()
        error = math.sqrt((np.abs(z) ** (2 * power) * density).sum() / len(draws))
        assert np.abs(moments - expected).max() < 5 * error
    assert np.abs((draws > 0).mean(axis=0) - 0.5).max() < 0.01
    assert distribution.information == pytest.approx(middle(threshold), abs=1e-5)


@pytest.mark.parametrize(
    "name",
    ["mae", "poisson"]
    + [
        pytest.param(n, marks=pytest.mark.slow)
        for n in ("huber", "log_cosh", "msle", "kl_divergence")
    ],
)
def test_learns(name):
    keras.utils.set_random_seed(0)
    last = {"poisson": "softplus", "msle": "softplus", "kl_divergence": "softmax"}.get(name)
    body = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(3, last)]
    model = keras.Sequential([keras.Input((4,)), *body])
    x = RNG.normal(size=(128, 4))
    y = x[:, :3] if last is None else np.exp(x[:, :3])
    if last == "softmax":
        y = y / y.sum(axis=1, keepdims=True)
    model = helpers.compiled(model, KFAC(), name)
    history = helpers.fit(model, (x, y), epochs=10, batch_size=32).history["loss"]
    constant = {"poisson": losses.poisson(y, np.maximum(y, 1e-6)).numpy().mean()}.get(name, 0)
    assert history[-1] - constant < 0.5 * (history[0] - constant)
    assert not model.optimizer.coverage().empirical_losses


@pytest.mark.parametrize("loss", [losses.CosineSimilarity(), losses.BinaryFocalCrossentropy()])
def test_others_take_the_empirical_fisher_and_say_so(loss):
    model = helpers.compiled(helpers.mlp(), KFAC(), loss)
    x = RNG.normal(size=(64, helpers.FEATURES))
    y = np.eye(3)[np.argmax(x[:, :3], axis=1)]
    with pytest.warns(UserWarning, match=f"no predictive distribution.* Losses: {loss.name}"):
        history = helpers.fit(model, (x, y), epochs=5).history["loss"]
    assert history[-1] < history[0]
    coverage = model.optimizer.coverage()
    assert coverage.empirical_losses == [loss.name]
    assert str(coverage).endswith(f"without known likelihood: {loss.name}.")


def test_squared_hinge_takes_its_hessian():
    """It is convex, so that the generalised Gauss-Newton matrix of the targets serves."""
    model, x, y = mlp((4, 5, 3)), RNG.normal(size=(1, 4)), np.array([[1.0, 0.0, 1.0]])
    loss = losses.SquaredHinge(dtype="float64")
    kwargs = {"y": tf.constant(y)}
    for (a, g), layer in zip(factors(model, loss, x, **kwargs), model.layers):
        assert_close(kron(a, g), layer_block(model, loss, x, y, layer))
    with helpers.precision("float64"):
        assert not trained(losses.SquaredHinge()).coverage().empirical_losses


def trained(loss, shape=(4,), classes=None, **kwargs):
    """The optimizer of a model that has learnt from one-hot targets."""
    keras.utils.set_random_seed(0)
    body = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input(shape), *body])
    model.compile(KFAC(**kwargs), loss)
    x = np.random.default_rng(0).normal(size=(64, *shape)).astype("float32")
    y = np.eye(3)[np.argmax(x[..., :3], axis=-1)] if classes is None else classes(x)
    history = helpers.fit(model, (x, y), epochs=5, batch_size=16).history["loss"]
    assert history[-1] < history[0]
    return model.optimizer


# ---- Losses whose values are not one for each position ------------------------------------------


def per_position(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 3, axis=-1)


def elementwise(y_true, y_pred):
    return tf.abs(y_true - y_pred) ** 3


def per_example(y_true, y_pred):
    return tf.reduce_mean(per_position(y_true, y_pred), axis=1)


def of_the_batch(y_true, y_pred):
    return tf.reduce_mean(per_position(y_true, y_pred))


def of_the_batch_in_axes(y_true, y_pred):
    return tf.reduce_mean(per_position(y_true, y_pred), keepdims=True)


SHAPES = [elementwise, per_example, of_the_batch, of_the_batch_in_axes]


class Wrapped(losses.Loss):
    """A loss class of somebody's own."""

    def __init__(self, function, reduction="sum_over_batch_size"):
        super().__init__(reduction=reduction, dtype="float64")
        self.call = function


def sequences():
    """A model of sequences with inputs and targets."""
    x, y = np.random.default_rng(1).normal(size=(2, 6, 5, 4))
    model = keras.Sequential([keras.Input((None, 4), dtype="float64"), *mlp((4, 5, 3)).layers])
    return model, x, y[..., :3]


@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_likelihood_given_for_a_loss_is_on_the_same_scale_however_that_is_averaged(
    function, fisher
):
    model, x, y = sequences()
    kwargs = {"fisher": fisher, "likelihood": Likelihood(normal), "y": tf.constant(y)}
    expected = factors(model, Wrapped(per_position), x, **kwargs)
    for (a, g), (b, h) in zip(factors(model, Wrapped(function), x, **kwargs), expected):
        assert_close(a, b)
        assert_close(g, h)


@pytest.mark.parametrize("function", [per_example, of_the_batch])
def test_empirical_factors_are_on_the_scale_of_the_average(function):
    """With a single example, one value of all is one value of its example, and `∇ℓ ∇ℓᵀ` exact."""
    model, x, y = sequences()
    x, y = x[:1, :1], y[:1, :1]
    kwargs = {"fisher": "sampled", "y": tf.constant(y)}
    expected = factors(model, Wrapped(per_position), x, **kwargs)
    for (a, g), (b, h) in zip(factors(model, Wrapped(function), x, **kwargs), expected):
        assert_close(a, b)
        assert_close(g, h)


@pytest.mark.parametrize("function", [of_the_batch, of_the_batch_in_axes])
@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
def test_one_value_of_the_batch_counts_as_the_mean_of_its_examples(reduction, function):
    model, x, y = sequences()
    x, y = x[:, :1], y[:, :1]
    kwargs = {"fisher": "empirical", "y": tf.constant(y)}
    expected = factors(model, Wrapped(per_position), x, **kwargs)
    actual = factors(model, Wrapped(function, reduction), x, **kwargs)
    for (_, g), (_, h) in zip(actual, expected):
        assert_close(g, h)


def labels(x):
    return np.random.default_rng(0).integers(1, 3, (len(x), 2))


@pytest.mark.parametrize(
    ("loss", "shape", "classes"),
    [
        (losses.CTC(), (6, 4), labels),
        (of_the_batch, (4,), None),
    ],
    ids=["ctc", "of_the_batch"],
)
def test_losses_of_other_shapes_learn(loss, shape, classes):
    with pytest.warns(UserWarning, match="no predictive distribution"):
        trained(loss, shape, classes)


class WeightedCrossentropy(losses.CategoricalCrossentropy):
    """Another loss, by its own `call`."""

    def call(self, y_true, y_pred):
        return 5.0 * super().call(y_true, y_pred)


class Named(losses.CategoricalCrossentropy):
    """The same loss under another name."""


class TestSubclasses:
    def test_that_computes_something_else_is_not_known(self):
        loss = WeightedCrossentropy(from_logits=True, label_smoothing=0.1, dtype="float64")
        outputs = tf.constant(real())
        term = understood(Score(loss, outputs, tf.constant(one_hot())), 0)
        assert term.likelihood is None and term.is_empirical
        assert_close(term.values(outputs), loss.call(term.targets, outputs))

    def test_that_is_the_same_keeps_its_options(self):
        loss = Named(from_logits=True, label_smoothing=0.1, dtype="float64")
        outputs = tf.constant(real())
        term = understood(Score(loss, outputs, tf.constant(one_hot())), 0)
        assert term.likelihood is not None
        assert_close(term.values(outputs), loss.call(term.targets, outputs))
        plain = losses.CategoricalCrossentropy(from_logits=True, dtype="float64")
        same = understood(Score(plain, outputs, tf.constant(one_hot())), 0)
        columns = [t.likelihood.root_column(outputs, 1) for t in (term, same)]
        np.testing.assert_array_equal(*columns)

    def test_options_are_those_of_the_loss_and_not_of_its_config(self):
        class Terse(losses.CategoricalCrossentropy):
            def get_config(self):
                return {"name": self.name}

        outputs, y = tf.constant(probabilities()), tf.constant(one_hot())
        for from_logits in (True, False):
            plain = losses.CategoricalCrossentropy(from_logits=from_logits)
            terse = Terse(from_logits=from_logits)
            terse.from_logits = not from_logits  # Too late: what it computes stays.
            assert_close(terse(y, outputs), plain(y, outputs))
            columns = [
                understood(Score(loss, outputs, y), 0).likelihood.root_column(outputs, 1)
                for loss in (terse, plain)
            ]
            helpers.assert_same(*columns)
        with pytest.raises(ValueError, match=r"last axis only. Received: Terse\(axis=1\)"):
            understood(Score(Terse(axis=1), outputs, y), 0)

    def test_with_another_function_is_not_known(self):
        class Scaled(losses.MeanSquaredError):
            def __init__(self):
                super().__init__()
                usual = self.fn
                self.fn = lambda y_true, y_pred: 5 * usual(y_true, y_pred)

        score = Score(Scaled(), tf.constant(real()), tf.constant(real()))
        assert understood(score, 0).is_empirical
        score = Score(losses.MeanSquaredError(), tf.constant(real()))
        assert not understood(score, 0).is_empirical

    def test_of_a_convex_loss_is_convex_only_if_it_is_the_same(self):
        class Own(losses.SquaredHinge):
            def call(self, y_true, y_pred):
                return -super().call(y_true, y_pred)

        assert is_convex(losses.SquaredHinge()) and not is_convex(Own())


def weights_after(loss, data, **kwargs):
    """The weights of a network that took some steps."""
    model = helpers.compiled(helpers.mlp(), KFAC(), loss)
    helpers.fit(model, data, epochs=2, **kwargs)
    return helpers.weights(model)


def test_class_weights_are_sample_weights():
    x, y = helpers.vectors()
    by_class = {0: 1.0, 1: 2.5, 2: 0.5}
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    ours = weights_after(loss, (x, y), class_weight=by_class)
    theirs = weights_after(loss, (x, y), sample_weight=np.vectorize(by_class.get)(y))
    helpers.assert_same(ours, theirs)
    helpers.assert_different(ours, weights_after(loss, (x, y)))


def test_ignored_class_counts_as_a_mask():
    """As positions of weight zero, in the loss and in the factors."""
    outputs, classes = mlp((4, 3)), RNG.integers(-1, 3, (12,))
    x = RNG.normal(size=(12, 4))
    kept = classes >= 0
    assert 0 < kept.sum() < 12
    ignoring = losses.SparseCategoricalCrossentropy(True, ignore_class=-1, dtype="float64")
    plain = losses.SparseCategoricalCrossentropy(True, dtype="float64")
    actual = factors(outputs, ignoring, x, classes)
    expected = factors(outputs, plain, x[kept], classes[kept])
    for ours, theirs in zip(actual, expected):
        for a, b in zip(ours, theirs):
            assert_close(a, b)
