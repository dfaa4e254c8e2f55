"""The Fisher matrix of all weights together: the exact natural gradient.

Source: Amari (1998), "Natural gradient works efficiently in learning", Neural Computation 10(2).
"""

from collections.abc import Sequence

import keras

from keras_kfac.curvature.block import BlockPlan
from keras_kfac.curvature.exact import FullBlock
from keras_kfac.introspection.composite import JointWeightsAdapter


class DenseBlock(FullBlock):
    """`(F + λ I)⁻¹`, of the Fisher matrix `F` of all weights of all layers that have it."""

    kind = "dense"
    is_joint = True

    @classmethod
    def merged(cls, plans: Sequence[BlockPlan], model: keras.Model) -> BlockPlan:
        """One block for all layers."""
        return plans[0]._replace(adapter=JointWeightsAdapter([plan.adapter for plan in plans]))
