"""Kronecker factors of a step's forward passes, under each kind of Fisher matrix."""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.batch_part import WHOLE, BatchPart
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import Term
from keras_kfac.introspection.scored_pass import Placed, ScoredPass
from keras_kfac.math.inverses import identity
from keras_kfac.math.linalg import scalar, with_rank


class Fisher(enum.StrEnum):
    """Which Fisher matrix the factors estimate."""

    SAMPLED = "sampled"
    """The true Fisher, from targets sampled from the model."""

    EXACT = "exact"
    """The true Fisher without sampling noise: one backward pass per output."""

    PROPAGATED = "curvature_propagation"
    """The true Fisher, from random signs for the columns of a root of that of the outputs."""

    EMPIRICAL = "empirical"
    """Outer products of the gradients of the training loss. A different matrix."""

    FORWARD_ONLY = "forward_only"
    """No backward pass: output factors are the identity, scaled as the Fisher of the outputs."""


# The sampled Fisher matrix is an estimate in any case, averaged over many batches later on. In the
# first steps it is not, and less will not do: see docs/step-control.md.
SAMPLED_PART = BatchPart(0.5, min_rows=128, min_examples=8)

# Folded into the seed of a pass. Draws of targets come first.
_PART, _PROBE = 2**20, 2**20 + 1


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
    adds them up, so do the output factors; the input factors average over all rows.

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
        pass_seed = _fold(seed, index)
        item = ScoredPass.of(forward_pass, uses, part, _fold(pass_seed, _PART), dtype)
        called = [u for u in uses if u.calls(forward_pass)]
        counting = [u for u in called if u.averages_inputs]
        weighted.append((item, item.row_weights(counting, _fold(pass_seed, _PROBE), dtype)))
        if fisher is Fisher.EXACT:
            parts = _exact(item, called, dtype)
        elif fisher is Fisher.EMPIRICAL:
            parts = _empirical(item, called, pass_seed, dtype)
        elif fisher is Fisher.FORWARD_ONLY:
            parts = _forward_only(item, called, dtype)
        else:
            parts = _mean_of_draws(item, called, fisher, samples, pass_seed, dtype)
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


def _fold(seed: tf.Tensor, index: int) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(seed, index)


def _input_factor(
    adapter: LayerAdapter, weighted: Sequence[tuple[ScoredPass, Placed]], dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor]:
    """The input factor, and its weight beside those of other batches."""
    total, weight, batches = (tf.zeros((), dtype) for _ in range(3))
    for item, row_weights in weighted:
        # So that weights of 1 count as none do, whatever the reduction.
        batches += tf.cast(item.batch, dtype) if item.is_weighted else item.total
        for place, call in adapter.calls(item.forward_pass).items():
            inputs = tf.nest.map_structure(item.used, call.inputs)
            scale = item.scale_of(tf.nest.flatten(call.inputs)[0])
            weights = row_weights.get(id(adapter), {}).get(place)
            # What takes a part of the batch takes a part of the positions, too.
            part = adapter if item.places is None else adapter.thinned(inputs)
            observed = item.observed[id(adapter)][place]
            moment, moment_weight = part.input_moment(inputs, weights, dtype, *observed)
            total, weight = total + scale * moment, weight + scale * moment_weight
    return tf.math.divide_no_nan(total, weight), batches * weight


