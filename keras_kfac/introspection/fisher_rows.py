"""The rows that the Fisher matrix of a batch is made of: `F = Rᵀ R`."""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.introspection.backward_passes import (
    BackwardPasses,
    Fisher,
    backward_passes,
    fold,
)
from keras_kfac.introspection.batch_part import WHOLE
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.per_example import ExactAdapter
from keras_kfac.introspection.scored_pass import ScoredPass


def fisher_rows(
    passes: Sequence[ForwardPass],
    adapters: Sequence[ExactAdapter],
    fisher: Fisher,
    samples: int,
    seed: tf.Tensor,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    """Gradients of single examples, of the whole batch.

    Args:
        passes: Forward passes that make up the loss of the step, with its terms.
        adapters: Whose weights to differentiate by.
        fisher: Which Fisher matrix.
        samples: How many targets to draw for each example.
        seed: Stateless seed, int32 `[2]`, of draws and random signs. With that of
            `statistics.collect` draws are the same.
        dtype: Of the rows.

    Returns:
        `[rows, weights]` by `id` of the adapter: for each pass and example a row, or several: one
        for each output at each position (exact), or for each draw. One row of zeros if no pass
        calls a layer.

    Raises:
        ValueError: For a Fisher matrix without gradients of single examples, or one that is not
            known in closed form and has to be.
    """
    found: dict[int, list[tf.Tensor]] = {id(adapter): [] for adapter in adapters}
    for index, forward_pass in enumerate(passes):
        own_seed = fold(seed, index)
        called = [adapter for adapter in adapters if adapter.calls(forward_pass)]
        if not called:
            continue
        item = ScoredPass.of(forward_pass, called, WHOLE, own_seed, dtype)
        root = tf.sqrt(tf.cast(item.unit, dtype))
        for backward in backward_passes(item, fisher, samples, own_seed):
            for adapter, rows in zip(called, _rows(item, called, backward, dtype)):
                found[id(adapter)].append(root * rows)
    none = {id(adapter): tf.zeros([1, adapter.dims[1]], dtype) for adapter in adapters}
    return {key: tf.concat(rows or [none[key]], axis=0) for key, rows in found.items()}


def _rows(
    item: ScoredPass,
    adapters: Sequence[ExactAdapter],
    backward: BackwardPasses,
    dtype: tf.DType,
) -> list[tf.Tensor]:
    """Those of some passes backwards, for each adapter."""

    def of_pass(index: tf.Tensor) -> list[tf.Tensor]:
        each = item.arrived(adapters, *backward.start(index), dtype)
        return [
            _flat(tf.add_n([adapter.output_rows(g, *seen) for g, seen in calls]), adapter)
            for adapter, calls in zip(adapters, each)
        ]

    if backward.number is None:
        return of_pass(tf.constant(0))
    stacked = tf.map_fn(
        of_pass,
        tf.range(backward.number),
        fn_output_signature=[dtype] * len(adapters),
        parallel_iterations=1,
    )
    return [_flat(rows, adapter) for rows, adapter in zip(stacked, adapters)]


def _flat(rows: tf.Tensor, adapter: ExactAdapter) -> tf.Tensor:
    return tf.reshape(rows, [-1, adapter.dims[1]])
