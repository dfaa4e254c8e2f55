"""Which distributions have a Fisher information in closed form.

Sources: Lehmann & Casella (1998), "Theory of Point Estimation", section 2.5 (exponential families,
location and scale); Lange, Little & Taylor (1989), "Robust statistical modeling using the t
distribution", appendix B; Mardia & Jupp (2000), "Directional Statistics", section 5.3 (von Mises).
Every entry is tested against sums or integrals over the distribution.
"""

import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.math.huber import Huber
from keras_kfac.math.information import (
    CONSTANT,
    Concentrations,
    Form,
    Gaussian,
    Scalars,
    Softmax,
    Together,
    trigamma,
)

tfd = tfp.distributions

Rows = list[list[Any]]


def _location_scale(location: float, cross: float, scale: float) -> Form:
    """`(y - loc) / scale` has the same distribution whatever these are; `I` is for both 1."""

    def information(loc: tf.Tensor, width: tf.Tensor) -> Rows:
        unit = width**-2
        return [[location * unit], [cross * unit, scale * unit]]

    return Scalars(lambda d: (d.loc, d.scale), information, (0, 0))


def _bernoulli(logits: tf.Tensor, draws: float | tf.Tensor = 1.0) -> Rows:
    return [[draws * tf.sigmoid(logits) * tf.sigmoid(-logits)]]


def _failures(logits: tf.Tensor, draws: float | tf.Tensor = 1.0) -> Rows:
    """Draws until a number of those of probability `σ(-logits)` has come."""
    return [[draws * tf.sigmoid(logits)]]


def _beta(a: tf.Tensor, b: tf.Tensor) -> Rows:
    both = trigamma(a + b)
    return [[trigamma(a) - both], [-both, trigamma(b) - both]]


def _gamma(concentration: tf.Tensor, log_rate: tf.Tensor) -> Rows:
    return [[trigamma(concentration)], [-1.0, concentration]]


def _log_rate(distribution: Any) -> tf.Tensor:
    known = distribution.log_rate
    return tf.math.log(distribution.rate) if known is None else known


def _student(df: tf.Tensor, loc: tf.Tensor, scale: tf.Tensor) -> Rows:
    curved = 0.25 * (trigamma(df / 2) - trigamma((df + 1) / 2))
    freedom = curved - (df + 5) / (2 * df * (df + 1) * (df + 3))
    return [
        [freedom],
        [0.0, (df + 1) / ((df + 3) * scale**2)],
        [-2 / (scale * (df + 1) * (df + 3)), 0.0, 2 * df / ((df + 3) * scale**2)],
    ]


def _von_mises(loc: tf.Tensor, kappa: tf.Tensor) -> Rows:
    resultant = tf.math.bessel_i1e(kappa) / tf.math.bessel_i0e(kappa)
    # At 0 the quotient is 1/2 in the limit.
    quotient = tf.where(kappa > 0, tf.math.divide_no_nan(resultant, kappa), 0.5)
    of_kappa = 1 - resultant**2 - quotient
    series = tf.math.divide_no_nan(2 * kappa + 1, 4 * kappa**3)
    return [[kappa * resultant], [0.0, tf.where(kappa > 1e4, series, of_kappa)]]


def _with_edges(form: Form) -> Form:
    form.has_edges = True
    return form


_EULER = float(np.euler_gamma)
_NORMAL = _location_scale(1.0, 0.0, 2.0)


FORMS: dict[type, Form] = {
    tfd.Normal: _NORMAL,
    tfd.LogNormal: _NORMAL,
    tfd.LogitNormal: _with_edges(_location_scale(1.0, 0.0, 2.0)),
    tfd.Laplace: _location_scale(1.0, 0.0, 1.0),
    tfd.Cauchy: _location_scale(0.5, 0.0, 0.5),
    tfd.Logistic: _location_scale(1 / 3, 0.0, (3 + math.pi**2) / 9),
    tfd.Gumbel: _location_scale(1.0, _EULER - 1, math.pi**2 / 6 + (1 - _EULER) ** 2),
    Huber: Scalars(lambda d: (d.loc, d.information), lambda loc, middle: [[middle]], (0, CONSTANT)),
    tfd.StudentT: Scalars(lambda d: (d.df, d.loc, d.scale), _student, (0, 0, 0)),
    tfd.VonMises: Scalars(lambda d: (d.loc, d.concentration), _von_mises, (0, 0)),
    tfd.HalfNormal: Scalars(lambda d: (d.scale,), lambda scale: [[2 * scale**-2]]),
    tfd.Exponential: Scalars(lambda d: (d.rate,), lambda rate: [[rate**-2]]),
    tfd.Gamma: _with_edges(Scalars(lambda d: (d.concentration, _log_rate(d)), _gamma, (0, 0))),
    tfd.InverseGamma: _with_edges(
        Scalars(lambda d: (d.concentration, tf.math.log(d.scale)), _gamma, (0, 0))
    ),
    tfd.Beta: _with_edges(Scalars(lambda d: (d.concentration1, d.concentration0), _beta, (0, 0))),
    tfd.Poisson: Scalars(
        lambda d: (d.log_rate_parameter(),), lambda log_rate: [[tf.exp(log_rate)]]
    ),
    tfd.Bernoulli: Scalars(lambda d: (d.logits_parameter(),), _bernoulli),
    tfd.Binomial: Scalars(
        lambda d: (d.logits_parameter(), d.total_count), _bernoulli, (0, CONSTANT)
    ),
    tfd.Geometric: Scalars(lambda d: (-d.logits_parameter(),), _failures),
    tfd.NegativeBinomial: Scalars(
        lambda d: (d.logits_parameter(), d.total_count), _failures, (0, CONSTANT)
    ),
    tfd.Categorical: Softmax(lambda d: (d.logits_parameter(),), (1,)),
    tfd.OneHotCategorical: Softmax(lambda d: (d.logits_parameter(),), (1,)),
    tfd.Multinomial: Softmax(lambda d: (d.logits_parameter(), d.total_count), (1, CONSTANT)),
    tfd.Dirichlet: _with_edges(Concentrations(lambda d: (d.concentration,), (1,))),
    tfd.MultivariateNormalTriL: Gaussian(lambda d: (d.mean(), d.scale.to_dense()), (1, 2)),
    tfd.MultivariateNormalDiag: Together(
        _NORMAL, 1, lambda d: tfd.Normal(d.mean(), d.scale.diag_part())
    ),
}


def form_of(distribution: Any) -> Form | None:
    """The Fisher information of a distribution; `None` if none is known in closed form.

    Example:
    >>> normal = tfp.distributions.Normal([0.0, 1.0], scale=2.0)
    >>> form = form_of(normal)
    >>> loc, scale = form.parameters(normal)
    >>> form.product((loc, scale), (tf.ones(2), None), (tf.ones(2), None)).numpy().tolist()
    [0.25, 0.25]
    """
    if hasattr(distribution, "reinterpreted_batch_ndims"):  # Independent, of whatever class.
        form = form_of(distribution.distribution)
        axes = int(tf.get_static_value(distribution.reinterpreted_batch_ndims))
        return form and Together(form, axes, lambda d: d.distribution)
    return FORMS.get(type(distribution))
