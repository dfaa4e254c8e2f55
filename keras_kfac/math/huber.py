"""The distribution whose negative log-likelihood is Huber's function."""

import math
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp


class Huber(tfp.distributions.Distribution):
    """`r(y) ∝ exp(-h(y - loc))`, with `h(z) = z²/2` up to a threshold, and linear beyond.

    A normal distribution with tails of a Laplace distribution, "the least favourable" one. Source:
    Huber (1964), "Robust estimation of a location parameter", section 4.

    Args:
        loc: Means.
        threshold: Positive float.
    """

    def __init__(self, loc: tf.Tensor, threshold: float, name: str = "Huber") -> None:
        parameters = dict(locals())
        self.loc = tf.convert_to_tensor(loc)
        self.threshold = float(threshold)
        # What the middle and both tails weigh in the integral of exp(-h).
        self._middle = math.sqrt(2 * math.pi) * math.erf(self.threshold / math.sqrt(2))
        self._tails = 2 * math.exp(-(self.threshold**2) / 2) / self.threshold
        super().__init__(
            dtype=self.loc.dtype,
            reparameterization_type=tfp.distributions.NOT_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=True,
            parameters=parameters,
            name=name,
        )

    @property
    def information(self) -> float:
        """Fisher information of `loc`: `E[h''] = E[h'²]`, the probability of the middle."""
        return self._middle / (self._middle + self._tails)

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: int | None = None) -> dict[str, Any]:
        properties = tfp.util.ParameterProperties
        return {"loc": properties(), "threshold": properties(event_ndims=None)}

    def _batch_shape(self) -> tf.TensorShape:
        return self.loc.shape

    def _batch_shape_tensor(self) -> tf.Tensor:
        return tf.shape(self.loc)

    def _event_shape(self) -> tf.TensorShape:
        return tf.TensorShape([])

    def _event_shape_tensor(self) -> tf.Tensor:
        return tf.constant([], tf.int32)

    def _log_prob(self, value: tf.Tensor) -> tf.Tensor:
        distance = tf.abs(value - self.loc)
        linear = self.threshold * distance - 0.5 * self.threshold**2
        h = tf.where(distance <= self.threshold, 0.5 * distance**2, linear)
        return -h - math.log(self._middle + self._tails)

    def _sample_n(self, n: tf.Tensor, seed: Any = None) -> tf.Tensor:
        shape = tf.concat([[n], tf.shape(self.loc)], axis=0)
        seeds = tf.random.experimental.stateless_split(tfp.random.sanitize_seed(seed), 3)
        first, second, third = (
            tf.random.stateless_uniform(shape, s, dtype=self.dtype) for s in tf.unstack(seeds)
        )
        # Of the middle by its distribution function, that of a normal distribution.
        reach = tf.constant(0.5 * math.erf(self.threshold / math.sqrt(2)), self.dtype)
        middle = tf.math.ndtri(0.5 + (2 * second - 1) * reach)
        tail = self.threshold - tf.math.log1p(-second) / self.threshold
        tail *= tf.where(third < 0.5, tf.ones_like(tail), -1)
        return self.loc + tf.where(first < self.information, middle, tail)
