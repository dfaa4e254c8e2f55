"""Adapters of convolutions: every output pixel is a position (KFC, Grosse & Martens 2016)."""

import copy
import math
from collections.abc import Collection
from typing import Any

import tensorflow as tf

from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.math import patches

# An estimate of the input factor takes some of the pixels, at least so many of an image.
MIN_POSITIONS = 64


class ConvAdapter(AffineAdapter):
    """`keras.layers.Conv1D`, `Conv2D` and `Conv3D`; each group of channels is a block."""

    _skip = 1  # Of as many patches in each dimension the first counts.

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
        *window, channels = self._kernel.shape
        return math.prod(window), channels // (self.groups or 1)

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows that the kernel multiplies."""
        images = self._channels_last(inputs)
        return self._split(self._patches(images), images.shape[-1])

    def thinned(self, inputs: tf.Tensor) -> "ConvAdapter":
        """The same for some of the pixels, evenly spaced: neighbours see nearly the same."""
        sizes = self._sizes(inputs)
        if self.reduces or None in sizes:
            return self
        spare = (math.prod(sizes) / MIN_POSITIONS) ** (1 / len(sizes))
        if spare < 2:
            return self
        other = copy.copy(self)
        other._skip = 2 ** int(math.log2(spare))
        return other

    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The second moment of the input rows, and its weight."""
        if self._skip > 1 and example_weights is not None and example_weights.shape.rank == 2:
            # Of each pixel that is taken, the mean weight of those that it stands for.
            example_weights = patches.cell_means(example_weights, self._sizes(inputs), self._skip)
        return super().input_moment(inputs, example_weights, dtype, *observed)

    def _sizes(self, inputs: tf.Tensor) -> tuple[Any, ...]:
        """Of the image of output pixels."""
        axes = slice(2, None) if self.layer.data_format == "channels_first" else slice(1, -1)
        return self.layer.compute_output_shape(inputs.shape)[axes]

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of pre-activation gradients."""
        rows = self._pixels(gradients)
        return self._split(rows, rows.shape[-1])

    def _patches(self, images: tf.Tensor) -> tf.Tensor:
        layer = self.layer
        return patches.extract(
            images, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate, self._skip
        )

    def _pixels(self, images: tf.Tensor) -> tf.Tensor:
        """`[batch, positions, channels]`."""
        images = self._channels_last(images)
        return tf.reshape(images, [tf.shape(images)[0], -1, images.shape[-1]])

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
        channels = self._kernel.shape[-2]
        return channels if channels > 1 else None

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel of one input channel."""
        *window, _, multiplier = self._kernel.shape
        return math.prod(window), multiplier


class _Part(ConvAdapter):
    """A part of a layer that is not one convolution."""

    @classmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods relied on."""
        return ("call",)

    @property
    def groups(self) -> int | None:
        """One block."""
        return None


class TransposedKernelAdapter(_Part):
    """The kernel of `keras.layers.Conv1DTranspose`, `Conv2DTranspose` or `Conv3DTranspose`.

    A transposed convolution multiplies each input pixel by the kernel and adds up what falls on the
    same output pixel. So input pixels are the positions, and the "output" of each is the window
    that it contributes to: the patches of the output gradient.
    """

    bias_name, part = None, "kernel"  # The bias belongs to output pixels.

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        *window, channels = self._kernel.shape
        return channels, math.prod(window)

    def thinned(self, inputs: tf.Tensor) -> ConvAdapter:
        """The same: all pixels count, for none is seen twice."""
        return self

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows that the kernel multiplies."""
        return self._pixels(inputs)

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of the gradients of what each input pixel contributes."""
        return self._patches(self._channels_last(gradients))

    def kernel_matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """A tensor shaped as the kernel as `kernel_dims`."""
        return tf.transpose(tf.reshape(kernel, self.kernel_dims[::-1]))

    def kernel_tensor(self, matrix: tf.Tensor) -> tf.Tensor:
        """Inverse of `kernel_matrix`."""
        return tf.reshape(tf.transpose(matrix), self._kernel.shape)


class ConvBiasAdapter(_Part):
    """The bias of a convolution whose kernel has a block of its own."""

    kernel_name, part = None, "bias"

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """No rows; a column for each channel."""
        return 0, self.layer.bias.shape[0]

    def thinned(self, inputs: tf.Tensor) -> ConvAdapter:
        """The same: there is one row."""
        return self

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """No rows: see `input_rows` of the base class."""
        raise NotImplementedError


class DepthwisePartAdapter(DepthwiseConvAdapter):
    """The first kernel of `keras.layers.SeparableConv1D` or `SeparableConv2D`."""

    kernel_name, bias_name = "depthwise_kernel", None
    part = "depthwise_kernel"

    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of gradients, propagated back through the second kernel."""
        gradients = self._pixels(gradients)
        width, filters = self.layer.pointwise_kernel.shape[-2:]
        pointwise = tf.reshape(self.layer.pointwise_kernel.value, [width, filters])
        rows = tf.matmul(gradients, tf.cast(pointwise, gradients.dtype), transpose_b=True)
        return self._split(rows, width)


class PointwisePartAdapter(_Part):
    """The second kernel of `keras.layers.SeparableConv1D` or `SeparableConv2D`, and the bias."""

    kernel_name = part = "pointwise_kernel"

    @property
    def kernel_dims(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        rows, columns = self._kernel.shape[-2:]
        return rows, columns

    def kernel_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """What the first kernel makes of the inputs."""
        first = DepthwisePartAdapter(self.layer, lambda variable: True)
        first._skip = self._skip
        rows = first.kernel_rows(inputs)
        matrix = first.kernel_matrix(tf.cast(self.layer.depthwise_kernel.value, inputs.dtype))
        if first.groups is None:
            return tf.matmul(rows, matrix)
        # [channels, batch, positions, multiplier], to have the multiplier fastest.
        rows = tf.transpose(tf.matmul(rows, matrix[:, tf.newaxis]), [1, 2, 0, 3])
        return tf.reshape(rows, [*tf.unstack(tf.shape(rows)[:2]), self.kernel_dims[0]])
