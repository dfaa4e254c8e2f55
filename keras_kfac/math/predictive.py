"""Predictive distributions of targets, from a distribution of the outputs of a model."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.math.eigen import eigen_decomposition

tfd = tfp.distributions

# What a distribution makes of logits, if it takes them for these, agrees to this.
_ROUNDING = 1e-3

Make = Callable[[tf.Tensor], Any]
"""From outputs `[..., width]` to the distribution of targets at each position."""


def normal(means: tf.Tensor, covariances: tf.Tensor) -> Any:
    """The normal distribution of these moments, of any rank.

    Args:
        means: `[batch, width]`.
        covariances: `[batch, width, width]`.
    """
    values, vectors = eigen_decomposition(covariances)
    scale = vectors * tf.sqrt(values)[..., tf.newaxis, :]
    return tfd.MultivariateNormalLinearOperator(means, tf.linalg.LinearOperatorFullMatrix(scale))


def with_noise(make: Make, means: tf.Tensor, covariance: tf.Tensor) -> Any:
    """The distribution of targets that are the outputs and independent normal noise.

    Args:
        make: The distribution of targets.
        means: Of the outputs, `[batch, width]`.
        covariance: Likewise, `[batch, width, width]`.

    Returns:
        A normal distribution of the shape of `make`'s; `None` if that is another one, or its
        noise depends on the outputs.
    """
    with tf.GradientTape() as tape:
        tape.watch(means)
        distribution = make(means)
        inner = _of_each_number(distribution)
        if not isinstance(inner, tfd.Normal) or distribution.event_shape.rank > 1:
            return None
        scale = inner.scale
    size = inner.batch_shape.num_elements()
    if size != means.shape.num_elements() or tape.gradient(scale, means) is not None:
        return None
    if tf.reduce_any(tf.reshape(inner.mean(), means.shape) != means):
        return None
    covariance += tf.linalg.diag(tf.reshape(inner.variance(), means.shape))
    if distribution.event_shape.rank == 0:  # One number at each position.
        return tfd.Normal(inner.loc, tf.reshape(tf.sqrt(covariance), inner.batch_shape))
    return tfd.MultivariateNormalTriL(means, tf.linalg.cholesky(covariance))


def probit(make: Make, logits: tf.Tensor, variances: tf.Tensor) -> Any:
    """The distribution of classes with `logits / √(1 + π/8 v)`, for those of variances `v`.

    For two classes the mean of a probit function that is like the logistic one; of several, the
    same for each, which leaves out that logits vary together.

    Args:
        make: The distribution of classes, of which the outputs are the logits.
        logits: Their means, `[batch, width]`.
        variances: Likewise.

    Raises:
        ValueError: If `make` makes others than Categorical or Bernoulli distributions, or takes
            the outputs for something else than their logits.

    Source: MacKay (1992), "The evidence framework applied to classification networks", section 3;
    for several classes Gibbs (1997), "Bayesian Gaussian processes for regression and
    classification".
    """
    distribution = make(logits / tf.sqrt(1 + math.pi / 8 * variances))
    inner = _of_each_number(distribution)
    if not isinstance(inner, (tfd.Categorical, tfd.Bernoulli)):
        raise ValueError(f"method='probit' is for classes. Received: {distribution}")
    if not _takes_logits(make, logits):
        raise ValueError(
            "method='probit' is for outputs that are logits. These are probabilities of which "
            "Keras does not see the logits, or what the likelihood makes logits of. Let the last "
            "layer be the softmax or sigmoid, under a cross-entropy; or let the model return "
            "logits, under one with from_logits=True; or take method='weights'. Received: "
            f"{distribution}"
        )
    return distribution


def _takes_logits(make: Make, like: tf.Tensor) -> bool:
    """Whether the distribution of classes has the outputs for logits, up to a constant."""
    # Numbers that can be probabilities: a likelihood of these need not take others.
    outputs = tf.linspace(tf.constant(0.25, like.dtype), 0.75, like.shape[-1])
    inner = _of_each_number(make(tf.broadcast_to(outputs, tf.shape(like))))
    found = inner.logits_parameter()
    if found.shape.num_elements() != like.shape.num_elements():
        return False
    difference = tf.reshape(found, tf.shape(like)) - outputs
    if isinstance(inner, tfd.Categorical):
        difference -= difference[..., :1]
    return bool(tf.reduce_all(tf.abs(difference) < _ROUNDING))


def mixture(make: Make, outputs: tf.Tensor) -> Any:
    """The mixture of the distributions for draws of the outputs.

    Args:
        make: The distribution of targets.
        outputs: `[..., draws, width]`.

    Example:
    >>> logits = tf.constant([[[9.0, -9.0], [-9.0, 9.0]]])
    >>> mixture(lambda f: tfp.distributions.Categorical(f), logits).probs_parameter().numpy()
    array([[0.5, 0.5]], dtype=float32)
    """
    each = make(outputs)
    if isinstance(each, tfd.Categorical):
        return tfd.Categorical(probs=tf.reduce_mean(each.probs_parameter(), axis=-2))
    weights = tf.zeros(tf.shape(outputs)[:-1], outputs.dtype)
    return tfd.MixtureSameFamily(tfd.Categorical(logits=weights), each)


def _of_each_number(distribution: Any) -> Any:
    """What an `Independent` joins; others that are made of a distribution are another one."""
    return distribution.distribution if isinstance(distribution, tfd.Independent) else distribution
