"""Tensors as rows `[batch, positions, features]`, and which of these count."""

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.math import factors
from keras_kfac.math.structure import Structure

Starts = Sequence[tf.Tensor] | None
"""Where each of several tensors starts on an axis of all; `None` if they have it in common."""


def masked_moment(
    rows: tf.Tensor,
    example_weights: tf.Tensor | None,
    masks: Sequence[tf.Tensor],
    structure: Structure,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`factors.input_moment` of the positions that count.

    Args:
        rows: `[..., batch, positions, d]`.
        example_weights: `[batch]`, or of rows `[batch, positions]`, or `None`.
        masks: None, or one `[batch, steps]`. Steps may consist of several positions each.
        structure: What to compute of the matrix.
    """
    return factors.input_moment(rows, masked_weights(rows, example_weights, masks), structure)


def masked_weights(
    rows: tf.Tensor, example_weights: tf.Tensor | None, masks: Sequence[tf.Tensor]
) -> tf.Tensor | None:
    """Weights of rows `[batch, positions, d]`, of examples if there is no mask."""
    # A single row may stand for all positions.
    weights = of_examples(example_weights) if rows.shape[-2] == 1 else example_weights
    for mask in masks:
        weights = factors.row_weights(weights, stretched(mask, rows))
    return weights


def of_examples(weights: tf.Tensor | None) -> tf.Tensor | None:
    """Weights of examples `[batch]`, from those of their positions `[batch, positions]`, if so."""
    if weights is None or weights.shape.rank == 1:
        return weights
    return tf.reduce_mean(weights, axis=1)


def stretched(mask: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """A mask for examples, for steps of several positions each, or for all positions.

    Where it has more entries than there are positions, behind a layer that pools steps and hands
    its mask on, a position counts if any of its steps does.

    Args:
        mask: `[batch]`, `[batch, steps]`, or more axes of positions.
        rows: `[..., batch, positions, d]`.

    Returns:
        `[batch, positions]`.

    Example:
    >>> stretched(tf.constant([[1, 0]]), tf.zeros([1, 4, 3])).numpy().tolist()
    [[1, 1, 0, 0]]
    >>> stretched(tf.constant([[0, 1, 0, 0]]), tf.zeros([1, 2, 3])).numpy().tolist()
    [[1, 0]]
    """
    flat = tf.reshape(mask, [tf.shape(mask)[0], -1])
    steps, positions = flat.shape[1], rows.shape[-2]
    if steps and positions and positions % steps == 0:
        return tf.repeat(flat, positions // steps, axis=1)
    # The steps of a position are from one share of them to the next.
    steps, positions = (tf.cast(n, tf.int64) for n in (tf.shape(flat)[1], tf.shape(rows)[-2]))
    places = tf.range(positions)
    first, last = places * steps // positions, -(-(places + 1) * steps // positions)
    numbers = tf.cumsum(tf.cast(tf.cast(flat, tf.bool), tf.float32), axis=1)
    before = tf.pad(numbers, [[0, 0], [1, 0]])
    counts = tf.gather(before, last, axis=1) > tf.gather(before, first, axis=1)
    return tf.cast(counts, mask.dtype)


def energy_shares(rows: tf.Tensor, whole: tf.Tensor) -> tf.Tensor:
    """The squared length of each row as a share of another's; 0 where that has none, at most 1.

    Args:
        rows: `[..., d]`.
        whole: Likewise.

    Returns:
        `[...]`, in [0, 1].

    Example:
    >>> energy_shares(tf.constant([[3.0, 0.0]]), tf.constant([[0.0, 6.0]])).numpy().tolist()
    [0.25]
    """
    unit = tf.reduce_max(tf.abs(whole), axis=-1, keepdims=True)  # Squares can be too small.
    parts = (tf.math.divide_no_nan(tensor, unit) for tensor in (rows, whole))
    part, total = (tf.reduce_sum(tf.square(tensor), axis=-1) for tensor in parts)
    return tf.minimum(tf.math.divide_no_nan(part, total), 1)


def rows_of_positions(tensor: tf.Tensor) -> tf.Tensor:
    """`[batch, ..., features]` to `[batch, positions, features]`."""
    if tensor.shape.rank == 2:
        return tensor[:, tf.newaxis, :]
    positions = -1 if None in tensor.shape[1:-1] else math.prod(tensor.shape[1:-1])
    return tf.reshape(tensor, [tf.shape(tensor)[0], positions, tensor.shape[-1]])


def aligned(tensors: Sequence[tf.Tensor], starts: Starts, axis: int) -> list[tf.Tensor]:
    """Tensors with zeros before and behind them, so that an axis is the same for all.

    Args:
        tensors: What starts at one place belongs together: entry by entry.
        starts: Where each begins, int32 scalars.
        axis: The axis, in `[0, rank)`.

    Example:
    >>> first, second = aligned([tf.ones([2]), tf.ones([1])], [0, 2], axis=0)
    >>> first.numpy().tolist(), second.numpy().tolist()
    ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    """
    if starts is None:
        return list(tensors)
    ends = [start + tf.shape(tensor)[axis] for start, tensor in zip(starts, tensors)]
    end = tf.reduce_max(ends)
    padded = []
    for tensor, start, own_end in zip(tensors, starts, ends):
        around = [[0, 0]] * tensor.shape.rank
        around[axis] = [start, end - own_end]
        result = tf.pad(tensor, around)
        # What is known of the other axes gets lost.
        result.set_shape([*tensor.shape[:axis], None, *tensor.shape[axis + 1 :]])
        padded.append(result)
    return padded