def _output_factors(
    item: ScoredPass,
    adapters: Sequence[LayerAdapter],
    targets: tf.Tensor | Sequence[tf.Tensor],
    vectors: Sequence[tf.Tensor] | None,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    """Back-propagates vectors and sums the outer products of what arrives at each layer."""
    layers = [layer for adapter in adapters for layer in adapter.layers]
    gradients = item.forward_pass.output_gradients(layers, targets, vectors)

    def factor(adapter: LayerAdapter, gradient: Any, observed: Sequence[Any]) -> tf.Tensor:
        used = tf.nest.map_structure(lambda g: item.used(g, dtype), gradient)
        return adapter.output_factor(used, *observed)

    def sum_over_calls(adapter: LayerAdapter) -> tf.Tensor:
        observed = item.observed[id(adapter)].items()
        each = [(adapter.arrived(gradients, place), seen) for place, seen in observed]
        return tf.add_n([factor(adapter, gradient, seen) for gradient, seen in each])

    return {id(a): sum_over_calls(a) for a in adapters}


def _root(coefficients: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    return with_rank(tf.sqrt(tf.cast(coefficients, outputs.dtype)), outputs.shape.rank)


def _mean_of_draws(
    item: ScoredPass,
    adapters: Sequence[LayerAdapter],
    fisher: Fisher,
    samples: int,
    seed: tf.Tensor,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    draws = []
    for index in range(samples):
        own_seed = _fold(seed, index) if index else seed
        draws.append(_drawn(item, adapters, fisher, own_seed, dtype))
    return {key: tf.add_n([draw[key] for draw in draws]) / samples for key in draws[0]}


def _drawn(
    item: ScoredPass,
    adapters: Sequence[LayerAdapter],
    fisher: Fisher,
    seed: tf.Tensor,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    """One backward pass: draws for different outputs are independent of each other."""
    targets: list[tf.Tensor] = []
    vectors: list[tf.Tensor] = []
    for index, (term, coefficients) in enumerate(item.terms):
        outputs, likelihood = term.differentiable(term.outputs)
        own_seed = _fold(seed, index)
        draw = likelihood.sampled_vector
        if fisher is Fisher.PROPAGATED:
            draw = likelihood.propagated_vector
        vector = draw(outputs, own_seed)
        targets.append(outputs)
        vectors.append(vector * _root(coefficients, outputs))
    return _output_factors(item, adapters, targets, vectors, dtype)


def _exact(
    item: ScoredPass, adapters: Sequence[LayerAdapter], dtype: tf.DType
) -> dict[int, tf.Tensor]:
    sums = {id(a): tf.zeros(a.factor_shapes[1], dtype) for a in adapters}
    for term, coefficients in item.terms:
        for key, own in _exact_of_term(item, term, coefficients, adapters, dtype).items():
            sums[key] += own
    return sums


def _exact_of_term(
    item: ScoredPass,
    term: Term,
    coefficients: tf.Tensor,
    adapters: Sequence[LayerAdapter],
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    """A backward pass for each column at each position: no cross terms between positions."""
    outputs, likelihood = term.differentiable(term.outputs)
    root = _root(coefficients, outputs)
    columns, shape = likelihood.columns(outputs), tf.shape(outputs)
    positions = tf.reduce_prod(shape[1:-1])
    position_shape = tf.concat([[1], shape[1:-1], [1]], axis=0)[: outputs.shape.rank]

    def add_column(index: tf.Tensor, *sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
        position = tf.one_hot(index // columns, positions, dtype=outputs.dtype)
        column = likelihood.root_column(outputs, index % columns)
        column *= root * tf.reshape(position, position_shape)
        parts = _output_factors(item, adapters, outputs, column, dtype)
        return index + 1, *(total + parts[id(a)] for a, total in zip(adapters, sums))

    sums = [tf.zeros(a.factor_shapes[1], dtype) for a in adapters]
    _, *sums = tf.while_loop(
        lambda index, *_: index < columns * positions,
        add_column,
        (tf.constant(0), *sums),
        parallel_iterations=1,
    )
    return {id(a): total for a, total in zip(adapters, sums)}


def _empirical(
    item: ScoredPass, adapters: Sequence[LayerAdapter], seed: tf.Tensor, dtype: tf.DType
) -> dict[int, tf.Tensor]:
    """Gradients of the training loss, scaled so that the outer products are on the Fisher's scale.

    With the loss `Σ c_p ℓ_p` and `ℓ_p = -w log r`, the matrix is `Σ c_p / w ∇ℓ_p ∇ℓ_pᵀ`, but for
    products between positions of one output. Those between outputs vanish on average: each example
    has random signs for these.
    """
    scaled = [(t, tf.sqrt(c / scalar(t.likelihood_weight(), c.dtype))) for t, c in item.terms]
    tape = item.forward_pass.tape
    with tape:
        totals = [term.weighted_sum(weights) for term, weights in scaled]
    if len(totals) == 1:
        return _output_factors(item, adapters, totals, None, dtype)
    logits = [_keras_internals.loss_logits(term.outputs) for term, _ in scaled]
    targets = [t.outputs if own is None else own for (t, _), own in zip(scaled, logits)]
    vectors = []
    for index, (total, target) in enumerate(zip(totals, targets)):
        vector = tape.gradient(total, target, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        vector = tf.convert_to_tensor(vector)  # Of a loss that gathers, it may be some rows.
        own_seed = tf.random.experimental.stateless_fold_in(seed, index)
        bits = tf.random.stateless_uniform(tf.shape(vector)[:1], own_seed, 0, 2, tf.int32)
        vectors.append(vector * with_rank(tf.cast(2 * bits - 1, vector.dtype), vector.shape.rank))
    return _output_factors(item, adapters, targets, vectors, dtype)


def _forward_only(
    item: ScoredPass, adapters: Sequence[LayerAdapter], dtype: tf.DType
) -> dict[int, tf.Tensor]:
    """The identity, times the weight between loss and negative log-likelihood of all terms.

    Source: Benzing (2022), arXiv:2201.12250, "Gradient descent on neurons and its link to
    approximate second-order optimization" (FOOF).
    """
    scale = tf.zeros((), dtype)
    for term, coefficients in item.terms:
        scale += term.likelihood_weight() * tf.cast(tf.reduce_sum(coefficients), dtype)
    return {id(a): scale * identity(a.factor_shapes[1], dtype) for a in adapters}
