"""Gradients of single examples, and second moments of these, from rows of inputs and outputs.

A weight matrix that an example uses at several positions has the gradient `Σ a gᵀ` over these: the
sum comes first, then the square. (George et al. (2018), arXiv:1806.03884, section 3: what is
squared are gradients of examples, not of positions.)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_kfac.math.rows import Starts, aligned
from keras_kfac.math.structure import Structure

# So many numbers of gradients are in memory at a time.
_CHUNK = 2**22


class OneHot(NamedTuple):
    """Rows that are 1 at an index and 0 elsewhere, never written down.

    Attributes:
        indices: Integers in `[0, size)`, `[batch, positions]`.
        size: Length of a row.
    """

    indices: tf.Tensor
    size: int


def example_gradients(inputs: tf.Tensor | OneHot, outputs: tf.Tensor) -> tf.Tensor:
    """`Σ a gᵀ` over the positions of each example.

    Args:
        inputs: Rows `a`, `[..., batch, positions, d_in]`.
        outputs: Rows `g`, `[..., batch, positions, d_out]`. Either can have one position that
            stands for all.

    Returns:
        `[..., batch, d_in, d_out]`.

    Example:
    >>> rows = tf.constant([[[1.0], [2.0]]])
    >>> example_gradients(rows, 10 * rows).numpy().tolist()
    [[[50.0]]]
    """
    if isinstance(inputs, OneHot):
        return _one_hot_gradients(inputs, outputs)
    return tf.matmul(*_paired(inputs, outputs), transpose_a=True)


def _paired(inputs: tf.Tensor, outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows of as many positions: summed up where one stands for all on the other side."""
    inputs = _used(inputs, outputs)
    if inputs.shape[-2] == 1:
        outputs = tf.reduce_sum(outputs, axis=-2, keepdims=True)
    elif outputs.shape[-2] == 1:
        inputs = tf.reduce_sum(inputs, axis=-2, keepdims=True)
    return inputs, outputs


RowPair = tuple[tf.Tensor | OneHot, tf.Tensor]
"""Rows of inputs and of outputs, position by position."""


def of_all_uses(pairs: Sequence[RowPair], starts: Starts = None) -> RowPair:
    """Row pairs of several uses of a matrix as those of one use, at the positions of all.

    Args:
        pairs: Those of each use, all of one kind.
        starts: Where the examples of each are among those of all; see `rows.aligned`.

    Example:
    >>> rows = tf.constant([[[1.0], [2.0]]])
    >>> pair = of_all_uses([(rows, 10 * rows), (rows[:, :1], rows[:, :1])])
    >>> squared_gradients(*pair).numpy().tolist()
    [[2601.0]]
    """
    if len(pairs) == 1:
        return pairs[0]
    one_hot = [inputs for inputs, _ in pairs if isinstance(inputs, OneHot)]
    if one_hot:
        indices = tf.concat(aligned([rows.indices for rows in one_hot], starts, 0), axis=1)
        outputs = tf.concat(aligned([own for _, own in pairs], starts, 0), axis=1)
        return OneHot(indices, one_hot[0].size), outputs
    axis = pairs[0][1].shape.rank - 3
    inputs, outputs = (
        tf.concat(aligned(rows, starts, axis), axis=-2)
        for rows in zip(*(_paired(*pair) for pair in pairs))
    )
    return inputs, outputs


def _one_hot_gradients(inputs: OneHot, outputs: tf.Tensor) -> tf.Tensor:
    batch, width = tf.shape(outputs)[0], outputs.shape[-1]
    places = inputs.indices + inputs.size * tf.range(batch)[:, tf.newaxis]
    rows = tf.reshape(outputs, [-1, width])
    sums = tf.math.unsorted_segment_sum(rows, tf.reshape(places, [-1]), batch * inputs.size)
    return tf.reshape(sums, [batch, inputs.size, width])


