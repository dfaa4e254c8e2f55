"""The Fisher matrix of all weights without a matrix: by the rows that each batch makes it of.

Source: Ren & Goldfarb (2019), "Efficient subsampled Gauss-Newton and natural gradient methods for
training neural networks", arXiv:1906.02353.
"""

from typing import Any

import tensorflow as tf

from keras_kfac.curvature.block import BlockPlan, KroneckerBlock, Parts
from keras_kfac.curvature.spectrum import LayerSpectrum
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.math.inverses import Inverse
from keras_kfac.math.linalg import is_finite, scalar
from keras_kfac.math.sample_space import AwaitedInverse


class SampleSpaceBlock(KroneckerBlock):
    """`(Rᵀ R + λ I + diag η)⁻¹`: the Fisher matrix of the step's own batch is made of the rows `R`.

    Of all batches before, no more than the mean eigenvalue of their Fisher matrix is kept, for
    rules of the damping that go by it. A refresh renews `λ` alone. Products are in the precision of
    the weights, whatever `product_dtype`.
    """

    kind = "sample_space"
    needs_rows = True
    keeps_fisher = False

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for an adapter of single examples."""
        adapter.has_isotropic_outputs = True
        return super().plan(adapter, inverse_type)

    @classmethod
    def note(cls, adapter: LayerAdapter) -> str:
        """What there is to say of it in `coverage()`."""
        return f"{adapter.dims[1]:,} weights, by the samples of each batch: no matrix is kept"

    @classmethod
    def inverse_parts(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> Parts:
        """Damping and condition number."""
        return dict.fromkeys(AwaitedInverse._fields, ((), tf.ones))

    @property
    def inverse(self) -> Any:
        """The inverse as of the last refresh, without its rows."""
        return AwaitedInverse(*(tf.convert_to_tensor(part) for part in self._inverse))

    def invert(self, damping: tf.Tensor) -> Any:
        """The inverse in another damping, without its rows."""
        damping = scalar(damping, self.input_factor.dtype) + self._l2
        further = self._further_l2()
        most = 0.0 if further is None else tf.reduce_max(further)
        return AwaitedInverse.of(self.trace(), damping, most)

    def spectra(self, damping: tf.Tensor) -> list[LayerSpectrum]:
        """None: there is no matrix."""
        return []

    def _product(self, matrix: Any, inverse: Any) -> Any:
        """The product with the inverse of this batch; the gradient itself where that fails."""
        direction = tf.cast(inverse.precondition(matrix, self._further_l2()), matrix.dtype)
        finite = is_finite(direction)
        self.failed_refreshes.assign_add(tf.cast(~finite, tf.int64))
        return tf.where(finite, direction, matrix)
