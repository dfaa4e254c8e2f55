"""When factors and inverses are renewed, and how much of the past the factors remember.

Curvature changes fastest at the start of training: a network's first ten steps do to it what takes
a hundred later on. So both follow the number of steps taken, up to bounds that the user sets: what
is in use is at most a quarter of the steps taken old, and in the moving average of the factors the
update of step `s` counts as `s³`, a memory of a quarter of the steps taken.

Later on what costs much is spread over the steps of a period, in turns, so that no step takes much
longer than another. (What is last in the first round is a little older than a quarter of the steps
then.)

Averages whose weights grow so: Shamir & Zhang (2013), arXiv:1212.1824, section 4.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.math.linalg import scalar

_DTYPE = tf.float64
# Steps taken per step between updates. Found by trial, like the power: see docs/step-control.md.
_AGE_PER_GAP = 4
_POWER = 3


def is_due(step: tf.Tensor, period: tf.Tensor, turn: float = 0.0) -> tf.Tensor:
    """Whether it is time for what happens once in `period` steps, and more often at first.

    Args:
        step: Steps taken before this one, integer scalar.
        period: Integer scalar.
        turn: When in a period, in [0, 1).

    Returns:
        Boolean scalar: true where `step` is the first in an interval `[1.25ᵏ, 1.25ᵏ⁺¹)`, and at
        step 0; from `4 · period` on, where the intervals get longer than that, once in a period.

    Example:
    >>> [step for step in range(50) if is_due(step, 10)]
    [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 23, 29, 36, 40]
    >>> [step for step in range(50) if is_due(step, 10, turn=0.25)]
    [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 23, 29, 36, 42]
    """
    step, period = tf.cast(step, tf.int64), tf.cast(period, tf.int64)
    is_new = _interval(step) > _interval(step - 1)
    offset = tf.cast(turn * tf.cast(period, _DTYPE), tf.int64)
    return tf.where(step < _AGE_PER_GAP * period, is_new, tf.equal(step % period, offset))


def _interval(step: tf.Tensor) -> tf.Tensor:
    """`k` of the interval; a step below 1 is in one below 0, and so on."""
    logarithm = tf.math.log(tf.cast(tf.maximum(step, 1), _DTYPE)) / math.log1p(1 / _AGE_PER_GAP)
    return tf.where(step < 1, tf.cast(step, _DTYPE) - 1, tf.floor(logarithm))


def gap(step: tf.Tensor, period: tf.Tensor) -> tf.Tensor:
    """About so many steps lie between two that `is_due` says are due; float64 scalar.

    Example:
    >>> [float(gap(step, 10)) for step in (1, 20, 100)]
    [1.0, 5.0, 10.0]
    """
    return tf.clip_by_value(scalar(step, _DTYPE) / _AGE_PER_GAP, 1.0, scalar(period, _DTYPE))


def growing_decay(age: tf.Tensor, period: tf.Tensor) -> tf.Tensor:
    """Decay, per update, of a moving average in which the update of step `s` counts as `s³`.

    Args:
        age: Steps taken before this update, scalar.
        period: The period of the updates, scalar.

    Returns:
        Float64 scalar in [0, 1).

    Example:
    >>> [round(float(growing_decay(age, 5)), 2) for age in (0, 1, 4, 20, 100, 300)]
    [0.0, 0.12, 0.51, 0.51, 0.86, 0.95]
    """
    age = scalar(age, _DTYPE)
    return (age / (age + gap(age, period))) ** _POWER


def in_turns(costs: Sequence[int], turns: int) -> list[list[int]]:
    """Spreads tasks over turns of about the same cost.

    Args:
        costs: Of the tasks.
        turns: How many turns, at most.

    Returns:
        Indices of the tasks of each turn, none of them empty. The dearest task still without a turn
        goes to the one that costs least: Graham (1969), "Bounds on multiprocessing timing
        anomalies", section 5.

    Example:
    >>> in_turns([8, 1, 5, 1], turns=2)
    [[0], [1, 2, 3]]
    """
    results: list[list[int]] = [[] for _ in range(min(turns, len(costs)))]
    for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
        cheapest = min(results, key=lambda tasks: (sum(costs[i] for i in tasks), len(tasks)))
        cheapest.append(task)
    return [sorted(tasks) for tasks in results]
