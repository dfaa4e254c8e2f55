"""A forward pass, of a model or a layer, run again: for other weights, or a part of its batch.

A replay draws the random numbers of the original pass and leaves no trace: dropout masks are the
same, batch normalisation keeps its moving statistics, seeds stay where they are. It works on
tensors in place of the weights, so that weights can be tried before they are assigned.
"""

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

Weights = Mapping[int, tf.Tensor]
"""Values by `id` of the variable."""


class _Replaying(threading.local):
    active = False


_replaying = _Replaying()


def is_replaying() -> bool:
    """Whether a forward pass is being replayed on this thread."""
    return _replaying.active


class Replay:
    """What it takes to run a forward pass again; to be created just *before* the pass.

    Args:
        layer: The model or layer.
        args: What its `call` was given: tensors, or arrays, which Keras gives to functional models.
        kwargs: Likewise.
    """

    def __init__(self, layer: keras.Layer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._layer = layer
        self._args, self._kwargs = tf.nest.map_structure(_without_arrays, (args, kwargs))
        self._states = [(v, tf.convert_to_tensor(v.value)) for v in layer.non_trainable_variables]

    def argument(self, name: str) -> Any:
        """What `call` was given by a name; `None` if nothing."""
        signature = inspect.signature(type(self._layer).call)
        return signature.bind(self._layer, *self._args, **self._kwargs).arguments.get(name)

    def with_inputs(self, inputs: Any) -> Self:
        """The same pass for another first argument."""
        other = copy.copy(self)
        if self._args:
            other._args = (inputs, *self._args[1:])
        else:
            other._kwargs = {**self._kwargs, next(iter(self._kwargs)): inputs}
        return other

    def of_examples(self, places: tf.Tensor) -> Self:
        """The same pass for some examples of its batch, `[used]`."""
        other = copy.copy(self)
        other._args, other._kwargs = _with_batches(
            (self._args, self._kwargs), lambda x: tf.gather(x, places)
        )
        return other

    def outputs(self, weights: Weights, cut: Callable[[tf.Tensor], tf.Tensor] | None = None) -> Any:
        """What the layer returns.

        Args:
            weights: Values for some of the layer's variables; the others keep theirs.
            cut: Chooses examples of a tensor whose first axis is the batch; all if `None`.
        """
        return self.outputs_and_losses(weights, cut)[0]

    def outputs_and_losses(
        self, weights: Weights, cut: Callable[[tf.Tensor], tf.Tensor] | None = None
    ) -> tuple[Any, list[tf.Tensor]]:
        """What the layer returns, and the losses that it and layers below add."""
        args, kwargs = self._args, self._kwargs
        if cut is not None:
            args, kwargs = _with_batches((args, kwargs), cut)
        with self.scope(weights) as scope:
            outputs = self._layer(*args, **kwargs)
            return outputs, list(scope.losses)

    @contextlib.contextmanager
    def scope(self, weights: Weights) -> Iterator[keras.StatelessScope]:
        """Within it, variables have the values that they had before the pass, or those given."""
        trained = [(v, weights[id(v)]) for v in self._layer.weights if id(v) in weights]
        _replaying.active = True
        try:
            # Losses that layers add are collected by the scope, or they would end up in the model.
            with keras.StatelessScope(self._states + trained, collect_losses=True) as scope:
                yield scope
        finally:
            _replaying.active = False


def tensors_of(structure: Any) -> list[tf.Tensor]:
    """The tensors among what a layer or model is given, or returns: other things may be, too."""
    return [x for x in tf.nest.flatten(structure) if tf.is_tensor(x)]


def batches_among(structure: Any) -> list[tf.Tensor]:
    """Those of the tensors that have a first axis, which can be the batch."""
    return [x for x in tensors_of(structure) if x.shape.rank != 0]


def _without_arrays(x: Any) -> Any:
    """A tensor in place of what is like an array, of its dtype: Keras casts either alike."""
    is_array = hasattr(x, "__array__") and not tf.is_tensor(x) and np.ndim(x) > 0
    return tf.convert_to_tensor(x) if is_array else x


def _with_batches(structure: Any, function: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    """Applies a function to all tensors with a batch axis: that of the first tensor."""
    batch = batches_among(structure)[0].shape[:1]

    def apply(x: Any) -> Any:
        is_batch = tf.is_tensor(x) and x.shape.rank != 0 and x.shape[:1].is_compatible_with(batch)
        return function(x) if is_batch else x

    return tf.nest.map_structure(apply, structure)


def tangents(
    replay: Replay,
    primals: Weights,
    directions: Sequence[Weights],
    differentiable: Callable[[Any], list[tf.Tensor]],
    places: tf.Tensor | None,
) -> tuple[list[tf.Tensor], list[list[tf.Tensor]]]:
    """Derivatives of the outputs along directions in weight space, in forward mode.

    Args:
        replay: The forward pass.
        primals: Weights to differentiate by, with their values.
        directions: Tangents for some of them, and that several times.
        differentiable: Function from the model's outputs to the tensors to differentiate.
        places: Use these examples only, `[used]`; `None` for all.

    Returns:
        These tensors, and for each direction their tangents.
    """
    if places is not None:
        replay = replay.of_examples(places)

    def function(weights: Weights) -> list[tf.Tensor]:
        return differentiable(replay.outputs(weights))

    try:
        return _forward_mode(function, primals, directions)
    except (TypeError, LookupError):  # Loops in graphs, and operations without such a derivative.
        return _double_reverse_mode(function, primals, directions)


def _forward_mode(
    function: Callable[[Weights], list[tf.Tensor]], primals: Weights, directions: Sequence[Weights]
) -> tuple[list[tf.Tensor], list[list[tf.Tensor]]]:
    results = []
    # Not nested: that would build the derivatives of the derivatives too.
    for direction in directions:
        watched = [primals[key] for key in direction]
        with tf.autodiff.ForwardAccumulator(watched, list(direction.values())) as tape:
            outputs = function(primals)
        results.append(tape.jvp(outputs, tf.UnconnectedGradients.ZERO))
    return outputs, results


def _double_reverse_mode(
    function: Callable[[Weights], list[tf.Tensor]], primals: Weights, directions: Sequence[Weights]
) -> tuple[list[tf.Tensor], list[list[tf.Tensor]]]:
    """`J d` as the derivative of `uᵀ J d` by `u`, in which it is linear.

    Source: Townsend (2017), "A new trick for calculating Jacobian vector products".
    """
    primals = dict(primals)
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as outer:
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(primals)
            outputs = function(primals)
        vectors = [tf.zeros_like(output) for output in outputs]
        outer.watch(vectors)
        back = inner.gradient(
            outputs, primals, vectors, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        products = [
            tf.add_n([tf.reduce_sum(back[key] * value) for key, value in direction.items()])
            for direction in directions
        ]
    zero = tf.UnconnectedGradients.ZERO
    return outputs, [outer.gradient(p, vectors, unconnected_gradients=zero) for p in products]
