"""The Fisher matrix and the Gauss-Newton matrix of a model on a batch, for those who study them."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.curvature_matrix import CurvatureMatrix, check_draws
from keras_kfac.introspection.losses import Term
from keras_kfac.introspection.target_curvature import unknown_likelihood
from keras_kfac.math import spectra
from keras_kfac.math.likelihood import Likelihood, OutputCurvature
from keras_kfac.math.linalg import scalar


class FisherMatrix(CurvatureMatrix):
    """The Fisher matrix of all trained weights of a model, for its loss on a batch.

    A `tf.linalg.LinearOperator`, so that products (`matvec`, `matmul`) take a derivative in forward
    mode and one in reverse mode each, and nothing of the size of the matrix is formed, unless
    `to_dense()` is asked for it. Weights are flattened one after the other, as `flatten` does.

    The matrix is that of the loss as it is, with its reduction, sample weights and loss weights:
    `E[∇ log r ∇ log rᵀ]` of the predictive distribution `r`, times the weight `w` of the loss
    `-w log r`, averaged as the loss averages. For cross-entropies of logits and squared errors it
    equals the generalised Gauss-Newton matrix, `GaussNewtonMatrix`.

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
        draws: Where the Fisher information of the outputs has no closed form, how many targets to
            draw for each position, at least 1: always the same ones, so that the matrix is one.

    Raises:
        ValueError: If the model has no trained weights, or no loss, or one not known as a
            likelihood; without `draws`, if that has no closed form.

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
        draws: int | None = None,
    ) -> None:
        parameters = _arguments(locals())
        if draws is not None and draws < 1:
            raise ValueError(f"`draws` must be at least 1. Received: draws={draws!r}")
        self._draws = draws
        super().__init__(model, x, y, sample_weight, training, damping, likelihood, parameters)

    def _check(self, term: Term) -> None:
        if term.is_empirical:
            raise unknown_likelihood(term.score.loss)
        if self._draws is None:
            differentiable, curvature = term.differentiable(term.outputs)
            curvature.columns(differentiable)  # Raises if there is no closed form.

    def _output_product(self, term: Term, outputs: tf.Tensor, direction: tf.Tensor) -> tf.Tensor:
        """`c w F u` for each position of an output."""
        _, curvature = term.differentiable(term.outputs)
        seeds = [(0, index) for index in range(self._draws or 1)]
        return self._weighted(term, _mean_product(curvature, outputs, direction, seeds))

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
        return self._conjugate_gradients(gradients, tolerance, max_iterations)

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
        check_draws(draws)

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


