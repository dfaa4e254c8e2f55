"""Gradients of dense layers as the rows that they are made of: `∇W = Σ aₙ gₙᵀ` over examples.

A wide layer has more rows and columns than a batch has examples, and then these rows are cheaper to
precondition than their sum. Keras hands the sum to the optimizer. The rows take another pass
backwards through the layers at the end of the network, from the total that `compute_loss` returned:
in a graph TensorFlow finds that it computes what Keras's does, and makes one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.math.linalg import RowPairs
from keras_kfac.math.structure import products

# Blocks whose gradient takes fewer multiplications to precondition are not worth the trouble.
MIN_PRODUCTS = 2**24


class GradientRows(NamedTuple):
    """Gradients of dense layers at the end of the network as rows.

    Attributes:
        pairs: By `id` of the layer's adapter.
        is_cheaper: Whether the batch is so small that they take less than the sums; bool scalar.
    """

    pairs: Mapping[int, RowPairs]
    is_cheaper: tf.Tensor

    @classmethod
    def of(cls, passes: Sequence[ForwardPass], adapters: Sequence[LayerAdapter]) -> Self | None:
        """Those of the layers that have such gradients.

        It belongs where the gradients are taken: in a branch, the pass backwards would be one more.

        Args:
            passes: Forward passes that make up the loss.
            adapters: Those of all layers with blocks.

        Returns:
            `None` if there is no such layer, or the batch is known to be too large.
        """
        forward_pass = passes[0]
        if len(passes) > 1 or len(forward_pass.totals) != 1:
            return None
        (total,) = forward_pass.totals
        found = _adapters_of(forward_pass, adapters)
        if not found:
            return None
        is_cheaper = _are_cheaper(forward_pass, found)
        if tf.get_static_value(is_cheaper) == False:  # noqa: E712 Nor is it None.
            return None
        layers = {id(adapter.layer): adapter.layer for adapter in found}.values()
        gradients = forward_pass.output_gradients(layers, total, None)
        rows: dict[int, RowPairs] = {}
        for adapter in found:
            (gradient,) = gradients[id(adapter.layer)]
            rows[id(adapter)] = RowPairs(
                tf.squeeze(adapter.input_rows(_inputs(forward_pass, adapter)), axis=-2),
                tf.squeeze(adapter.output_rows(gradient), axis=-2),
            )
        return cls(rows, is_cheaper)


def _adapters_of(
    forward_pass: ForwardPass, adapters: Sequence[LayerAdapter]
) -> list[AffineAdapter]:
    """Those of large dense layers at the end of the network."""
    found: list[AffineAdapter] = []
    for key, (call, *more) in reversed(forward_pass.calls.items()):
        if more or call.inputs.shape.rank != 2:
            break  # Beyond, the cost of the pass backwards is not known, where it is another one.
        own = [a for a in adapters if id(a.layer) == key and isinstance(a, AffineAdapter)]
        found += [adapter for adapter in own if _suits(adapter, call.inputs.dtype)]
    return found


def _suits(adapter: AffineAdapter, dtype: tf.DType) -> bool:
    """Whether it is large, in full precision, and its gradient that of the loss alone."""
    is_full = dtype.size >= 4 and all(v.dtype == dtype.name for v in adapter.variables)
    is_plain = all(v.regularizer is None for v in adapter.variables)
    is_large = products(adapter.structures) >= MIN_PRODUCTS
    return is_full and is_plain and is_large and adapter.groups is None


def _inputs(forward_pass: ForwardPass, adapter: LayerAdapter) -> tf.Tensor:
    (call,) = forward_pass.calls[id(adapter.layer)]
    return call.inputs


def _are_cheaper(forward_pass: ForwardPass, adapters: Sequence[LayerAdapter]) -> tf.Tensor:
    summed: float = 0.0
    by_rows: float | tf.Tensor = 0.0
    for adapter in adapters:
        summed += products(adapter.structures)
        inputs = _inputs(forward_pass, adapter)
        # As a number where it is one: only so is the comparison known while a graph is built.
        rows = inputs.shape[0] or tf.cast(tf.shape(inputs)[0], tf.float64)
        by_rows += float(products(adapter.structures, pairs=1)) * rows
    return tf.convert_to_tensor(by_rows < summed)
