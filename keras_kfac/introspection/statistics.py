"""Kronecker factors of a step's forward passes, under each kind of Fisher matrix."""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.batch_part import WHOLE, BatchPart, examples_of, whole_over_part
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import Term
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


class LayerStatistics(NamedTuple):
    """Kronecker factors of one layer on one batch."""

    input_factor: tf.Tensor
    output_factor: tf.Tensor


class BatchStatistics(NamedTuple):
    """Factors of all layers that took part, by `id` of the adapter, and the number of examples."""

    layers: dict[int, LayerStatistics]
    examples: tf.Tensor


class _ScoredPass(NamedTuple):
    """A forward pass with the derivatives of the loss by the loss at each output position.

    Attributes:
        coefficients: These, for each term of the loss.
        weights: What each example contributes to the loss, `[batch]`.
        is_weighted: Whether these can differ.
        examples: How many examples are used, the first ones; `None` for all.
        batch: The number of all examples.
        scale: What sums over these are to be multiplied by to stand for the whole batch.
        observed: What the output rows of each adapter's calls depend on beside the gradients, of
            the used examples, by `id` of the adapter and place of the call.
    """

    forward_pass: ForwardPass
    coefficients: Sequence[tf.Tensor]
    weights: tf.Tensor
    is_weighted: bool
    examples: tf.Tensor | None
    batch: tf.Tensor
    scale: tf.Tensor
    observed: dict[int, dict[int, Sequence[Any]]]

    @property
    def terms(self) -> list[tuple[Term, tf.Tensor]]:
        """The terms of the loss, with their coefficients."""
        return list(zip(self.forward_pass.terms, self.coefficients))

    def example_weights(self) -> tf.Tensor | None:
        """What each used example contributes to the loss; `None` if all the same."""
        return self.weights[: self.examples] if self.is_weighted else None

    def used(self, tensor: tf.Tensor) -> tf.Tensor:
        """What a tensor of a layer holds of the used examples.

        One whose first axis is not the batch is all used.
        """
        if self.examples is None:
            return tensor
        return tensor[: tf.where(self._has_batch(tensor), self.examples, tf.shape(tensor)[0])]

    def scale_of(self, tensor: tf.Tensor) -> tf.Tensor:
        """What sums over that are to be multiplied by to stand for the whole batch."""
        if self.examples is None:
            return self.scale
        return tf.where(self._has_batch(tensor), self.scale, 1)

    def _has_batch(self, tensor: tf.Tensor) -> tf.Tensor:
        return tf.equal(tf.shape(tensor)[0], self.batch)


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
    scored = [_score(forward_pass, uses, part, dtype) for forward_pass in passes]
    output_factors = {id(u): tf.zeros((), dtype) for u in uses}
    for index, item in enumerate(scored):
        pass_seed = tf.random.experimental.stateless_fold_in(seed, index)
        called = [u for u in uses if u.calls(item.forward_pass)]
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
    found = {id(u): (_input_factor(u, scored, dtype), output_factors[id(u)]) for u in uses}
    layers: dict[int, LayerStatistics] = {}
    for adapter in adapters:
        of_uses = [(u, found[id(u)]) for u in adapter.uses if id(u) in found]
        if of_uses:
            layers[id(adapter)] = LayerStatistics(*adapter.joined(of_uses))
    return BatchStatistics(layers, tf.add_n([_examples(item, dtype) for item in scored]))


def _score(
    forward_pass: ForwardPass,
    adapters: Sequence[LayerAdapter],
    part: BatchPart,
    dtype: tf.DType,
) -> _ScoredPass:
    terms = forward_pass.terms
    coefficients = [term.coefficients() for term in terms]
    each = [tf.reduce_sum(c, axis=list(range(1, c.shape.rank))) for c in coefficients]
    weights = tf.add_n([tf.cast(weights, dtype) for weights in each])
    examples = None if part.is_whole else examples_of(part, coefficients)
    is_weighted = any(term.is_weighted for term in terms)
    scale = tf.ones((), dtype) if examples is None else whole_over_part(weights, examples)
    batch = tf.shape(weights)[0]
    item = _ScoredPass(forward_pass, coefficients, weights, is_weighted, examples, batch, scale, {})

    def used(thing: Any) -> Any:
        return item.used(tf.cast(thing, dtype)) if tf.is_tensor(thing) else thing

    for adapter in adapters:
        item.observed[id(adapter)] = {
            index: tf.nest.map_structure(used, adapter.observed(call))
            for index, call in adapter.calls(forward_pass).items()
        }
    return item


def _examples(item: _ScoredPass, dtype: tf.DType) -> tf.Tensor:
    weights = item.example_weights()
    if weights is None:
        return tf.cast(tf.shape(item.weights[: item.examples])[0], dtype)
    return tf.reduce_sum(tf.cast(weights > 0, dtype))


