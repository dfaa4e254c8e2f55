"""The natural gradient of deep linear networks, exactly.

Source: Bernacchia, Lengyel & Hennequin (2018), "Exact natural gradient in deep linear networks and
its application to the nonlinear case", NeurIPS.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.curvature.block import BlockPlan, KroneckerBlock
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.per_example import ExactAdapter
from keras_kfac.math.inverses import Inverse


class LinearExactBlock(KroneckerBlock):
    """`L A ⊗ G` with the number `L` of such blocks.

    In a deep linear network with squared loss, whose layers are no narrower than inputs or outputs,
    the step is then a natural gradient of the whole network, blocks between layers included: each
    layer makes its share of the change that all of them make together. Without the `L` it is too
    long.
    """

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for a layer that it suits."""
        if isinstance(adapter, ExactAdapter):  # Scales and offsets are no linear layer.
            return KroneckerBlock.plan(adapter, inverse_type)
        return BlockPlan(cls, adapter, inverse_type, "linear_exact")

    def join(self, blocks: Sequence[KroneckerBlock]) -> None:
        """Counts them."""
        self._depth = sum(isinstance(block, LinearExactBlock) for block in blocks)

    def _factors(self) -> list[tf.Tensor]:
        a, g = super()._factors()
        return [a, self._depth * g]
