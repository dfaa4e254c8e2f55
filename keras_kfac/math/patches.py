"""Convolution as a matrix product: patches in the order of Keras kernels.

A kernel `[height, width, channels_in, channels_out]` reshaped to `[-1, channels_out]` has rows in
the order (row, column, channel), channels fastest: the order of `tf.image.extract_patches`.
"""

from collections.abc import Sequence

import tensorflow as tf


def patches_2d(
    images: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
) -> tf.Tensor:
    """Patches that a 2-D convolution multiplies with its kernel.

    Args:
        images: `[batch, height, width, channels]`.
        kernel_size: Two positive ints.
        strides: Two positive ints.
        padding: `"same"` or `"valid"`; padded entries are zero.
        dilation: Two positive ints.

    Returns:
        `[batch, positions, height * width * channels]` of the kernel, one position for each
        output pixel, row by row.
    """
    patches = tf.image.extract_patches(
        images,
        sizes=[1, *kernel_size, 1],
        strides=[1, *strides, 1],
        rates=[1, *dilation, 1],
        padding=padding.upper(),
    )
    width = kernel_size[0] * kernel_size[1] * images.shape[-1]
    return tf.reshape(patches, [tf.shape(images)[0], -1, width])


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
