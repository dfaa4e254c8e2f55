"""Adapters of layers that are no affine map: blocks of exact gradients, example by example."""

import abc
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import (
    Arrived,
    Gradients,
    LayerAdapter,
    layer_path,
    own_variables,
)
from keras_kfac.introspection.forward_pass import ForwardPass, LayerCall
from keras_kfac.introspection.replay import batches_among
from keras_kfac.math import factors
from keras_kfac.math.rows import Starts, aligned
from keras_kfac.math.structure import Structure, Structures

# Up to so many weights have a full block: a matrix that costs next to nothing to invert.
MAX_FULL_BLOCK = 256


def check_examples(forward_pass: ForwardPass, adapter: LayerAdapter) -> None:
    """Refuses layers that are plainly not called on the examples of the batch.

    Raises:
        ValueError: If outputs of a layer have another first axis than those of the model.
    """
    outputs = [output.shape for output in batches_among(forward_pass.outputs)]
    batch = {shape[0] for shape in outputs}
    for layer in adapter.layers:
        for call in forward_pass.calls.get(id(layer), []):
            shapes = [output.shape for output in batches_among(call.outputs)]
            sizes = {shape[0] for shape in shapes} - {None}
            if not sizes <= batch:
                raise ValueError(
                    "A layer whose first axis is not the batch has no gradients of single "
                    "examples, which curvature='dense' or 'sample_space' and linearised "
                    "predictions are made of. "
                    f"Received: layer {layer_path(layer)!r} with outputs of shape {shapes[0]}, in "
                    f"a model of outputs of shape {outputs[0]}"
                )


class ExactAdapter(LayerAdapter):
    """Weights whose Fisher matrix is computed as it is, or the diagonal of it.

    The input factor is 1, and the rows of the "outputs" are the gradients of all weights for one
    example, so that the output factor is the Fisher matrix of the weights itself. Nothing is
    approximated but what lies between blocks.

    Attributes:
        max_full_block: Of more weights than this only the diagonal is kept.
    """

    averages_inputs = False
    max_full_block: float = MAX_FULL_BLOCK

    @property
    def block(self) -> str:
        """Whether the block is full or diagonal."""
        return "diagonal" if self.structures[1].is_diagonal else "full"

    def _structures(self) -> Structures:
        """The second is diagonal if the weights are too many for a full block."""
        size = self.dims[1]
        return Structure(1), Structure(size, is_diagonal=size > self.max_full_block)

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The constant 1."""
        return tf.ones(self.factor_shapes[0], dtype), tf.ones((), dtype)

    def output_factor_of_calls(self, calls: Arrived, starts: Starts) -> tf.Tensor:
        """The moment of gradients that are sums over the calls of an example."""
        rows = [self.output_rows(gradients, *seen) for gradients, seen in calls]
        return factors.output_factor(tf.add_n(aligned(rows, starts, 0)), self.structures[1])


class PerExampleAdapter(ExactAdapter):
    """Weights whose gradient can be had for each example of the batch.

    Their block is full if they are few (256), else diagonal, in any network.

    A subclass defines `example_gradients`.
    """

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        super().__init__(layer, trained)
        self._variables = [v for v in own_variables(layer) if trained(v)]
        self._sizes = [int(v.value.shape.num_elements()) for v in self._variables]

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""
        return self._variables

    @property
    def dims(self) -> tuple[int, int]:
        """One row; a column for each weight."""
        return 1, sum(self._sizes)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Gradients of the weights for each example: `[batch, 1, d_out]`."""
        parts = self.example_gradients(gradients, *observed)
        batch = tf.shape(tf.nest.flatten(gradients)[0])[0]
        rows = [tf.reshape(parts[id(v)], [batch, 1, -1]) for v in self._variables]
        return tf.concat(rows, axis=-1)

    @abc.abstractmethod
    def example_gradients(self, gradients: tf.Tensor, *observed: Any) -> Gradients:
        """Gradients of the variables for each example: `[batch, size]`, by `id` of the variable.

        Args:
            gradients: Of the layer's outputs, shaped as these.
            observed: What `observed` noted of the call.
        """

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins the gradients of the variables into `[1, weights]`."""
        parts = [tf.reshape(gradients[id(v)], [1, -1]) for v in self._variables]
        return tf.concat(parts, axis=-1)

    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`."""
        parts = tf.split(matrix, self._sizes, axis=-1)
        return {id(v): tf.reshape(part, v.shape) for v, part in zip(self._variables, parts)}


