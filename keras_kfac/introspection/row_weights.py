"""How much the rows of layers count in input factors."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import Term
from keras_kfac.introspection.probes import of_positions, random_vector
from keras_kfac.introspection.scored_pass import Placed, ScoredPass
from keras_kfac.math.rows import energy_shares


def row_weights(
    item: ScoredPass, adapters: Sequence[LayerAdapter], seed: tf.Tensor, dtype: tf.DType
) -> Placed:
    """What examples count, `[used]`, or rows, `[used, positions]`; nothing if all alike.

    An example counts what it does in the terms of the loss that the layer has a part in, where it
    can be told spread over those of its positions, and of its calls, that do. Passes backwards of
    random numbers for each term tell how much each does: see `_Probes`. Rows of something else than
    examples, of positions that all of them share for instance, count alike where they do.

    Args:
        item: The forward pass, with what examples and positions count.
        adapters: Those of which to weight the rows.
        seed: Stateless seed, int32 `[2]`, of the random numbers.
        dtype: Of the weights.
    """
    if not item.is_weighted:
        return {}
    layers = [layer for adapter in adapters for layer in adapter.layers]
    found: Placed = {}
    for index, (term, coefficients) in enumerate(item.terms):
        own_seed = tf.random.experimental.stateless_fold_in(seed, index)
        probes = _Probes.of(item.forward_pass, layers, term, coefficients, own_seed)
        for adapter in adapters:
            calls = _counting(item, adapter, probes, dtype)
            places = item.observed[id(adapter)]
            mine = found.setdefault(id(adapter), {})
            for place, own in zip(places, _weights(item.weights[index], calls)):
                mine[place] = mine[place] + own if place in mine else own
    return found


class _Probes(NamedTuple):
    """What arrives at the layers if the positions of an output get random numbers.

    Attributes:
        counting: If those that count do. Where it is not zero, the row of a layer counts.
        everywhere: If all do; `None` if none of an example counts without the others. Where it is
            zero, behind a relu or a pooling layer for instance, a row counts as often as others of
            the example.
        weighted: If those that count get them by the roots of what they do, 1 at most; `None` if
            they count alike. Its squares beside those of `counting` are what a row counts: the
            weight of its position, or, of a row that leads to many, a mean by their gradients.
    """

    counting: dict[int, Any]
    everywhere: dict[int, Any] | None
    weighted: dict[int, Any] | None

    @classmethod
    def of(
        cls,
        forward_pass: ForwardPass,
        layers: Sequence[Any],
        term: Term,
        coefficients: tf.Tensor,
        seed: tf.Tensor,
    ) -> Self:
        """Back-propagates from the output of a term, with what its positions count."""
        outputs, vector = random_vector(term, seed)

        def arriving(amounts: tf.Tensor) -> dict[int, Any]:
            return forward_pass.output_gradients(layers, outputs, of_positions(vector, amounts))

        everywhere = weighted = None
        if term.tells_positions_apart:
            everywhere = forward_pass.output_gradients(layers, outputs, vector)
        if term.weighs_positions:
            positions = list(range(1, coefficients.shape.rank))
            largest = tf.reduce_max(coefficients, axis=positions, keepdims=True)
            weighted = arriving(tf.sqrt(tf.math.divide_no_nan(coefficients, largest)))
        return cls(arriving(coefficients > 0), everywhere, weighted)


class _Counting(NamedTuple):
    """How much the rows of a call count.

    Attributes:
        rows: `[batch, positions]` in [0, 1], or another first axis.
        has_batch: Whether that is the batch.
    """

    rows: tf.Tensor
    has_batch: tf.Tensor

    def of_examples(self, count: tf.Tensor) -> tf.Tensor:
        """How many rows of each of so many examples count; 0 where rows are none of theirs."""
        return self._aligned(tf.reduce_sum(self.rows, axis=1), count, tf.zeros((), self.rows.dtype))

    def weighted(self, of_examples: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """The rows, by factors of their examples; where they are others, such that all count."""
        number, positions = tf.unstack(tf.shape(self.rows))
        total = tf.reduce_sum(self.rows, axis=1)
        alike = tf.math.divide_no_nan(mean * tf.cast(positions, mean.dtype), total)
        return self._aligned(of_examples, number, alike)[:, tf.newaxis] * self.rows

    def _aligned(self, values: tf.Tensor, count: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """Values for so many rows or examples, others where the two don't belong together."""
        places = tf.minimum(tf.range(count), tf.shape(values)[0] - 1)
        return tf.where(self.has_batch, tf.gather(values, places), other)


def _counting(
    item: ScoredPass, adapter: LayerAdapter, probes: _Probes, dtype: tf.DType
) -> list[_Counting]:
    """How much the rows of each call count."""

    def at_rows(gradients: dict[int, Any], place: Any) -> tf.Tensor:
        arrived = adapter.arrived(gradients, place)
        own = tf.nest.map_structure(lambda g: item.used(g, dtype), arrived)
        return adapter.arriving(own, *item.observed[id(adapter)][place])

    calls = []
    for place, seen in item.observed[id(adapter)].items():
        has_batch = item.has_batch(tf.nest.flatten(adapter.arrived(probes.counting, place))[0])
        here = at_rows(probes.counting, place)
        counts = is_alive = tf.reduce_any(here != 0, axis=-1)
        if probes.everywhere is not None:
            is_alive = tf.reduce_any(at_rows(probes.everywhere, place) != 0, axis=-1)
        amounts = tf.cast(counts, dtype)
        if probes.weighted is not None:
            shares = energy_shares(at_rows(probes.weighted, place), here)
            amounts = tf.where(has_batch, shares, amounts)
        mask = adapter.row_mask(counts[..., tf.newaxis], *seen)
        is_real = tf.ones_like(counts) if mask is None else mask > 0
        alive = tf.cast(is_alive & is_real, dtype)
        number = tf.reduce_sum(alive, axis=1, keepdims=True)
        # None do of a layer that the term does not depend on, and none that stand alone.
        otherwise = tf.cast(has_batch & tf.reduce_any(counts), dtype)
        share = tf.reduce_sum(alive * amounts, axis=1, keepdims=True)
        share = tf.where(number > 0, tf.math.divide_no_nan(share, number), otherwise)
        rows = tf.where(alive > 0, amounts, share) * tf.cast(is_real, dtype)
        calls.append(_Counting(rows, has_batch))
    return calls


def _weights(weights: tf.Tensor, calls: Sequence[_Counting]) -> list[tf.Tensor]:
    """What the rows of each call count: on average over those of an example, what that does."""
    count, dtype = tf.shape(weights)[0], weights.dtype
    counted = tf.add_n([call.of_examples(count) for call in calls])
    positions = tf.add_n([tf.shape(call.rows)[1] for call in calls])
    factors = tf.math.divide_no_nan(weights * tf.cast(positions, dtype), counted)
    return [call.weighted(factors, tf.reduce_mean(weights)) for call in calls]