def _input_factor(
    adapter: LayerAdapter, scored: Sequence[_ScoredPass], dtype: tf.DType
) -> tf.Tensor:
    total, weight = tf.zeros((), dtype), tf.zeros((), dtype)
    for item in scored:
        example_weights = item.example_weights()
        for index, call in adapter.calls(item.forward_pass).items():
            observed = item.observed[id(adapter)][index]
            _check_batch(adapter, call.inputs, item)
            inputs = tf.nest.map_structure(item.used, call.inputs)
            scale = item.scale_of(tf.nest.flatten(call.inputs)[0])
            # What takes a part of the batch takes a part of the positions, too.
            part = adapter if item.examples is None else adapter.thinned(inputs)
            moment, moment_weight = part.input_moment(inputs, example_weights, dtype, *observed)
            total, weight = total + scale * moment, weight + scale * moment_weight
    return tf.math.divide_no_nan(total, weight)


def _check_batch(adapter: LayerAdapter, inputs: Any, item: _ScoredPass) -> None:
    if not item.is_weighted:
        return
    for own in tf.nest.flatten(inputs):
        if not own.shape[:1].is_compatible_with(item.weights.shape):
            raise ValueError(
                "With sample weights or masks, K-FAC needs the same batch axis in a layer's input "
                f"and in the model's output. Received: layer {adapter.layer.name!r} with inputs of "
                f"shape {own.shape} and weights of shape {item.weights.shape}"
            )


def _output_factors(
    item: _ScoredPass,
    adapters: Sequence[LayerAdapter],
    targets: tf.Tensor | Sequence[tf.Tensor],
    vectors: Sequence[tf.Tensor] | None,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    """Back-propagates vectors and sums the outer products of what arrives at each layer."""
    layers = [layer for adapter in adapters for layer in adapter.layers]
    gradients = item.forward_pass.output_gradients(layers, targets, vectors)

    def factor(adapter: LayerAdapter, gradient: Any, observed: Sequence[Any]) -> tf.Tensor:
        used = tf.nest.map_structure(lambda g: item.used(tf.cast(g, dtype)), gradient)
        scale = item.scale_of(tf.nest.flatten(gradient)[0])
        return scale * adapter.output_factor(used, *observed)

    def sum_over_calls(adapter: LayerAdapter) -> tf.Tensor:
        observed = item.observed[id(adapter)].items()
        each = [(adapter.arrived(gradients, place), seen) for place, seen in observed]
        return tf.add_n([factor(adapter, gradient, seen) for gradient, seen in each])

    return {id(a): sum_over_calls(a) for a in adapters}


def _root(coefficients: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    return with_rank(tf.sqrt(tf.cast(coefficients, outputs.dtype)), outputs.shape.rank)


def _mean_of_draws(
    item: _ScoredPass,
    adapters: Sequence[LayerAdapter],
    fisher: Fisher,
    samples: int,
    seed: tf.Tensor,
    dtype: tf.DType,
) -> dict[int, tf.Tensor]:
    draws = []
    for index in range(samples):
        own_seed = tf.random.experimental.stateless_fold_in(seed, index) if index else seed
        draws.append(_drawn(item, adapters, fisher, own_seed, dtype))
    return {key: tf.add_n([draw[key] for draw in draws]) / samples for key in draws[0]}


def _drawn(
    item: _ScoredPass,
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
        own_seed = tf.random.experimental.stateless_fold_in(seed, index)
        draw = likelihood.sampled_vector
        if fisher is Fisher.PROPAGATED:
            draw = likelihood.propagated_vector
        vector = draw(outputs, own_seed)
        targets.append(outputs)
        vectors.append(vector * _root(coefficients, outputs))
    return _output_factors(item, adapters, targets, vectors, dtype)


def _exact(
    item: _ScoredPass, adapters: Sequence[LayerAdapter], dtype: tf.DType
) -> dict[int, tf.Tensor]:
    sums = {id(a): tf.zeros(a.factor_shapes[1], dtype) for a in adapters}
    for term, coefficients in item.terms:
        for key, own in _exact_of_term(item, term, coefficients, adapters, dtype).items():
            sums[key] += own
    return sums


def _exact_of_term(
    item: _ScoredPass,
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
    item: _ScoredPass, adapters: Sequence[LayerAdapter], seed: tf.Tensor, dtype: tf.DType
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
    item: _ScoredPass, adapters: Sequence[LayerAdapter], dtype: tf.DType
) -> dict[int, tf.Tensor]:
    """The identity, times the weight between loss and negative log-likelihood of all terms.

    Source: Benzing (2022), arXiv:2201.12250, "Gradient descent on neurons and its link to
    approximate second-order optimization" (FOOF).
    """
    scale = tf.zeros((), dtype)
    for term, coefficients in item.terms:
        scale += term.likelihood_weight() * tf.cast(tf.reduce_sum(coefficients), dtype)
    return {id(a): scale * identity(a.factor_shapes[1], dtype) for a in adapters}
