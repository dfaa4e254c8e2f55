"""The schedules and the logs of the callback."""

import keras
import numpy as np
import pytest

from keras_kfac import KFAC, KFACCallback
from tests import helpers

STEPS = 3  # of an epoch


class Watch(keras.callbacks.Callback):
    """Notes a property of the optimizer after each batch."""

    def __init__(self, name):
        super().__init__()
        self.name, self.seen = name, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(getattr(helpers.inner(self.model), self.name)))


def watched(name, optimizer, epochs=2, **kwargs):
    """The values of a property at each step, under a callback with the given arguments."""
    model = helpers.compiled(helpers.mlp(), optimizer)
    watch = Watch(name)
    x, y = helpers.vectors(STEPS * helpers.BATCH)
    callbacks = [KFACCallback(**kwargs), watch]
    model.fit(x, y, batch_size=helpers.BATCH, epochs=epochs, verbose=0, callbacks=callbacks)
    return watch.seen


PERIODS = ["factor_update_period", "inverse_update_period"]


class TestSchedules:
    @pytest.mark.parametrize("name", PERIODS)
    def test_periods_by_epoch(self, name):
        optimizer = helpers.kfac(inverse_update_period=9)
        seen = watched(name, optimizer, **{name: lambda epoch: 3 + epoch})
        assert seen == [3] * STEPS + [4] * STEPS

    @pytest.mark.parametrize("name", PERIODS)
    def test_periods_by_step_count_on_over_the_epochs(self, name):
        optimizer = helpers.kfac(inverse_update_period=9)
        seen = watched(name, optimizer, unit="step", **{name: lambda step: 3 + step})
        assert seen == list(range(3, 3 + 2 * STEPS))

    def test_steps_are_those_of_the_optimizer(self):
        seen = watched(
            "damping",
            helpers.kfac(gradient_accumulation_steps=3),
            damping=lambda step: 1.0 + step,
            unit="step",
        )
        assert seen == [1, 1, 1, 2, 2, 2]

    def test_damping_by_step_equals_a_schedule_of_the_optimizer(self):
        schedule = keras.optimizers.schedules.InverseTimeDecay(0.5, 1, 1.0)
        weights = []
        data = helpers.vectors()
        for damping, callback in (
            (0.1, KFACCallback(damping=lambda step: 0.5 / (1 + step), unit="step")),
            (schedule, KFACCallback()),
        ):
            model = helpers.compiled(helpers.mlp(), helpers.kfac(damping=damping))
            model.fit(*data, helpers.BATCH, shuffle=False, verbose=0, callbacks=[callback])
            weights.append(helpers.weights(model))
        helpers.assert_same(*weights, rtol=1e-6, atol=1e-7)

    def test_damping_is_fixed_and_set_free(self):
        seen = watched(
            "damping",
            KFAC(damping="adaptive"),
            epochs=5,
            damping=lambda epoch: 0.25 if epoch == 1 else "adaptive",
        )
        epochs = np.reshape(seen, [5, STEPS])
        assert (epochs[1] == 0.25).all()
        assert (epochs[0] != 0.25).all()
        assert len(set(np.ravel(epochs[2:]))) > 1

    def test_what_is_not_scheduled_stays(self):
        optimizer = helpers.kfac(inverse_update_period=7)
        watched("damping", optimizer, factor_update_period=2)
        assert (optimizer.factor_update_period, optimizer.inverse_update_period) == (2, 7)
        assert float(optimizer.damping) == pytest.approx(0.1)

    @pytest.mark.parametrize("damping", [0.1, "adaptive"])
    def test_constant_damping_belongs_to_the_optimizer(self, damping):
        with pytest.raises(ValueError, match=r"a constant to the optimizer. Received: damping"):
            KFACCallback(damping=damping)

    def test_unknown_unit_is_refused(self):
        with pytest.raises(ValueError, match=r"'epoch' or 'step'. Received: unit='batch'"):
            KFACCallback(unit="batch")

    def test_bad_value_of_a_schedule_is_refused(self):
        with pytest.raises(ValueError, match=r"must be a positive int. Received"):
            watched("damping", helpers.kfac(), factor_update_period=lambda epoch: 0)
        with pytest.raises(ValueError, match=r"fixed `damping`.*damping='adaptive'"):
            watched("damping", helpers.kfac(), damping=lambda epoch: "adaptive")


class TestConditionNumbers:
    def test_are_those_of_the_damped_blocks(self):
        with helpers.precision("float64"):
            optimizer = helpers.kfac()
            assert optimizer.condition_numbers() == {}
            helpers.fit(helpers.compiled(helpers.mlp(), optimizer), helpers.vectors())
            numbers = optimizer.condition_numbers()
            inverses = helpers.inverses(optimizer)
        assert list(numbers) == [row.layer for row in optimizer.coverage()]
        for index, number in enumerate(numbers.values()):
            a, g = (m for name, m in sorted(inverses.items()) if f".block.{index}." in name)
            expected = np.linalg.cond(np.kron(a, g), 1)
            assert number == pytest.approx(expected, rel=1e-10)

    def test_are_one_for_a_damping_that_drowns_the_factors(self):
        optimizer = helpers.kfac(damping=1e12)
        history = helpers.fit(helpers.compiled(helpers.mlp(), optimizer), helpers.vectors())
        numbers = optimizer.condition_numbers().values()
        assert list(numbers) == pytest.approx([1, 1], abs=1e-3)
        assert history.history["condition_number"][-1] == max(numbers)
