"""Kronecker factors of a step's forward passes, under each kind of Fisher matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.backward_passes import (
    BackwardPasses,
    Fisher,
    backward_passes,
    fold,
)
from keras_kfac.introspection.batch_part import WHOLE, BatchPart
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.lost_masks import without_lost_masks
from keras_kfac.introspection.row_weights import row_weights
from keras_kfac.introspection.scored_pass import Placed, ScoredPass
from keras_kfac.math.inverses import identity

# The sampled Fisher matrix is an estimate in any case, averaged over many batches later on. In the
# first steps it is not, and less will not do: see docs/step-control.md.
SAMPLED_PART = BatchPart(0.5, min_rows=128, min_examples=8)

# Folded into the seed of a pass. Draws of targets come first.
_PART, _PROBE, _MASK = 2**20, 2**20 + 1, 2**20 + 2


class LayerStatistics(NamedTuple):
    """Kronecker factors of one layer on one batch.

    Attributes:
        input_factor: A mean over rows.
        output_factor: A sum over rows, of gradients of a loss that is a mean over examples.
    """

    input_factor: tf.Tensor
    output_factor: tf.Tensor


class BatchWeights(NamedTuple):
    """What a batch counts beside others, in averages of their factors.

    Attributes:
        inputs: Of input factors: what the rows count.
        outputs: Of output factors: the number of examples.
    """

    inputs: tf.Tensor
    outputs: tf.Tensor


class BatchStatistics(NamedTuple):
    """Factors of all layers that took part, and their weights, by `id` of the adapter."""

    layers: dict[int, LayerStatistics]
    weights: dict[int, BatchWeights]


def collect(
    passes: Sequence[ForwardPass],
    adapters: Sequence[LayerAdapter],
    fisher: Fisher,
    seed: tf.Tensor,
    dtype: tf.DType,
    samples: int = 1,
) -> BatchStatistics:
    """Computes the Kronecker factors of all adapted layers.

    Several forward passes, and several calls of a layer in one, are terms of one sum: the loss
    adds them up, so do the output factors; the input factors average over all rows. Exact blocks
    have the products between the calls of an example, too.

    Args:
        passes: Forward passes that make up the loss of the step, with its terms.
        adapters: Layers to cover; those that no pass called are left out of the result.
        fisher: Which Fisher matrix.
        seed: Stateless seed, int32 `[2]`, of draws and random signs.
        dtype: Of the factors.
        samples: How many targets to draw for each example.
    """
    uses = [u for a in adapters for u in a.uses if any(u.calls(p) for p in passes)]
    part = SAMPLED_PART if fisher in (Fisher.SAMPLED, Fisher.PROPAGATED) else WHOLE
    output_factors = {id(u): tf.zeros((), dtype) for u in uses}
    weighted = []
    for index, forward_pass in enumerate(passes):
        pass_seed = fold(seed, index)
        forward_pass = without_lost_masks(forward_pass, uses, fold(pass_seed, _MASK))
        item = ScoredPass.of(forward_pass, uses, part, fold(pass_seed, _PART), dtype)
        called = [u for u in uses if u.calls(forward_pass)]
        counting = [u for u in called if u.averages_inputs]
        weighted.append((item, row_weights(item, counting, fold(pass_seed, _PROBE), dtype)))
        parts = _output_factors(item, called, fisher, samples, pass_seed, dtype)
        for key, factor in parts.items():
            output_factors[key] += factor
    inputs = {id(u): _input_factor(u, weighted, dtype) for u in uses}
    examples = sum(tf.cast(item.batch, dtype) for item, _ in weighted)
    result = BatchStatistics({}, {})
    for adapter in adapters:
        own = [u for u in adapter.uses if id(u) in inputs]
        if own:
            pairs = [(u, (inputs[id(u)][0], output_factors[id(u)])) for u in own]
            counted = tf.add_n([inputs[id(u)][1] for u in own])
            result.layers[id(adapter)] = LayerStatistics(*adapter.joined(pairs))
            result.weights[id(adapter)] = BatchWeights(counted, examples)
    return result


def _input_factor(
    adapter: LayerAdapter, weighted: Sequence[tuple[ScoredPass, Placed]], dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor]:
    """The input factor, and its weight beside those of other batches."""
    total, weight, batches = (tf.zeros((), dtype) for _ in range(3))
    for item, of_rows in weighted:
        # So that weights of 1 count as none do, whatever the reduction.
        batches += tf.cast(item.batch, dtype) if item.is_weighted else item.total
        for place, call in adapter.calls(item.forward_pass).items():
            inputs = tf.nest.map_structure(item.used, call.inputs)
            scale = item.scale_of(tf.nest.flatten(call.inputs)[0])
            weights = of_rows.get(id(adapter), {}).get(place)
            # What takes a part of the batch takes a part of the positions, too.
            part = adapter if item.places is None else adapter.thinned(inputs)
            observed = item.observed[id(adapter)][place]
            moment, moment_weight = part.input_moment(inputs, weights, dtype, *observed)
            total, weight = total + scale * moment, weight + scale * moment_weight
    return tf.math.divide_no_nan(total, weight), batches * weight


def _output_factors(
    item: ScoredPass,
    adapters: Sequence[LayerAdapter],
    fisher: Fisher,
    samples: int,
    seed: tf.Tensor,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    """Sums of the outer products of what arrives at each layer."""
    if fisher is Fisher.FORWARD_ONLY:
        return _forward_only(item, adapters, dtype)
    totals = {id(a): tf.zeros((), dtype) for a in adapters}
    for backward in backward_passes(item, fisher, samples, seed):
        for adapter, own in zip(adapters, _of_passes(item, adapters, backward, dtype)):
            totals[id(adapter)] += own
    unit = tf.cast(item.unit, dtype)
    return {key: total * unit for key, total in totals.items()}


def _of_passes(
    item: ScoredPass,
    adapters: Sequence[LayerAdapter],
    backward: BackwardPasses,
    dtype: tf.DType,
) -> Sequence[tf.Tensor]:
    """The sums over some passes backwards, for each adapter."""
    starts = [item.starts(adapter) for adapter in adapters]

    def of_pass(index: tf.Tensor) -> list[tf.Tensor]:
        each = item.arrived(adapters, *backward.start(index), dtype)
        return [
            adapter.output_factor_of_calls(calls, own)
            for adapter, calls, own in zip(adapters, each, starts)
        ]

    def add_pass(index: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return index + 1, *(total + own for total, own in zip(sums, of_pass(index)))

    if backward.number is None:
        return of_pass(tf.constant(0))
    _, *sums = tf.while_loop(
        lambda index, *_: index < backward.number,
        add_pass,
        (tf.constant(0), *(tf.zeros(a.factor_shapes[1], dtype) for a in adapters)),
        parallel_iterations=1,
    )
    return sums


def _forward_only(
    item: ScoredPass, adapters: Sequence[LayerAdapter], dtype: tf.DType
) -> dict[int, tf.Tensor]:
    """The identity, times the weight between loss and negative log-likelihood of the terms.

    Those that depend on a layer.

    Source: Benzing (2022), arXiv:2201.12250, "Gradient descent on neurons and its link to
    approximate second-order optimization" (FOOF).
    """
    scales = {id(a): tf.zeros((), dtype) for a in adapters}
    for term, coefficients in item.terms:
        own = term.likelihood_weight() * tf.cast(tf.reduce_sum(coefficients), dtype)
        reached = item.forward_pass.layers_behind(term.outputs)
        for adapter in adapters:
            if any(id(layer) in reached for layer in adapter.layers):
                scales[id(adapter)] += own
    return {id(a): scales[id(a)] * identity(a.factor_shapes[1], dtype) for a in adapters}
