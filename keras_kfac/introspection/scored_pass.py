"""A forward pass with what each example, and each position, counts in the loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.batch_part import (
    BatchPart,
    parts_for_whole,
    places_of,
    whole_over_part,
)
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import Term
from keras_kfac.math.linalg import with_rank
from keras_kfac.math.rows import Starts

Placed = dict[int, dict[Any, Any]]
"""Of each adapter and each of its calls: by `id` of the adapter and place of the call."""


class ScoredPass(NamedTuple):
    """A forward pass with the derivatives of the loss by the loss at each output position.

    Attributes:
        forward_pass: The pass.
        coefficients: These, for each term of the loss; of a part of the batch such that it stands
            for the whole, and 0 elsewhere.
        weights: What the examples in use count in each term, `[used]`.
        total: What all examples count, in all terms.
        is_weighted: Whether examples can count differently.
        places: Which examples are used, `[used]`; `None` for all.
        batch: The number of all examples.
        scale: What sums over inputs of these are to be multiplied by to stand for the whole batch.
        observed: What the output rows of each call depend on beside the gradients, of the examples
            in use.
    """

    forward_pass: ForwardPass
    coefficients: Sequence[tf.Tensor]
    weights: Sequence[tf.Tensor]
    total: tf.Tensor
    is_weighted: bool
    places: tf.Tensor | None
    batch: tf.Tensor
    scale: tf.Tensor
    observed: Placed

    @classmethod
    def of(
        cls,
        forward_pass: ForwardPass,
        adapters: Sequence[LayerAdapter],
        part: BatchPart,
        seed: tf.Tensor,
        dtype: tf.DType,
    ) -> Self:
        """Finds out what counts.

        Args:
            forward_pass: The pass, with its terms.
            adapters: Those whose statistics are wanted.
            part: How much of the batch to use.
            seed: Stateless seed, int32 `[2]`, of the choice.
            dtype: Of the statistics.
        """
        coefficients = [tf.cast(term.coefficients(), dtype) for term in forward_pass.terms]
        each = [tf.reduce_sum(c, axis=list(range(1, c.shape.rank))) for c in coefficients]
        weights = tf.add_n(each)
        is_weighted = any(term.is_weighted for term in forward_pass.terms)
        batch, places, scale = tf.shape(weights)[0], None, tf.ones((), dtype)
        if not part.is_whole:
            places = places_of(part, coefficients, seed)
            scale = whole_over_part(weights, places)
            is_used = tf.scatter_nd(places[:, tf.newaxis], tf.ones_like(places), [batch])
            coefficients = [
                c * with_rank(tf.cast(is_used, dtype), c.shape.rank)
                for c in parts_for_whole(coefficients, places)
            ]
            each = [tf.gather(own, places) for own in each]
        item = cls(
            forward_pass,
            coefficients,
            each,
            tf.reduce_sum(weights),
            is_weighted,
            places,
            batch,
            scale,
            {},
        )
        for adapter in adapters:
            item.observed[id(adapter)] = {
                place: tf.nest.map_structure(lambda x: item.used(x, dtype), adapter.observed(call))
                for place, call in adapter.calls(forward_pass).items()
            }
        return item

    @property
    def unit(self) -> tf.Tensor | float:
        """What to measure the coefficients by: the largest, where gradients are in float16.

        In that, what each of many positions counts can be too small a number.
        """
        calls = (call for own in self.forward_pass.calls.values() for call in own)
        if all(out.dtype != tf.float16 for call in calls for out in tf.nest.flatten(call.outputs)):
            return 1.0
        largest = tf.reduce_max([tf.reduce_max(c) for c in self.coefficients])
        return tf.where(largest > 0, largest, 1)

    @property
    def terms(self) -> list[tuple[Term, tf.Tensor]]:
        """The terms of the loss, with their coefficients."""
        return list(zip(self.forward_pass.terms, self.coefficients))

    def used(self, thing: Any, dtype: tf.DType | None = None) -> Any:
        """What something of a layer holds of the examples in use: a tensor, or what finds some.

        A tensor whose first axis is not the batch is all used.
        """
        if not tf.is_tensor(thing):
            is_whole = self.places is None or not hasattr(thing, "of_examples")
            return thing if is_whole else thing.of_examples(self.places)
        tensor = thing if dtype is None else tf.cast(thing, dtype)
        if self.places is None:
            return tensor
        if self._is_other(tensor):
            return tensor
        is_batch, count = self.has_batch(tensor), tf.shape(self.places)[0]
        # No branch: there are tensors of every layer, and branches take long to trace.
        numbers = tf.range(tf.where(is_batch, count, tf.shape(tensor)[0]))
        places = tf.gather(self.places, tf.minimum(numbers, count - 1))
        return tf.gather(tensor, tf.where(is_batch, places, numbers))

    def scale_of(self, tensor: tf.Tensor) -> tf.Tensor:
        """What sums over inputs are to be multiplied by to stand for the whole batch."""
        if self.places is None:
            return self.scale
        return tf.where(self.has_batch(tensor), self.scale, 1)

    def _is_other(self, tensor: tf.Tensor) -> bool:
        """Whether it is plain that the first axis is not the batch."""
        return self.forward_pass.has_unknown_batch and tensor.shape[0] is not None

    def has_batch(self, tensor: tf.Tensor) -> tf.Tensor:
        """Whether the first axis is the batch, or of the same length by chance."""
        is_as_long = tf.equal(tf.shape(tensor)[0], self.batch)
        return tf.constant(False) if self._is_other(tensor) else is_as_long

    def starts(self, adapter: LayerAdapter) -> Starts:
        """Where the examples of each call are among those of all.

        The first are those of the batch, in all calls whose first axis it is. What other calls have
        instead is nobody's, and has places of its own.
        """
        calls = list(adapter.calls(self.forward_pass).values())
        if len(calls) == 1:
            return None
        outputs = [tf.nest.flatten(call.outputs)[0] for call in calls]
        sizes = {out.shape[0] for out in outputs}
        if sizes == {self.coefficients[0].shape[0]} - {None}:
            return None  # As is plain before it runs.
        result, end = [], tf.shape(self.weights[0])[0]
        for out in outputs:
            is_batch = self.has_batch(out)
            result.append(tf.where(is_batch, 0, end))
            end += tf.where(is_batch, 0, tf.shape(out)[0])
        return result

    def arrived(
        self,
        adapters: Sequence[LayerAdapter],
        targets: Any,
        vectors: Any,
        dtype: tf.DType,
    ) -> list[list[tuple[Any, Sequence[Any]]]]:
        """Back-propagates vectors from the targets to the layers.

        Returns:
            For each adapter, of each of its calls: gradients of the outputs, of the examples in
            use, and what was observed.
        """
        layers = [layer for adapter in adapters for layer in adapter.layers]
        gradients = self.forward_pass.output_gradients(layers, targets, vectors)

        def used(gradient: Any) -> Any:
            return tf.nest.map_structure(lambda g: self.used(g, dtype), gradient)

        return [
            [
                (used(adapter.arrived(gradients, place)), seen)
                for place, seen in self.observed[id(adapter)].items()
            ]
            for adapter in adapters
        ]
