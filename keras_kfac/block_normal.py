"""The normal distribution of the weights that a curvature block covers."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import tensorflow as tf

from keras_kfac.curvature.block import KroneckerBlock
from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.math.eigenbasis_normal import EigenbasisNormal
from keras_kfac.math.linalg import scalar
from keras_kfac.math.structure import from_blocks, to_blocks


class BlockNormal(NamedTuple):
    """A layer, or a part of one, and what the data say of its weights.

    Attributes:
        adapter: Its weights as a matrix.
        mean: That matrix, `[..., d_in, d_out]`; as `[k, l, b, c]` if factors are in blocks.
        bases: In which the covariance is diagonal.
        eigenvalues: Of the Fisher matrix of all data, shaped as the mean.
    """

    adapter: LayerAdapter
    mean: tf.Tensor
    bases: tuple[tf.Tensor, tf.Tensor]
    eigenvalues: tf.Tensor

    @classmethod
    def of(cls, block: KroneckerBlock, examples: float | tf.Tensor) -> Self:
        """What a block knows of the mean over examples, for all of them.

        Args:
            block: One that `keeps_fisher`. The weights that it has now are the mean.
            examples: How many; or what to multiply its Fisher matrix by.
        """
        adapter, basis = block.adapter, block.eigenbasis()
        matrix = adapter.to_matrix({id(v): tf.convert_to_tensor(v) for v in adapter.variables})
        mean = to_blocks(matrix, adapter.structures)
        values = tf.broadcast_to(basis.eigenvalues, tf.shape(mean))
        return cls(adapter, mean, basis[:2], values * scalar(examples, values.dtype))

    def normal(self, prior_precision: float | tf.Tensor) -> EigenbasisNormal:
        """The distribution of the matrix.

        Args:
            prior_precision: What to add to the eigenvalues.
        """
        precision = self.eigenvalues + scalar(prior_precision, self.mean.dtype)
        return EigenbasisNormal(self.mean, *self.bases, precision)


def draws(
    adapters: Sequence[LayerAdapter], normals: Sequence[EigenbasisNormal], seed: tf.Tensor
) -> list[Gradients]:
    """One draw of the weights of each block, by `id` of the variable.

    Args:
        adapters: Those of the blocks.
        normals: The distributions of their matrices.
        seed: Stateless seed, int32 `[2]`.
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, len(normals)))
    each = zip(adapters, normals, seeds)
    return [a.from_matrix(from_blocks(n.sample(s), a.structures)) for a, n, s in each]
