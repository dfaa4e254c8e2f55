"""Gradients of dense layers as the rows that they are made of: `∇W = Σ aₙ gₙᵀ` over examples.

A wide layer has more rows and columns than a batch has examples, and then these rows are cheaper to
precondition than their sum. Keras hands the sum to the optimizer. The rows take one more pass
backwards through the layers at the end of the network.
"""

from collections.abc import Sequence
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
    """The layers of a forward pass whose gradients can be had as rows.

    Attributes:
        forward_pass: The pass, with its targets.
        adapters: Those of dense layers at the end of the network.
    """

    forward_pass: ForwardPass
    adapters: Sequence[AffineAdapter]

    @classmethod
    def of(cls, passes: Sequence[ForwardPass], adapters: Sequence[LayerAdapter]) -> Self | None:
        """`None` if there is no such layer.

        Args:
            passes: Forward passes that make up the loss.
            adapters: Those of all layers with blocks.
        """
        forward_pass = passes[0]
        scores = [term.score for term in forward_pass.terms]
        if len(passes) > 1 or any(not s.is_complete or s.targets is None for s in scores):
            return None
        found: list[AffineAdapter] = []
        for key, (call, *more) in reversed(forward_pass.calls.items()):
            if more or call.inputs.shape.rank != 2:
                break  # The pass backwards ends here: beyond, its cost is not known.
            own = [a for a in adapters if id(a.layer) == key and isinstance(a, AffineAdapter)]
            found += [adapter for adapter in own if _suits(adapter, call.inputs.dtype)]
        return cls(forward_pass, found) if found else None

    def is_cheaper(self) -> tf.Tensor:
        """Whether the batch is small enough, bool scalar."""
        summed, by_rows = 0, tf.zeros((), tf.float64)
        for adapter in self.adapters:
            structures, (d_in, d_out) = adapter.structures, adapter.dims
            summed += products(structures)
            # And one pass backwards.
            each = products(structures, pairs=1) + d_in * d_out
            by_rows += each * tf.cast(tf.shape(self._inputs(adapter))[0], by_rows.dtype)
        return by_rows < summed

    def _inputs(self, adapter: LayerAdapter) -> tf.Tensor:
        (call,) = self.forward_pass.calls[id(adapter.layer)]
        return call.inputs

    def pairs(self) -> dict[int, RowPairs]:
        """The rows, by `id` of the adapter."""
        forward_pass = self.forward_pass
        weighted = [(term, term.coefficients()) for term in forward_pass.terms]
        with forward_pass.tape:
            total = sum(term.weighted_sum(coefficients) for term, coefficients in weighted)
        layers = {id(adapter.layer): adapter.layer for adapter in self.adapters}.values()
        gradients = forward_pass.output_gradients(layers, total, None)
        rows: dict[int, RowPairs] = {}
        for adapter in self.adapters:
            (gradient,) = gradients[id(adapter.layer)]
            rows[id(adapter)] = RowPairs(
                tf.squeeze(adapter.input_rows(self._inputs(adapter)), axis=-2),
                tf.squeeze(adapter.output_rows(gradient), axis=-2),
            )
        return rows


def _suits(adapter: AffineAdapter, dtype: tf.DType) -> bool:
    """Whether it is large, in full precision, and its gradient that of the loss alone."""
    is_plain = all(v.regularizer is None and v.dtype == dtype.name for v in adapter.variables)
    is_large = products(adapter.structures) >= MIN_PRODUCTS
    return is_plain and is_large and adapter.groups is None
