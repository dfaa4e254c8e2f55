"""The losses of a model's outputs, as terms of the total, and the scale of their Fisher matrix."""

import dataclasses
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.known_losses import PerPosition, known
from keras_kfac.introspection.target_curvature import TargetGradients, TargetHessian, is_convex
from keras_kfac.introspection.value_shapes import (
    OF_FEATURES,
    check_positions,
    check_replaced,
    check_weights,
    checked,
    checked_alike,
    is_for_all,
)
from keras_kfac.math.draws import check_compiles
from keras_kfac.math.families import form_of
from keras_kfac.math.likelihood import (
    Likelihood,
    Make,
    OutputCurvature,
    bernoulli,
    categorical,
)
from keras_kfac.math.linalg import scalar, with_rank

NEGATIVE_WEIGHTS = (
    "A Fisher matrix of losses or examples of negative weight may not be positive semi-definite. "
    "K-FAC needs loss weights and sample weights that are at least 0."
)


# What Keras looks for in a graph, to find the logits of a likelihood behind probabilities.
_OPERATIONS: dict[Make, str] = {categorical: "Softmax", bernoulli: "Sigmoid"}


class _Reduction(keras.losses.Loss):
    """The reduction of a loss, applied to given values per position."""

    def __init__(self, values: tf.Tensor, loss: keras.losses.Loss, reduction: str | None) -> None:
        super().__init__("kfac_reduction", reduction or loss.reduction, loss.dtype)
        self.values = values

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return self.values


class Score(NamedTuple):
    """A loss of an output, as a term of the total.

    Attributes:
        loss: The Keras loss.
        outputs: The output.
        targets: Its targets; of no meaning if nobody saw them.
        sample_weight: What the examples count; `None` if all the same.
        weight: What the loss is multiplied by in the total: number or scalar, or as many as a loss
            without a reduction has values.
        is_complete: Whether targets and sample weights were seen.
        reduction: What to take in place of the loss's own; `None` for that.
    """

    loss: keras.losses.Loss
    outputs: tf.Tensor
    targets: Any = None
    sample_weight: Any = None
    weight: Any = 1.0
    is_complete: bool = True
    reduction: str | None = None


def _ignored_class(loss: keras.losses.Loss) -> int | None:
    return getattr(loss, "ignore_class", None)


