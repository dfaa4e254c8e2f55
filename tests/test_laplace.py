"""Laplace's approximation: the posterior of weights, its evidence and its predictions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac import KFAC, LaplacePosterior, NegativeLogLikelihood, laplace
from keras_kfac.introspection.data_likelihood import likelihood_term, log_likelihood
from keras_kfac.math import likelihood, predictive
from keras_kfac.math.eigenbasis_normal import EigenbasisNormal
from keras_kfac.math.evidence import best_precision, log_evidence
from tests import helpers
from tests.cases import LOSS, mlp
from tests.reference import assert_close, dense_ggn, relative_difference

tfd = tfp.distributions
layers = keras.layers
RNG = np.random.default_rng(0)
NOISE, TAU = 0.4, 0.7


def noisy(means):
    """Targets that are the outputs and noise."""
    return tfd.Independent(tfd.Normal(means, tf.constant(NOISE, means.dtype)), 1)


def linear(width):
    """An affine map of three numbers."""
    inputs = keras.Input((3,), dtype="float64")
    return keras.Sequential([inputs, layers.Dense(width, dtype="float64")])


def compiled(model, loss):
    model.compile("sgd", loss)
    return model


def precisions(posterior):
    """The dense precision matrix of each block."""
    return [np.linalg.inv(d.covariance()) for d in posterior.weights().values()]


def ggn_blocks(model, case, x, y):
    """That of each layer, for the log-likelihood of all data."""
    # Keras takes the mean over examples, and of squares over the outputs, without the half.
    scale = len(x) * (model.output_shape[-1] / 2 if case.name == "mse" else 1)
    return [
        scale * dense_ggn(model, case.make(), x, y, layer.trainable_variables)
        for layer in model.layers
        if layer.trainable_variables
    ]


@pytest.fixture(scope="module")
def regression():
    """Bayesian linear regression, by Laplace's approximation and by its own formulas."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(23, 3))
    y = x @ rng.normal(size=(3, 2)) + 0.3 + NOISE * rng.normal(size=(23, 2))
    design = np.c_[x, np.ones(23)]
    precision = design.T @ design / NOISE**2 + TAU * np.eye(4)
    mean = np.linalg.solve(precision, design.T @ y / NOISE**2)
    model = linear(2)
    model.set_weights([mean[:3], mean[3]])
    compiled(model, NegativeLogLikelihood(noisy, dtype="float64"))
    return laplace(model, x, y, prior_precision=TAU, batch_size=10), design, y, precision, mean


