"""Outputs of a model with uncertain weights."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.jacobians import example_jacobians
from keras_kfac.introspection.model_pass import recorded_pass
from keras_kfac.introspection.replay import Replay, Weights
from keras_kfac.math.eigenbasis_normal import EigenbasisNormal
from keras_kfac.whole_data import CurvatureSettings, inputs_of

# So many examples at a time, or as many as have Jacobians of no more numbers than that.
_BATCH = 1024
_NUMBERS = 2**25

Moments = tuple[tf.Tensor, tf.Tensor]


class Predictions:
    """What a model puts out, for weights that are drawn or linearised.

    Args:
        settings: The model, and its likelihood.
        adapters: The parts of layers whose weights are uncertain.
        output_shape: Of the outputs, batch included.
    """

    def __init__(
        self,
        settings: CurvatureSettings,
        adapters: Sequence[LayerAdapter],
        output_shape: tf.TensorShape,
    ) -> None:
        self._settings = settings
        self._adapters = adapters
        self._output_shape = output_shape
        # In graphs, where the likelihood was found: without, Keras sees other logits.
        self._outputs = tf.function(self._outputs_of_batch, autograph=False, reduce_retracing=True)
        self._moments = tf.function(self._moments_of_batch, autograph=False, reduce_retracing=True)

    def outputs(self, x: Any, weights: Weights) -> tf.Tensor:
        """What the likelihood is of, `[batch, ..., width]`, for weights by `id`."""
        parts = [self._outputs(part, weights) for part in inputs_of(x, _BATCH)]
        outputs = tf.concat(parts, axis=0)
        return outputs[:, tf.newaxis] if outputs.shape.rank == 1 else outputs

    def _outputs_of_batch(self, x: Any, weights: Weights) -> tf.Tensor:
        replay = Replay(self._settings.model, (x,), {"training": False})
        return self._differentiable(replay.outputs(weights))

    def moments(self, x: Any, normals: Sequence[EigenbasisNormal]) -> Moments:
        """Of the linearised model: means `[batch, width]`, covariances `[batch, width, width]`.

        Args:
            x: Inputs.
            normals: The distributions of the weights.

        Raises:
            ValueError: For outputs of another shape, or if a layer has no gradients of single
                examples.
        """
        if self._output_shape.rank != 2:
            raise ValueError(
                "A linearised model has outputs of shape (batch, width); for others there is "
                f"method='weights'. Received: outputs of shape {self._output_shape}"
            )
        weights = sum(math.prod(adapter.matrix_shape) for adapter in self._adapters)
        batch = min(max(1, _NUMBERS // (weights * self._output_shape[-1])), _BATCH)
        parts = [self._moments(part, list(normals)) for part in inputs_of(x, batch)]
        means, covariances = (tf.concat(each, axis=0) for each in zip(*parts))
        return means, covariances

    def _moments_of_batch(self, x: Any, normals: Sequence[EigenbasisNormal]) -> Moments:
        model = self._settings.model
        forward_pass = recorded_pass(model, lambda: model(x, training=False))
        outputs = self._differentiable(forward_pass.outputs)
        # Outputs may be of half the precision, and layers of several.
        dtype = max((normal.mean.dtype for normal in normals), key=lambda own: own.size)
        covariances = tf.zeros((), dtype)
        jacobians = example_jacobians(forward_pass, self._adapters, outputs)
        for normal, jacobian in zip(normals, jacobians):
            vectors = normal.standardized(jacobian)
            rows = tf.reshape(vectors, [tf.shape(outputs)[0], outputs.shape[-1], -1])
            covariances += tf.cast(tf.matmul(rows, rows, transpose_b=True), dtype)
        return tf.cast(outputs, dtype), covariances

    def _differentiable(self, outputs: Any) -> tf.Tensor:
        term = self._settings.term(outputs, None)
        return term.differentiable(term.outputs)[0]
