"""Whitening of the inputs: the input factor alone.

Source: Desjardins, Simonyan, Pascanu & Kavukcuoglu (2015), "Natural neural networks",
arXiv:1507.00210 (PRONG); Benzing (2022), "Gradient descent on neurons and its link to approximate
second-order optimization", arXiv:2201.12250 (FOOF).
"""

from keras_kfac.curvature.block import BlockPlan, KroneckerBlock
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.math.inverses import Inverse


class InputBlock(KroneckerBlock):
    """`(A + λ/g I)⁻¹ ⊗ I/g` with the mean eigenvalue `g` of the output factor."""

    kind = "input"

    @classmethod
    def unsuitable(cls, adapter: LayerAdapter) -> str | None:
        """Why the structure can't be had for a layer; `None` if it can."""
        if len(adapter.uses) > 1:
            return "a tied table has its inputs on both sides"
        return None

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for a layer that it suits."""
        adapter.has_isotropic_outputs = True
        return super().plan(adapter, inverse_type)
