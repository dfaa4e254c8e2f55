"""Blocks of the Fisher matrix as it is, in full or its diagonal.

The diagonal is what adaptive methods estimate: Adam and RMSprop divide by the root of that of the
empirical Fisher matrix of a batch, with the mean gradient of the batch in place of single ones.
Source: Martens (2020), "New insights and perspectives on the natural gradient method", section 11.
"""

import math

from keras_kfac.curvature.block import BlockPlan, KroneckerBlock
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.example_gradients import (
    ExampleGradientsAdapter,
    reason_without_pairs,
)
from keras_kfac.introspection.per_example import ExactAdapter
from keras_kfac.math.inverses import Inverse


class FullBlock(KroneckerBlock):
    """`(F + λ I)⁻¹`, of the Fisher matrix `F` of all weights of the layer: nothing approximated."""

    replaces_exact = True
    needs_gradients = True
    max_full_block: float = math.inf

    @classmethod
    def unsuitable(cls, adapter: LayerAdapter) -> str | None:
        """Why the structure can't be had for a layer; `None` if it can."""
        return None if isinstance(adapter, ExactAdapter) else reason_without_pairs(adapter)

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for a layer that it suits."""
        if isinstance(adapter, ExactAdapter):
            adapter.max_full_block = cls.max_full_block
        else:
            adapter = ExampleGradientsAdapter(adapter, cls.max_full_block)
        return super().plan(adapter, inverse_type)


class DiagonalBlock(FullBlock):
    """`(diag F + λ I)⁻¹`."""

    max_full_block = 0
