"""The natural gradient of deep linear networks, exactly.

Source: Bernacchia, Lengyel & Hennequin (2018), "Exact natural gradient in deep linear networks and
its application to the nonlinear case", NeurIPS.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.curvature.block import KroneckerBlock


class LinearExactBlock(KroneckerBlock):
    """`L A ⊗ G` with the number `L` of such blocks.

    In a deep linear network with squared loss, whose layers are no narrower than inputs or outputs,
    the step is then a natural gradient of the whole network, blocks between layers included: each
    layer makes its share of the change that all of them make together. Without the `L` it is too
    long.
    """

    kind = "linear_exact"
    keeps_fisher = False

    def join(self, blocks: Sequence[KroneckerBlock]) -> None:
        """Counts them."""
        self._depth = sum(isinstance(block, LinearExactBlock) for block in blocks)

    def _factors(self) -> list[tf.Tensor]:
        a, g = super()._factors()
        return [a, self._depth * g]
