"""What of a Kronecker factor is kept: all, equal blocks on its diagonal, the diagonal, its mean.

The mean of the diagonal is a matrix `[1, 1]` and stands for that multiple of the identity. Blocks
are a matrix `[k, b, b]`; the last one is filled up with zeros. So that they multiply the parts of a
gradient that belong to them, factors in blocks have an axis for each of both: `[k, 1, b, b]` from
the left and `[1, l, c, c]` from the right of the gradient `[k, l, b, c]`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import tensorflow as tf

from keras_kfac.math.linalg import Gradient, RowPairs

Shape = tuple[int, ...]


class Structure(NamedTuple):
    """The part of a `[size, size]` matrix that is kept.

    Attributes:
        size: Number of rows.
        blocks: Number of blocks on the diagonal, 1 for the whole matrix.
        is_diagonal: Whether only the diagonal is kept.
        is_isotropic: Whether only the mean of the diagonal is kept.
    """

    size: int
    blocks: int = 1
    is_diagonal: bool = False
    is_isotropic: bool = False

    def split(self, largest: int) -> Self:
        """The same in as few blocks as make none larger than that.

        Example:
        >>> Structure(10).split(4).blocks
        3
        """
        return self._replace(blocks=-(-self.size // largest))

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return -(-self.size // self.blocks)

    @property
    def copies(self) -> int:
        """How many eigenvalues one of what is kept stands for."""
        return self.size if self.is_isotropic else 1

    @property
    def shape(self) -> Shape:
        """Of what is kept."""
        if self.is_isotropic:
            return (1, 1)
        if self.is_diagonal:
            return (self.size,)
        whole = (self.block_size, self.block_size)
        return whole if self.blocks == 1 else (self.blocks, *whole)

    def parts(self, rows: tf.Tensor) -> tf.Tensor:
        """Rows `[n, size]` in columns for each block: `[blocks, n, block_size]`.

        Example:
        >>> Structure(3, blocks=2).parts(tf.constant([[1.0, 2.0, 3.0]])).numpy().tolist()
        [[[1.0, 2.0]], [[3.0, 0.0]]]
        """
        parts = tf.reshape(self.padded(rows, axis=1), [-1, self.blocks, self.block_size])
        return tf.transpose(parts, [1, 0, 2])

    def joined(self, parts: tf.Tensor) -> tf.Tensor:
        """Inverse of `parts`."""
        rows = tf.reshape(tf.transpose(parts, [1, 0, 2]), [-1, self.blocks * self.block_size])
        return rows[:, : self.size]

    def padded(self, matrix: tf.Tensor, axis: int) -> tf.Tensor:
        """A matrix of `size` rows or columns, with zeros for what the last block has too much."""
        missing = self.blocks * self.block_size - self.size
        if not missing:
            return matrix
        return tf.pad(matrix, [[0, missing if i == axis else 0] for i in range(2)])

    def filled(self, factor: tf.Tensor) -> tf.Tensor:
        """A factor with its mean eigenvalue where the last block has rows too much.

        These are independent of all else, and change nothing but that the block is not singular for
        no reason.

        Example:
        >>> Structure(3, blocks=2).filled(tf.constant([np.eye(2), np.diag([4.0, 0.0])]))[1].numpy()
        array([[4., 0.],
               [0., 2.]])
        """
        if not self._is_padded:
            return factor
        mean = tf.reduce_sum(tf.linalg.trace(factor)) / self.size
        return factor + tf.linalg.diag(mean * (1 - self._belongs(factor.dtype)))

    def emptied(self, factor: tf.Tensor) -> tf.Tensor:
        """Undoes `filled`: rows that the last block has too much, independent of others, are zero.

        Example:
        >>> structure = Structure(3, blocks=2)
        >>> factor = tf.constant([np.eye(2), np.diag([4.0, 0.0])])
        >>> bool(tf.reduce_all(structure.emptied(structure.filled(factor)) == factor))
        True
        """
        if not self._is_padded:
            return factor
        return tf.reshape(factor, self.shape) * self._belongs(factor.dtype)[..., tf.newaxis]

    @property
    def _is_padded(self) -> bool:
        return self.blocks * self.block_size > self.size

    def _belongs(self, dtype: tf.DType) -> tf.Tensor:
        """1 for the rows of the blocks that are rows of the matrix, `[blocks, block_size]`."""
        rows = tf.range(self.blocks * self.block_size) < self.size
        return tf.reshape(tf.cast(rows, dtype), [self.blocks, self.block_size])


Structures = tuple[Structure, Structure]
"""Those of the input factor and the output factor."""


def products(structures: Structures, pairs: int | None = None) -> int:
    """Multiplications that it takes to precondition a gradient.

    Args:
        structures: Those of the factors.
        pairs: The number of terms if the gradient comes as `RowPairs`; what they save elsewhere and
            what they cost apart from the preconditioning is not counted.

    Example:
    >>> structures = Structure(1000), Structure(500, blocks=2)
    >>> products(structures), products(structures, pairs=100)
    (625000000, 162500000)
    """
    d_in, d_out = (structure.size for structure in structures)
    each = [1 if s.is_diagonal or s.is_isotropic else s.block_size for s in structures]
    if pairs is None:
        return d_in * d_out * sum(each)
    return pairs * (d_in * each[0] + d_out * each[1] + d_in * d_out)


def in_blocks(structures: Structures) -> bool:
    """Whether either factor is."""
    return any(structure.blocks > 1 for structure in structures)


def aligned_shapes(shapes: Sequence[Shape], structures: Structures) -> Sequence[Shape]:
    """Shapes of both factors, with the axes of the gradient's blocks if it has any."""
    if not in_blocks(structures):
        return shapes
    rows, columns = structures
    return [(rows.blocks, 1, *shapes[0][-2:]), (1, columns.blocks, *shapes[1][-2:])]


