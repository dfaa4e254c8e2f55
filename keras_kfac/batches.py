"""Batches that grow while training goes on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

BatchSize = Callable[[tf.Tensor], Any]


def growing_batches(data: Any, batch_size: BatchSize, seed: int | None = 0) -> tf.data.Dataset:
    """An endless stream of batches of arrays, whose size is a function of the step.

    The noise of a gradient sets how far training can go; larger batches late in training take it
    further without a decaying learning rate. `fit` fixes the size of the batches that it makes
    itself, and a callback can't change it.

    Args:
        data: Array or nested structure of arrays `[examples, ...]`: `(x, y)` or
            `(x, y, sample_weight)` for `fit`.
        batch_size: Function of the step (int64 scalar tensor, counted from 0) to the number of
            examples of its batch; any number, rounded down and kept between 1 and all
            examples. It is traced by TensorFlow; a `LearningRateSchedule` serves.
        seed: Of the order of the examples, which is another one in each pass through them. `None`
            keeps the order of the data. A batch may begin in one pass and end in the next.

    Returns:
        A dataset without end: give `fit` its `steps_per_epoch`. The step is not traced again for a
        new size, but `jit_compile` compiles for each.

    Raises:
        ValueError: If the arrays differ in their number of examples, have none, or `batch_size` is
            no function.

    Example:
    >>> x = np.arange(10)
    >>> stream = growing_batches((x, 2 * x), lambda step: 2 + step, seed=None)
    >>> [batch.numpy().tolist() for batch, _ in stream.take(3)]
    [[0, 1], [2, 3, 4], [5, 6, 7, 8]]

    Source: Martens & Grosse (2015), arXiv:1503.05671, section 13: exponentially growing batches, as
    `keras.optimizers.schedules.ExponentialDecay(1000, 500, decay_rate=4.5)` gives them.
    """
    if not callable(batch_size):
        raise ValueError(
            "`batch_size` must be a function of the step, and several arrays one tuple: "
            "`growing_batches((x, y), batch_size)`. "
            f"Received: batch_size of type {type(batch_size).__name__!r}"
        )
    arrays = tf.nest.map_structure(np.asarray, data)
    sizes = {len(array) if array.ndim else 0 for array in tf.nest.flatten(arrays)}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "All arrays must have the same number of examples, at least one. Received: "
            f"{sorted(sizes)} examples"
        )
    (examples,) = sizes
    tensors = tf.nest.map_structure(tf.convert_to_tensor, arrays)

    def order(number: tf.Tensor) -> tf.Tensor:
        """The rows in the order of a pass through the data."""
        rows = tf.range(examples)
        if seed is None:
            return rows
        key = tf.stack([tf.constant(seed, tf.int64), number])
        return tf.random.experimental.stateless_shuffle(rows, key)

    def next_rows(state: Sequence[tf.Tensor], step: tf.Tensor) -> Any:
        number, start, rows = state
        stop = start + tf.clip_by_value(tf.cast(batch_size(step), tf.int32), 1, examples)

        def within() -> Any:
            return (number, stop, rows), rows[start:stop]

        def beyond() -> Any:
            following = order(number + 1)
            first = following[: stop - examples]
            return (number + 1, stop - examples, following), tf.concat([rows[start:], first], 0)

        return tf.cond(stop <= examples, within, beyond)

    first_pass = tf.constant(0, tf.int64)
    return (
        tf.data.Dataset.counter()
        .scan((first_pass, tf.constant(0), order(first_pass)), next_rows)
        .map(lambda rows: tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), tensors))
        .prefetch(tf.data.AUTOTUNE)
    )
