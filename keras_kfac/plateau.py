"""A callback that changes the damping when training stalls."""

import math
from typing import Any

import keras

from keras_kfac import validation
from keras_kfac.callbacks import kfac_of


class DampingOnPlateau(keras.callbacks.Callback):
    """Multiplies the damping when a metric has stopped improving.

    As Keras's `ReduceLROnPlateau` does with the learning rate. More damping makes shorter steps,
    closer to the gradient. An adaptive damping is fixed by the first change, at what it was times
    `factor`.

    Args:
        monitor: Name of the quantity in the logs, one that falls while training goes well.
        factor: What the damping is multiplied by, `> 0` and not 1.
        patience: Epochs without improvement before a change, a positive int.
        min_delta: The least fall of the quantity that counts as an improvement, `>= 0`.
        maximum: Ceiling of the damping, `None` for none.

    Raises:
        ValueError: For arguments out of range; in training, if the logs lack the quantity.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=KFAC(damping=0.5), loss="mse")
    >>> stalls = DampingOnPlateau("loss", factor=4.0, patience=1, min_delta=100.0)
    >>> callbacks = [KFACCallback(), stalls]
    >>> _ = model.fit(np.eye(2), np.eye(2)[:, :1], epochs=2, verbose=0, callbacks=callbacks)
    >>> float(model.optimizer.damping)
    2.0
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 2.0,
        patience: int = 10,
        min_delta: float = 1e-4,
        maximum: float | None = None,
    ) -> None:
        super().__init__()
        validation.check_plateau(factor, min_delta)
        validation.check_positive_int("patience", patience)
        validation.check_positive("maximum", maximum)
        self.monitor = monitor
        self.factor = factor
        self.patience = patience
        self.min_delta = min_delta
        self.maximum = maximum

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Forgets earlier training."""
        self._best, self._waited = math.inf, 0

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Changes the damping if it is time to."""
        logs = logs or {}
        if self.monitor not in logs:
            raise ValueError(
                f"The logs have no {self.monitor!r} to watch. Choose `monitor` among "
                f"{sorted(logs)}. Received: monitor={self.monitor!r}"
            )
        if logs[self.monitor] < self._best - self.min_delta:
            self._best, self._waited = logs[self.monitor], 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            self._waited = 0
            optimizer = kfac_of(self.model)
            damping = float(keras.ops.convert_to_numpy(optimizer.damping)) * self.factor
            optimizer.damping = damping if self.maximum is None else min(damping, self.maximum)
