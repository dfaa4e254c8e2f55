"""A part of a batch, drawn at random, in place of the whole where an estimate will do."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_kfac.math.linalg import scalar


class BatchPart(NamedTuple):
    """How many of a batch's examples to use.

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


def places_of(part: BatchPart, coefficients: Sequence[tf.Tensor], seed: tf.Tensor) -> tf.Tensor:
    """The examples to use, so many that they are enough for each output: int32 `[used]`.

    At random, for batches can be in some order: by class, or one task after another. Of those that
    count in some output, as long as there are any.

    Args:
        part: How many of them.
        coefficients: What each position counts, `[batch, ...]` for each output.
        seed: Stateless seed, int32 `[2]`.
    """
    count = tf.reduce_max([part.examples(tf.shape(each)) for each in coefficients])
    # A shuffle that XLA can compile.
    numbers = tf.random.stateless_uniform(tf.shape(coefficients[0])[:1], seed)
    numbers = tf.where(_count_somewhere(coefficients), numbers, numbers + 1)
    return tf.argsort(numbers)[:count]


def parts_for_whole(coefficients: Sequence[tf.Tensor], places: tf.Tensor) -> list[tf.Tensor]:
    """What counts in each output, such that the examples in use stand for the whole batch.

    On average over draws also where these can miss all that count in an output: that happens with
    a known probability `p`, and what there is otherwise stands for `1 / (1 - p)` as much.

    Args:
        coefficients: What each position counts in the loss, `[batch, ...]` for each output.
        places: The examples in use, from `places_of`.

    Returns:
        The coefficients, scaled.
    """
    number = tf.math.count_nonzero(_count_somewhere(coefficients))
    scaled = []
    for each in coefficients:
        scale = whole_over_part(each, places)
        if len(coefficients) > 1:
            own = tf.math.count_nonzero(_count_somewhere([each]))
            missed = chance_of_none(number, own, tf.size(places))
            scale = tf.math.divide_no_nan(scale, tf.cast(1 - missed, scale.dtype))
        scaled.append(each * scale)
    return scaled


def chance_of_none(number: tf.Tensor, special: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
    """The probability that none of the special ones is drawn, without repetition; float64 scalar.

    Args:
        number: Of all.
        special: Of those that are special.
        drawn: Of those that are drawn.

    Example:
    >>> round(float(chance_of_none(4, 2, 1)), 12), float(chance_of_none(4, 2, 3))
    (0.5, 0.0)
    """
    number, special, drawn = (scalar(count, tf.float64) for count in (number, special, drawn))
    others = number - special

    def ways(of: tf.Tensor) -> tf.Tensor:
        """The logarithm of the number of draws, but for a constant."""
        return tf.math.lgamma(of + 1) - tf.math.lgamma(tf.maximum(of - drawn, 0) + 1)

    return tf.where(others >= drawn, tf.exp(ways(others) - ways(number)), 0)


def whole_over_part(coefficients: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """What a sum over some examples is to be multiplied by to stand for the whole batch.

    Args:
        coefficients: What each position of the outputs counts in the loss, `[batch, ...]`.
        places: The examples in use.

    Returns:
        Scalar in the dtype of the coefficients; 0 if those of the part are all 0.
    """
    part = tf.reduce_sum(tf.gather(coefficients, places))
    return tf.math.divide_no_nan(tf.reduce_sum(coefficients), part)


def _count_somewhere(coefficients: Sequence[tf.Tensor]) -> tf.Tensor:
    """Which examples count in some output: booleans `[batch]`."""
    each = [tf.reduce_any(c > 0, axis=list(range(1, c.shape.rank))) for c in coefficients]
    return tf.reduce_any(each, axis=0)
