"""Losses that are likelihoods of any distribution: their Fisher matrix, and how they train."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac import KFAC, NegativeLogLikelihood
from keras_kfac.introspection.known_losses import known
from keras_kfac.math.draws import draw
from keras_kfac.math.likelihood import Likelihood
from tests import helpers
from tests.cases import factors, mlp
from tests.reference import assert_close, kron
from tests.test_information import CASES, KL_CASES, MIXTURES, fisher_by_definition, mixture

tfd = tfp.distributions
layers = keras.layers
RNG = np.random.default_rng(0)
ALL = {**CASES, **KL_CASES}
SEED = tf.constant([1, 2])


def loss_of(case, **kwargs):
    return NegativeLogLikelihood(case.make, dtype="float64", **kwargs)


def dense_fisher(model, case, x, layer):
    """Of one layer, by the Jacobian of the outputs and the information of each example."""
    from tests.test_information import fisher_by_products

    with tf.GradientTape() as tape:
        outputs = model(x)
    jacobian = tape.jacobian(outputs, [v.value for v in layer.weights])
    size = int(np.prod(outputs.shape))
    jacobian = np.concatenate([np.reshape(j, [size, -1]) for j in jacobian], axis=1)
    jacobian = jacobian.reshape(*outputs.shape, -1)
    information, _ = fisher_by_products(case, outputs)
    return np.einsum("nip,nij,njq->pq", jacobian, information, jacobian) / len(x)


@pytest.mark.parametrize("name", ["normal", "gamma", "student-t", "poisson", "triangular", "bits"])
def test_exact_factors_of_one_example_equal_the_fisher_matrix(name):
    """Identity 5."""
    case = ALL[name]
    model = mlp((3, 4, case.width))
    x = RNG.normal(size=(1, 3))
    for layer, (a, g) in zip(model.layers, factors(model, loss_of(case), x)):
        assert_close(kron(a, g), dense_fisher(model, case, x, layer))


@pytest.mark.parametrize("name", ALL)
def test_sampled_converges_to_exact(name):
    """Identity 4, in the space of the outputs: as fast as an average of so many draws can."""
    case, draws = ALL[name], 40_000
    likelihood = Likelihood(case.make)
    outputs = tf.constant(RNG.uniform(-0.5, 0.5, (1, case.width)))
    exact = sum(
        np.multiply.outer(column, column)
        for i in range(likelihood.columns(outputs))
        for column in [likelihood.root_column(outputs, i)[0]]
    )
    vectors = likelihood.sampled_vector(tf.tile(outputs, [draws, 1]), SEED).numpy()
    products = vectors[:, :, None] * vectors[:, None]
    error = products.std(axis=0) / np.sqrt(draws)
    assert (np.abs(products.mean(axis=0) - exact) <= 5 * error + 1e-12).all()


COMPILED = {"gamma", "binomial", "negative-binomial", "multinomial", "von-mises"}


@pytest.mark.parametrize(
    "name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in ALL]
)
def test_draws_compile(name):
    likelihood = Likelihood(ALL[name].make)
    outputs = tf.constant(RNG.uniform(-0.5, 0.5, (4, ALL[name].width)))
    compiled = tf.function(lambda x: likelihood.sampled_vector(x, SEED), jit_compile=True)
    assert np.isfinite(compiled(outputs)).all()


@pytest.mark.parametrize(
    "name",
    [n if n in ("gamma", "multinomial") else pytest.param(n, marks=pytest.mark.slow) for n in ALL],
)
def test_closed_forms_compile(name):
    """To the digits that XLA's special functions have."""
    likelihood = Likelihood(ALL[name].make)
    outputs, direction = (
        tf.constant(RNG.uniform(-0.5, 0.5, (4, ALL[name].width))) for _ in range(2)
    )

    def products(outputs):
        return likelihood.curvature_products(outputs, [direction], SEED)[0, 0]

    compiled = tf.function(products, jit_compile=True)
    assert_close(compiled(outputs), products(outputs), 1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_sampled_of_a_mixture_converges_to_an_integral(name):
    """Without a closed form there is still the definition."""
    case, draws = MIXTURES[name], 40_000
    outputs = tf.constant(RNG.uniform(-0.5, 0.5, (1, case.width)))
    vectors = Likelihood(case.make).sampled_vector(tf.tile(outputs, [draws, 1]), SEED).numpy()
    products = vectors[:, :, None] * vectors[:, None]
    error = products.std(axis=0) / np.sqrt(draws)
    expected = fisher_by_definition(case, outputs)[0]
    assert (np.abs(products.mean(axis=0) - expected) <= 5 * error).all()


def test_rate_of_convergence_is_that_of_an_average():
    """Identity 4, from both sides: a hundred times the draws have a tenth of the error."""
    likelihood = Likelihood(CASES["normal-fixed-scale"].make)
    outputs = tf.constant([[0.3]], tf.float64)
    exact, errors = float(likelihood.root_column(outputs, 0)[0, 0]) ** 2, []
    for draws in (20, 2000):
        many = tf.broadcast_to(outputs, [1000, draws, 1])
        vectors = likelihood.sampled_vector(many, SEED).numpy()
        errors.append(np.sqrt(np.mean(np.square(np.mean(vectors**2, axis=(1, 2)) - exact))))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_mixture_learns(fisher):
    """It has no closed form: factors and products of the model are from draws."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 3)).astype("float32")
    y = x[:, 0] * rng.choice([-1, 1], 256) + 0.1 * rng.normal(size=256)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(6)]
    )
    helpers.compiled(model, KFAC(fisher=fisher), NegativeLogLikelihood(mixture))
    history = helpers.fit(model, (x, y), epochs=15, batch_size=32).history["loss"]
    assert history[-1] < history[0] - 0.5


COUNTS = {
    "alone": lambda f: tfd.NegativeBinomial(3.0, f[..., 0]),
    "independent": lambda f: tfd.Independent(tfd.NegativeBinomial(3.0, f), 1),
    "repeated": lambda f: tfd.Sample(tfd.NegativeBinomial(3.0, f[..., 0]), 2),
    "shifted": lambda f: tfp.bijectors.Shift(f[..., 1])(tfd.NegativeBinomial(3.0, f[..., 0])),
    "mixture": lambda f: tfd.MixtureSameFamily(
        tfd.Categorical(-f), tfd.NegativeBinomial([1.0, 8.0], f)
    ),
    "unlike-parts": lambda f: tfd.Mixture(
        tfd.Categorical(-f), [tfd.Poisson(tf.exp(f[..., 1])), tfd.NegativeBinomial(3.0, f[..., 0])]
    ),
    "zero-inflated": lambda f: tfd.ZeroInflatedNegativeBinomial(
        total_count=tf.constant(3.0, f.dtype), logits=f[..., 0], inflated_loc_logits=f[..., 1]
    ),
    "zero-inflated-probability": lambda f: tfd.ZeroInflatedNegativeBinomial(
        total_count=3 * tf.ones_like(f[..., 0]),
        logits=f[..., 0],
        inflated_loc_probs=tf.sigmoid(f[..., 1]),
    ),
    "beta-binomial": lambda f: tfd.BetaBinomial(4.0, tf.exp(f[..., 0]), tf.exp(f[..., 1])),
    "log-normal-rate": lambda f: tfd.PoissonLogNormalQuadratureCompound(f[..., 0], 0.5),
}


@pytest.mark.parametrize("name", COUNTS)
def test_draws_for_xla_have_the_moments_of_the_distribution(name):
    outputs = tf.tile(tf.constant([[-0.5, 0.3]], tf.float64), [100_000, 1])
    drawn = draw(COUNTS[name](outputs), SEED).numpy()
    distribution = COUNTS[name](outputs[:1])
    mean, variance = distribution.mean().numpy()[0], distribution.variance().numpy()[0]
    assert drawn.shape[1:] == distribution.event_shape
    assert np.abs(drawn.mean(axis=0) - mean).max() < 5 * np.sqrt(variance / len(drawn)).max()
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.05)


@pytest.mark.parametrize(
    "name",
    [n if n == "mixture" else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS],
)
def test_draws_of_compounds_compile(name):
    outputs = tf.constant(RNG.uniform(-0.5, 0.5, (4, 2)))
    compiled = tf.function(lambda x: draw(COUNTS[name](x), SEED), jit_compile=True)
    assert np.isfinite(compiled(outputs)).all()


def test_other_distributions_are_drawn_as_they_are():
    outputs = tf.constant(RNG.uniform(-0.5, 0.5, (4, 6)))
    helpers.assert_same(draw(mixture(outputs), SEED), mixture(outputs).sample(seed=SEED))


EDGES = {
    "beta": (lambda o: tfd.Beta(*tf.unstack(tf.exp(o), axis=-1)), [-2.3, -1.6]),
    "gamma": (lambda o: tfd.Gamma(*tf.unstack(tf.exp(o), axis=-1)), [-4.6, 0.0]),
    "inverse-gamma": (lambda o: tfd.InverseGamma(*tf.unstack(tf.exp(o), axis=-1)), [-3.5, 0.0]),
    "logit-normal": (
        lambda o: tfd.LogitNormal(o[..., 0], tf.exp(o[..., 1])),
        [0.0, 2.3],
    ),
    "dirichlet": (lambda o: tfd.Dirichlet(tf.exp(o)), [-3.5, -3.0]),
}


@pytest.mark.parametrize("name", EDGES)
def test_draws_at_the_edge_of_the_range_have_derivatives(name):
    """In float32, where draws round to 0 or 1: second moments of the score are the information."""
    make, values = EDGES[name]
    likelihood = Likelihood(make)
    outputs = tf.tile(tf.constant([values], tf.float32), [20_000, 1])
    vectors = likelihood.sampled_vector(outputs, tf.constant([0, 1])).numpy()
    assert np.isfinite(vectors).all()
    columns = [likelihood.root_column(outputs[:1], i).numpy()[0] for i in range(2)]
    information = sum(np.outer(c, c) for c in columns)
    error = np.abs(vectors.T @ vectors / len(vectors) - information).max()
    assert error < 0.1 * np.abs(information).max()


@pytest.mark.parametrize("concentration", [1e3, 1e6])
def test_roots_of_large_concentrations_are_exact(concentration):
    """In float32: of Gamma distributions, what is left of α is 1/2."""
    likelihood = Likelihood(lambda o: tfd.Gamma(o[..., 0], tf.exp(o[..., 1])))
    outputs = tf.constant([[concentration, 0.0]])
    second = likelihood.root_column(outputs, 1).numpy()[0]
    np.testing.assert_allclose(second, [0, 0.5**0.5], atol=1e-3)


def test_what_does_not_depend_on_the_outputs_is_refused():
    constant = Likelihood(lambda f: tfd.Normal(tf.zeros_like(f[..., 0]), 1.0))
    outputs = tf.zeros([4, 2])
    for use in (
        lambda: constant.sampled_vector(outputs, SEED),
        lambda: constant.columns(outputs),
        lambda: constant.propagated_vector(outputs, SEED),
        lambda: constant.curvature_products(outputs, [outputs], SEED),
    ):
        with pytest.raises(ValueError, match=r"must depend on the outputs.* Received: .*Normal"):
            use()


def test_what_can_not_be_made_of_the_outputs_is_refused():
    def of_two(outputs):
        mean, scale = tf.unstack(outputs, axis=-1)
        return tfd.Normal(mean, scale)

    outputs = tf.zeros([4, 3])
    match = r"of the width .* Received: outputs of shape \(4, 3\), .*ValueError: too many values"
    with pytest.raises(ValueError, match=match):
        Likelihood(of_two).distribution(outputs)
    with pytest.raises(ValueError, match=match):
        NegativeLogLikelihood(of_two)(tf.zeros([4]), outputs)


def test_joint_distributions_are_refused():
    model = mlp((3, 2))
    joint = NegativeLogLikelihood(
        lambda o: tfd.JointDistributionSequential([tfd.Normal(o[..., 0], 1.0)])
    )
    model.compile(KFAC().attach(model), joint)
    with pytest.raises(ValueError, match=r"Distribution` of one tensor. Received: .*Joint"):
        model.train_on_batch(np.zeros((4, 3)), np.zeros(4))


def test_a_subclass_that_computes_something_else_is_another_loss():
    class Five(NegativeLogLikelihood):
        def call(self, y_true, y_pred):
            return 5 * super().call(y_true, y_pred)

    def make(outputs):
        return tfd.Normal(outputs[..., 0], 1.0)

    assert known(NegativeLogLikelihood(make))[1] is not None
    assert known(Five(make))[1] is None


def test_draws_that_do_not_compile_are_refused_by_name():
    """Where they would be compiled, and only there."""

    def bates(outputs):
        return tfd.Bates(3.0, high=1 + tf.exp(outputs[..., 0]))

    x, y = RNG.normal(size=(8, 3)), RNG.uniform(size=8)
    for jit_compile in (True, False):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        helpers.compiled(model, KFAC(), NegativeLogLikelihood(bates), jit_compile=jit_compile)
        if jit_compile:
            with pytest.raises(ValueError, match=r"with jit_compile=False. Received: .*Bates"):
                helpers.fit(model, (x, y))
        else:
            helpers.fit(model, (x, y))
            helpers.assert_all_finite(model)
