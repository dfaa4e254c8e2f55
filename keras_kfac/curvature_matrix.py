"""Curvature matrices of a whole model on a batch, as linear operators."""

import abc
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.known_losses import (
    as_loss,
    given_likelihoods,
    only_entry,
    only_loss,
)
from keras_kfac.introspection.losses import Score, Term, understood
from keras_kfac.introspection.observed_losses import observed_losses
from keras_kfac.introspection.replay import Replay, tangents
from keras_kfac.introspection.unscored import names_of, unscored_error
from keras_kfac.math import spectra
from keras_kfac.math.likelihood import Likelihood
from keras_kfac.math.linalg import scalar, with_rank


class CurvatureMatrix(tf.linalg.LinearOperator):
    """`Jᵀ H J` with the Jacobian `J` of the outputs of a model by all its trained weights.

    Products (`matvec`, `matmul`) take a derivative in forward mode and one in reverse mode each,
    and nothing of the size of the matrix is formed, unless `to_dense()` is asked for it. Weights
    are flattened one after the other, as `flatten` does. The state of the model stays as it is:
    moving statistics, seeds, metrics.

    A subclass says what `H` is, in `_output_product`.

    Args:
        model: A built model, compiled with a loss.
        x: Inputs of the batch.
        y: Targets, or `None`.
        sample_weight: As for `fit`.
        training: Whether the forward pass is one of training.
        damping: `λ >= 0`, float: the matrix is `Jᵀ H J + λ I`.
        likelihood: As for `KFAC`.
        parameters: What the subclass was made with.

    Attributes:
        goes_by_likelihood: Whether what `KFAC(likelihood=...)` says of a loss counts, or the loss.

    Raises:
        ValueError: If the model has no loss, or no trained weights.
    """

    goes_by_likelihood = True

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any,
        sample_weight: Any,
        training: bool,
        damping: float,
        likelihood: Any,
        parameters: dict[str, Any],
    ) -> None:
        if not damping >= 0:
            raise ValueError(f"`damping` must be at least 0. Received: damping={damping!r}")
        if getattr(model, "loss", None) is None:
            raise ValueError(
                "A curvature matrix belongs to a loss: compile the model with one. Received: model "
                f"{model.name!r} without a loss"
            )
        self._variables = list(model.trainable_variables)
        if not self._variables:
            raise ValueError(
                "A curvature matrix is that of the trained weights of a model. Received: model "
                f"{model.name!r} without trained weights"
            )
        self._damping = damping
        x = tf.nest.map_structure(tf.convert_to_tensor, x)
        self._replay = Replay(model, (x,), {"training": training})
        outputs = self._replay.outputs({})
        given: list[Likelihood | None] = [None] * len(tf.nest.flatten(outputs))
        if self.goes_by_likelihood:
            given = given_likelihoods(model, likelihood, outputs)
        with self._replay.scope({}):  # Metrics of single outputs stay as they are, too.
            self._terms = _terms(model, x, y, outputs, sample_weight, given)
        for term in self._terms:
            self._check(term)
        self._unit = _unit(self._terms)
        self._size = sum(int(v.value.shape.num_elements()) for v in self._variables)
        self._products = tf.function(
            lambda vectors: tf.map_fn(self._product, vectors), reduce_retracing=True
        )
        super().__init__(
            dtype=tf.as_dtype(self._variables[0].dtype),
            is_self_adjoint=True,
            is_positive_definite=damping > 0 or None,  # Conjugate gradients take no other.
            is_square=True,
            parameters=parameters,
        )

    @abc.abstractmethod
    def _check(self, term: Term) -> None:
        """Raises a `ValueError` if there is no such matrix of a loss."""

    @abc.abstractmethod
    def _output_product(self, term: Term, outputs: tf.Tensor, direction: tf.Tensor) -> tf.Tensor:
        """`H u` of an output.

        Args:
            term: The loss of the output.
            outputs: What `term.differentiable` says to differentiate.
            direction: `u`, shaped as the outputs.
        """

    def flatten(self, values: Sequence[Any]) -> tf.Tensor:
        """Tensors shaped as the trained weights, as one vector.

        Args:
            values: In the order of `model.trainable_variables`.
        """
        flat = [tf.reshape(tf.cast(value, self.dtype), [-1]) for value in values]
        return tf.concat(flat, axis=0)

    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """The inverse of `flatten`."""
        sizes = [int(v.value.shape.num_elements()) for v in self._variables]
        parts = tf.split(tf.cast(vector, self.dtype), sizes)
        return [tf.reshape(part, v.shape) for part, v in zip(parts, self._variables)]

    def _conjugate_gradients(
        self, gradients: Sequence[Any], tolerance: float, max_iterations: int
    ) -> list[tf.Tensor]:
        """`(Jᵀ H J + λ I)⁻¹ ∇`, shaped as the gradients."""
        if self._damping == 0:
            raise ValueError(
                "Conjugate gradients need a matrix that is positive definite. Make it with "
                "`damping`. Received: damping=0"
            )
        state = tf.linalg.experimental.conjugate_gradient(
            self, self.flatten(gradients), tol=tolerance, max_iter=max_iterations
        )
        return self.unflatten(state.x)

    def trace_estimate(self, draws: int = 10, seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
        """The trace of the matrix, without the matrix.

        Args:
            draws: Number of random vectors of signs, at least 2.
            seed: Of these.

        Returns:
            An unbiased estimate, and its standard error.

        Raises:
            ValueError: For fewer draws, which have no error.
        """
        check_draws(draws)
        return spectra.trace_estimate(self, draws, seed)

    def largest_eigenvalues(self, count: int = 10, steps: int = 12, seed: int = 0) -> tf.Tensor:
        """The largest eigenvalues, each as often as it occurs, by the block method of Lanczos.

        Where the blocks would fill the space, the matrix is formed instead.

        Args:
            count: How many.
            steps: Blocks to take, each of `count` products.
            seed: Of the vectors to start with.

        Returns:
            `[count]`, falling.
        """
        return spectra.largest_eigenvalues(self, count, steps, seed)

    def _coefficients(self, term: Term) -> tf.Tensor:
        """What each position of an output counts, by the largest that any does."""
        coefficients = term.coefficients()
        return coefficients / tf.cast(self._unit, coefficients.dtype)

    def _weighted(self, term: Term, vector: tf.Tensor) -> tf.Tensor:
        """Rows of an output, with what the positions count."""
        # Derivatives in forward mode may have lost their shape.
        coefficients = tf.cast(self._coefficients(term), vector.dtype)
        return vector * with_rank(coefficients, term.outputs.shape.rank)

    def _differentiable(self, weights: dict[int, tf.Tensor]) -> list[tf.Tensor]:
        return self._of_outputs(self._replay.outputs(weights))

    def _of_outputs(self, outputs: Any) -> list[tf.Tensor]:
        flat = tf.nest.flatten(outputs)
        return [self._differentiated(term, flat[term.index]) for term in self._terms]

    def _differentiated(self, term: Term, output: tf.Tensor) -> tf.Tensor:
        """What `J` is the Jacobian of: an output, or the logits behind it."""
        return term.differentiable(output)[0]

    def _shape(self) -> tf.TensorShape:
        return tf.TensorShape([self._size, self._size])

    def _shape_tensor(self) -> tf.Tensor:
        return tf.constant([self._size, self._size])

    def _matmul(self, x: tf.Tensor, adjoint: bool = False, adjoint_arg: bool = False) -> tf.Tensor:
        columns = x if adjoint_arg else tf.linalg.matrix_transpose(x)
        products = self._products(tf.convert_to_tensor(columns, self.dtype))
        return tf.linalg.matrix_transpose(products)

    def _product(self, vector: tf.Tensor) -> tf.Tensor:
        weights = {id(v): tf.convert_to_tensor(v.value) for v in self._variables}
        direction = dict(zip(weights, self.unflatten(vector)))
        _, (along,) = tangents(self._replay, weights, [direction], self._of_outputs, None)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs = self._differentiable(weights)
        each = zip(self._terms, outputs, along)
        back = [self._output_product(*own) for own in each]
        gradients = tape.gradient(outputs, weights, back, unconnected_gradients="zero")
        unit = tf.cast(self._unit, self.dtype)
        gradients = [unit * tf.cast(g, self.dtype) for g in gradients.values()]
        return self.flatten(gradients) + scalar(self._damping, self.dtype) * vector


def _unit(terms: Sequence[Term]) -> tf.Tensor | float:
    """The largest coefficient, for outputs in float16, where small ones are none."""
    if all(term.outputs.dtype != tf.float16 for term in terms):
        return 1.0
    largest = tf.reduce_max([tf.cast(tf.reduce_max(t.coefficients()), "float32") for t in terms])
    return tf.where(largest > 0, largest, 1)


def check_draws(draws: int) -> None:
    """Refuses a number of draws of which the mean has no standard error.

    Raises:
        ValueError: For fewer than two.
    """
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2. Received: draws={draws!r}")


def _terms(
    model: keras.Model,
    x: Any,
    y: Any,
    outputs: Any,
    sample_weight: Any,
    given: Sequence[Likelihood | None],
) -> list[Term]:
    """The losses of the outputs."""
    flat = tf.nest.flatten(outputs)
    if y is None:
        if len(flat) != 1:
            raise ValueError(
                "A curvature matrix of a model of several outputs needs targets, to see which loss "
                f"is of which output. Received: y=None for {len(flat)} outputs"
            )
        weight = only_entry(sample_weight)
        weight = None if weight is None else tf.convert_to_tensor(weight)
        loss, loss_weight = only_loss(model)
        score = Score(as_loss(loss), flat[0], None, weight, loss_weight, is_complete=False)
        term = understood(score, 0, given[0])
        if term.needs_targets and not term.is_empirical:
            raise ValueError(
                "The curvature of this loss depends on the targets. Received: y=None for "
                f"loss={loss!r}"
            )
        return [term]
    with observed_losses() as observed:
        observed.watch(flat)
        takes_training = "training" in inspect.signature(model.compute_loss).parameters
        training = {"training": False} if takes_training else {}
        total = model.compute_loss(x, y, outputs, sample_weight, **training)
    places = {id(output): index for index, output in enumerate(flat)}
    scores, _, unscored = observed.terms(total)
    if any(id(score.outputs) not in places for score in scores):
        raise ValueError(
            "A curvature matrix is that of losses of the model's outputs as they are. Received: "
            f"losses {[score.loss.name for score in scores]} of other tensors"
        )
    if unscored or not scores:
        raise unscored_error(model, names_of(model, outputs, unscored))
    return [understood(s, places[id(s.outputs)], given[places[id(s.outputs)]]) for s in scores]
