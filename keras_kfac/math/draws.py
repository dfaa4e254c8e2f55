"""Draws from distributions, where TensorFlow Probability's do not serve."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp

tfd = tfp.distributions


def draw(distribution: Any, seed: tf.Tensor) -> tf.Tensor:
    """One draw for each distribution of a batch.

    XLA can't compile the draws that TensorFlow Probability makes from `NegativeBinomial`,
    `BetaBinomial` and `PoissonLogNormalQuadratureCompound`, alone or as parts of others. Here they
    are those of a Poisson or Binomial distribution whose parameter is drawn first.

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
    try:
        return _compilable(distribution).sample(seed=seed)
    except NotImplementedError as error:
        raise ValueError(
            "The sampled Fisher matrix needs draws from the predictive distribution, which has "
            "none. Use KFAC(fisher='exact') if its Fisher information is known in closed form, or "
            "'empirical' with numbers as learning rate, momentum and damping. Received: "
            f"{distribution}"
        ) from error


def check_compiles(make: Callable[[tf.Tensor], Any], outputs: tf.Tensor) -> None:
    """Draws once under XLA, which does not say whose draws it can't compile.

    Args:
        make: From outputs to the distribution.
        outputs: Some, of which shape and type count.

    Raises:
        ValueError: If it can't compile them.
    """
    zeros = tf.TensorSpec([1 if size is None else size for size in outputs.shape], outputs.dtype)
    names: list[str] = []

    @tf.function(jit_compile=True, autograph=False)
    def drawn(outputs: tf.Tensor) -> tf.Tensor:
        distribution = make(outputs)
        names.append(repr(distribution))
        return draw(distribution, tf.constant([0, 0]))

    try:
        with tf.init_scope():
            drawn(tf.zeros(zeros.shape, zeros.dtype))
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        if "unsupported operations" not in str(error):
            return  # Of zeros there may be no draws.
        raise ValueError(
            "XLA can't compile the draws that TensorFlow Probability makes from the likelihood. "
            "Compile the model with jit_compile=False. Received: jit_compile=True with "
            f"{names[-1]}"
        ) from error


class _NegativeBinomial(tfp.distributions.NegativeBinomial):
    """The same distribution, by other draws."""

    def _sample_n(self, n: Any, seed: Any = None) -> tf.Tensor:
        first, second = _two(seed)
        rates = tfd.Gamma(self.total_count, log_rate=-self.logits_parameter())
        return tfd.Poisson(rates.sample(n, seed=first)).sample(seed=second)


class _BetaBinomial(tfp.distributions.BetaBinomial):
    """Likewise."""

    def _sample_n(self, n: Any, seed: Any = None) -> tf.Tensor:
        first, second = _two(seed)
        probabilities = tfd.Beta(self.concentration1, self.concentration0).sample(n, seed=first)
        return tfd.Binomial(self.total_count, probs=probabilities).sample(seed=second)


def _two(seed: Any) -> list[tf.Tensor]:
    seed = tfp.random.sanitize_seed(seed)
    return tf.unstack(tf.random.experimental.stateless_split(seed, 2))


def _inflated(distribution: Any) -> Any:
    """With the distribution that it makes of its parameters as one of these."""
    names = ("distribution", "inflated_loc_logits", "inflated_loc_probs", "inflated_loc")
    return tfd.Inflated(**{name: getattr(distribution, name) for name in names})


def _mixture(distribution: Any) -> Any:
    """The mixture that it is."""
    poisson, among = distribution.poisson_and_mixture_distributions()
    return tfd.MixtureSameFamily(among, poisson)


_INSTEAD = {
    tfd.NegativeBinomial: lambda d: _NegativeBinomial(**d.parameters),
    tfd.BetaBinomial: lambda d: _BetaBinomial(**d.parameters),
    tfd.ZeroInflatedNegativeBinomial: lambda d: _compilable(_inflated(d)),
    tfd.PoissonLogNormalQuadratureCompound: _mixture,
}


def _compilable(distribution: Any) -> Any:
    """The same distribution with draws for XLA: of its parts, too, as mixtures have them."""
    if type(distribution) in _INSTEAD:
        return _INSTEAD[type(distribution)](distribution)
    changed = {}
    for name, value in distribution.parameters.items():
        parts = tf.nest.flatten(value)
        made = [_compilable(p) if isinstance(p, tfd.Distribution) else p for p in parts]
        if any(new is not old for new, old in zip(made, parts)):
            changed[name] = tf.nest.pack_sequence_as(value, made)
    return distribution.copy(**changed) if changed else distribution