def squared_gradients(inputs: tf.Tensor | OneHot, outputs: tf.Tensor) -> tf.Tensor:
    """The sum over examples of the squares of their gradients.

    Args:
        inputs: Rows `[..., batch, positions, d_in]`.
        outputs: Rows `[..., batch, positions, d_out]`.

    Returns:
        `[..., d_in, d_out]`.

    Example:
    >>> rows = tf.constant([[[1.0], [2.0]]])
    >>> squared_gradients(rows, 10 * rows).numpy().tolist()
    [[2500.0]]
    """
    if isinstance(inputs, OneHot):
        return _squared_one_hot_gradients(inputs, outputs)
    if inputs.shape[-2] == 1 and outputs.shape[-2] == 1:
        each = _used(inputs, outputs), outputs
        squares = (tf.square(tf.squeeze(rows, axis=-2)) for rows in each)
        return tf.matmul(*squares, transpose_a=True)

    def of(inputs: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.square(example_gradients(inputs, outputs)), axis=-3)

    return _in_chunks(of, inputs, outputs)


def _squared_one_hot_gradients(inputs: OneHot, outputs: tf.Tensor) -> tf.Tensor:
    """By sums over the positions of an example that have one index, without a row for each."""
    indices = inputs.indices
    is_same = tf.cast(indices[:, :, tf.newaxis] == indices[:, tf.newaxis, :], outputs.dtype)
    # All positions that have an index know its sum: each of them counts for a share.
    squares = tf.square(tf.matmul(is_same, outputs)) / tf.reduce_sum(is_same, -1, keepdims=True)
    rows = tf.reshape(squares, [-1, outputs.shape[-1]])
    return tf.math.unsorted_segment_sum(rows, tf.reshape(indices, [-1]), inputs.size)


def _used(inputs: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Input rows with zeros where the gradients are: 0 * inf of an ignored row must be 0."""
    is_used = tf.reduce_any(outputs != 0, axis=-1, keepdims=True)
    if inputs.shape[-2] == 1:
        is_used = tf.reduce_any(is_used, axis=-2, keepdims=True)
    return tf.where(is_used, inputs, tf.zeros_like(inputs))


def _in_chunks(
    function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], inputs: tf.Tensor, outputs: tf.Tensor
) -> tf.Tensor:
    """Sums what a function makes of some examples at a time: all gradients can be too many."""
    d_in, d_out = inputs.shape[-1], outputs.shape[-1]
    leading, batch = inputs.shape[:-3], inputs.shape[-3]
    size = max(1, _CHUNK // (d_in * d_out * max(1, leading.num_elements())))
    if batch is not None and batch <= size:
        return function(inputs, outputs)
    size = tf.minimum(size, tf.shape(inputs)[-3])
    chunks = -(-tf.shape(inputs)[-3] // size)

    def chunk(rows: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        # What is beyond the last example is gathered as zeros, which add nothing.
        places = index * size + tf.range(size)
        is_there = places < tf.shape(rows)[-3]
        found = tf.gather(rows, tf.where(is_there, places, 0), axis=-3)
        return tf.where(is_there[:, tf.newaxis, tf.newaxis], found, tf.zeros_like(found))

    def add(index: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index + 1, total + function(chunk(inputs, index), chunk(outputs, index))

    start = tf.constant(0), tf.zeros([*leading, d_in, d_out], inputs.dtype)
    _, total = tf.while_loop(lambda index, _: index < chunks, add, start, parallel_iterations=1)
    return total


def rotated(rows: tf.Tensor | OneHot, basis: tf.Tensor, structure: Structure) -> tf.Tensor | OneHot:
    """Rows in an eigenbasis of their factor.

    Args:
        rows: `[..., batch, positions, d]`, one-hot ones only for a diagonal factor.
        basis: Vectors in columns `[..., d, d]`; or the diagonal of the identity; or that of each
            block, `[blocks, b, b]`.
        structure: That of the factor.

    Returns:
        `[..., batch, positions, blocks * b]`.
    """
    if isinstance(rows, OneHot) or structure.is_diagonal or structure.is_isotropic:
        return rows
    if structure.blocks == 1:
        # Of groups, each has a basis for all of its examples.
        return tf.matmul(rows, basis[..., tf.newaxis, :, :] if basis.shape.rank > 2 else basis)
    parts = tf.matmul(structure.parts(tf.reshape(rows, [-1, structure.size])), basis)
    turned = tf.transpose(parts, [1, 0, 2])
    positions = rows.shape[-2] or tf.shape(rows)[-2]
    return tf.reshape(turned, [-1, positions, structure.blocks * structure.block_size])