class TestLinearRegression:
    def test_weights(self, regression):
        posterior, _, _, precision, mean = regression
        (weights,) = posterior.weights().values()
        assert_close(weights.mean(), mean.ravel())
        assert_close(weights.covariance(), np.kron(np.linalg.inv(precision), np.eye(2)))

    @pytest.mark.parametrize("tau", [TAU, 1e-3, 50.0])
    def test_evidence(self, regression, tau):
        """The probability of the data, weights integrated out; the maximum moves with `τ`."""
        posterior, design, y, _, _ = regression
        covariance = design @ design.T / tau + NOISE**2 * np.eye(23)
        _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
        expected = -0.5 * (np.sum(y * np.linalg.solve(covariance, y)) + 2 * logdet)
        if tau == TAU:
            assert_close(posterior.log_marginal_likelihood(), expected)
        else:  # The weights are no maximum of that posterior.
            assert abs(posterior.log_marginal_likelihood(tau) - expected) > 1e-5

    def test_outputs_and_targets(self, regression):
        posterior, _, _, precision, mean = regression
        x = RNG.normal(size=(5, 3))
        design = np.c_[x, np.ones(5)]
        variance = np.einsum("ni,ij,nj->n", design, np.linalg.inv(precision), design)
        expected = variance[:, None, None] * np.eye(2)
        outputs, targets = posterior.outputs(x), posterior.predictive(x)
        for found, noise in ((outputs, 0.0), (targets, NOISE**2)):
            assert_close(found.mean(), design @ mean)
            assert_close(found.covariance(), expected + noise * np.eye(2))
        assert targets.log_prob(design @ mean).shape == (5,)

    @pytest.mark.parametrize("value", [0.0, -1.0, np.nan, [1.0, 2.0]])
    def test_other_priors_are_refused(self, regression, value):
        for given in (value, tf.constant(value, tf.float64)):
            with pytest.raises(ValueError, match=r"a positive number. Received: prior_precision="):
                regression[0].log_marginal_likelihood(given)

    def test_evidence_is_maximal(self, regression):
        posterior = regression[0]
        best = posterior.maximize_evidence()
        grid = best * np.exp(np.linspace(-3, 3, 601))
        assert np.argmax([posterior.log_marginal_likelihood(t) for t in grid]) == 300
        tau = tf.constant(best, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(tau)
            value = posterior.log_marginal_likelihood(tau)
        assert abs(tape.gradient(value, tau) * tau) < 1e-9
        norm = sum(np.sum(np.square(w)) for w in posterior.model.get_weights())
        assert_close(posterior.effective_dimension, best * norm)
        posterior.prior_precision = TAU

    def test_noise_is_part_of_the_likelihood(self, regression):
        """A squared error is noise of variance 1; another one can be named."""
        _, design, _, precision, _ = regression
        model = linear(2)
        model.compile(
            "sgd", keras.losses.MeanSquaredError("sum", dtype="float64"), loss_weights=3.0
        )
        (found,) = precisions(laplace(model, design[:, :3], prior_precision=TAU))
        unit = design.T @ design + TAU * np.eye(4)
        assert_close(found, np.kron(unit, np.eye(2)))
        options = {"prior_precision": TAU, "likelihood": noisy}
        (found,) = precisions(laplace(model, design[:, :3], **options))
        assert_close(found, np.kron(precision, np.eye(2)))


class TestCovariance:
    @pytest.mark.parametrize("name", ["sce-logits", "mse"])
    def test_one_datum_is_exact(self, name):
        case = LOSS[name]
        model = compiled(mlp((4, 3, 3)), case.make())
        x, y = RNG.normal(size=(1, 4)), case.targets(RNG, (1, 3))
        found = precisions(laplace(model, x, prior_precision=TAU))
        for block, ggn in zip(found, ggn_blocks(model, case, x, y), strict=True):
            assert_close(block, ggn + TAU * np.eye(len(ggn)))

    def test_structures(self):
        """The full one is exact, the others are not; two of them keep the trace."""
        case = LOSS["sce-logits"]
        model = compiled(mlp((4, 3, 3)), case.make())
        x, y = RNG.normal(size=(6, 4)), case.targets(RNG, (6, 3))
        expected = ggn_blocks(model, case, x, y)
        for name in ("full", "ekfac", "kfac", "diagonal"):
            options = {"curvature": name, "prior_precision": TAU, "batch_size": 3}
            found = [p - TAU * np.eye(len(p)) for p in precisions(laplace(model, x, **options))]
            errors = [relative_difference(*pair) for pair in zip(found, expected, strict=True)]
            assert max(errors) < 1e-10 if name == "full" else min(errors) > 1e-3
            if name == "diagonal":
                assert_close(found[0], np.diag(np.diag(expected[0])))
            if name == "ekfac":
                assert_close([np.trace(f) for f in found], [np.trace(e) for e in expected])

    @pytest.mark.parametrize("curvature", ["kfac", "dense"])
    def test_layers_of_several_types(self, curvature):
        x, y = RNG.normal(size=(9, 3)), RNG.normal(size=(9, 2))
        found, weights = [], [RNG.normal(size=shape) for shape in ((3, 3), (3,), (3, 2), (2,))]
        for dtype in ("float64", "float32"):
            first = layers.Dense(3, "tanh", dtype=dtype)
            model = keras.Sequential([keras.Input((3,)), first, layers.Dense(2, dtype="float64")])
            model.set_weights(weights)
            posterior = laplace(
                compiled(model, "mse"), x, y, prior_precision=1.0, curvature=curvature
            )
            deviations = posterior.outputs(x).stddev().numpy().ravel()
            assert [t.dtype.name for t in posterior.sample()][::2] == [dtype, "float64"]
            found.append([*deviations, float(posterior.log_marginal_likelihood())])
        np.testing.assert_allclose(*found, rtol=1e-4)

    def test_a_layer_that_is_called_twice(self):
        inputs, twice = keras.Input((4,), dtype="float64"), layers.Dense(4, "tanh", dtype="float64")
        outputs = layers.Dense(2, dtype="float64")(twice(twice(inputs)))
        model = compiled(keras.Model(inputs, outputs), LOSS["mse"].make())
        x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 2))
        found = precisions(laplace(model, x, prior_precision=TAU, curvature="full"))
        for block, ggn in zip(found, ggn_blocks(model, LOSS["mse"], x, y), strict=True):
            assert_close(block, ggn + TAU * np.eye(len(ggn)))

    def test_counts_the_data(self):
        """Data three times over, in a dataset of uneven batches, are three times as precise."""
        model = compiled(mlp((4, 3, 3)), LOSS["mse"].make())
        x = RNG.normal(size=(5, 4))
        once = precisions(laplace(model, x, prior_precision=TAU))
        data = tf.data.Dataset.from_tensor_slices(np.tile(x, [3, 1])).batch(4)
        thrice = precisions(laplace(model, data, prior_precision=3 * TAU))
        for few, many in zip(once, thrice, strict=True):
            assert_close(many, 3 * few)

    @pytest.mark.parametrize("groups", [None, 2])
    def test_draws(self, groups):
        """Of a matrix, or of one for each group."""
        shape = (3, 2) if groups is None else (groups, 3, 2)
        lead = shape[:-2]
        bases = [np.linalg.qr(RNG.normal(size=(*lead, d, d)))[0] for d in shape[-2:]]
        precision, mean = RNG.uniform(0.5, 3, shape), RNG.normal(size=shape)
        normal = EigenbasisNormal(*map(tf.constant, (mean, *bases, precision)))
        one = lambda i: normal.sample(tf.stack([0, i]))  # noqa: E731
        many = tf.function(lambda n: tf.map_fn(one, tf.range(n), fn_output_signature=tf.float64))
        draws = many(20000)
        expected = normal.distribution().covariance()
        flat = np.reshape(draws - mean, [20000, *lead, 6])
        # Entries of a sample covariance are off by `√(2 / n)` times a variance: 1 %.
        assert_close(np.einsum("n...i,n...j->...ij", flat, flat) / 20000, expected, 0.05)
        vector = RNG.normal(size=shape)
        variance = np.sum(np.square(normal.standardized(tf.constant(vector))), axis=(-2, -1))
        v = np.reshape(vector, [*lead, 6])
        assert_close(variance, np.einsum("...i,...ij,...j->...", v, expected, v))


