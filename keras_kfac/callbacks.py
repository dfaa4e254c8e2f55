"""The callback that connects K-FAC with `fit`."""

from collections.abc import Callable
from typing import Any

import keras

from keras_kfac import validation
from keras_kfac.optimizer import KFAC
from keras_kfac.staleness import StalenessSchedule

PeriodSchedule = int | Callable[[int], int]
DampingSchedule = Callable[[int], float | str]


class KFACCallback(keras.callbacks.Callback):
    """Attaches a `KFAC` optimizer to the model in `fit`, schedules its updates, and logs.

    At the end of each epoch it adds what `KFAC.last_step` tells of the last step, `skipped_steps`
    and `rejected_steps` to the logs, for the progress bar, `History`, `CSVLogger` and TensorBoard.
    It warns of skipped steps and factors that could not be inverted. Nothing is read from the
    device in between.

    The optimizer stays attached after `fit`.

    Args:
        factor_update_period: Int, or function of the epoch (counted from 0), that replaces the
            optimizer's at the start of each epoch. `None` leaves it.
        inverse_update_period: Likewise, or a `StalenessSchedule`. Early in training curvature
            changes fast and frequent refreshes pay; later, rare ones do.
        damping: Function of the epoch that gives the damping: a float fixes it, `"adaptive"` lets
            it adapt itself (if the optimizer was created so). `None` leaves it.
        unit: What the schedules count: `"epoch"`, or `"step"` for the steps that the optimizer has
            taken. With `steps_per_execution` a schedule by steps acts between executions.

    Raises:
        ValueError: For an unknown unit.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=KFAC(), loss="mse")
    >>> callback = KFACCallback(
    ...     inverse_update_period=lambda step: 10 if step < 100 else 50,
    ...     damping=lambda step: "adaptive" if step < 1000 else 0.1,
    ...     unit="step",
    ... )
    >>> history = model.fit(np.eye(2), np.eye(2)[:, :1], epochs=2, verbose=0, callbacks=[callback])
    >>> model.optimizer.inverse_update_period
    10
    """

    def __init__(
        self,
        factor_update_period: PeriodSchedule | None = None,
        inverse_update_period: PeriodSchedule | StalenessSchedule | None = None,
        damping: DampingSchedule | None = None,
        unit: str = "epoch",
    ) -> None:
        super().__init__()
        validation.check_damping_schedule(damping)
        self.factor_update_period = factor_update_period
        self.inverse_update_period = inverse_update_period
        self.damping = damping
        self.unit = validation.check_unit(unit)
        self._step = 0
        self._next_look = 0  # at the staleness
        self._last: tuple[Any, ...] = ()  # what was applied last

    @property
    def optimizer(self) -> KFAC:
        """The model's K-FAC optimizer, inside a `LossScaleOptimizer` or not.

        Raises:
            ValueError: If the model is compiled with another optimizer.
        """
        return kfac_of(self.model)

    def set_model(self, model: keras.Model) -> None:
        """Attaches the optimizer before anything is traced."""
        super().set_model(model)
        self.optimizer.attach(model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Applies the schedules."""
        # Once an epoch steps are read from the optimizer; in between they are counted here.
        self._step = int(self.optimizer.iterations.numpy())
        self._burn_in = self.optimizer.burn_in_steps_left
        self._last = ()
        self._next_look = 0
        self._apply_schedules(epoch if self.unit == "epoch" else self._step)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Applies the schedules that count steps."""
        if self.unit == "step":
            micro_steps = self.optimizer.gradient_accumulation_steps or 1
            self._apply_schedules(self._step + max(0, batch - self._burn_in) // micro_steps)

    def _apply_schedules(self, count: int) -> None:
        optimizer = self.optimizer
        if isinstance(self.inverse_update_period, StalenessSchedule):
            self._follow_staleness(self.inverse_update_period, count)
            inverse_period = None
        else:
            inverse_period = _at(self.inverse_update_period, count)
        factor_period = _at(self.factor_update_period, count)
        damping = None if self.damping is None else self.damping(count)
        values = (factor_period, inverse_period, damping)
        if values == self._last:
            return
        self._last = values
        if factor_period is not None or inverse_period is not None:
            optimizer.set_update_periods(
                optimizer.factor_update_period if factor_period is None else factor_period,
                optimizer.inverse_update_period if inverse_period is None else inverse_period,
            )
        if damping is not None:
            optimizer.damping = damping

    def _follow_staleness(self, schedule: StalenessSchedule, count: int) -> None:
        if count < self._next_look:
            return
        optimizer = self.optimizer
        factor_period, period = optimizer.factor_update_period, optimizer.inverse_update_period
        new = schedule.next(period, optimizer.staleness())
        # Then there is news.
        self._next_look = count + (new if self.unit == "step" else 1)
        if new != period:
            optimizer.set_update_periods(max(1, factor_period * new // period), new)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Logs, and warns of problems."""
        optimizer = self.optimizer
        optimizer.report_problems()
        if logs is not None:
            logs.update(optimizer.last_step())
            for name in ("skipped_steps", "rejected_steps"):
                logs[name] = int(getattr(optimizer, name).numpy())


def _at(schedule: PeriodSchedule | None, count: int) -> int | None:
    return schedule(count) if callable(schedule) else schedule


def kfac_of(model: keras.Model) -> KFAC:
    """The model's K-FAC optimizer, inside a `LossScaleOptimizer` or not.

    Raises:
        ValueError: If the model is compiled with another optimizer.
    """
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    if not isinstance(optimizer, KFAC):
        raise ValueError(
            "This callback needs a model compiled with `optimizer=keras_kfac.KFAC(...)`. "
            f"Received: optimizer={optimizer!r}"
        )
    return optimizer
