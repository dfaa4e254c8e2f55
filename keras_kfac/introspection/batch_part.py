"""The first part of a batch, used in place of the whole where an estimate will do."""

from typing import NamedTuple

import tensorflow as tf

from keras_kfac.math.linalg import scalar


class BatchPart(NamedTuple):
    """How many of a batch's examples to use: the first ones.

    Attributes:
        fraction: In (0, 1]: this part of the batch,
        min_examples: but so many examples at least, or all there are.
    """

    fraction: float = 1.0
    min_examples: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether all examples are used, whatever the batch."""
        return self.fraction == 1

    def examples(self, batch: tf.Tensor) -> tf.Tensor:
        """The number of examples to use of a batch of the given size, int32."""
        wanted = tf.math.ceil(tf.cast(batch, tf.float64) * scalar(self.fraction, tf.float64))
        wanted = tf.maximum(tf.cast(wanted, tf.int32), self.min_examples)
        return tf.minimum(wanted, batch)


WHOLE = BatchPart()


def whole_over_part(coefficients: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    """What a sum over the first examples is to be multiplied by to stand for the whole batch.

    Args:
        coefficients: What each position of the outputs counts in the loss, `[batch, ...]`.
        examples: The number of examples in use.

    Returns:
        Scalar in the dtype of the coefficients; 0 if those of the part are all 0.
    """
    part = tf.reduce_sum(coefficients[:examples])
    return tf.math.divide_no_nan(tf.reduce_sum(coefficients), part)