@pytest.fixture(scope="module")
def classes():
    """Three classes of points in the plane, a network with a convolution, and its posterior."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 60)
    angles = 2 * np.pi * y / 3
    x = np.stack([np.cos(angles), np.sin(angles)], axis=-1) + 0.3 * rng.normal(size=(60, 2))
    with helpers.precision("float64"):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((2,)),
                layers.Reshape((2, 1)),
                layers.Conv1D(4, 2, padding="same"),
                layers.PReLU(shared_axes=[1]),
                layers.Flatten(),
                layers.Dense(3, "softmax"),
            ]
        )
        model.compile(keras.optimizers.Adam(0.03), "sparse_categorical_crossentropy")
        model.fit(np.tile(x, [100, 1]), np.tile(y, 100), batch_size=60, verbose=0)
    return model, x, y, laplace(model, x, y)


class TestPredictions:
    def test_covariance_of_outputs(self, classes):
        """`J Σ Jᵀ`, with a Jacobian of automatic differentiation; outputs are logits."""
        model, x, _, posterior = classes
        dense = model.layers[-1]
        body = keras.Model(model.inputs[0], model.layers[-2].output)
        with tf.GradientTape(persistent=True) as tape:
            logits = tf.matmul(body(x[:4]), dense.kernel.value) + dense.bias.value
        variables = [v.value for v in model.trainable_variables]
        parts = tape.jacobian(logits, variables, experimental_use_pfor=False)
        flat = [np.reshape(part, [4, 3, -1]) for part in parts]
        conv, slopes, last = posterior.weights().values()
        expected = 0.0
        for block, own in ((conv, flat[:2]), (slopes, flat[2:3]), (last, flat[3:])):
            j = np.concatenate(own, axis=-1)
            expected += np.einsum("nki,ij,nlj->nkl", j, block.covariance(), j)
        outputs = posterior.outputs(x[:4])
        assert_close(outputs.covariance(), expected)
        assert_close(outputs.mean(), logits)
        assert_close(model(x[:4]), tf.nn.softmax(outputs.mean()))

    def test_one_block_for_all_layers(self):
        """The covariance of the whole model, with no approximation but the linearised model."""
        case = LOSS["mse"]
        model = compiled(mlp((4, 3, 2)), case.make())
        x, y = RNG.normal(size=(6, 4)), case.targets(RNG, (6, 2))
        posterior = laplace(model, x, curvature="dense", prior_precision=TAU)
        variables = model.trainable_variables
        fisher = len(x) * dense_ggn(model, case.make(), x, y, variables)  # Of two outputs: 2/2.
        with tf.GradientTape() as tape:
            outputs = model(x[:3])
        parts = tape.jacobian(outputs, [v.value for v in variables])
        j = np.concatenate([np.reshape(part, [3, 2, -1]) for part in parts], axis=-1)
        covariance = np.linalg.inv(fisher + TAU * np.eye(len(fisher)))
        found = posterior.outputs(x[:3])
        assert_close(found.mean(), outputs)
        assert_close(found.covariance(), np.einsum("nki,ij,nlj->nkl", j, covariance, j))
        targets = posterior.predictive(x[:3])
        assert_close(targets.covariance(), found.covariance() + np.eye(2))

    def test_less_certain_far_away(self, classes):
        """The network itself is the more certain the farther it is from what it has seen."""
        model, x, _, posterior = classes
        far = 30 * x[:5]
        plain = np.max(model(far), axis=-1)
        assert np.min(plain) > np.mean(np.max(model(x[:5]), axis=-1)) - 0.05
        for method in ("linear", "probit", "weights"):
            found = posterior.predictive(far, method, draws=30).probs_parameter()
            assert_close(tf.reduce_sum(found, axis=-1), np.ones(5))
            assert np.mean(plain - np.max(found, axis=-1)) > 0.02, method

    def test_methods_agree_where_weights_are_known(self, classes):
        model, x, _, posterior = classes
        before, posterior.prior_precision = posterior.prior_precision, 1e8
        for method in ("linear", "probit", "weights"):
            found = posterior.predictive(x[:5], method, draws=5).probs_parameter()
            assert_close(found, model(x[:5]), 1e-3)
        posterior.prior_precision = before

    def test_likelihood_is_that_of_the_loss(self, classes):
        model, x, y, posterior = classes
        assert_close(posterior.log_likelihood, -60 * model.evaluate(x, y, verbose=0), 1e-6)

    def test_leaves_no_trace(self, classes):
        """Neither weights nor optimizer change, nor does another one lose sight of the model."""
        model, x, y, _ = classes
        other = KFAC().attach(model)
        variables = [*model.variables, *model.optimizer.variables]
        before, attributes = [v.numpy() for v in variables], set(vars(model))
        posterior = laplace(model, x, y)
        posterior.predictive(x[:3], "weights", draws=2)
        posterior.predictive(x[:3])
        assert isinstance(posterior, LaplacePosterior)
        helpers.assert_same([v.numpy() for v in variables], before)
        assert set(vars(model)) == attributes and "train_step" in attributes
        other.detach()

    def test_other_weights_are_refused(self, classes):
        model, x, _, posterior = classes
        bias = model.layers[-1].bias
        before = bias.numpy()
        bias.assign(before + 1.0)
        with pytest.raises(ValueError, match=r"not the one whose posterior.*Received: model"):
            posterior.outputs(x)
        bias.assign(before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_other_data(seed):
    """A curve through 30 points, prior by the evidence: how certain it is of 1000 others.

    Among them, 95 % intervals hold 90 to 99.5 %: 30 points tell no better. Where it has seen none
    it knows that, and the network by itself does not.
    """
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)

    def points(count, low, high):
        x = rng.uniform(low, high, (count, 1)).astype("float32")
        return x, (np.sin(3 * x) + 0.2 * rng.normal(size=x.shape)).astype("float32")

    def noise(means):
        return tfd.Independent(tfd.Normal(means, 0.2), 1)

    x, y = points(30, -1, 1)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(20, "tanh"), layers.Dense(1)])
    model.compile(KFAC(), "mse")
    helpers.fit(model, (np.tile(x, [100, 1]), np.tile(y, [100, 1])), batch_size=30)
    posterior = laplace(model, x, y, likelihood=noise)
    inside, outside = points(1000, -1, 1), points(1000, 1, 2)
    found = posterior.predictive(inside[0])
    z = np.abs((inside[1] - found.mean()) / found.stddev())
    print(f"squares {np.mean(z**2):.2f}, in 95 % intervals {np.mean(z < 1.96):.3f}")  # by `-s`
    assert 0.9 < np.mean(z < 1.96) < 0.995
    for (x, y), gain in ((inside, -0.1), (outside, 1.0)):
        each = posterior.predictive(x), noise(tf.constant(model(x)))
        ours, plain = (np.mean(d.log_prob(y)) for d in each)
        print(f"mean log-likelihood {ours:.2f}, of the network {plain:.2f}")
        assert ours > plain + gain


class TestOtherLikelihoods:
    def test_independent_classes(self):
        """In float32, with targets in two columns: mixtures, and sigmoids of scaled logits."""
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
        model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
        x, y = RNG.normal(size=(8, 2)), RNG.integers(0, 2, (8, 2))
        posterior = laplace(model, x, y, prior_precision=1.0)
        loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction="sum")
        assert_close(posterior.log_likelihood, -2 * loss(y, model(x)), 1e-6)
        mean, probit = (posterior.predictive(x, m).mean() for m in ("linear", "probit"))
        assert mean.dtype == tf.float32
        assert_close(probit, mean, 0.1)  # A hundred draws, and an approximate function.
        variance = posterior.outputs(x).variance()
        scaled = model(x) / tf.sqrt(1 + np.pi / 8 * variance)
        assert_close(probit, tf.sigmoid(scaled), 1e-5)

    def test_noise_that_depends_on_the_input(self):
        """A mixture: no normal distribution."""

        def learned(outputs):
            mean, log_scale = tf.unstack(outputs, axis=-1)
            return tfd.Normal(mean, tf.exp(log_scale))

        model = compiled(mlp((4, 2)), NegativeLogLikelihood(learned, dtype="float64"))
        x, y = RNG.normal(size=(30, 4)), RNG.normal(size=30)
        found = laplace(model, x, y).predictive(x[:3], draws=20)
        assert isinstance(found, tfd.MixtureSameFamily) and found.batch_shape == (3,)
        with pytest.raises(ValueError, match=r"'probit' is for classes. Received"):
            laplace(model, x).predictive(x[:3], "probit")

    @pytest.mark.parametrize("name", ["one number", "a vector"])
    def test_normal_logarithms(self, name):
        """Of weights that are known, the prediction is the likelihood: not the logarithm's."""

        def one(outputs):
            return tfd.LogNormal(outputs[..., 0], tf.constant(NOISE, outputs.dtype))

        def vector(outputs):
            return tfd.Independent(tfd.LogNormal(outputs, tf.constant(NOISE, outputs.dtype)), 1)

        make = {"one number": one, "a vector": vector}[name]
        x = RNG.normal(size=(4, 3))
        model = compiled(linear(1), NegativeLogLikelihood(make, dtype="float64"))
        posterior = laplace(model, x, prior_precision=1e14)
        expected = make(model(x))
        for method in ("linear", "weights"):
            found = posterior.predictive(x, method, draws=2)
            assert found.event_shape == expected.event_shape
            assert_close(found.mean(), expected.mean(), 1e-5)
            assert_close(found.log_prob(expected.mean()), expected.log_prob(expected.mean()), 1e-5)

    def test_squared_logarithmic_errors(self):
        """Predictions are of the targets; the likelihood of the data that of `log(1 + y)`."""
        x, y = RNG.normal(size=(4, 3)), RNG.exponential(size=(4, 2))
        loss = keras.losses.MeanSquaredLogarithmicError(dtype="float64")
        model = compiled(
            keras.Sequential([linear(2), layers.Activation("exponential", dtype="float64")]), loss
        )
        posterior = laplace(model, x, y, prior_precision=1e14)
        logarithms = tfd.Normal(np.log1p(model(x)), 1.0)
        densities = logarithms.log_prob(np.log1p(y))
        assert_close(posterior.log_likelihood, np.sum(densities))
        for method in ("linear", "weights"):
            found = posterior.predictive(x, method, draws=2)
            jacobian = np.log1p(y)  # That of the logarithm by the targets is `1 / (1 + y)`.
            assert_close(found.log_prob(y), np.sum(densities - jacobian, axis=-1), 1e-5)
            # Moments of exp(z) are exp(m + 1/2) and exp(2 m + 2).
            mean, square = (np.exp(k * logarithms.loc + k**2 / 2) for k in (1, 2))
            assert_close(found.mean(), mean - 1, 1e-5)
            assert_close(found.stddev(), np.sqrt(square - mean**2), 1e-5)

    @pytest.mark.parametrize("ignored", [-1, 255])
    def test_positions_that_do_not_count(self, ignored):
        """A language model of tied weights: by draws of weights alone."""
        table = layers.ReversibleEmbedding(4, 3, dtype="float64")
        model = keras.Sequential([keras.Input((5,), dtype="int32"), table, Projection(table)])
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=ignored, dtype="float64"
        )
        x = RNG.integers(0, 4, (6, 5))
        y = np.where(RNG.random((6, 5)) < 0.3, ignored, x)
        counts = y != ignored
        posterior = laplace(compiled(model, loss), x, y)
        logarithms = tf.nn.log_softmax(model(x)).numpy()
        each = np.take_along_axis(logarithms, x[..., None], axis=-1)[..., 0]
        assert 0 < counts.sum() < 30
        assert_close(posterior.log_likelihood, np.sum(each[counts]))
        assert posterior.predictive(x, "weights", draws=3).probs_parameter().shape == (6, 5, 4)
        with pytest.raises(ValueError, match=r"'weights'. Received: outputs of shape"):
            posterior.outputs(x)


