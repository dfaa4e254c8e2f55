"""Fisher information in closed form, against sums and integrals over the distributions."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.math.families import FORMS, form_of
from keras_kfac.math.huber import Huber
from tests.reference import assert_close

tfd = tfp.distributions
RNG = np.random.default_rng(0)


def line():
    """Points and weights of the double-exponential rule on the whole line; 0 is no point."""
    t = (np.arange(-8000, 8000) + 0.5) * 5e-4
    y = np.sinh(np.pi / 2 * np.sinh(t))
    return y, np.gradient(y, t) * 5e-4


def half_line():
    """Likewise for positive numbers."""
    t = (np.arange(-8000, 8000) + 0.5) * 5e-4
    y = np.exp(np.pi / 2 * np.sinh(t))
    return y, y * np.pi / 2 * np.cosh(t) * 5e-4


def unit_interval():
    """Likewise for numbers between 0 and 1."""
    t = (np.arange(-6100, 6100) + 0.5) * 5e-4
    y = 1 / (1 + np.exp(-np.pi * np.sinh(t)))
    return y, y * (1 - y) * np.pi * np.cosh(t) * 5e-4


def circle():
    y = np.linspace(-np.pi, np.pi, 512, endpoint=False)
    return y, np.full(512, 2 * np.pi / 512)


def counts(largest=400):
    return np.arange(largest + 1.0), np.ones(largest + 1)


def labels():
    return np.arange(3), np.ones(3)


def one_hot():
    return np.eye(3), np.ones(3)


def draws():
    """Four draws among three."""
    y = [(i, j, 4 - i - j) for i in range(5) for j in range(5 - i)]
    return np.array(y, float), np.ones(len(y))


def pairs_of_bits():
    return np.array([[i, j] for i in (0.0, 1.0) for j in (0.0, 1.0)]), np.ones(4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function from outputs `[..., width]` to distributions, and where to sum over these."""

    make: Callable
    width: int
    support: Callable | None


def two(cls):
    return lambda f: cls(f[..., 0], tf.exp(f[..., 1]))


def two_positive(cls):
    return lambda f: cls(tf.exp(f[..., 0]), tf.exp(f[..., 1]))


CASES = {
    "normal": Case(two(tfd.Normal), 2, line),
    "normal-one-output-in-both": Case(lambda f: tfd.Normal(f[..., 0], 1 + f[..., 0] ** 2), 1, line),
    "normal-fixed-scale": Case(lambda f: tfd.Normal(f[..., 0], 0.5), 1, line),
    "log-normal": Case(two(tfd.LogNormal), 2, half_line),
    "logit-normal": Case(two(tfd.LogitNormal), 2, unit_interval),
    "cauchy": Case(two(tfd.Cauchy), 2, line),
    "huber": Case(lambda f: Huber(f[..., 0], 1.5), 1, line),
    "logistic": Case(two(tfd.Logistic), 2, line),
    "gumbel": Case(two(tfd.Gumbel), 2, line),
    "student-t": Case(lambda f: tfd.StudentT(4.0, f[..., 0], tf.exp(f[..., 1])), 2, line),
    "student-t-freedom": Case(
        lambda f: tfd.StudentT(2 + tf.exp(f[..., 2]), f[..., 0], tf.exp(f[..., 1])), 3, line
    ),
    "von-mises": Case(two(tfd.VonMises), 2, circle),
    "half-normal": Case(lambda f: tfd.HalfNormal(tf.exp(f[..., 0])), 1, half_line),
    "exponential": Case(lambda f: tfd.Exponential(tf.exp(f[..., 0])), 1, half_line),
    "gamma": Case(two_positive(tfd.Gamma), 2, half_line),
    "gamma-log-rate": Case(
        lambda f: tfd.Gamma(tf.exp(f[..., 0]), log_rate=f[..., 1]), 2, half_line
    ),
    "inverse-gamma": Case(two_positive(tfd.InverseGamma), 2, half_line),
    "beta": Case(two_positive(tfd.Beta), 2, unit_interval),
    "poisson": Case(lambda f: tfd.Poisson(tf.exp(f[..., 0])), 1, counts),
    "poisson-log-rate": Case(lambda f: tfd.Poisson(log_rate=f[..., 0]), 1, counts),
    "bernoulli": Case(lambda f: tfd.Bernoulli(f[..., 0]), 1, lambda: counts(1)),
    "bernoulli-probs": Case(
        lambda f: tfd.Bernoulli(probs=tf.sigmoid(2 * f[..., 0])), 1, lambda: counts(1)
    ),
    "binomial": Case(lambda f: tfd.Binomial(5.0, f[..., 0]), 1, lambda: counts(5)),
    "geometric": Case(lambda f: tfd.Geometric(f[..., 0]), 1, counts),
    "negative-binomial": Case(lambda f: tfd.NegativeBinomial(3.0, f[..., 0]), 1, counts),
    "categorical": Case(lambda f: tfd.Categorical(f), 3, labels),
    "one-hot": Case(lambda f: tfd.OneHotCategorical(f), 3, one_hot),
    "multinomial": Case(lambda f: tfd.Multinomial(4.0, f), 3, draws),
    "bits": Case(lambda f: tfd.Independent(tfd.Bernoulli(f), 1), 2, pairs_of_bits),
    "bits-tied": Case(
        lambda f: tfd.Independent(tfd.Bernoulli(f[..., :1] * [1.0, 2.0]), 1), 1, pairs_of_bits
    ),
}