class GaussNewtonMatrix(CurvatureMatrix):
    """The generalised Gauss-Newton matrix of all trained weights, for a model's loss on a batch.

    `Jᵀ H J` with the Hessian matrix `H` of the loss by the outputs of the model, on the targets of
    the batch, whatever the loss: reductions, sample weights and loss weights included. It equals
    `FisherMatrix` for losses of exponential families by their natural parameters, and of
    probabilities by the logits behind them, where Keras knows these. For others it depends on the
    targets, and it is positive semi-definite only if the loss is convex in the outputs.

    Derivatives are TensorFlow's, as in training. That of a categorical cross-entropy by the logits
    `f` is `softmax(f) - y`, as it is for targets that sum to 1; for others, such as rows of zeros,
    it is not that of the loss's value.

    A `tf.linalg.LinearOperator` like `FisherMatrix`, which leaves the model as it is, too.

    Args:
        model: A built model, compiled with a loss.
        x: Inputs of the batch.
        y: Targets.
        sample_weight: As for `fit`.
        training: Whether the forward pass is one of training.
        damping: `λ >= 0`, float: the matrix is `Jᵀ H J + λ I`.

    Raises:
        ValueError: If the model has no loss, or no trained weights, or a loss has options that
            `KFAC` refuses.

    Example:
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile("sgd", "log_cosh")  # Its second derivative is 1 / cosh² of the distance.
    >>> far, near = model(np.ones((1, 1))) + np.array([[20.0], [0.0]])
    >>> [GaussNewtonMatrix(model, np.ones((1, 1)), y[None]).to_dense().numpy().round(3).item()
    ...  for y in (far, near)]
    [0.0, 1.0]

    Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient
    descent"; Martens (2020), sections 6 and 9.
    """

    goes_by_likelihood = False

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        training: bool = False,
        damping: float = 0.0,
    ) -> None:
        parameters = _arguments(locals())
        if y is None:
            raise ValueError("The Gauss-Newton matrix depends on the targets. Received: y=None")
        super().__init__(model, x, y, sample_weight, training, damping, None, parameters)

    def _check(self, term: Term) -> None:
        """There is one of every loss."""

    def _differentiated(self, term: Term, output: tf.Tensor) -> tf.Tensor:
        return super()._differentiated(term, output) if term.sees_logits else output

    def _output_product(self, term: Term, outputs: tf.Tensor, direction: tf.Tensor) -> tf.Tensor:
        """The derivative of the gradient, by the outputs, along the direction."""
        if self._differentiated(term, term.outputs) is not term.outputs:
            # Logits, of which the Fisher matrix is the Hessian.
            _, curvature = term.differentiable(term.outputs)
            return self._weighted(term, _mean_product(curvature, outputs, direction, [(0, 0)]))
        coefficients = self._coefficients(term)
        outputs = tf.identity(outputs)  # Keras would look through a softmax for its logits.
        with tf.GradientTape() as outer:
            outer.watch(outputs)
            with tf.GradientTape() as inner:
                inner.watch(outputs)
                values = term.values(outputs)
                total = tf.reduce_sum(values * tf.cast(coefficients, values.dtype))
            gradient = inner.gradient(total, outputs, unconnected_gradients="zero")
            gradient = tf.convert_to_tensor(gradient)  # Of a loss that gathers, it is some rows.
            slope = tf.reduce_sum(gradient * tf.stop_gradient(direction))
        return outer.gradient(slope, outputs, unconnected_gradients="zero")

    def gauss_newton_step(
        self, gradients: Sequence[Any], tolerance: float = 1e-5, max_iterations: int = 100
    ) -> list[tf.Tensor]:
        """`(Jᵀ H J + λ I)⁻¹ ∇`, by conjugate gradients, for losses that are convex in the outputs.

        Args:
            gradients: `∇`, in the order of `model.trainable_variables`.
            tolerance: Where to stop, as the norm of the residual over that of the gradient.
            max_iterations: Where to stop at the latest.

        Returns:
            Tensors shaped as the gradients.

        Raises:
            ValueError: Without damping: the matrix could be singular.
        """
        return self._conjugate_gradients(gradients, tolerance, max_iterations)


def _arguments(names: dict[str, Any]) -> dict[str, Any]:
    """Those of a constructor."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def _mean_product(
    curvature: OutputCurvature,
    outputs: tf.Tensor,
    direction: tf.Tensor,
    seeds: Sequence[tuple[int, int]],
) -> tf.Tensor:
    """`w F u` for each position of an output; of draws, where there is no closed form."""
    other = tf.zeros_like(direction)

    def product(seed: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(other)
            products = curvature.curvature_products(outputs, [direction, other], seed)
        return tape.gradient(products[0, 1], other)

    if len(seeds) == 1:
        return product(tf.constant(seeds[0]))
    each = tf.map_fn(product, tf.constant(seeds), fn_output_signature=direction.dtype)
    return tf.reduce_mean(each, axis=0)


def _closed_divergence(old: Any, new: Any, index: int) -> tf.Tensor:
    try:
        return tfp.distributions.kl_divergence(old, new)
    except NotImplementedError as error:
        raise ValueError(
            "TensorFlow Probability has no closed form of this divergence: use `kl_estimate`. "
            f"Received: {old}"
        ) from error
