"""Several adapters as one: statistics of their weights together."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.introspection.forward_pass import ForwardPass, LayerCall
from keras_kfac.introspection.per_example import ExactAdapter, check_examples
from keras_kfac.math import factors
from keras_kfac.math.rows import masked_weights


class JointCall(NamedTuple):
    """The calls of all parts in a forward pass.

    Attributes:
        inputs: Those of each part's calls.
        calls: The calls.
    """

    inputs: Sequence[Sequence[tf.Tensor]]
    calls: Sequence[Sequence[LayerCall]]


def weights_dtype(adapter: LayerAdapter) -> str:
    """The type of an adapter's weights; of several, one that holds them all.

    Example:
    >>> parts = [keras.layers.Dense(1, dtype=dtype) for dtype in ("bfloat16", "float32")]
    >>> model = keras.Sequential([keras.Input((1,)), *parts])
    >>> from keras_kfac.introspection.registry import adapt
    >>> adapters = [adapter for part in parts for adapter in adapt(part, lambda variable: True)]
    >>> weights_dtype(JointWeightsAdapter(adapters))
    'float32'
    """
    return str(keras.backend.result_type(*{v.dtype for v in adapter.variables}))


class CompositeAdapter(LayerAdapter):
    """Several adapters, in place of a layer.

    What `LayerAdapter` takes of one call, gradients and what is observed, it takes of all calls of
    all parts, as a list for each part of what belongs to its calls.

    Args:
        parts: The adapters.

    Attributes:
        parts: The adapters.
    """

    def __init__(self, parts: Sequence[LayerAdapter]) -> None:
        super().__init__(parts[0].layer, lambda variable: True)
        self.parts = parts

    @classmethod
    def methods(cls) -> Collection[str]:
        """Those of the parts count."""
        return ()

    @property
    def layers(self) -> Sequence[keras.Layer]:
        """The layers whose output gradients are needed."""
        return [layer for part in self.parts for layer in part.layers]

    @property
    def path(self) -> str:
        """What the block is called in reports."""
        return " ... ".join(dict.fromkeys(part.path for part in (self.parts[0], self.parts[-1])))

    @property
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the parts cover."""
        return [variable for part in self.parts for variable in part.variables]

    def calls(self, forward_pass: ForwardPass) -> dict[Any, Any]:
        """One, of all parts; none if none was called."""
        each = [part.calls(forward_pass) for part in self.parts]
        if not any(each):
            return {}
        places = tuple(map(tuple, each))
        calls = [list(own.values()) for own in each]
        return {places: JointCall([[call.inputs for call in own] for own in calls], calls)}

    def arrived(self, gradients: Mapping[int, Sequence[Any]], place: Any) -> Any:
        """The output gradients of all calls."""
        return [[p.arrived(gradients, one) for one in own] for p, own in zip(self.parts, place)]

    def observed(self, call: Any) -> tuple[Any, ...]:
        """What each part observes of each call."""
        return tuple(
            [part.observed(own) for own in calls] for part, calls in zip(self.parts, call.calls)
        )

    @property
    def dims(self) -> tuple[int, int]:
        """One row; a column for each weight."""
        return 1, sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(part.matrix_shape) for part in self.parts]

    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins the gradients of the variables into `[1, weights]`, in the type of all weights."""
        dtype = weights_dtype(self)
        rows = [tf.reshape(part.to_matrix(gradients), [1, -1]) for part in self.parts]
        return tf.concat([tf.cast(row, dtype) for row in rows], axis=1)

    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`: each part in the type of its weights."""
        result: Gradients = {}
        for part, own in zip(self.parts, tf.split(matrix, self._sizes, axis=1)):
            own = tf.cast(own, weights_dtype(part))
            result |= part.from_matrix(tf.reshape(own, part.matrix_shape))
        return result

    def output_rows(self, gradients: Any, *observed: Any) -> tf.Tensor:
        """Rows of all parts side by side: `[batch, positions, sum of their d_out]`."""
        first = tf.nest.flatten(gradients)[0]
        rows = []
        for part, own, seen in zip(self.parts, gradients, observed):
            each = [part.output_rows(g, *o) for g, o in zip(own, seen)]
            # What a pass does not use has no gradient.
            none = tf.zeros([tf.shape(first)[0], 1, part.dims[1]], first.dtype)
            rows.append(tf.add_n(each) if each else none)
        return tf.concat(rows, axis=-1)


class JointWeightsAdapter(CompositeAdapter, ExactAdapter):
    """Gradients of the weights of several exact adapters for each example, as one row."""

    max_full_block = math.inf

    def calls(self, forward_pass: ForwardPass) -> dict[Any, Any]:
        """One, of all parts.

        Raises:
            ValueError: If a layer is called on other things than the examples of the batch.
        """
        check_examples(forward_pass, self)
        return super().calls(forward_pass)


class CrossAdapter(CompositeAdapter):
    """What two layers of affine maps have in common: moments of their inputs, and of gradients.

    Both must be called as often, and have as many positions.
    """

    parts: Sequence[AffineAdapter]

    @property
    def factor_shapes(self) -> list[tuple[int, ...]]:
        """`(d_in, d_in of the second)`, `(d_out, d_out of the second)`."""
        first, second = (part.dims for part in self.parts)
        return list(zip(first, second))

    def input_moment(
        self,
        inputs: Any,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The moment of the inputs of both, and its weight."""
        moments: list[tuple[tf.Tensor, tf.Tensor]] = []
        for each, masks in zip(zip(*inputs, strict=True), observed[0]):
            first, second = (p.input_rows(tf.cast(x, dtype)) for p, x in zip(self.parts, each))
            if not first.shape[1:2].is_compatible_with(second.shape[1:2]):
                raise ValueError(
                    "Neighbours in a chain must have as many positions. Received: "
                    f"{self.path} with {first.shape[1]} and {second.shape[1]}"
                )
            weights = masked_weights(first, example_weights, masks)
            moments.append(factors.cross_moment(first, second, weights))
        total, weight = map(tf.add_n, zip(*moments))
        return total, weight

    def arriving(self, gradients: Any, *observed: Any) -> tf.Tensor:
        """What arrives at the rows of the first layer in its calls."""
        first = self.parts[0]
        each = [first.arriving(g, *seen) for g, seen in zip(gradients[0], observed[0])]
        return tf.concat(each, axis=-1)

    def row_mask(self, rows: tf.Tensor, *observed: Any) -> tf.Tensor | None:
        """Which rows of the first layer are no padding in one of its calls."""
        each = [self.parts[0].row_mask(rows, *seen) for seen in observed[0]]
        masks = [mask for mask in each if mask is not None]
        return tf.reduce_max(masks, axis=0) if masks and len(masks) == len(each) else None

    def output_factor(self, gradients: Any, *observed: Any) -> tf.Tensor:
        """The moment of the output gradients of both."""
        each = [[part.output_rows(g) for g in own] for part, own in zip(self.parts, gradients)]
        return tf.add_n([factors.cross_product(*rows) for rows in zip(*each, strict=True)])
