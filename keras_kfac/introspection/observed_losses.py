"""Which losses make up the total that a model computes, and what each counts in it.

Keras puts the losses of a model's outputs together in private; whoever calls them can be seen. What
else the total depends on shows in its derivatives: whether there is one is known without its value,
so that in graphs nothing is computed for it.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.introspection.losses import Score
from keras_kfac.math.linalg import shaped_like


class ObservedLosses:
    """The losses called while they were observed, with their values.

    Args:
        added: Losses that layers added to the model before.
    """

    def __init__(self, added: Sequence[tf.Tensor] = ()) -> None:
        self._calls: list[tuple[Score, tf.Tensor]] = []
        self._added = added
        self._outputs: list[tf.Tensor] = []
        self.tape = tf.GradientTape(watch_accessed_variables=False)
        # Past the losses. Apart from the other, which need not go back through all that is added.
        self.past = tf.GradientTape(watch_accessed_variables=False)

    def watch(self, outputs: Any) -> None:
        """Has the total tell whether it depends on a model's outputs, as far as these are real."""
        found = [output for output in tf.nest.flatten(outputs) if _is_differentiable(output)]
        self.past.watch(found)
        self._outputs += found

    def add(self, score: Score, value: tf.Tensor) -> None:
        """Notes a call."""
        self.tape.watch(value)
        self._calls.append((score, value))

    def terms(self, total: tf.Tensor) -> "Terms":
        """What makes up the total."""
        values = [value for _, value in self._calls]
        of_calls, of_added = self.tape.gradient(total, [values, list(self._added)])
        calls, added = zip(self._calls, of_calls), zip(self._added, of_added)
        scores = [
            score._replace(weight=shaped_like(w, value))
            for (score, value), w in calls
            if w is not None
        ]
        return Terms(
            scores,
            [AddedLoss(loss, w) for loss, w in added if w is not None],
            self._unscored(total, scores),
        )

    def _unscored(self, total: tf.Tensor, scores: Sequence[Score]) -> list[tf.Tensor]:
        """Outputs without a loss of them that the total depends on.

        By itself, or by what losses are given: other tensors, targets or weights.
        """
        scored = {id(score.outputs) for score in scores}
        rest = [output for output in self._outputs if id(output) not in scored]
        if not rest:
            return []
        watched = {id(output) for output in self._outputs}
        others = [s.outputs for s in scores if id(s.outputs) not in watched]
        others = tf.nest.flatten([others, [(s.targets, s.sample_weight) for s in scores]])
        targets = [total, *(other for other in others if _is_differentiable(other))]
        found = self.past.gradient(targets, rest)
        return [output for output, gradient in zip(rest, found) if gradient is not None]


def _is_differentiable(thing: Any) -> bool:
    return isinstance(thing, tf.Tensor) and thing.dtype.is_floating


class AddedLoss(NamedTuple):
    """A loss that a layer added, and its weight in the total."""

    value: tf.Tensor
    weight: tf.Tensor


class Terms(NamedTuple):
    """What makes up a total loss.

    Attributes:
        scores: Losses that were called.
        added: Losses that layers added.
        unscored: Outputs watched that the total depends on, though no loss is of them as they are.
    """

    scores: list[Score]
    added: list[AddedLoss]
    unscored: list[tf.Tensor]


class _Observing(threading.local):
    """Who observes on this thread."""

    observed: ObservedLosses | None = None


_observing = _Observing()


@contextlib.contextmanager
def observed_losses(added: Sequence[tf.Tensor] = ()) -> Iterator[ObservedLosses]:
    """Notes calls of Keras losses in the body, on this thread, but for those within another.

    Args:
        added: Losses that layers added to the model before, of which to find what they count.
    """
    observed = ObservedLosses(added)
    before, _observing.observed = _observing.observed, observed
    try:
        with _calls.seen(), observed.tape, observed.past:
            observed.tape.watch(list(added))
            yield observed
    finally:
        _observing.observed = before


class _Calls:
    """Has Keras's losses tell of their calls, while anybody on any thread wants to know."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._observers = 0
        self._original: Callable[..., Any] | None = None
        self._observed: Callable[..., Any] | None = None

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Sees calls in the body."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        loss = keras.losses.Loss
        with self._lock:
            self._observers += change
            if change > 0 and self._observers == 1:
                self._original = loss.__call__
                self._observed = loss.__call__ = _telling(self._original)
            # Whoever has put something around it since needs it on.
            elif self._observers == 0 and loss.__call__ is self._observed:
                loss.__call__ = self._original


def _telling(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, which tells whoever observes on this thread."""

    @functools.wraps(call)
    def observed_call(
        self: keras.losses.Loss, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        observed, _observing.observed = _observing.observed, None
        # What the total owes to the value is no dependence of its own.
        aside = contextlib.nullcontext() if observed is None else observed.past.stop_recording()
        try:
            with aside:
                value = call(self, y_true, y_pred, sample_weight)
        finally:
            _observing.observed = observed
        if observed is not None:
            observed.add(Score(self, y_pred, y_true, sample_weight), value)
        return value

    return observed_call


_calls = _Calls()