def test_outputs_that_are_no_tensors_have_no_likelihood():
    model = mlp((4, 2))
    model.compile("sgd", LOSS["mse"].make())
    x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 2))
    outputs = {"cache": None, "count": 3, "y": model(x)}
    found, alone = (likelihood_term(model, o, tf.constant(y), None) for o in (outputs, model(x)))
    assert_close(log_likelihood(found), log_likelihood(alone))
    with pytest.raises(ValueError, match=r"models of one output.* Received: .* with 2 outputs"):
        likelihood_term(model, {**outputs, "z": outputs["y"]}, tf.constant(y), None)


class Projection(layers.Layer):
    """The other use of a table."""

    def __init__(self, table):
        super().__init__(dtype="float64")
        self.table = table

    def call(self, inputs):
        return self.table(inputs, reverse=True)


class TestUncovered:
    def test_is_said_and_fixed(self):
        keras.utils.set_random_seed(0)
        model = helpers.mlp(helpers.Unknown(name="unknown"))
        x, y = helpers.vectors(8)
        with pytest.warns(UserWarning, match=r"no curvature block(.|\n)*Unknown .* fallback"):
            posterior = laplace(compiled(model, helpers.crossentropy()), x, y)
        for variable, drawn in zip(model.trainable_variables, posterior.sample(), strict=True):
            assert np.array_equal(variable, drawn) == ("unknown" in variable.path)
        again, other = posterior.sample(), posterior.sample(seed=1)
        assert np.array_equal(again[0], posterior.sample()[0])
        assert not np.array_equal(again[0], other[0])