# The score jumps, where no rule of integration is exact.
LAPLACE = Case(two(tfd.Laplace), 2, None)


def outputs_of(case, batch=(2, 3)):
    return tf.constant(RNG.uniform(-0.5, 0.5, (*batch, case.width)))


def fisher_by_products(case, outputs):
    """`[*batch, width, width]` from the form, and by the columns of its root."""
    width = case.width
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(outputs)
        distribution = case.make(outputs)
        form = form_of(distribution)
        parameters = form.parameters(distribution)
    varies = [tape.gradient(p, outputs) is not None for p in parameters]
    tangents = []
    for i in range(width):
        direction = tf.broadcast_to(tf.one_hot(i, width, dtype=outputs.dtype), outputs.shape)
        with tf.autodiff.ForwardAccumulator(outputs, direction) as accumulator:
            own = form.parameters(case.make(outputs))
        tangents.append(tuple(accumulator.jvp(p) for p in own))
    products = [[form.product(parameters, u, v) for v in tangents] for u in tangents]
    by_products = np.moveaxis(np.array(products), [0, 1], [-2, -1])
    by_columns = 0
    columns = form.columns(parameters, varies)
    for z in tf.eye(columns, dtype=outputs.dtype):
        column = form.root_product(parameters, varies, z)
        assert [part is not None for part in column] == varies
        used = [
            (p, tf.broadcast_to(c, p.shape)) for p, c in zip(parameters, column) if c is not None
        ]
        back = tape.gradient([p for p, _ in used], outputs, [c for _, c in used]).numpy()
        by_columns += back[..., :, None] * back[..., None, :]
    return by_products, by_columns


def fisher_by_definition(case, outputs):
    """The expected outer product of the gradient of the log-likelihood."""
    points, weights = case.support()
    points = np.reshape(points, [len(weights), *[1] * (outputs.shape.rank - 1), *points.shape[1:]])
    every = tf.repeat(outputs[tf.newaxis], len(weights), axis=0)
    with tf.GradientTape() as tape:
        tape.watch(every)
        log_prob = case.make(every).log_prob(points)
    scores = np.nan_to_num(tape.gradient(log_prob, every).numpy())
    mass = np.exp(log_prob) * np.reshape(weights, [-1, *[1] * (outputs.shape.rank - 1)])
    np.testing.assert_allclose(mass.sum(axis=0), 1, rtol=1e-6)
    return np.einsum("n...,n...i,n...j->...ij", mass, scores, scores)


@pytest.mark.parametrize("name", CASES)
def test_is_the_variance_of_the_score(name):
    case = CASES[name]
    outputs = outputs_of(case)
    by_products, by_columns = fisher_by_products(case, outputs)
    assert_close(by_products, fisher_by_definition(case, outputs), 1e-5)
    assert_close(by_columns, by_products, 1e-10)


def mixture(outputs):
    """Of two normal distributions."""
    means, log_scales, logits = tf.split(outputs, 3, axis=-1)
    parts = tfd.Normal(means, tf.exp(log_scales))
    return tfd.MixtureSameFamily(tfd.Categorical(logits), parts)


def mixture_of_counts(outputs):
    """Of two negative binomial distributions."""
    logits, among = tf.split(outputs, 2, axis=-1)
    parts = tfd.NegativeBinomial([1.0, 5.0], logits)
    return tfd.MixtureSameFamily(tfd.Categorical(among), parts)


# Without a closed form.
MIXTURES = {"normals": Case(mixture, 6, line), "counts": Case(mixture_of_counts, 4, counts)}


