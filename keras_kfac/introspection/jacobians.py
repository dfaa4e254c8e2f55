"""Derivatives of a model's outputs by its weights, for each example by itself.

One pass backwards for each output serves all examples and layers: the gradients of single examples
are sums over the rows that each layer has anyway.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.composite import weights_dtype
from keras_kfac.introspection.example_gradients import ExampleGradientsAdapter, reason_without_pairs
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.per_example import ExactAdapter, check_examples


def by_example(adapter: LayerAdapter) -> ExactAdapter:
    """An adapter of the same weights that knows their gradients for each example.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(adapter, ExactAdapter):
        return adapter
    reason = reason_without_pairs(adapter)
    if reason is not None:
        raise ValueError(
            "The outputs can't be differentiated by the weights of a layer, example by example: "
            f"{reason}. Received: layer {adapter.path!r}"
        )
    return ExampleGradientsAdapter(adapter, math.inf)


def example_jacobians(
    forward_pass: ForwardPass, adapters: Sequence[LayerAdapter], outputs: tf.Tensor
) -> list[tf.Tensor]:
    """The Jacobian of each adapter's weights.

    Args:
        forward_pass: A pass in which examples do not depend on each other.
        adapters: Those of layers that it recorded.
        outputs: Tensor `[batch, width]` of this pass.

    Returns:
        Matrices `[batch, width, ...]`, the last axes as of `adapter.to_matrix`, in the order of the
        adapters.

    Raises:
        ValueError: If a layer has no gradients of single examples.
    """
    singles = [by_example(adapter) for adapter in adapters]
    for single in singles:
        check_examples(forward_pass, single)
    layers = [layer for single in singles for layer in single.layers]
    calls = [_observed(forward_pass, single) for single in singles]
    width = outputs.shape[-1]

    def row(index: tf.Tensor) -> list[tf.Tensor]:
        vector = tf.one_hot(index, width, dtype=outputs.dtype)
        vectors = tf.broadcast_to(vector, tf.shape(outputs))
        arrived = forward_pass.output_gradients(layers, outputs, vectors)
        return [_gradients(single, arrived, own) for single, own in zip(singles, calls)]

    dtypes = [weights_dtype(single) for single in singles]
    rows = tf.map_fn(row, tf.range(width), fn_output_signature=dtypes, parallel_iterations=1)
    of_outputs = [tf.transpose(each, [1, 0, 2]) for each in rows]
    return [
        tf.reshape(each, [-1, width, *adapter.matrix_shape])
        for each, adapter in zip(of_outputs, adapters)
    ]


def _observed(forward_pass: ForwardPass, adapter: ExactAdapter) -> dict[Any, Sequence[Any]]:
    """What is seen of each call that uses the weights of an adapter, by its place."""
    calls = adapter.calls(forward_pass).items()
    return {place: adapter.observed(call) for place, call in calls}


def _gradients(
    adapter: ExactAdapter,
    arrived: Mapping[int, Sequence[Any]],
    calls: Mapping[Any, Sequence[Any]],
) -> tf.Tensor:
    """Gradients of the weights, `[batch, weights]`, summed over the calls."""
    dtype = weights_dtype(adapter)

    def cast(things: Any) -> Any:
        return tf.nest.map_structure(
            lambda thing: tf.cast(thing, dtype) if tf.is_tensor(thing) else thing, things
        )

    parts = [
        adapter.output_rows(cast(adapter.arrived(arrived, place)), *cast(observed))
        for place, observed in calls.items()
    ]
    return tf.squeeze(tf.add_n(parts), axis=-2)