class TestWrongUses:
    def check(self, message, *args, model=None, loss="mse", **kwargs):
        model = model or keras.Sequential([keras.Input((2,)), layers.Dense(2)])
        if loss is not None:
            model.compile("sgd", loss)
        with pytest.raises(ValueError, match=message):
            laplace(model, *(args or [np.ones([3, 2])]), **kwargs)

    def test_models(self):
        self.check(r"not built. Received", model=keras.Sequential([layers.Dense(1)]))
        self.check(r"compile the model with one. Received", loss=None)
        self.check(r"knows no predictive distribution.*Received", loss="cosine_similarity")
        inputs = keras.Input((2,))
        two = keras.Model(inputs, [layers.Dense(1)(inputs), layers.Dense(1)(inputs)])
        self.check(r"models of one output.*Received", model=two, loss=["mse", "mse"])
        idle = keras.Sequential([keras.Input((2,)), layers.Flatten()])
        self.check(r"No layer of this model.*Received", model=idle)

    @pytest.mark.parametrize("value", [-1.0, 0, np.inf, "large"])
    def test_prior_precision(self, value):
        self.check(r"must be a positive number. Received: prior", prior_precision=value)

    def test_data(self):
        x = np.ones([3, 2])
        self.check(r"one entry for each example.*Received: .*\(3, 2\), \(2, 2\)", x, x[:2])
        self.check(r"at least one. Received: arrays of shapes \[\(0, 2\)\]", x[:0])
        self.check(r"outputs of the model are not finite. Received: batch 0", np.nan * x)
        norm = layers.Lambda(lambda z: tf.norm(z, axis=-1, keepdims=True))
        model = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False), norm])
        lost = r"not finite: .* no derivative.* Received: .*by layer: {'.*/dense.*': 2}"
        some = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
        self.check(lost, some, model=model, batch_size=1)
        data = tf.data.Dataset.from_tensor_slices((x, x, x[:, 0])).batch(2)
        self.check(r"Sample weights .* Received: a dataset of 3 parts", data)
        self.check(r"come to an end. Received", data.repeat())
        self.check(r"must hold the targets.*Received", data, x)
        self.check(
            r"depends on the targets.*Received: y=None for fisher='empirical'", fisher="empirical"
        )

    def test_names(self):
        self.check(r"`curvature` must be one of.*Received", curvature="kronecker")
        self.check(r"'linear_exact' keeps none.*Received: 6 weights", curvature="linear_exact")
        self.check(r"`fisher` must be one of.*Received", fisher="true")
        self.check(r"`batch_size` must be a positive int. Received", batch_size=0)

    def test_no_evidence(self):
        model = keras.Sequential([keras.Input((2,)), layers.Dense(2, kernel_initializer="zeros")])
        self.check(r"Choose `prior_precision`. Received: squared norm 0", model=model)
        model.compile("sgd", "mse")
        posterior = laplace(model, np.ones([3, 2]), prior_precision=1.0)
        with pytest.raises(ValueError, match=r"must come to an end. Received: x="):
            posterior.outputs(tf.data.Dataset.from_tensors(np.ones([3, 2])).repeat())
        with pytest.raises(ValueError, match=r"needs the targets.*Received"):
            posterior.log_marginal_likelihood()
        with pytest.raises(ValueError, match=r"`method` must be one of.*Received: method='mc'"):
            posterior.predictive(np.ones([3, 2]), "mc")


