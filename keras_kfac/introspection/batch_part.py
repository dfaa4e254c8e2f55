"""The first part of a batch, used in place of the whole where an estimate will do."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_kfac.math.linalg import scalar


class BatchPart(NamedTuple):
    """How many of a batch's examples to use: the first ones.

    Attributes:
        fraction: In (0, 1]: this part of the batch,
        min_rows: but so many rows of the model's outputs at least, one for each example and
            position,
        min_examples: and so many examples; or all there are.
    """

    fraction: float = 1.0
    min_rows: int = 1
    min_examples: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether all examples are used, whatever the batch."""
        return self.fraction == 1

    def examples(self, shape: tf.Tensor) -> tf.Tensor:
        """The number of examples to use, int32, where outputs are rows `[batch, positions...]`."""
        batch, positions = shape[0], tf.maximum(tf.reduce_prod(shape[1:]), 1)
        part = tf.cast(batch, tf.float64) * scalar(self.fraction, tf.float64)
        enough_rows = -(-self.min_rows // positions)
        wanted = tf.maximum(tf.cast(tf.math.ceil(part), tf.int32), enough_rows)
        return tf.minimum(tf.maximum(wanted, self.min_examples), batch)


WHOLE = BatchPart()


def examples_of(part: BatchPart, coefficients: Sequence[tf.Tensor]) -> tf.Tensor:
    """The number of examples to use that is enough for each output.

    Args:
        part: How many of them.
        coefficients: What each position counts, `[batch, ...]` for each output.
    """
    return tf.reduce_max([part.examples(tf.shape(each)) for each in coefficients])


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
