"""Adapters of convolutions: every output pixel is a position (KFC, Grosse & Martens 2016)."""

import math
from collections.abc import Collection

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.math import patches


class ConvAdapter(LayerAdapter):
    """`keras.layers.Conv1D`, `Conv2D` and `Conv3D`; each group of channels is a block."""

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call", "convolution_op")

    @property
    def groups(self) -> int | None:
        """Groups of channels, each a block of its own."""
        return self.layer.groups if self.layer.groups > 1 else None

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        *window, channels = self.layer.kernel.shape
        return math.prod(window), channels // (self.groups or 1)

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows that the kernel multiplies."""
        layer = self.layer
        images = self._channels_last(inputs)
        rows = patches.extract(
            images, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate
        )
        return self._split(rows, images.shape[-1])

    def output_rows(self, gradients: tf.Tensor) -> tf.Tensor:
        """Rows of pre-activation gradients."""
        gradients = self._channels_last(gradients)
        channels = gradients.shape[-1]
        rows = tf.reshape(gradients, [tf.shape(gradients)[0], -1, channels])
        return self._split(rows, channels)

    def _channels_last(self, images: tf.Tensor) -> tf.Tensor:
        if self.layer.data_format == "channels_first":
            rank = images.shape.rank
            return tf.transpose(images, [0, *range(2, rank), 1])
        return images

    def _split(self, rows: tf.Tensor, channels: int) -> tf.Tensor:
        if self.groups is None:
            return rows
        return patches.split_channel_groups(rows, channels, self.groups)


class DepthwiseConvAdapter(ConvAdapter):
    """`keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`: each input channel is a group."""

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @property
    def groups(self) -> int | None:
        """Input channels, each a block of its own."""
        channels = self.layer.kernel.shape[-2]
        return channels if channels > 1 else None

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel of one input channel."""
        *window, _, multiplier = self.layer.kernel.shape
        return math.prod(window), multiplier
