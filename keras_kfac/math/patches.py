"""Convolution as a matrix product: patches in the order of Keras kernels.

A kernel `[*window, channels_in, channels_out]` reshaped to `[-1, channels_out]` has rows in
the order of the window, then the channel, channels fastest: so have patches.
"""

import itertools
import math
from collections.abc import Sequence

import tensorflow as tf


def extract(
    images: tf.Tensor,
    window: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    skip: int = 1,
) -> tf.Tensor:
    """Patches that a convolution in any number of dimensions multiplies with its kernel.

    Args:
        images: `[batch, *sizes, channels]`.
        window: A positive int for each of the sizes, like the next two.
        strides: Steps from one patch to the next.
        padding: `"same"`, `"valid"` or `"causal"` (no entry later than the output in any
            dimension); padded entries are zero.
        dilation: Steps from one entry of a patch to the next.
        skip: Takes the first of as many patches in each dimension.

    Returns:
        `[batch, positions, window * channels]`, one position for each output pixel, the last
        dimension fastest.

    Example:
    >>> signal = tf.reshape(tf.range(4.0), [1, 4, 1])
    >>> extract(signal, [2], [1], "causal", [1])[0].numpy().tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    >>> extract(signal, [2], [1], "causal", [1], skip=2)[0].numpy().tolist()
    [[0.0, 0.0], [1.0, 2.0]]
    """
    width = math.prod(window) * images.shape[-1]
    batch = tf.shape(images)[0]
    if padding == "causal" or skip > 1 or len(window) > 2:
        pads = _pads(images, window, strides, padding, dilation)
        images = tf.pad(images, [[0, 0], *pads, [0, 0]])
        padding, strides = "valid", [skip * step for step in strides]
    if len(window) > 2:
        patches = _by_slices(images, window, strides, dilation)
        return tf.reshape(patches, [batch, -1, width])
    if len(window) == 1:
        images = images[:, tf.newaxis]
    one = [1] * (2 - len(window))
    patches = tf.image.extract_patches(
        images,
        sizes=[1, *one, *window, 1],
        strides=[1, *one, *strides, 1],
        rates=[1, *one, *dilation, 1],
        padding=padding.upper(),
    )
    return tf.reshape(patches, [batch, -1, width])


def cell_means(rows: tf.Tensor, sizes: Sequence[int], skip: int) -> tf.Tensor:
    """Means of values of pixels over cells, of which `extract` takes the first patch of each.

    Args:
        rows: `[batch, positions]`, one position for each pixel, the last dimension fastest.
        sizes: Of the image, in pixels.
        skip: As for `extract`: of the cells.

    Returns:
        `[batch, cells]`; over what a cell at the border has of pixels.

    Example:
    >>> cell_means(tf.constant([[0.0, 2.0, 0.0, 6.0, 1.0]]), [5], 2).numpy().tolist()
    [[1.0, 3.0, 1.0]]
    """
    counts = [-(-size // skip) for size in sizes]
    cells = [number for count in counts for number in (count, skip)]

    def sums(values: tf.Tensor) -> tf.Tensor:
        grid = tf.reshape(values, [-1, *sizes])
        whole = tf.pad(grid, [[0, 0], *([0, -size % skip] for size in sizes)])
        parts = tf.reshape(whole, [-1, *cells])
        total = tf.reduce_sum(parts, axis=[2 * (i + 1) for i in range(len(sizes))])
        return tf.reshape(total, [-1, math.prod(counts)])

    return sums(rows) / sums(tf.ones([1, math.prod(sizes)], rows.dtype))


def _pads(
    images: tf.Tensor,
    window: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
) -> list[list[tf.Tensor | int]]:
    """Zeros before and after each dimension, with which `"valid"` gives the same patches."""
    reach = [(size - 1) * step for size, step in zip(window, dilation)]
    if padding == "valid":
        return [[0, 0] for _ in reach]
    if padding == "causal":
        return [[size, 0] for size in reach]
    pads: list[list[tf.Tensor | int]] = []
    for axis, (span, step) in enumerate(zip(reach, strides), start=1):
        size = images.shape[axis] or tf.shape(images)[axis]
        last = (size - 1) // step * step  # Where the last patch begins.
        missing = last + span + 1 - size
        missing = max(missing, 0) if isinstance(missing, int) else tf.maximum(missing, 0)
        pads.append([missing // 2, missing - missing // 2])
    return pads


def _by_slices(
    images: tf.Tensor, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> tf.Tensor:
    """`[batch, *places, window * channels]`: a slice of the images for each entry of the window.

    TensorFlow's own op for three dimensions knows no dilation.
    """
    reach = [(size - 1) * step for size, step in zip(window, dilation)]
    ends = [tf.shape(images)[axis] - size for axis, size in enumerate(reach, start=1)]
    slices = []
    for entry in itertools.product(*map(range, window)):
        starts = [index * step for index, step in zip(entry, dilation)]
        place = [slice(s, s + end, step) for s, end, step in zip(starts, ends, strides)]
        slices.append(images[:, *place])
    return tf.concat(slices, axis=-1)


def split_channel_groups(rows: tf.Tensor, channels: int, groups: int) -> tf.Tensor:
    """Separates rows whose fastest index is the channel into groups of adjacent channels.

    Args:
        rows: `[batch, positions, taps * channels]`.
        channels: Number of channels, a multiple of `groups`.
        groups: Number of groups.

    Returns:
        `[groups, batch, positions, taps * channels / groups]`.
    """
    shape = tf.shape(rows)
    taps = rows.shape[-1] // channels
    per_group = channels // groups
    split = tf.reshape(rows, [shape[0], shape[1], taps, groups, per_group])
    split = tf.transpose(split, [3, 0, 1, 2, 4])
    return tf.reshape(split, [groups, shape[0], shape[1], taps * per_group])
