"""Which losses make up the total that a model computes, and what each counts in it.

Keras puts the losses of a model's outputs together in private; whoever calls them can be seen.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.introspection.losses import Score


class ObservedLosses:
    """The losses called while they were observed, with their values.

    Args:
        added: Losses that layers added to the model before.
    """

    def __init__(self, added: Sequence[tf.Tensor] = ()) -> None:
        self._calls: list[tuple[Score, tf.Tensor]] = []
        self._added = added
        self.tape = tf.GradientTape(watch_accessed_variables=False)

    def add(self, score: Score, value: tf.Tensor) -> None:
        """Notes a call."""
        self.tape.watch(value)
        self._calls.append((score, value))

    def terms(self, total: tf.Tensor) -> "Terms":
        """What makes up the total."""
        values = [value for _, value in self._calls]
        of_calls, of_added = self.tape.gradient(total, [values, list(self._added)])
        calls, added = zip(self._calls, of_calls), zip(self._added, of_added)
        return Terms(
            [score._replace(weight=w) for (score, _), w in calls if w is not None],
            [AddedLoss(loss, w) for loss, w in added if w is not None],
        )


class AddedLoss(NamedTuple):
    """A loss that a layer added, and its weight in the total."""

    value: tf.Tensor
    weight: tf.Tensor


class Terms(NamedTuple):
    """What makes up a total loss: losses of outputs, and those that layers added."""

    scores: list[Score]
    added: list[AddedLoss]


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
        with _calls.seen(), observed.tape:
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
        try:
            value = call(self, y_true, y_pred, sample_weight)
        finally:
            _observing.observed = observed
        if observed is not None:
            observed.add(Score(self, y_pred, y_true, sample_weight), value)
        return value

    return observed_call


_calls = _Calls()
