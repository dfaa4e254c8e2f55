"""The Fisher matrix of all weights together: the exact natural gradient.

Source: Amari (1998), "Natural gradient works efficiently in learning", Neural Computation 10(2).
"""

from collections.abc import Sequence

import keras

from keras_kfac.curvature.block import BlockPlan
from keras_kfac.curvature.exact import FullBlock
from keras_kfac.curvature.sample_space import SampleSpaceBlock
from keras_kfac.introspection.composite import JointWeightsAdapter


class DenseBlock(FullBlock):
    """`(F + λ I)⁻¹`, of the Fisher matrix `F` of all weights of all layers that have it."""

    kind = "dense"
    is_joint = True
    # Of more weights no matrix is kept: 2 P² numbers, 134 MB of these in float32, and P³ operations
    # for a refresh, some seconds on a few cores.
    max_kept = 4096

    @classmethod
    def merged(cls, plans: Sequence[BlockPlan], model: keras.Model) -> BlockPlan:
        """One block for all layers: this one, or one that keeps no matrix."""
        adapter = JointWeightsAdapter([plan.adapter for plan in plans])
        if adapter.dims[1] > cls.max_kept:
            return SampleSpaceBlock.plan(adapter, plans[0].inverse_type)
        return plans[0]._replace(adapter=adapter)


class BatchBlock(DenseBlock):
    """Of the step's batch alone, by its samples, however many weights there are."""

    max_kept = 0