class NormalizationAdapter(PerExampleAdapter):
    """Scale and offset of a normalisation: `keras.layers.LayerNormalization`, for example.

    What they are applied to is what the layer puts out with a scale of 1 and an offset of 0.
    """

    scale_name, offset_name = "gamma", "beta"

    @classmethod
    def unsupported_reason(cls, layer: keras.Layer, base: type[keras.Layer]) -> str | None:
        """Why `layer` can't be adapted; `None` if it can."""
        if 0 in tf.nest.flatten(layer.axis):
            return "it has a weight for each example of the batch"
        return super().unsupported_reason(layer, base)

    def observed(self, call: LayerCall) -> tuple[tf.Tensor, ...]:
        """What is scaled."""
        neutral = [(self._scale, tf.ones), (self._offset, tf.zeros)]
        weights = {id(v): value(v.shape, v.dtype) for v, value in neutral if v is not None}
        return (call.replay.outputs(weights),)

    def example_gradients(self, gradients: tf.Tensor, *observed: Any) -> Gradients:
        """Gradients of scale and offset for each example."""
        axes = self._axes(gradients.shape.rank)
        parts = [(self._scale, gradients * observed[0]), (self._offset, gradients)]
        return {id(v): sum_over_others(part, axes) for v, part in parts if v is not None}

    def _axes(self, rank: int) -> set[int]:
        """The axes along which there are weights."""
        return {axis % rank for axis in tf.nest.flatten(self.layer.axis)}

    @property
    def _scale(self) -> keras.Variable | None:
        return getattr(self.layer, self.scale_name, None)

    @property
    def _offset(self) -> keras.Variable | None:
        return getattr(self.layer, self.offset_name, None)


class RMSNormalizationAdapter(NormalizationAdapter):
    """`keras.layers.RMSNormalization`, which calls its scale so and has no offset."""

    scale_name, offset_name = "scale", ""

    def _axes(self, rank: int) -> set[int]:
        # Keras multiplies by the scale along the last axes, whichever it normalises.
        return set(range(rank - len(tf.nest.flatten(self.layer.axis)), rank))


class PReLUAdapter(PerExampleAdapter):
    """`keras.layers.PReLU`: its slopes for negative inputs."""

    def observed(self, call: LayerCall) -> tuple[tf.Tensor, ...]:
        """What is multiplied by the slopes."""
        return (tf.minimum(call.inputs, 0),)

    def example_gradients(self, gradients: tf.Tensor, *observed: Any) -> Gradients:
        """Gradients of the slopes for each example."""
        shared = self.layer.shared_axes or []
        axes = {axis for axis in range(1, gradients.shape.rank) if axis not in shared}
        return {id(self.layer.alpha): sum_over_others(gradients * observed[0], axes)}


class RawWeightsAdapter(PerExampleAdapter):
    """Weights of any layer, used in any way: it is run again for each example by itself.

    That needs no knowledge of the layer, and takes as long as a pass through it (vectorised where
    TensorFlow can). It is for layers that treat examples apart from each other: statistics of the
    batch, or dropout masks, would be others for one example. Weights of layers below it have their
    own blocks.
    """

    with_activation = True

    @classmethod
    def methods(cls) -> Collection[str]:
        """None."""
        return ()

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """What runs the layer again."""
        return (call.replay,)

    def example_gradients(self, gradients: tf.Tensor, *observed: Any) -> Gradients:
        """Gradients of the weights for each example, by as many passes backwards."""
        replay, values = observed[0], {id(v): tf.convert_to_tensor(v) for v in self._variables}
        arrived = tf.nest.flatten(gradients)

        def of_example(index: tf.Tensor) -> Gradients:
            def cut(tensor: tf.Tensor) -> tf.Tensor:
                return tf.gather(tensor, [index])

            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                outputs = tf.nest.flatten(replay.outputs(values, cut))
                vectors = [tf.cast(cut(g), o.dtype) for g, o in zip(arrived, outputs)]
            return tape.gradient(outputs, values, vectors, unconnected_gradients="zero")

        parts = tf.vectorized_map(of_example, tf.range(tf.shape(arrived[0])[0]))
        return {key: tf.cast(part, arrived[0].dtype) for key, part in parts.items()}


def sum_over_others(tensor: tf.Tensor, axes: Collection[int]) -> tf.Tensor:
    """Sums over all axes but the batch and those given, which become one: `[batch, size]`."""
    others = [axis for axis in range(1, tensor.shape.rank) if axis not in axes]
    total = tf.reduce_sum(tensor, axis=others)
    return tf.reshape(total, [tf.shape(total)[0], -1])
