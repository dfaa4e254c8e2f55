"""Curvature of losses without a predictive distribution: by the targets of the training data."""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_kfac.introspection.known_losses import CHOICES, keras_class, wrapped_function
from keras_kfac.math.likelihood import OutputCurvature, Products, products_of

_CONVEX = (keras.losses.SquaredHinge,)
"""Losses that are sums of convex functions of one output each, curved ones."""


def is_convex(loss: keras.losses.Loss) -> bool:
    """Whether the Hessian matrix of a loss is known to be positive semi-definite, and diagonal."""
    is_function = wrapped_function(loss) is keras.losses.squared_hinge
    return is_function or keras_class(loss, _CONVEX) is not None


def unknown_likelihood(loss: keras.losses.Loss) -> ValueError:
    """The error for a true Fisher matrix of a loss that has none."""
    return ValueError(
        "K-FAC knows no predictive distribution for this loss, so there is no exact Fisher "
        f"matrix. Use one of keras.losses.{CHOICES}, keras_kfac.NegativeLogLikelihood of a "
        "distribution, KFAC(likelihood=...), or KFAC(fisher='empirical'). Received: "
        f"loss={loss!r}"
    )


@dataclasses.dataclass(frozen=True)
class TargetGradients(OutputCurvature):
    """The empirical Fisher matrix `∇ℓ ∇ℓᵀ`.

    Attributes:
        values: The loss at each position `[batch, ...]`, by outputs `[batch, ...]` of more axes.
        loss: For messages.
    """

    values: Callable[[tf.Tensor], tf.Tensor]
    loss: keras.losses.Loss

    def sampled_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The gradient of the loss."""
        return self._gradient(outputs)[0]

    def curvature_products(
        self, outputs: tf.Tensor, directions: Sequence[tf.Tensor], seed: tf.Tensor
    ) -> Products:
        """Products with the gradient of each value of the loss."""
        vector, rank = self._gradient(outputs)
        axes = list(range(rank, vector.shape.rank))
        return products_of([tf.reduce_sum(vector * u, axis=axes) for u in directions])

    def _gradient(self, outputs: tf.Tensor) -> tuple[tf.Tensor, int]:
        """With the number of axes that tell the values of the loss apart."""
        outputs = tf.stop_gradient(outputs)
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            values = self.values(outputs)
        return tape.gradient(values, outputs), values.shape.rank

    def columns(self, outputs: tf.Tensor) -> int:
        """Not known."""
        raise unknown_likelihood(self.loss)

    def root_column(self, outputs: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Not known."""
        raise unknown_likelihood(self.loss)

    def propagated_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Not known."""
        raise unknown_likelihood(self.loss)


@dataclasses.dataclass(frozen=True)
class TargetHessian(OutputCurvature):
    """The Hessian matrix of a loss that is a sum of convex functions of one output each.

    Attributes:
        values: The loss at each position `[...]`, by outputs `[..., width]`.
    """

    values: Callable[[tf.Tensor], tf.Tensor]

    def sampled_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The columns with random signs: there are no targets to draw."""
        return self.propagated_vector(outputs, seed)

    def columns(self, outputs: tf.Tensor) -> int:
        """One for each output."""
        return outputs.shape[-1]

    def root_column(self, outputs: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Of the diagonal root."""
        return self._root(outputs) * tf.one_hot(index, outputs.shape[-1], dtype=outputs.dtype)

    def propagated_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The diagonal of the root with random signs."""
        bits = tf.random.stateless_uniform(tf.shape(outputs), seed, 0, 2, tf.int32)
        return self._root(outputs) * tf.cast(2 * bits - 1, outputs.dtype)

    def curvature_products(
        self, outputs: tf.Tensor, directions: Sequence[tf.Tensor], seed: tf.Tensor
    ) -> Products:
        """Exact."""
        root, rank = self._root(outputs), self.values(outputs).shape.rank
        along = [root * direction for direction in directions]
        # Keras drops the last axis of outputs for targets without it: then values have one less.
        axes = list(range(rank, root.shape.rank))
        return {pair: tf.reduce_sum(p, axis=axes) for pair, p in products_of(along).items()}

    def _root(self, outputs: tf.Tensor) -> tf.Tensor:
        outputs = tf.stop_gradient(outputs)
        with tf.GradientTape() as outer:
            outer.watch(outputs)
            with tf.GradientTape() as inner:
                inner.watch(outputs)
                values = self.values(outputs)
            gradient = inner.gradient(values, outputs)
        return tf.sqrt(tf.maximum(outer.gradient(gradient, outputs), 0))
