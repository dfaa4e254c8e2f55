"""K-FAC without inverting: roots of the damped inverses in place of the factors.

Source: Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner & Makhzani (2024), "Structured
inverse-free natural gradient descent: memory-efficient & numerically-stable KFAC",
arXiv:2312.05705 (IKFAC).
"""

from collections.abc import Sequence
from typing import cast

import tensorflow as tf

from keras_kfac.curvature.block import AddVariable, BlockPlan, KroneckerBlock
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.statistics import BatchWeights, LayerStatistics
from keras_kfac.math.inverses import Inverse, RootInverse, Shape
from keras_kfac.math.kronecker import mean_eigenvalue
from keras_kfac.math.linalg import scalar
from keras_kfac.math.moving_average import share_of_new
from keras_kfac.math.roots import numbers_shape, wide
from keras_kfac.math.structure import aligned, aligned_shapes


class InverseFreeBlock(KroneckerBlock):
    """`K Kᵀ ∇W C Cᵀ` with `K Kᵀ = (A + π√λ I)⁻¹` and `C Cᵀ = (G + √λ/π I)⁻¹`.

    The moving averages `A` and `G` are those of K-FAC, but only their mean eigenvalues are kept, as
    `input_factor` and `output_factor`: statistics go into the roots with each update, and a refresh
    changes no more than the damping.
    """

    kind = "inverse_free"
    factorises = False
    keeps_fisher = False

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for a layer that it suits.

        Raises:
            ValueError: If it is to be damped exactly.
        """
        cls.check_factored(adapter, inverse_type)
        return super().plan(adapter, RootInverse)

    @classmethod
    def averages(cls, adapter: LayerAdapter) -> dict[str, Shape]:
        """Names and shapes of the moving averages: of each factor, a number for each matrix."""
        shapes = aligned_shapes(adapter.factor_shapes, adapter.structures)
        return dict(zip(super().averages(adapter), map(numbers_shape, shapes)))

    def __init__(
        self,
        adapter: LayerAdapter,
        add_variable: AddVariable,
        inverse_type: type[Inverse],
        product_dtype: str | None = None,
    ) -> None:
        super().__init__(adapter, add_variable, inverse_type, product_dtype)
        self._wide = wide(tf.as_dtype(self.weight.dtype))
        # Since the refresh before: updates, too, change the inverse.
        self._change = add_variable("change", (), self.weight.dtype)

    def update(
        self, statistics: Sequence[LayerStatistics], weights: BatchWeights, decay: tf.Tensor
    ) -> None:
        """Includes the statistics of a batch in the moving averages, unless they are not finite."""
        each = zip(self._structures, statistics[0])
        filled = [structure.filled(tf.cast(factor, self._wide)) for structure, factor in each]
        factors = aligned(filled, self._structures)
        shares = [
            share_of_new(*(tf.cast(x, self._wide) for x in (kept, new, decay)))
            for kept, new in zip(self._weights, weights)
        ]
        is_first = tf.convert_to_tensor(self.weight) <= 0
        finite, change = self._replace_inverse(self._roots.including(factors, shares, is_first))
        self._change.assign_add(tf.where(finite, change, 0))
        # What the roots can't take in is not counted, either.
        means = [tf.where(finite, mean_eigenvalue(f), float("nan")) for f in factors]
        super().update([LayerStatistics(*means)], weights, decay)

    def trace(self) -> tf.Tensor:
        """Trace of `A ⊗ G`, undamped."""
        traces = [s.size * mean for s, mean in zip(self._structures, self._factors())]
        return tf.reduce_sum(traces[0] * traces[1])

    def _whole_factors(self) -> list[tf.Tensor]:
        """What the roots stand for, with zeros for what the last block has too much."""
        each = zip(self._structures, self._roots.roots)
        return [structure.emptied(root.inverted()) for structure, root in each]

    def invert(self, damping: tf.Tensor) -> RootInverse:
        """The inverse in another damping; not finite where that fails."""
        means = [tf.cast(mean, self._wide) for mean in self._factors()]
        return self._roots.damped(means, scalar(damping, self._wide) + self._l2)

    def keep(self, inverse: Inverse) -> None:
        """Keeps an inverse for the next steps; the previous one if it is not finite."""
        super().keep(inverse)
        self.staleness.assign_add(self._change)
        self._change.assign(0)

    @property
    def _roots(self) -> RootInverse:
        return cast(RootInverse, self.inverse)