@dataclasses.dataclass(frozen=True)
class Term:
    """A score whose loss is understood.

    Attributes:
        score: The score.
        index: The place of its output among all of the model.
        likelihood: The predictive distribution; `None` if unknown. The curvature is by the targets
            then.
        is_known: Whether the loss is known to have a value at each position.
    """

    score: Score
    index: int
    likelihood: Likelihood | None
    is_known: bool = False

    @property
    def outputs(self) -> tf.Tensor:
        """The output."""
        return self.score.outputs

    @property
    def targets(self) -> Any:
        """The targets.

        Raises:
            RuntimeError: If `compute_loss` has not seen them.
        """
        if not self.score.is_complete:
            need = "The empirical Fisher and adaptive damping need"
            other = ", or use fisher='sampled' and a float as `damping`"
            if self.likelihood is None:
                other = f", or use KFAC(likelihood=...), as none is known for {self.score.loss!r}"
            elif self._ignores:
                need, other = "`ignore_class` needs", ""
            raise RuntimeError(
                f"{need} the training targets, which K-FAC sees in `model.compute_loss` only. In a "
                "custom training loop compute the loss by "
                f"`model.compute_loss(x, y, y_pred, sample_weight)`{other}."
            )
        return self.score.targets

    def check(self, needs_targets: bool, needs_positions: bool, compiles_draws: bool) -> None:
        """Raises what is wrong with the term, before a branch of the step hides where.

        Args:
            needs_targets: Whether the targets have to be known, even with a likelihood.
            needs_positions: Whether what each position of the outputs counts is needed.
            compiles_draws: Whether XLA has to compile draws from the likelihood.

        Raises:
            RuntimeError: Without targets.
            ValueError: If the values of the loss or the likelihood do not suit the outputs, or the
                likelihood XLA.
        """
        if self.needs_targets or needs_targets:
            _ = self.targets
        if not self.is_known:
            values = self._own_values()
            check_positions(values, self.outputs, self._rank(values) if needs_positions else 1)
        if self.likelihood is None:
            return
        distribution = self.likelihood.distribution(self.outputs)
        # XLA compiles those of all whose information is known.
        if compiles_draws and form_of(distribution) is None:
            check_compiles(self.likelihood.distribution, self.outputs)

    @property
    def needs_targets(self) -> bool:
        """Whether the curvature depends on the targets."""
        return self.likelihood is None or self._ignores

    @property
    def is_empirical(self) -> bool:
        """Whether only the empirical Fisher matrix is known."""
        return self.likelihood is None and not self._is_convex

    @property
    def is_weighted(self) -> bool:
        """Whether examples may count differently."""
        is_masked = _keras_internals.mask_of(self.outputs) is not None
        return is_masked or self._ignores or any(weights.shape.rank for weights in self._weights)

    @property
    def tells_positions_apart(self) -> bool:
        """Whether positions of one example may count differently."""
        is_masked = _keras_internals.mask_of(self.outputs) is not None
        return self.weighs_positions or self._ignores or is_masked

    @property
    def weighs_positions(self) -> bool:
        """Whether positions of one example may have weights of their own."""
        # Without a likelihood, all values are of positions of their own.
        rank = None if self.likelihood is None else self._positions
        sizes = [size for weights in self._weights for size in weights.shape[1:rank]]
        return any(size != 1 for size in sizes)

    @property
    def _is_convex(self) -> bool:
        return is_convex(self.score.loss) and self.outputs.shape.rank > 1

    @property
    def _ignores(self) -> bool:
        """Whether the loss leaves out the positions of a class."""
        return self.likelihood is not None and _ignored_class(self.score.loss) is not None

    def coefficients(self) -> tf.Tensor:
        """Derivative of the total loss by the loss value at each position.

        Keras's own reduction is differentiated, so that reductions, sample weights and masks count
        exactly as they do in the loss.

        Returns:
            `[batch, ...]`, as `values`.
        """
        by_value = self._by_value()
        if is_for_all(by_value, self.outputs):
            by_value = tf.reshape(by_value, [])
        rank = self._rank(by_value)
        if by_value.shape.rank >= rank:
            if tf.convert_to_tensor(self.score.weight).shape.rank:
                by_value = checked_alike(by_value, rank)
            return tf.reduce_sum(by_value, axis=list(range(rank, by_value.shape.rank)))
        coefficients = _spread(by_value, self.outputs, rank)
        share = tf.size(by_value) / tf.size(coefficients)
        return coefficients * tf.cast(share, coefficients.dtype)

    def _by_value(self) -> tf.Tensor:
        """Derivative of the total loss by each of the loss's own values."""
        loss, outputs, sample_weight = self.score.loss, self.outputs, self._sample_weight
        self.counts_negatively()
        if self._ignores:
            classes = tf.reshape(self.targets, tf.shape(outputs)[:-1])
            counts = tf.not_equal(tf.cast(classes, tf.int64), _ignored_class(loss))
            outputs = _keras_internals.with_mask(outputs, counts)
        values = tf.zeros_like(self._own_values(), dtype=loss.dtype)
        if not self.is_known:
            values = checked(values, outputs)
        if sample_weight is not None:
            check_weights(sample_weight.shape, values.shape)
            self._check_positions(sample_weight.shape)
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = _Reduction(values, loss, self.score.reduction)(outputs, outputs, sample_weight)
        # Without a reduction both have an entry for each value, of a shape of Keras's own.
        weight = scalar(self.score.weight, total.dtype)
        check_replaced(weight.shape, total.shape)
        weight = tf.broadcast_to(weight, tf.shape(total))
        return tape.gradient(total, values, output_gradients=weight)

    def counts_negatively(self) -> tf.Tensor:
        """Whether a weight is negative: boolean scalar, for XLA, which leaves out the error.

        NaN is not: steps of that are left out.

        Raises:
            tf.errors.InvalidArgumentError: If so; in a graph, when it runs.
        """
        is_negative = tf.reduce_any([tf.reduce_any(weights < 0) for weights in self._weights])
        check = tf.debugging.assert_equal(is_negative, False, NEGATIVE_WEIGHTS)
        with tf.control_dependencies([] if check is None else [check]):
            return tf.identity(is_negative)

    @property
    def _sample_weight(self) -> tf.Tensor | None:
        weights = self.score.sample_weight
        # As Keras does; of booleans, too.
        return None if weights is None else tf.cast(weights, self.score.loss.dtype)

    @property
    def _weights(self) -> list[tf.Tensor]:
        """All weights that the values of the loss are multiplied by."""
        weights = [tf.convert_to_tensor(self.score.weight)]
        return weights if self._sample_weight is None else [*weights, self._sample_weight]

    def _check_positions(self, weights: tf.TensorShape) -> None:
        """Refuses weights of single outputs, where the likelihood is that of all of a position."""
        of_single_outputs = weights[self._positions :]
        if self.likelihood is not None and any(size != 1 for size in of_single_outputs):
            raise ValueError(
                f"{OF_FEATURES} Received: weights of shape {weights} for outputs of shape "
                f"{self.outputs.shape}"
            )

    def values(self, outputs: tf.Tensor) -> tf.Tensor:
        """The loss at each position if the outputs were these.

        Returns:
            `[batch, ...]`: the shape of the outputs without their last axis; without a likelihood,
            that of the loss's own values. One value for several positions, or for the whole batch,
            is that of each; several for one are averaged.
        """
        values = PerPosition(self.score.loss)(self.targets, outputs)
        if is_for_all(values, outputs):
            values = tf.reshape(values, [])
        rank = self._rank(values)
        if values.shape.rank >= rank:
            return tf.reduce_mean(values, axis=list(range(rank, values.shape.rank)))
        return _spread(values, outputs, rank)

    def _own_values(self) -> tf.Tensor:
        """A tensor shaped as the values of the loss, not reduced."""
        if self.likelihood is not None and not self.score.is_complete:
            return self.outputs[..., 0]
        return PerPosition(self.score.loss)(self.targets, self.outputs)

    def _rank(self, values: tf.Tensor) -> int:
        """How many axes tell the positions apart."""
        if self.likelihood is None:
            return max(values.shape.rank, 1)
        return self._positions

    @property
    def _positions(self) -> int:
        """How many axes of the outputs tell the positions of a likelihood apart."""
        return max(self.outputs.shape.rank - 1, 1)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """The sum of the loss at all positions, with weights for these."""
        values = self.values(self.outputs)
        return tf.reduce_sum(values * tf.cast(weights, values.dtype))

    def likelihood_weight(self) -> float:
        """The factor `w` between loss and negative log-likelihood; 1 if that is unknown."""
        return 1.0 if self.likelihood is None else self.likelihood.weight(self.outputs)

    def differentiable(
        self, outputs: tf.Tensor, places: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, OutputCurvature]:
        """What to differentiate, and the curvature there: logits where the loss goes back to them.

        Args:
            outputs: The output of a forward pass,
            places: of these examples, `[used]`; `None` for all.
        """
        likelihood = self.likelihood
        if likelihood is None:
            targets = self.targets
            if places is not None:
                targets = tf.nest.map_structure(lambda t: tf.gather(t, places), targets)
            term = dataclasses.replace(self, score=self.score._replace(targets=targets))
            if self._is_convex:
                return outputs, TargetHessian(term.values)
            return outputs, TargetGradients(term.values, self.score.loss)
        if likelihood.of_logits is None:
            return outputs, likelihood
        # Outputs of another pass, in a graph or not, are as those that the loss is of.
        operation = [_OPERATIONS[likelihood.of_logits]]
        own, logits = (_keras_internals.loss_logits(o, operation) for o in (self.outputs, outputs))
        if own is None or logits is None:
            return outputs, likelihood
        if likelihood.make is likelihood.of_logits and not self.sees_logits:
            return outputs, likelihood
        return logits, dataclasses.replace(likelihood, make=likelihood.of_logits)

    @property
    def sees_logits(self) -> bool:
        """Whether the loss is of the logits behind the output, if there are any.

        Keras loses sight of them when it casts the output to the dtype of the loss, or drops or
        adds a last axis, to have as many as the targets, or replaces what is of an ignored class.
        """
        if self._ignores:
            return False
        is_reshaped = False
        if self.score.is_complete and self.likelihood is not None:
            own, other = self.outputs.shape, tf.convert_to_tensor(self.targets).shape
            is_reshaped = 2 <= other.rank == own.rank - 1 and own[-1] == 1
            is_reshaped |= own.rank == 1 and other.rank == 2 and other[-1] == 1
        return self.outputs.dtype.name == self.score.loss.dtype and not is_reshaped


def _spread(values: tf.Tensor, outputs: tf.Tensor, rank: int) -> tf.Tensor:
    """A value for all positions in more axes of the outputs."""
    return tf.broadcast_to(with_rank(values, rank), tf.shape(outputs)[:rank])


def understood(score: Score, index: int, given: Likelihood | None = None) -> Term:
    """Finds the likelihood behind a loss.

    Args:
        score: The loss, and what it is of.
        index: The place of the output among all of the model.
        given: The likelihood, where somebody says it.

    Raises:
        ValueError: For outputs without an axis of features, where the loss needs one, or options
            of a loss under which it is no likelihood.
    """
    loss, likelihood = known(score.loss)
    found, rank = given or likelihood, score.outputs.shape.rank
    if not rank or (rank == 1 and found is not None and not found.averages_outputs):
        raise ValueError(
            "K-FAC needs model outputs of shape (batch, ..., features). "
            f"Received: outputs of shape {score.outputs.shape}"
        )
    return Term(score._replace(loss=loss), index, found, is_known=likelihood is not None)
