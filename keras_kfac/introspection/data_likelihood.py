"""The log-likelihood of data under a model, with the scale of its training loss taken out."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import keras
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.introspection.known_losses import as_loss, given_likelihoods, only_loss
from keras_kfac.introspection.losses import Score, Term, understood
from keras_kfac.introspection.target_curvature import unknown_likelihood
from keras_kfac.math.likelihood import Likelihood, normal_of_logarithm

tfd = tfp.distributions


def likelihood_term(model: keras.Model, outputs: Any, targets: Any, likelihood: Any) -> Term:
    """The negative log-likelihood of a batch, as the term of a loss.

    The model's loss is `-w log r` at each position, averaged and weighted in some way. Here each
    position counts `-log r`, but those that a mask or `ignore_class` leaves out.

    Args:
        model: A model with a loss.
        outputs: What it returns: one tensor.
        targets: The targets; `None` if they are not known.
        likelihood: As for `KFAC`; `None` for that of the loss, or of the model's optimizer.

    Raises:
        ValueError: If the model has several outputs, no loss, or one that is no likelihood.
    """
    term, _ = _own_term(model, outputs, targets, likelihood)
    summed = dataclasses.replace(term, score=term.score._replace(reduction="sum"))
    return scaled(summed, 1 / term.likelihood_weight())


def loss_scale(model: keras.Model, outputs: Sequence[tf.TensorShape]) -> float:
    """`c` of a model's loss, regularisers apart: the mean over examples of `-c log r`.

    That of a mean squared error of `d` outputs is `2 / d`; a mean over positions has their number
    in the denominator, a loss weight is a factor.

    Args:
        model: A model with a loss.
        outputs: The shapes of its outputs, batch included.

    Raises:
        ValueError: If the model has several outputs, no loss, or one that is no likelihood, or no
            mean over examples in which all positions count the same.
    """

    def of_batch(size: int) -> float:
        shapes = [[size, *shape[1:]] for shape in outputs]
        term, weight = _own_term(model, [tf.zeros(shape) for shape in shapes], None, None)
        if term.needs_targets:
            raise ValueError(
                "The positions of `ignore_class` have no part in the likelihood, so that its scale "
                f"differs between batches. Received: loss={term.score.loss!r}"
            )
        by_value = float(tf.reduce_max(term.coefficients()))
        return size * by_value * weight * term.likelihood_weight()

    if any(None in shape[1:].as_list() for shape in outputs):
        raise ValueError(
            "The scale of a likelihood depends on the number of positions, which must be known. "
            f"Received: outputs of shape {outputs[0]}"
        )
    scale = of_batch(1)
    if not math.isclose(scale, of_batch(2), rel_tol=1e-3):
        raise ValueError(
            "The loss must be a mean over examples. Received: reduction="
            f"{as_loss(only_loss(model)[0]).reduction!r}"
        )
    return scale


def _own_term(
    model: keras.Model, outputs: Any, targets: Any, likelihood: Any
) -> tuple[Term, float]:
    """The loss of a model of one output as a term, and its loss weight."""
    flat, (loss, weight) = tf.nest.flatten(outputs), only_loss(model)
    places = [place for place, output in enumerate(flat) if tf.is_tensor(output)]
    if len(places) != 1:
        raise ValueError(
            "A posterior is for models of one output. Received: model "
            f"{model.name!r} with {len(places)} outputs"
        )
    if loss is None:
        raise ValueError(
            "The likelihood belongs to a loss: compile the model with one. Received: model "
            f"{model.name!r} without a loss"
        )
    (place,) = places
    given = given_likelihoods(model, likelihood, outputs)[place]
    score = Score(as_loss(loss), flat[place], targets, is_complete=targets is not None)
    term = understood(score, place, given)
    if term.likelihood is None:
        raise unknown_likelihood(term.score.loss)
    return term, weight


def scaled(term: Term, factor: float | tf.Tensor) -> Term:
    """The term times a number."""
    return dataclasses.replace(term, score=term.score._replace(weight=factor * term.score.weight))


def examples_of(term: Term) -> tf.Tensor:
    """How many examples the batch has, those included that do not count."""
    return tf.cast(tf.shape(term.outputs)[0], tf.float64)


def log_likelihood(term: Term) -> tf.Tensor:
    """`Σ log r(y | f)` over the positions that count; float64 scalar."""
    outputs, found = term.differentiable(term.outputs)
    likelihood = cast(Likelihood, found)
    distribution = likelihood.distribution(outputs)
    targets = tf.convert_to_tensor(term.targets)
    if likelihood.make is normal_of_logarithm:
        targets = tf.math.log1p(targets)
    counts = term.coefficients() > 0
    values = _log_probability(distribution, targets, outputs, counts)
    return tf.reduce_sum(tf.where(counts, tf.cast(values, tf.float64), 0))


def _log_probability(
    distribution: Any, targets: tf.Tensor, outputs: tf.Tensor, counts: tf.Tensor
) -> tf.Tensor:
    """At each position that counts; of targets that are probabilities of classes, the mean."""
    if isinstance(distribution, tfd.Categorical):
        if targets.shape.rank == outputs.shape.rank and targets.shape[-1] == outputs.shape[-1]:
            logarithms = tf.nn.log_softmax(distribution.logits_parameter())
            return tf.reduce_sum(tf.cast(targets, logarithms.dtype) * logarithms, axis=-1)
        # Ignored classes are none of the distribution.
        targets = tf.where(counts, tf.reshape(targets, tf.shape(counts)), 0)
    shape = tf.concat([distribution.batch_shape_tensor(), distribution.event_shape_tensor()], 0)
    return distribution.log_prob(tf.cast(tf.reshape(targets, shape), distribution.dtype))