class TestInputs:
    def test_of_datasets(self):
        """As Keras takes them: the first part of a tuple, which may be one of several inputs."""
        first, second = keras.Input((2,)), keras.Input((1,))
        both = layers.Dense(2)(layers.Concatenate()([first, second]))
        model = compiled(keras.Model([first, second], both), "mse")
        x, y = [RNG.normal(size=(5, 2)), RNG.normal(size=(5, 1))], RNG.normal(size=(5, 2))
        pairs = tf.data.Dataset.from_tensor_slices((tuple(x), y)).batch(3)
        posterior = laplace(model, pairs, prior_precision=TAU)
        weighted = pairs.map(lambda x, y: (x, y, y[:, 0]))
        for data in (pairs, weighted, pairs.map(lambda x, _: (x,))):
            for method in ("linear", "weights"):
                found, expected = (posterior.predictive(i, method, draws=2) for i in (data, x))
                assert_close(found.mean(), expected.mean(), 1e-6)
                assert_close(found.variance(), expected.variance(), 1e-6)

    def test_one_number_for_each_example(self):
        """Outputs `(batch,)` are predicted as those of shape `(batch, 1)`."""
        column = linear(1)
        row = keras.Sequential([column, layers.Lambda(lambda z: z[:, 0], dtype="float64")])
        x, y = RNG.normal(size=(6, 3)), RNG.normal(size=6)
        made = [
            laplace(compiled(m, LOSS["mse"].make()), x, y, prior_precision=TAU)
            for m in (row, column)
        ]
        found, expected = (p.predictive(x, "weights", draws=3) for p in made)
        for same in zip(*map(precisions, made), strict=True):
            assert_close(*same, 1e-6)
        assert found.batch_shape == (6,)
        assert_close(found.log_prob(y[:, None]), expected.log_prob(y[:, None]), 1e-6)
        with pytest.raises(ValueError, match=r"method='weights'. Received: outputs of shape"):
            made[0].predictive(x)