@pytest.mark.parametrize("name", [*CASES, *MIXTURES])
def test_divergence_is_half_the_square_to_third_order(name):
    """Identity 18: the rest is to the square as the step is to 1. By sums and integrals."""
    case = {**CASES, **MIXTURES}[name]
    outputs = outputs_of(case, batch=())
    points, weights = case.support()
    direction = RNG.normal(size=case.width)
    if name in MIXTURES:
        fisher = fisher_by_definition(case, outputs)
    else:
        fisher, _ = fisher_by_products(case, outputs)
    half = 0.5 * direction @ fisher @ direction
    distribution = case.make(outputs)
    before = distribution.log_prob(points)
    rests = []
    for size in (0.08, 0.04, 0.02):
        after = case.make(outputs + size * direction).log_prob(points)
        divergence = np.sum(weights * np.exp(before) * np.nan_to_num(before - after))
        rests.append(abs(divergence / size**2 / half - 1))
    assert rests[0] < 0.3
    assert rests[2] < 0.6 * rests[1] + 1e-4 and rests[1] < 0.6 * rests[0] + 1e-4


def test_of_laplace():
    """`1 / scale²` for the location, 1 for the logarithm of the scale, and nothing between."""
    outputs = outputs_of(LAPLACE)
    by_products, by_columns = fisher_by_products(LAPLACE, outputs)
    each = np.stack([np.exp(-2 * outputs[..., 1]), np.ones(outputs.shape[:-1])], axis=-1)
    assert_close(by_products, each[..., None] * np.eye(2))
    assert_close(by_columns, by_products)


def triangular(f):
    return tfd.MultivariateNormalTriL(
        f[..., :2], tfp.math.fill_triangular(f[..., 2:]) + tf.eye(2, dtype=f.dtype)
    )


def diagonal(f):
    return tfd.MultivariateNormalDiag(f[..., :2], tf.exp(f[..., 2:]))


KL_CASES = {
    "triangular": Case(triangular, 5, None),
    "triangular-fixed-mean": Case(
        lambda f: tfd.MultivariateNormalTriL(
            None, triangular(tf.concat([f[..., :2], f], -1)).scale.to_dense()
        ),
        3,
        None,
    ),
    "triangular-fixed-root": Case(
        lambda f: tfd.MultivariateNormalTriL(f, np.array([[1.0, 0.0], [0.5, 2.0]])), 2, None
    ),
    "diagonal": Case(diagonal, 4, None),
    "dirichlet": Case(lambda f: tfd.Dirichlet(tf.exp(f)), 3, None),
    "independent-vectors": Case(
        lambda f: tfd.Independent(triangular(tf.reshape(f, [*f.shape[:-1], 2, 5])), 1), 10, None
    ),
    "gamma": CASES["gamma"],
    "von-mises": CASES["von-mises"],
}


@pytest.mark.parametrize("name", KL_CASES)
def test_is_the_hessian_of_the_divergence(name):
    """Identity 18, to second order: exact derivatives of the divergence that TFP knows."""
    case = KL_CASES[name]
    outputs = outputs_of(case, batch=(2,))
    fixed = case.make(tf.identity(outputs))
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(outputs)
        with tf.GradientTape() as inner:
            inner.watch(outputs)
            divergence = tfd.kl_divergence(fixed, case.make(outputs))
        gradient = inner.gradient(divergence, outputs)
    expected = outer.batch_jacobian(gradient, outputs, experimental_use_pfor=False)
    by_products, by_columns = fisher_by_products(case, outputs)
    assert_close(by_products, expected, 1e-8)
    assert_close(by_columns, by_products, 1e-10)


def test_others_have_none():
    mixture = tfd.MixtureSameFamily(tfd.Categorical([0.0, 1.0]), tfd.Normal([0.0, 1.0], 1.0))
    assert form_of(mixture) is None
    assert form_of(tfd.Independent(tfd.Uniform([0.0, 1.0], 2.0), 1)) is None


@pytest.mark.parametrize("name", ["binomial", "negative-binomial", "multinomial"])
def test_numbers_of_draws_are_constants(name):
    form = form_of(CASES[name].make(outputs_of(CASES[name])))
    assert form.is_constant == [False, True]


@pytest.mark.parametrize("concentration", [1e2, 1e3, 1e4, 1e6])
def test_concentrated_directions_are_normal_numbers(concentration):
    """In float32, where differences are lost: of the logarithm the information is 1/2."""
    form, kappa = FORMS[tfd.VonMises], tf.constant(concentration)
    (along,) = [form.product((tf.zeros([]), kappa), (None, kappa), (None, kappa))]
    assert float(along) == pytest.approx(0.5, rel=2 / concentration + 1e-5)


def test_uniform_directions_have_no_information_on_their_location():
    distribution = tfd.VonMises([0.3], tf.constant([0.0]))
    form = form_of(distribution)
    parameters = form.parameters(distribution)
    for z, expected in (([1.0, 0.0], [0.0, 0.0]), ([0.0, 1.0], [0.0, 0.5**0.5])):
        column = form.root_product(parameters, [True, True], tf.constant(z))
        np.testing.assert_allclose(np.ravel(column), expected, rtol=1e-6)
