"""A loss that is the negative log-likelihood of any distribution."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.math.likelihood import made


@keras.saving.register_keras_serializable(package="keras_kfac")
class NegativeLogLikelihood(keras.losses.Loss):
    """`-log r(y | outputs)`, with a distribution `r` whose parameters the model puts out.

    K-FAC takes the Fisher matrix of that distribution. It need not be known to K-FAC to be sampled
    from; `fisher="exact"` asks for one whose Fisher information is known in closed form: Normal,
    LogNormal, LogitNormal, Laplace, Cauchy, Logistic, Gumbel, StudentT, VonMises, HalfNormal,
    Exponential, Gamma, InverseGamma, Beta, Poisson, Bernoulli, Binomial, Geometric,
    NegativeBinomial, Categorical, OneHotCategorical, Multinomial, Dirichlet,
    MultivariateNormalDiag, MultivariateNormalTriL, or an Independent of these.

    Args:
        distribution: Function from the outputs `[batch, ..., width]` of the model to a
            `tfp.distributions.Distribution` with batch shape `[batch, ...]`: one for each
            position. `tfp.distributions.Independent` joins those of one position. To save a model
            that is compiled with the loss, register the function by
            `keras.saving.register_keras_serializable`.
        reduction: As for any Keras loss.
        name: Likewise.
        dtype: Likewise.

    Raises:
        ValueError: In training, for targets of a shape that is not the distribution's, and for
            outputs that no distribution can be made of.

    Example:
    >>> def learned_scale(outputs):
    ...     mean, log_scale = tf.unstack(outputs, axis=-1)
    ...     return tfp.distributions.Normal(mean, tf.exp(log_scale))
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile(KFAC(), NegativeLogLikelihood(learned_scale))
    >>> x = np.random.default_rng(0).normal(size=(64, 3))
    >>> history = model.fit(x, x[:, 0], epochs=5, verbose=0, callbacks=[KFACCallback()])
    >>> history.history["loss"][-1] < history.history["loss"][0]
    True
    """

    def __init__(
        self,
        distribution: Callable[[tf.Tensor], Any],
        reduction: str = "sum_over_batch_size",
        name: str = "negative_log_likelihood",
        dtype: Any = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if not callable(distribution):
            raise TypeError(
                "`distribution` must be a function from outputs to a distribution. Received: "
                f"distribution={distribution!r}"
            )
        self.distribution = distribution

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The loss at each position, `[batch, ...]`."""
        distribution = made(self.distribution, y_pred)
        shape = distribution.batch_shape.concatenate(distribution.event_shape)
        # One number for each example comes as a column.
        if y_true.shape.rank == shape.rank + 1 and y_true.shape[-1] == 1:
            y_true = tf.squeeze(y_true, axis=-1)
        if not y_true.shape.is_compatible_with(shape):
            raise ValueError(
                "The targets do not have the shape of a draw from the likelihood, "
                f"{shape}. Received: targets of shape {y_true.shape} for {distribution}"
            )
        return -distribution.log_prob(tf.cast(y_true, distribution.dtype))

    def get_config(self) -> dict[str, Any]:
        """What makes the same loss again."""
        config = super().get_config()
        return {**config, "distribution": keras.saving.serialize_keras_object(self.distribution)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NegativeLogLikelihood":
        """The inverse of `get_config`."""
        given = dict(config)
        given["distribution"] = keras.saving.deserialize_keras_object(given["distribution"])
        return cls(**given)
