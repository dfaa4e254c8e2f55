"""Draws from distributions, where TensorFlow Probability's do not serve."""

from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp

tfd = tfp.distributions


def draw(distribution: Any, seed: tf.Tensor) -> tf.Tensor:
    """One draw for each distribution of a batch.

    XLA can't compile the draws that TensorFlow Probability makes from `NegativeBinomial`. They are
    those of a Poisson distribution whose rate is drawn from a Gamma distribution.

    Args:
        distribution: Of any class.
        seed: Stateless seed, int32 `[2]`.

    Raises:
        ValueError: If the distribution has no draws.

    Example:
    >>> counts = tfp.distributions.NegativeBinomial(3.0, logits=[0.0, 1.0])
    >>> draw(counts, tf.constant([1, 2])).shape
    TensorShape([2])
    """
    inner = distribution
    while hasattr(inner, "reinterpreted_batch_ndims"):  # Independent draws the same.
        inner = inner.distribution
    if not isinstance(inner, tfd.NegativeBinomial):
        return _sample(distribution, seed)
    first, second = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
    rates = tfd.Gamma(inner.total_count, log_rate=-inner.logits_parameter()).sample(seed=first)
    return tfd.Poisson(rates).sample(seed=second)


def _sample(distribution: Any, seed: tf.Tensor) -> tf.Tensor:
    try:
        return distribution.sample(seed=seed)
    except NotImplementedError as error:
        raise ValueError(
            "The sampled Fisher matrix needs draws from the predictive distribution, which has "
            "none. Use KFAC(fisher='exact') if its Fisher information is known in closed form, or "
            "'empirical' with numbers as learning rate, momentum and damping. Received: "
            f"{distribution}"
        ) from error
