"""The Fisher matrix of a model on a batch, for those who study it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.introspection.known_losses import as_loss, given_likelihoods, only_loss
from keras_kfac.introspection.losses import Score, Term, understood
from keras_kfac.introspection.observed_losses import observed_losses
from keras_kfac.introspection.replay import Replay, tangents
from keras_kfac.introspection.target_curvature import unknown_likelihood
from keras_kfac.math import spectra
from keras_kfac.math.likelihood import Likelihood
from keras_kfac.math.linalg import scalar, with_rank


class FisherMatrix(tf.linalg.LinearOperator):
    """The Fisher matrix of all trained weights of a model, for its loss on a batch.

    A `tf.linalg.LinearOperator`, so that products (`matvec`, `matmul`) take a derivative in forward
    mode and one in reverse mode each, and nothing of the size of the matrix is formed, unless
    `to_dense()` is asked for it. Weights are flattened one after the other, as `flatten` does.

    The matrix is that of the loss as it is, with its reduction, sample weights and loss weights:
    `E[∇ log r ∇ log rᵀ]` of the predictive distribution `r`, times the weight `w` of the loss
    `-w log r`, averaged as the loss averages. For cross-entropies of logits and squared errors it
    equals the generalised Gauss-Newton matrix.

    The state of the model stays as it is: moving statistics, seeds, metrics.

    Args:
        model: A built model, compiled with a loss.
        x: Inputs of the batch.
        y: Targets. They matter for several outputs, to see which loss is of which.
        sample_weight: As for `fit`.
        training: Whether the forward pass is one of training: with dropout, and statistics of the
            batch.
        damping: `λ >= 0`, float: the matrix is `F + λ I`.
        likelihood: As for `KFAC`; by default that of the model's optimizer, if it has one.

    Raises:
        ValueError: If the model has no loss, or one not known as a likelihood with a closed form.

    Example:
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> fisher = FisherMatrix(model, np.eye(3, dtype="float32"))
    >>> (3 * fisher.to_dense()[0]).numpy().round().tolist()
    [2.0, 0.0, 0.0, 2.0]

    Source: Schraudolph (2002); Martens (2020), "New insights and perspectives on the natural
    gradient method", sections 8 and 9.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        training: bool = False,
        damping: float = 0.0,
        likelihood: Any = None,
    ) -> None:
        parameters = dict(locals())
        for name in ("self", "__class__"):
            parameters.pop(name, None)
        if not damping >= 0:
            raise ValueError(f"`damping` must be at least 0. Received: damping={damping!r}")
        if getattr(model, "loss", None) is None:
            raise ValueError(
                "The Fisher matrix belongs to a loss: compile the model with one. Received: model "
                f"{model.name!r} without a loss"
            )
        self._model = model
        self._variables = list(model.trainable_variables)
        self._damping = damping
        x = tf.nest.map_structure(tf.convert_to_tensor, x)
        self._replay = Replay(model, (x,), {"training": training})
        outputs = self._replay.outputs({})
        given = given_likelihoods(model, likelihood, outputs)
        with self._replay.scope({}):  # Metrics of single outputs stay as they are, too.
            self._terms = _terms(model, x, y, outputs, sample_weight, given)
        for term in self._terms:
            if term.is_empirical:
                raise unknown_likelihood(term.score.loss)
            differentiable, curvature = term.differentiable(term.outputs)
            curvature.columns(differentiable)  # Raises if there is no closed form.
        self._size = sum(int(v.value.shape.num_elements()) for v in self._variables)
        self._products = tf.function(
            lambda vectors: tf.map_fn(self._product, vectors), reduce_retracing=True
        )
        super().__init__(
            dtype=tf.as_dtype(self._variables[0].dtype),
            is_self_adjoint=True,
            is_positive_definite=damping > 0 or None,
            is_square=True,
            parameters=parameters,
        )

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

    def natural_gradient(
        self, gradients: Sequence[Any], tolerance: float = 1e-5, max_iterations: int = 100
    ) -> list[tf.Tensor]:
        """`(F + λ I)⁻¹ ∇`, by conjugate gradients.

        Args:
            gradients: `∇`, in the order of `model.trainable_variables`.
            tolerance: Where to stop, as the norm of the residual over that of the gradient.
            max_iterations: Where to stop at the latest.

        Returns:
            Tensors shaped as the gradients.

        Raises:
            ValueError: Without damping: the matrix could be singular.
        """
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
        _check_draws(draws)
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

    def kl_divergence(self, steps: Sequence[Any]) -> tf.Tensor:
        """`KL(r_θ ‖ r_θ+δ)` of the predictions, scaled and averaged as the loss is.

        To second order that is `½ δᵀ F δ`.

        Args:
            steps: `δ`, in the order of `model.trainable_variables`.

        Raises:
            ValueError: If TensorFlow Probability has no closed form: see `kl_estimate`.
        """
        return self._divergence(steps, _closed_divergence)

    def kl_estimate(
        self, steps: Sequence[Any], draws: int = 100, seed: int = 0
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """`kl_divergence` by draws from the model, for any distribution.

        Args:
            steps: `δ`, in the order of `model.trainable_variables`.
            draws: How many for each position, at least 2.
            seed: Of these.

        Returns:
            An unbiased estimate, and its standard error.

        Raises:
            ValueError: For fewer draws, which have no error.
        """
        _check_draws(draws)

        def each_draw(old: Any, new: Any, index: int) -> tf.Tensor:
            y = old.sample(draws, seed=tf.constant([seed, index]))
            return old.log_prob(y) - new.log_prob(y)

        each = self._divergence(steps, each_draw)
        return spectra.mean_and_error(each)

    def _divergence(
        self, steps: Sequence[Any], of_positions: Callable[[Any, Any, int], tf.Tensor]
    ) -> tf.Tensor:
        """A divergence `[..., *positions]` of each output, summed as the loss sums."""
        weights = {id(v): v.value + step for v, step in zip(self._variables, steps)}
        before, after = (self._differentiable(w) for w in ({}, weights))
        total = scalar(0.0, self.dtype)
        for index, term in enumerate(self._terms):
            likelihood = term.differentiable(term.outputs)[1]
            if not isinstance(likelihood, Likelihood):
                raise unknown_likelihood(term.score.loss)
            old, new = (likelihood.distribution(each[index]) for each in (before, after))
            divergence = of_positions(old, new, index)
            coefficients = tf.cast(term.coefficients(), divergence.dtype)
            axes = list(range(-coefficients.shape.rank, 0))
            weighted = tf.reduce_sum(divergence * coefficients, axis=axes)
            total += tf.cast(weighted * term.likelihood_weight(), self.dtype)
        return total

    def _differentiable(self, weights: dict[int, tf.Tensor]) -> list[tf.Tensor]:
        return self._of_outputs(self._replay.outputs(weights))

    def _of_outputs(self, outputs: Any) -> list[tf.Tensor]:
        flat = tf.nest.flatten(outputs)
        return [term.differentiable(flat[term.index])[0] for term in self._terms]

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
        back = [_curvature(term, out, u) for term, out, u in zip(self._terms, outputs, along)]
        gradients = tape.gradient(outputs, weights, back, unconnected_gradients="zero")
        return self.flatten(gradients.values()) + scalar(self._damping, self.dtype) * vector


def _check_draws(draws: int) -> None:
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2. Received: draws={draws!r}")


def _closed_divergence(old: Any, new: Any, index: int) -> tf.Tensor:
    try:
        return tfp.distributions.kl_divergence(old, new)
    except NotImplementedError as error:
        raise ValueError(
            "TensorFlow Probability has no closed form of this divergence: use `kl_estimate`. "
            f"Received: {old}"
        ) from error


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
                "The Fisher matrix of a model of several outputs needs targets, to see which loss "
                f"is of which output. Received: y=None for {len(flat)} outputs"
            )
        weight = None if sample_weight is None else tf.convert_to_tensor(sample_weight)
        loss, loss_weight = only_loss(model)
        score = Score(as_loss(loss), flat[0], None, weight, loss_weight, is_complete=False)
        term = understood(score, 0, given[0])
        if term.needs_targets and not term.is_empirical:
            raise ValueError(
                "The Fisher matrix of this loss depends on the targets. Received: y=None for "
                f"loss={loss!r}"
            )
        return [term]
    with observed_losses() as observed:
        total = model.compute_loss(x, y, outputs, sample_weight, training=False)
    places = {id(output): index for index, output in enumerate(flat)}
    scores = observed.terms(total).scores
    if any(id(score.outputs) not in places for score in scores):
        raise ValueError(
            "The Fisher matrix is that of losses of the model's outputs as they are. Received: "
            f"losses {[score.loss.name for score in scores]} of other tensors"
        )
    return [understood(s, places[id(s.outputs)], given[places[id(s.outputs)]]) for s in scores]


def _curvature(term: Term, outputs: tf.Tensor, direction: tf.Tensor) -> tf.Tensor:
    """`c w F u` for each position of an output."""
    _, likelihood = term.differentiable(term.outputs)
    seed = tf.zeros([2], tf.int32)
    other = tf.zeros_like(direction)
    with tf.GradientTape() as tape:
        tape.watch(other)
        products = likelihood.curvature_products(outputs, [direction, other], seed)
    vector = tape.gradient(products[0, 1], other)
    # Derivatives in forward mode may have lost their shape.
    coefficients = tf.cast(term.coefficients(), vector.dtype)
    return vector * with_rank(coefficients, outputs.shape.rank)
