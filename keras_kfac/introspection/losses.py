"""From a Keras loss to the predictive distribution and the scale of its Fisher matrix."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.math.likelihood import Family, Likelihood

_CATEGORICAL = Likelihood(Family.CATEGORICAL)
_BERNOULLI = Likelihood(Family.BERNOULLI, averages_outputs=True)
_NORMAL = Likelihood(Family.NORMAL, weight_per_output=2.0, averages_outputs=True)

_LOSSES: dict[type[keras.losses.Loss], Likelihood] = {
    keras.losses.CategoricalCrossentropy: _CATEGORICAL,
    keras.losses.SparseCategoricalCrossentropy: _CATEGORICAL,
    keras.losses.BinaryCrossentropy: _BERNOULLI,
    keras.losses.MeanSquaredError: _NORMAL,
}
_FUNCTIONS = {
    keras.losses.categorical_crossentropy: keras.losses.CategoricalCrossentropy,
    keras.losses.sparse_categorical_crossentropy: keras.losses.SparseCategoricalCrossentropy,
    keras.losses.binary_crossentropy: keras.losses.BinaryCrossentropy,
    keras.losses.mean_squared_error: keras.losses.MeanSquaredError,
}
_CHOICES = ", ".join(f"keras.losses.{loss.__name__}" for loss in _LOSSES)


class _FunctionLoss(keras.losses.Loss):
    """A loss function as Keras's `compile` treats it: averaged over the batch."""

    def __init__(self, function: Any) -> None:
        super().__init__(name=getattr(function, "__name__", "loss"))
        self.function = function

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return self.function(y_true, y_pred)

    def __repr__(self) -> str:
        return f"<function {self.name}>"


class _Reduction(keras.losses.Loss):
    """The reduction of a loss, applied to given values per position."""

    def __init__(self, values: tf.Tensor, loss: keras.losses.Loss) -> None:
        super().__init__("kfac_reduction", reduction=loss.reduction, dtype=loss.dtype)
        self.values = values

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return self.values