PROBABILITIES = [
    likelihood.categorical_of_probabilities,
    likelihood.bernoulli_of_probabilities,
    lambda f: tfd.Categorical(probs=f),
    lambda f: tfd.Categorical(logits=2 * f),
    lambda f: tfd.Bernoulli(logits=f[..., 0] - f[..., 1]),
]
LOGITS = [
    likelihood.categorical,
    likelihood.bernoulli,
    lambda f: tfd.Categorical(probs=tf.nn.softmax(f)),
    lambda f: tfd.Bernoulli(probs=tf.sigmoid(f)),
]


class TestProbit:
    """Only logits can be scaled."""

    @pytest.mark.parametrize("make", PROBABILITIES)
    def test_refuses_others(self, make):
        uniform, none = tf.fill([3, 2], 0.5), tf.zeros([3, 2])
        with pytest.raises(ValueError, match=r"outputs that are logits.* Received: tfp"):
            predictive.probit(make, uniform, none)

    @pytest.mark.parametrize("make", LOGITS)
    def test_takes_them(self, make):
        logits = tf.constant([[3.0, -1.0], [40.0, -50.0]])
        found = predictive.probit(make, logits, tf.fill([2, 2], 24 / np.pi))
        halved = make(logits / 2)  # √(1 + π/8 · 24/π) = 2.
        parameters = [getattr(d, "distribution", d).probs_parameter() for d in (found, halved)]
        np.testing.assert_allclose(*parameters, rtol=1e-5)

    def test_probabilities_of_a_loss(self):
        """Of a divergence of probabilities, or where Keras does not see the logits."""
        x, y = RNG.normal(size=(6, 3)), np.eye(2)[[0, 1, 0, 1, 1, 0]]
        hidden = layers.Reshape((2,))
        for loss, more in (("kl_divergence", []), ("categorical_crossentropy", [hidden])):
            body = [keras.Input((3,)), layers.Dense(2, "softmax"), *more]
            posterior = laplace(compiled(keras.Sequential(body), loss), x, y)
            with pytest.raises(ValueError, match=r"method='weights'. Received: .*Categorical"):
                posterior.predictive(x, "probit")


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_best_precision_is_found_from_anywhere(scale):
    """Where the derivative is zero, whatever the units of weights and curvature."""
    s, norm = tf.constant(RNG.exponential(size=50) ** 8 * scale), tf.constant(3.0, tf.float64)
    tau = best_precision(s, norm)
    with tf.GradientTape() as tape:
        tape.watch(tau)
        value = log_evidence(tf.zeros((), tf.float64), s, norm, tau)
    assert abs(tape.gradient(value, tau) * tau) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        lambda f: tfd.Independent(tfd.Normal(2 * f, tf.ones_like(f)), 1),
        lambda f: tfd.Poisson(f),
        lambda f: tfd.LogNormal(f[..., 0], 1.0),
        lambda f: tfd.Sample(tfd.Normal(f[..., 0], 1.0), 1),
        lambda f: tfd.Masked(tfd.Normal(f[..., 0], 1.0), [True, False]),
        lambda f: tfd.Independent(tfd.Normal(f[..., tf.newaxis], 1.0), 2),
    ],
    ids=["other means", "no normal noise", "logarithms", "samples", "masked", "matrices"],
)
def test_only_noise_is_added(make):
    means, covariance = tf.ones([2, 1]), tf.ones([2, 1, 1])
    assert predictive.with_noise(make, means, covariance) is None


