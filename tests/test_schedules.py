"""Schedules that watch the training: by staleness of the inverses, by a plateau of the loss."""

import keras
import pytest

from keras_kfac import KFAC, DampingOnPlateau, KFACCallback, StalenessSchedule
from tests import helpers


class TestStaleness:
    def fit(self, schedule, optimizer, unit="step", epochs=1):
        model = helpers.compiled(helpers.mlp(), optimizer)
        x, y = helpers.vectors(12 * helpers.BATCH)
        callback = KFACCallback(inverse_update_period=schedule, unit=unit)
        model.fit(x, y, helpers.BATCH, epochs, verbose=0, callbacks=[callback])

    @pytest.mark.parametrize("unit", ["step", "epoch"])
    def test_inverses_that_hardly_change_are_refreshed_rarely(self, unit):
        optimizer = helpers.kfac(damping=1e6, factor_update_period=1, inverse_update_period=2)
        self.fit(StalenessSchedule(shortest=1, longest=8), optimizer, unit, epochs=4)
        assert (optimizer.factor_update_period, optimizer.inverse_update_period) == (4, 8)
        assert max(optimizer.staleness().values()) < 0.1

    def test_inverses_that_change_are_refreshed_often(self):
        optimizer = helpers.kfac(
            damping=1e-6, factor_update_period=4, inverse_update_period=4, factor_ema_decay=0.0
        )
        self.fit(StalenessSchedule(1e-6, 1e-4, shortest=1), optimizer)
        assert (optimizer.factor_update_period, optimizer.inverse_update_period) == (1, 1)

    def test_is_not_read_at_every_step(self, monkeypatch):
        reads = []
        optimizer = helpers.kfac(factor_update_period=4, inverse_update_period=4)
        original = optimizer.staleness
        monkeypatch.setattr(optimizer, "staleness", lambda: reads.append(1) or original())
        self.fit(StalenessSchedule(1e-9, 1e9, shortest=4, longest=4), optimizer)
        assert len(reads) == 3

    def test_is_empty_before_the_first_step(self):
        assert KFAC().staleness() == {}
        assert StalenessSchedule(shortest=5, longest=50).next(7, {}) == 7
        assert StalenessSchedule(shortest=5, longest=50).next(100, {}) == 50

    @pytest.mark.parametrize(
        "arguments", [(0.2, 0.1), (0.1, 0.1), (0.1, 0.2, 9, 8), (-1.0, 0.2), (0.1, 0.2, 0, 8)]
    )
    def test_bad_bounds_are_refused(self, arguments):
        with pytest.raises(ValueError, match=r"Received: "):
            StalenessSchedule(*arguments)


class TestPlateau:
    def fit(self, callback, optimizer=None, losses=(3.0, 2.0, 2.0, 1.9, 2.5, 2.5)):
        optimizer = optimizer or helpers.kfac(damping=1.0)
        model = helpers.compiled(helpers.mlp(), optimizer)

        class Told(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                logs["told"] = losses[epoch]

        class Watch(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                seen.append(float(optimizer.damping))

        seen: list[float] = []
        x, y = helpers.vectors(helpers.BATCH)
        callbacks = [KFACCallback(), Told(), callback, Watch()]
        model.fit(x, y, helpers.BATCH, len(losses), verbose=0, callbacks=callbacks)
        return seen

    def test_damping_changes_after_so_many_epochs_without_improvement(self):
        assert self.fit(DampingOnPlateau("told", 3.0, patience=1)) == [1, 1, 3, 3, 9, 27]
        assert self.fit(DampingOnPlateau("told", 3.0, patience=2)) == [1, 1, 1, 1, 1, 3]
        assert self.fit(DampingOnPlateau("told", 3.0, 2, min_delta=0.5)) == [1, 1, 1, 3, 3, 9]

    def test_ceiling(self):
        assert max(self.fit(DampingOnPlateau("told", 3.0, patience=1, maximum=5.0))) == 5.0

    def test_adaptive_damping_is_fixed_by_the_first_change(self):
        optimizer = helpers.kfac(damping="adaptive")
        seen = self.fit(DampingOnPlateau("told", 2.0, patience=3), optimizer, (1.0,) * 6)
        assert len(set(seen[3:])) == 1

    def test_unknown_quantity_is_refused(self):
        with pytest.raises(ValueError, match=r"no 'val_loss' to watch.*'loss'.*Received: monitor"):
            self.fit(DampingOnPlateau())

    @pytest.mark.parametrize(
        "arguments",
        [
            {"factor": 1.0},
            {"factor": 0.0},
            {"factor": None},
            {"patience": 0},
            {"min_delta": -1.0},
            {"maximum": 0.0},
        ],
    )
    def test_bad_arguments_are_refused(self, arguments):
        (name,) = arguments
        with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
            DampingOnPlateau(**arguments)

    def test_other_optimizer_is_refused(self):
        model = helpers.compiled(helpers.mlp(), keras.optimizers.Adam())
        with pytest.raises(ValueError, match=r"needs a model compiled with `optimizer=keras_kfac"):
            model.fit(
                *helpers.vectors(helpers.BATCH),
                epochs=2,
                verbose=0,
                callbacks=[DampingOnPlateau("loss", patience=1, min_delta=1e9)],
            )
