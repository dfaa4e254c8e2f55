"""Predictive distributions: where the Fisher matrix comes from.

A loss that is a scaled negative log-likelihood, `ℓ(y, f) = -w log r(y | f) + const`, has the
generalised Gauss-Newton matrix `w F` with `F` the Fisher information of `r` with respect to the
outputs `f`. The curvature enters K-FAC through vectors to back-propagate from the outputs whose
outer products are, exactly or in expectation, `w F`:

* *sampled* (the true Fisher, Monte Carlo): `√w ∇_f(-log r(ŷ | f))` with `ŷ ~ r(· | f)`;
* *exact* (type-2): columns `s_c` of a root, `Σ_c s_c s_cᵀ = w F`.

Both are formed for *natural* outputs (logits, or the mean of a normal distribution) and pulled
back to what the model puts out. Source: Martens (2020), "New insights and perspectives on the
natural gradient method", JMLR 21, sections 5, 8 and 9.
"""

import dataclasses
import enum
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.math.linalg import scalar

# Probabilities are clipped to [_FLOOR, 1 - _FLOOR], as Keras clips them in its losses.
_FLOOR = 1e-7


class Family(enum.Enum):
    """Distributions of a vector of outputs; each says what its natural outputs are."""

    CATEGORICAL = "categorical"  # logits of one draw among the outputs
    BERNOULLI = "bernoulli"  # logits of one independent draw for each output
    NORMAL = "normal"  # means, unit variance


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The predictive distribution `r(y | outputs)` behind a loss `-w log r`.

    Attributes:
        family: The distribution over the last axis of the outputs.
        from_probabilities: Whether the outputs are probabilities and not logits.
        weight_per_output: `w` times the number of outputs: the losses that average over the last
            axis have `w = weight_per_output / outputs`.
        averages_outputs: Whether the loss averages over the last axis.
    """

    family: Family
    from_probabilities: bool = False
    weight_per_output: float = 1.0
    averages_outputs: bool = False

    def weight(self, width: int) -> float:
        """The factor `w` for outputs of the given width."""
        return self.weight_per_output / (width if self.averages_outputs else 1)

    def natural(self, outputs: tf.Tensor) -> tf.Tensor:
        """Natural outputs, in float32 or float64."""
        if outputs.dtype not in (tf.float32, tf.float64):
            outputs = tf.cast(outputs, tf.float32)
        if not self.from_probabilities:
            return outputs
        if self.family is Family.CATEGORICAL:
            return tf.math.log(tf.maximum(outputs, _FLOOR))
        probabilities = tf.clip_by_value(outputs, _FLOOR, 1 - _FLOOR)
        return tf.math.log(probabilities) - tf.math.log1p(-probabilities)

    def distribution(self, natural: tf.Tensor) -> Any:
        """TFP distribution with one batch entry for each position of the outputs."""
        tfd = tfp.distributions
        if self.family is Family.CATEGORICAL:
            return tfd.Categorical(logits=natural)
        if self.family is Family.BERNOULLI:
            return tfd.Independent(
                tfd.Bernoulli(logits=natural, dtype=natural.dtype), reinterpreted_batch_ndims=1
            )
        scale = tf.ones((), natural.dtype)
        return tfd.Independent(tfd.Normal(natural, scale), reinterpreted_batch_ndims=1)

    def sampled_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """`√w` times the gradient of `-log r(ŷ | f)` for targets sampled from the model.

        Args:
            outputs: `[..., width]`, one distribution for each leading index.
            seed: Stateless seed, int32 `[2]`.

        Returns:
            Tensor shaped as `outputs`, independent between leading indices.
        """
        outputs = tf.stop_gradient(outputs)
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            distribution = self.distribution(self.natural(outputs))
            targets = tf.stop_gradient(distribution.sample(seed=seed))
            negative_log_likelihood = -distribution.log_prob(targets)
        gradient = tape.gradient(negative_log_likelihood, outputs)
        return gradient * scalar(self.weight(outputs.shape[-1]) ** 0.5, outputs.dtype)

    def root_column(self, outputs: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Column `index` of a root of `w F`: `[..., width]`; there are `width` columns.

        Example:
        >>> normal = Likelihood(Family.NORMAL, weight_per_output=2.0, averages_outputs=True)
        >>> normal.root_column(tf.zeros([1, 2]), 0).numpy().tolist()  # √(2/2) e_0
        [[1.0, 0.0]]
        """
        outputs = tf.stop_gradient(outputs)
        width = outputs.shape[-1]
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            natural = self.natural(outputs)
        # The column is stated for the natural outputs; the tape's Jacobian brings it back.
        unit = tf.one_hot(index, width, dtype=natural.dtype)
        if self.family is Family.CATEGORICAL:
            probabilities = tf.nn.softmax(natural)
            chosen = tf.gather(probabilities, [index], axis=-1)
            column = tf.sqrt(chosen) * (unit - probabilities)
        elif self.family is Family.BERNOULLI:
            column = unit * tf.sqrt(tf.sigmoid(natural) * tf.sigmoid(-natural))
        else:
            column = tf.broadcast_to(unit, tf.shape(natural))
        column = column * scalar(self.weight(width) ** 0.5, natural.dtype)
        return tape.gradient(natural, outputs, output_gradients=column)

    def curvature_product(self, natural: tf.Tensor, u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """`uᵀ (w F) v` for directions `u` and `v` in the space of natural outputs.

        Args:
            natural: Natural outputs, `[..., width]`.
            u: A direction for each position, `[..., width]`.
            v: Another.

        Returns:
            Tensor `[...]`.

        Example:
        >>> bernoulli = Likelihood(Family.BERNOULLI)
        >>> one = tf.ones([1, 2])
        >>> bernoulli.curvature_product(tf.zeros([1, 2]), one, one).numpy().tolist()  # Σ p (1 - p)
        [0.5]
        """
        if self.family is Family.CATEGORICAL:
            probabilities = tf.nn.softmax(natural)
            u_mean = tf.reduce_sum(probabilities * u, axis=-1, keepdims=True)
            product = tf.reduce_sum(probabilities * (u - u_mean) * v, axis=-1)
        elif self.family is Family.BERNOULLI:
            variances = tf.sigmoid(natural) * tf.sigmoid(-natural)
            product = tf.reduce_sum(variances * u * v, axis=-1)
        else:
            product = tf.reduce_sum(u * v, axis=-1)
        return product * scalar(self.weight(natural.shape[-1]), product.dtype)
