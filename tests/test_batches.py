"""Batches that grow: their sizes, their order, and training on them."""

import itertools

import keras
import numpy as np
import pytest

from keras_kfac import KFAC, growing_batches
from tests import helpers


def taken(data, batch_size, count, **kwargs):
    return list(growing_batches(data, batch_size, **kwargs).take(count).as_numpy_iterator())


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_every_pass_shows_each_example_once(seed):
    batches = taken(np.arange(10), lambda step: 3 + step, 8, seed=seed)
    assert [len(batch) for batch in batches] == [3, 4, 5, 6, 7, 8, 9, 10]
    stream = np.concatenate(batches)
    for start in range(0, 50, 10):
        assert sorted(stream[start : start + 10]) == list(range(10))


def test_order_depends_on_seed_and_pass():
    def passes(seed):
        return np.concatenate(taken(np.arange(50), lambda step: 25, 4, seed=seed)).reshape(2, 50)

    first, second = passes(1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, passes(2)[0])
    np.testing.assert_array_equal(passes(1), [first, second])
    np.testing.assert_array_equal(passes(None), [np.arange(50)] * 2)


def test_size_is_kept_between_one_and_all_examples():
    sizes = [len(batch) for batch in taken(np.arange(4), lambda step: 3 * step - 1, 4)]
    assert sizes == [1, 2, 4, 4]


def test_keras_schedule_gives_the_sizes():
    schedule = keras.optimizers.schedules.ExponentialDecay(2, 2, decay_rate=2.0)
    sizes = [len(batch) for batch in taken(np.arange(99), schedule, 7)]
    assert sizes == [2, 2, 4, 5, 8, 11, 16]


def test_arrays_stay_together():
    x = np.random.default_rng(0).normal(size=(7, 2))
    for rows, (label, weight) in taken((x, (x[:, 0], x[:, 1])), lambda step: 3, 5):
        np.testing.assert_array_equal(rows, np.stack([label, weight], 1))


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_fit_trains_on_them_without_tracing_again(steps_per_execution):
    traces = itertools.count()

    class Counting(keras.Sequential):
        def call(self, *args, **kwargs):
            next(traces)
            return super().call(*args, **kwargs)

    model = helpers.compiled(
        helpers.mlp(cls=Counting), KFAC(), steps_per_execution=steps_per_execution
    )
    stream = growing_batches(helpers.vectors(), lambda step: 2 + step)
    helpers.fit(model, (stream,), batch_size=None, shuffle=None, steps_per_epoch=4)
    before = next(traces)
    helpers.fit(model, (stream,), batch_size=None, shuffle=None, steps_per_epoch=8, epochs=2)
    assert next(traces) == before + 1
    assert int(model.optimizer.iterations) == 20
    helpers.assert_all_finite(model)


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ((np.ones(3), np.ones(4)), lambda step: 2, r"same number of examples.*: \[3, 4\]"),
        (np.ones((0, 2)), lambda step: 2, r"at least one. Received: \[0\]"),
        (np.ones(3), 2, "must be a function of the step.*of type 'int'"),
        (np.ones(3), np.ones(3), r"several arrays one tuple.*of type 'ndarray'$"),
    ],
)
def test_bad_input_is_refused(data, batch_size, message):
    with pytest.raises(ValueError, match=message):
        growing_batches(data, batch_size)
