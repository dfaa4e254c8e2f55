"""The callback that connects K-FAC with `fit`."""

from collections.abc import Callable
from typing import Any

import keras

from keras_kfac.optimizer import KFAC

PeriodSchedule = int | Callable[[int], int]


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
        inverse_update_period: Likewise. Early in training curvature changes fast and frequent
            refreshes pay; later, rare ones do.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=KFAC(), loss="mse")
    >>> callback = KFACCallback(inverse_update_period=lambda epoch: 10 if epoch == 0 else 50)
    >>> history = model.fit(np.eye(2), np.eye(2)[:, :1], epochs=2, verbose=0, callbacks=[callback])
    >>> model.optimizer.inverse_update_period
    50
    """

    def __init__(
        self,
        factor_update_period: PeriodSchedule | None = None,
        inverse_update_period: PeriodSchedule | None = None,
    ) -> None:
        super().__init__()
        self.factor_update_period = factor_update_period
        self.inverse_update_period = inverse_update_period

    @property
    def optimizer(self) -> KFAC:
        """The model's K-FAC optimizer, inside a `LossScaleOptimizer` or not.

        Raises:
            ValueError: If the model is compiled with another optimizer.
        """
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        if not isinstance(optimizer, KFAC):
            raise ValueError(
                "`KFACCallback` needs a model compiled with `optimizer=keras_kfac.KFAC(...)`. "
                f"Received: optimizer={optimizer!r}"
            )
        return optimizer

    def set_model(self, model: keras.Model) -> None:
        """Attaches the optimizer before anything is traced."""
        super().set_model(model)
        self.optimizer.attach(model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Applies the schedules of the update periods."""
        optimizer = self.optimizer
        optimizer.set_update_periods(
            _at(self.factor_update_period, epoch, optimizer.factor_update_period),
            _at(self.inverse_update_period, epoch, optimizer.inverse_update_period),
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Logs, and warns of problems."""
        optimizer = self.optimizer
        optimizer.report_problems()
        if logs is not None:
            logs.update({name: float(value) for name, value in optimizer.last_step().items()})
            for name in ("skipped_steps", "rejected_steps"):
                logs[name] = int(getattr(optimizer, name).numpy())


def _at(schedule: PeriodSchedule | None, epoch: int, current: int) -> int:
    if schedule is None:
        return current
    return schedule(epoch) if callable(schedule) else schedule