def test_one_number_joined_by_itself_stays_one():
    def make(f):
        return tfd.Independent(tfd.Normal(f[..., 0], 1.0), 0)

    found = predictive.with_noise(make, tf.ones([2, 1]), tf.ones([2, 1, 1]))
    assert found.event_shape == [] and found.batch_shape == [2]
    assert_close(found.variance(), [2.0, 2.0], 1e-6)


def test_draws_of_weights_behind_an_operation():
    """Keras sees the logits behind TensorFlow's softmax in graphs only: so does the posterior."""
    x, found = np.random.default_rng(0).normal(size=(20, 4)), []
    for last in (keras.layers.Softmax(), keras.layers.Lambda(tf.nn.softmax)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), last])
        model.compile("sgd", "sparse_categorical_crossentropy")
        posterior = laplace(model, x, np.arange(20) % 3)
        for method in ("weights", "linear"):
            predicted = posterior.predictive(x[:5], method=method, draws=20)
            found.append(predicted.probs_parameter())
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)
    np.testing.assert_allclose(found[1], found[3], atol=1e-4)


def test_linear_predictions_need_gradients_of_examples():
    """Layers on positions that all examples share have none; draws of weights do without."""
    body = [helpers.Places(4, 3), keras.layers.Flatten(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4, 3)), *body])
    model.compile("sgd", "mse")
    inputs = np.random.default_rng(0).normal(size=(8, 4, 3))
    posterior = laplace(model, inputs, inputs[:, 0, :2])
    with pytest.raises(ValueError, match=r"single examples.* Received: layer '.*table'"):
        posterior.predictive(inputs[:6])
    assert posterior.predictive(inputs[:6], method="weights", draws=5).mean().shape == (6, 2)
