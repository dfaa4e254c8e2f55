"""The posterior distribution of a model's weights, and what it predicts."""

import math
from typing import Any

import tensorflow as tf

from keras_kfac import validation
from keras_kfac.block_normal import BlockNormal, draws
from keras_kfac.math import evidence, predictive
from keras_kfac.math.eigenbasis_normal import EigenbasisNormal
from keras_kfac.math.linalg import scalar
from keras_kfac.predictions import Predictions
from keras_kfac.whole_data import CurvatureSettings, WholeCurvature

LINEAR, PROBIT, WEIGHTS = METHODS = ("linear", "probit", "weights")


class LaplacePosterior:
    """Normal distributions of the weights of a trained model, as `laplace` makes them.

    Layer by layer, with the weights of a layer as a matrix `W` (the bias its last row) and the
    Fisher matrix `F = U diag(s) Uᵀ` of the log-likelihood of all data,

        W ~ N(trained weights, U diag(1 / (s + τ)) Uᵀ).

    With `curvature="kfac"`, `U = U_A ⊗ U_G` and `s = N a gᵀ` are those of `N A ⊗ G`: nothing is
    added to the factors, `τ` is added to their product. With `"dense"` all layers are as one.
    Weights without a curvature block are fixed.

    It goes with the weights that the model had: to train on, make another one afterwards. The
    model's own state is never changed.

    Attributes:
        model: The model.
        coverage: Which weights are covered, and why others are not; prints as a table.
        examples: Number `N` of examples.
        log_likelihood: `log p(D | θ)` of the data at the trained weights, float; `None` if the
            posterior was made without targets. With a squared logarithmic error the data are
            `log(1 + y)`.
    """

    def __init__(self, settings: CurvatureSettings, found: WholeCurvature) -> None:
        self.model = settings.model
        self.coverage = found.coverage
        self.examples = float(found.examples)
        self.log_likelihood = None
        if found.log_likelihood is not None:
            self.log_likelihood = float(found.log_likelihood)
        self._make = found.likelihood.of_targets
        self._variables = list(self.model.trainable_variables)
        self._mean = [tf.convert_to_tensor(v) for v in self._variables]
        self._blocks = [BlockNormal.of(block, found.examples) for block in found.blocks]
        # Layers may be of several types.
        flat = [tf.cast(tf.reshape(b.eigenvalues, [-1]), tf.float64) for b in self._blocks]
        self._eigenvalues = tf.concat(flat, axis=0)
        squares = [tf.reduce_sum(tf.cast(b.mean, tf.float64) ** 2) for b in self._blocks]
        self._squared_norm = tf.add_n(squares)
        self._precision = scalar(1.0, tf.float64)
        adapters = [block.adapter for block in self._blocks]
        self._predictions = Predictions(settings, adapters, found.output_shape)

    # ---- Prior and evidence ---------------------------------------------------------------------

    @property
    def prior_precision(self) -> float:
        """`τ > 0` of the prior `N(0, I/τ)`; assigning another one costs nothing."""
        return float(self._precision)

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        value = validation.check_finite_positive("prior_precision", value)
        self._precision = scalar(value, tf.float64)

    def maximize_evidence(self) -> float:
        """Takes the prior precision of largest evidence, and returns it.

        It is where `τ ‖θ‖²` is the number of weights that the data determine; there is one such
        `τ`. (Source: MacKay (1992), "Bayesian interpolation", section 4.)

        Raises:
            ValueError: If there is none: all weights are zero, or the data depend on none.
        """
        best = float(evidence.best_precision(self._eigenvalues, self._squared_norm))
        if not 0 < best < math.inf:
            raise ValueError(
                "No prior precision has the largest evidence: the weights are zero, or the outputs "
                "do not depend on them. Choose `prior_precision`. Received: squared norm "
                f"{float(self._squared_norm)}, trace {float(tf.reduce_sum(self._eigenvalues))}"
            )
        self.prior_precision = best
        return best

    @property
    def effective_dimension(self) -> float:
        """How many weights the data determine: `γ = Σ s / (s + τ)`."""
        return float(evidence.effective_dimension(self._eigenvalues, self._precision))

    def log_marginal_likelihood(self, prior_precision: Any = None) -> tf.Tensor:
        """The evidence `log p(D | τ)`, to compare prior precisions, likelihoods and models.

        Args:
            prior_precision: `τ > 0`, number or tensor, by which the result can be differentiated;
                `None` for that of the posterior.

        Returns:
            float64 scalar.

        Raises:
            ValueError: If the posterior was made without targets, or for another `τ`.
        """
        if self.log_likelihood is None:
            raise ValueError(
                "The evidence needs the targets of the data: `laplace(model, x, y)`. Received: "
                "a posterior made without targets"
            )
        if prior_precision is not None:
            validation.check_positive_scalar("prior_precision", prior_precision)
        precision = self._precision if prior_precision is None else prior_precision
        return evidence.log_evidence(
            scalar(self.log_likelihood, tf.float64),
            self._eigenvalues,
            self._squared_norm,
            scalar(precision, tf.float64),
        )

    # ---- Weights --------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """The distribution of each block's weights, by path of the layer.

        A `tfp.distributions.MultivariateNormalLinearOperator` of the matrix of the weights, row by
        row: kernel and bias of a dense layer, flattened one after the other. Its scale is made of
        Kronecker products; groups of a convolution are a batch of distributions.
        """
        return {b.adapter.path: b.normal(self._precision).distribution() for b in self._blocks}

    def sample(self, seed: int = 0) -> list[tf.Tensor]:
        """One draw of all weights.

        Args:
            seed: Of the draw.

        Returns:
            Tensors in the order of `model.trainable_variables`; weights that are not covered are
            as they were.
        """
        return list(self._draw(seed, 0).values())

    def _draw(self, seed: int, index: int) -> dict[int, tf.Tensor]:
        """One of several draws, by `id` of the variable."""
        drawn = {id(v): mean for v, mean in zip(self._variables, self._mean)}
        adapters, normals = [b.adapter for b in self._blocks], self._normals()
        for values in draws(adapters, normals, tf.constant([seed, index])):
            drawn.update(values)
        return drawn

    # ---- Predictions ----------------------------------------------------------------------------

    def outputs(self, x: Any) -> Any:
        """The distribution of the outputs, of the model linearised in its weights.

        `N(f, J Σ Jᵀ)` with the Jacobian `J` of the outputs by the weights, for each example by
        itself. Outputs are logits, where the loss is a function of these.

        Args:
            x: Inputs, as for `laplace`. Targets in a dataset are left out.

        Returns:
            `tfp.distributions.MultivariateNormalLinearOperator` over `[width]`, a batch of them.

        Raises:
            ValueError: If the outputs are not `[batch, width]`, a layer has no gradients of single
                examples, or the model has other weights now.
        """
        return predictive.normal(*self._moments(x))

    def predictive(self, x: Any, method: str = LINEAR, draws: int = 100, seed: int = 0) -> Any:
        """The distribution of targets for new inputs.

        Args:
            x: Inputs, as for `outputs`.
            method: How to take the mean over weights:

                - `"linear"`: by the distribution of `outputs`. With a normal likelihood of fixed
                  scale the result is normal, else a mixture over draws of the outputs.
                - `"probit"`: classes, by `softmax(f / √(1 + π/8 v))` with the variances `v` of
                  `outputs`; independent ones by `sigmoid` of the same. It takes no draws, and is
                  for outputs that are logits, or a softmax or sigmoid of which Keras sees these.
                - `"weights"`: a mixture over draws of the weights, each with a forward pass of the
                  model as it is, for outputs of any shape; of shape `(batch,)` they are taken as
                  `(batch, 1)`. `Σ` is that of the linearised model, and draws from it can be poor
                  networks (see docs/laplace.md).
            draws: How many, a positive int, for those that take draws.
            seed: Of these.

        Returns:
            A TFP distribution: Categorical for classes, normal for a normal likelihood, else a
            `MixtureSameFamily`.

        Raises:
            ValueError: As `outputs`; for other methods; or for `"probit"` without classes, or
                where the outputs are not their logits.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}. Received: method={method!r}")
        validation.check_positive_int("draws", draws)
        if method == WEIGHTS:
            weights = (self._draw(seed, index) for index in range(draws))
            each = [self._predictions.outputs(x, drawn) for drawn in weights]
            return predictive.mixture(self._make, tf.stack(each, axis=-2))
        means, covariances = self._moments(x)
        if method == PROBIT:
            return predictive.probit(self._make, means, tf.linalg.diag_part(covariances))
        known = predictive.with_noise(self._make, means, covariances)
        if known is not None:
            return known
        drawn = predictive.normal(means, covariances).sample(draws, seed=[seed, 0])
        return predictive.mixture(self._make, tf.einsum("dbk->bdk", drawn))

    def _moments(self, x: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Means and covariances of the linearised model's outputs."""
        for variable, mean in zip(self._variables, self._mean):
            if not tf.reduce_all(tf.convert_to_tensor(variable) == mean):
                raise ValueError(
                    "The model is not the one whose posterior this is: make another one by "
                    "`laplace`, or put its weights back. Received: model "
                    f"{self.model.name!r} with other values of {variable.path!r}"
                )
        return self._predictions.moments(x, self._normals())

    def _normals(self) -> list[EigenbasisNormal]:
        """The distributions of the blocks."""
        return [block.normal(self._precision) for block in self._blocks]