def aligned(factors: Sequence[tf.Tensor], structures: Structures) -> list[tf.Tensor]:
    """Both factors, with the axes of the gradient's blocks if it has any."""
    if not in_blocks(structures):
        return list(factors)
    shapes = aligned_shapes([tuple(factor.shape) for factor in factors], structures)
    return [tf.reshape(factor, shape) for factor, shape in zip(factors, shapes)]


def to_blocks(matrix: Gradient, structures: Structures) -> Gradient:
    """A gradient `[d_in, d_out]` as `[k, l, b, c]`; as it is if neither factor is in blocks.

    Example:
    >>> structures = Structure(2), Structure(3, blocks=2)
    >>> blocks = to_blocks(tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), structures)
    >>> blocks.numpy().tolist()
    [[[[1.0, 2.0], [4.0, 5.0]], [[3.0, 0.0], [6.0, 0.0]]]]
    >>> from_blocks(blocks, structures).numpy().tolist()
    [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    """
    if not in_blocks(structures):
        return matrix
    rows, columns = structures
    if isinstance(matrix, RowPairs):
        return RowPairs(
            rows.parts(matrix.inputs)[:, tf.newaxis], columns.parts(matrix.outputs)[tf.newaxis]
        )
    return whole_blocks(columns.padded(rows.padded(matrix, axis=0), axis=1), structures)


def whole_blocks(matrix: tf.Tensor, structures: Structures) -> tf.Tensor:
    """`to_blocks` of a matrix whose last blocks are filled up already."""
    if not in_blocks(structures):
        return matrix
    rows, columns = structures
    shape = [rows.blocks, rows.block_size, columns.blocks, columns.block_size]
    return tf.transpose(tf.reshape(matrix, shape), [0, 2, 1, 3])


def from_blocks(blocks: Gradient, structures: Structures) -> Gradient:
    """Inverse of `to_blocks`."""
    if not in_blocks(structures):
        return blocks
    rows, columns = structures
    if isinstance(blocks, RowPairs):
        return RowPairs(rows.joined(blocks.inputs[:, 0]), columns.joined(blocks.outputs[0]))
    shape = [rows.blocks * rows.block_size, columns.blocks * columns.block_size]
    matrix = tf.reshape(tf.transpose(blocks, [0, 2, 1, 3]), shape)
    return matrix[: rows.size, : columns.size]