class _PerPosition(keras.losses.Loss):
    """The values of a loss at each position, not reduced."""

    def __init__(self, loss: keras.losses.Loss) -> None:
        super().__init__("kfac_values", reduction="none", dtype=loss.dtype)
        self.loss = loss

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return self.loss.call(y_true, y_pred)


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """The loss of a model's output, taken apart.

    Attributes:
        loss: The Keras loss.
        likelihood: Its predictive distribution; `None` if unknown, which suits the empirical
            Fisher only.
        loss_weight: The weight of the loss in the total.
    """

    loss: keras.losses.Loss
    likelihood: Likelihood | None
    loss_weight: float = 1.0

    @property
    def known_likelihood(self) -> Likelihood:
        """The predictive distribution.

        Raises:
            ValueError: If it is unknown.
        """
        if self.likelihood is None:
            raise ValueError(
                "K-FAC knows no predictive distribution for this loss, so it can't model a step to "
                "adapt it. Give numbers as `learning_rate`, `momentum` and `damping`. "
                f"Received: loss={self.loss!r}"
            )
        return self.likelihood

    def coefficients(self, outputs: tf.Tensor, sample_weight: Any) -> tf.Tensor:
        """Derivative of the total loss by the loss value at each position of the outputs.

        Keras's own reduction is differentiated, so that reductions, sample weights and masks count
        exactly as they do in the loss.

        Returns:
            `[batch, ...]`: the shape of the outputs without their last axis.
        """
        values = tf.zeros_like(outputs[..., 0], dtype=self.loss.dtype)
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = _Reduction(values, self.loss)(outputs, outputs, sample_weight)
        return tape.gradient(total, values) * self.loss_weight

    def values(self, targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """The loss at each position of the outputs, `[batch, ...]`."""
        return _PerPosition(self.loss)(targets, outputs)

    def likelihood_weight(self, outputs: tf.Tensor) -> float:
        """The factor `w` between loss and negative log-likelihood; 1 if that is unknown."""
        return 1.0 if self.likelihood is None else self.likelihood.weight(outputs.shape[-1])

    def differentiable_outputs(self, outputs: tf.Tensor) -> tuple[tf.Tensor, Likelihood]:
        """What to differentiate, and its likelihood: logits where the loss goes back to them.

        Raises:
            ValueError: If the likelihood is unknown.
        """
        likelihood = self.known_likelihood
        if likelihood.family is Family.NORMAL:
            return outputs, likelihood
        logits = _keras_internals.loss_logits(outputs)
        # Keras loses sight of the logits when it casts the outputs to the dtype of the loss.
        is_seen = outputs.dtype.name == self.loss.dtype
        if logits is None or not (likelihood.from_probabilities or is_seen):
            return outputs, likelihood
        return logits, dataclasses.replace(likelihood, from_probabilities=False)

    def natural_outputs(self, outputs: Any) -> tf.Tensor:
        """The natural outputs of the model's one output."""
        (output,) = tf.nest.flatten(outputs)
        differentiable, likelihood = self.differentiable_outputs(output)
        return likelihood.natural(differentiable)


def resolve_loss(loss: Any, loss_weight: float, empirical: bool) -> ModelLoss:
    """Finds the likelihood behind a loss.

    Args:
        loss: What `compile(loss=...)` accepts for one output: name, function or `Loss`.
        loss_weight: Its weight in the total loss.
        empirical: Whether an unknown loss will do, for the empirical Fisher.

    Raises:
        ValueError: For a loss without known likelihood, unless `empirical`.
    """
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        if not callable(loss):
            raise ValueError(
                "K-FAC needs one loss for the model's single output; models with several outputs "
                f"are not supported yet. Received: loss={loss!r}"
            )
        known = _FUNCTIONS.get(loss)
        loss = _FunctionLoss(loss) if known is None else known()
    likelihood = _LOSSES.get(type(loss))
    if likelihood is None:
        if empirical:
            return ModelLoss(loss, None, loss_weight)
        raise ValueError(
            "K-FAC knows no predictive distribution for this loss. Use one of "
            f"{_CHOICES} (by name, function or instance), or the Fisher matrix of the training "
            "targets, KFAC(fisher='empirical'), with numbers as `learning_rate`, `momentum` and "
            f"`damping`. Received: loss={loss!r}"
        )
    _check_supported(loss)
    if likelihood.family is not Family.NORMAL and not loss.get_config()["from_logits"]:
        likelihood = dataclasses.replace(likelihood, from_probabilities=True)
    return ModelLoss(loss, likelihood, loss_weight)


def _check_supported(loss: keras.losses.Loss) -> None:
    config = loss.get_config()
    if config.get("axis", -1) != -1:
        raise ValueError(
            "K-FAC supports losses over the last axis only. "
            f"Received: {type(loss).__name__}(axis={config['axis']})"
        )
    if config.get("ignore_class") is not None:
        raise ValueError(
            "K-FAC does not support `ignore_class` yet: the Fisher matrix would count the ignored "
            "positions. Give them sample weight 0 instead. "
            f"Received: {type(loss).__name__}(ignore_class={config['ignore_class']})"
        )


def single_output(forward_pass: ForwardPass) -> tf.Tensor:
    """The output tensor of a model with one output.

    Raises:
        ValueError: For several outputs, or an output without a feature axis.
    """
    outputs = tf.nest.flatten(forward_pass.outputs)
    if len(outputs) != 1:
        raise ValueError(
            "K-FAC does not support models with several outputs yet. "
            f"Received: a model with {len(outputs)} outputs"
        )
    if outputs[0].shape.rank is None or outputs[0].shape.rank < 2:
        raise ValueError(
            "K-FAC needs model outputs of shape (batch, ..., features). "
            f"Received: outputs of shape {outputs[0].shape}"
        )
    return outputs[0]
