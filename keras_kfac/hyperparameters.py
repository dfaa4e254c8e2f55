"""The hyperparameters of K-FAC: fixed, scheduled or adaptive, also in the midst of training."""

from typing import Any, Self

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_kfac import validation
from keras_kfac.damping import LevenbergMarquardt
from keras_kfac.restorable import RestorableOptimizer

ADAPTIVE = "adaptive"


class ConfiguredOptimizer(RestorableOptimizer):
    """Holds the arguments of `KFAC`, which describes them.

    What may change while a compiled step runs is a variable. A learning rate, momentum or damping
    that adapts itself is a variable too, with a flag beside it: assigning a number to the property
    clears the flag, assigning `"adaptive"` sets it again.
    """

    def __init__(
        self,
        learning_rate: Any,
        damping: Any,
        momentum: float | str,
        factor_ema_decay: float,
        factor_update_period: int,
        inverse_update_period: int,
        fisher: str,
        kl_clip: float | None,
        fallback: keras.optimizers.Optimizer | None,
        seed: int,
        name: str,
        **kwargs: Any,
    ) -> None:
        fallback = validation.check_fallback(fallback)
        is_adaptive = isinstance(learning_rate, str) and learning_rate == ADAPTIVE
        initial = 0.0 if is_adaptive else validation.check_learning_rate(learning_rate)
        super().__init__(fallback, learning_rate=initial, name=name, **kwargs)
        self._can_adapt_learning_rate = is_adaptive
        validation.check_unit_interval("factor_ema_decay", factor_ema_decay)
        validation.check_positive("kl_clip", kl_clip)
        self.factor_ema_decay = factor_ema_decay
        self.fisher = validation.check_fisher(fisher)
        self.kl_clip = kl_clip
        self.seed = seed
        self._factor_update_period = self.add_variable((), dtype="int64", name="factor_period")
        self._inverse_update_period = self.add_variable((), dtype="int64", name="inverse_period")
        self.set_update_periods(factor_update_period, inverse_update_period)
        self._adapts_learning_rate = self._flag("adapts_learning_rate", learning_rate)
        self._set_up_momentum(momentum)
        self._set_up_damping(damping)

    def _flag(self, name: str, value: Any) -> keras.Variable:
        flag = self.add_variable((), dtype="bool", name=name)
        flag.assign(isinstance(value, str) and value == ADAPTIVE)
        return flag

    @property
    def can_adapt(self) -> bool:
        """Whether anything was created to adapt itself; if not, no step is modelled."""
        return (
            self._can_adapt_learning_rate
            or self._can_adapt_momentum
            or self._damping_rule is not None
        )

    # ---- Learning rate and momentum -------------------------------------------------------------

    @property
    def learning_rate(self) -> Any:
        """The learning rate `α`: a variable (the rate of the last step, if adaptive), or a value.

        Assigning a float fixes an adaptive rate, `"adaptive"` sets it free again.
        """
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, str):
            _check_can_adapt("learning_rate", value, self._can_adapt_learning_rate)
            self._adapts_learning_rate.assign(True)
            return
        keras.optimizers.Optimizer.learning_rate.fset(self, value)
        self._adapts_learning_rate.assign(False)

    def _set_up_momentum(self, momentum: float | str) -> None:
        self._can_adapt_momentum = momentum == ADAPTIVE
        self._adapts_momentum = self._flag("adapts_momentum", momentum)
        self._momentum = self.add_variable((), dtype="float64", name="momentum")
        if not self._can_adapt_momentum:
            self._momentum.assign(validation.check_momentum(momentum))
        self._has_momentum = momentum != 0

    @property
    def momentum(self) -> keras.Variable:
        """The momentum `μ`, a variable; that of the last step, if adaptive.

        Assigning a float fixes an adaptive momentum, `"adaptive"` sets it free again.
        """
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | str) -> None:
        if isinstance(value, str):
            _check_can_adapt("momentum", value, self._can_adapt_momentum)
            self._adapts_momentum.assign(True)
            return
        validation.check_momentum(value)
        if value and not self._has_momentum:
            raise ValueError(
                "This optimizer was created without momentum and keeps no velocities. "
                f"Received: momentum={value!r}"
            )
        self._momentum.assign(value)
        self._adapts_momentum.assign(False)

    # ---- Damping --------------------------------------------------------------------------------

    def _set_up_damping(self, damping: Any) -> None:
        if isinstance(damping, str) and damping == ADAPTIVE:
            damping = LevenbergMarquardt()
        self._damping = self.add_variable((), dtype="float64", name="damping")
        self._adapts_damping = self._flag("adapts_damping", "")
        self._damping_schedule: LearningRateSchedule | None = None
        self._damping_rule: LevenbergMarquardt | None = None
        if isinstance(damping, LevenbergMarquardt):
            self._damping_rule = damping
            self._adapts_damping.assign(True)
        elif isinstance(damping, LearningRateSchedule):
            self._damping_schedule = damping
        else:
            self._damping.assign(validation.check_damping(damping))

    @property
    def damping(self) -> Any:
        """The damping `λ`: a variable, to which floats can be assigned, or a schedule's value.

        Assigning a float fixes an adaptive damping, `"adaptive"` sets it free again.
        """
        if self._damping_schedule is not None:
            return self._damping_schedule(self.iterations)
        return self._damping

    @damping.setter
    def damping(self, value: float | str) -> None:
        if isinstance(value, str):
            _check_can_adapt("damping", value, self._damping_rule is not None)
            self._adapts_damping.assign(True)
            return
        # As for Keras's learning rate: a compiled training step would not notice the change.
        if self._damping_schedule is not None:
            raise TypeError(
                "This optimizer was created with a schedule as its `damping`, which is not "
                f"settable. Create it with a float instead. Received: damping={value!r}"
            )
        self._damping.assign(validation.check_damping(value))
        self._adapts_damping.assign(False)

    # ---- Periods --------------------------------------------------------------------------------

    @property
    def factor_update_period(self) -> int:
        """Steps between updates of the factors."""
        return int(self._factor_update_period.numpy())

    @property
    def inverse_update_period(self) -> int:
        """Steps between refreshes of the inverses."""
        return int(self._inverse_update_period.numpy())

    def set_update_periods(self, factor_update_period: int, inverse_update_period: int) -> None:
        """Changes how often factors and inverses are renewed, also in the midst of training.

        Args:
            factor_update_period: Steps, a positive int.
            inverse_update_period: Steps, an int `>= factor_update_period`.

        Raises:
            ValueError: For anything else.
        """
        validation.check_periods(factor_update_period, inverse_update_period)
        self._factor_update_period.assign(factor_update_period)
        self._inverse_update_period.assign(inverse_update_period)

    # ---- Config ---------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Arguments to create the same optimizer again, without its state."""
        config = super().get_config()
        if self._adapts(self._adapts_learning_rate):
            config["learning_rate"] = ADAPTIVE
        return {
            **config,
            "damping": self._damping_config(),
            "momentum": ADAPTIVE
            if self._adapts(self._adapts_momentum)
            else float(self._momentum.numpy()),
            "factor_ema_decay": self.factor_ema_decay,
            "factor_update_period": self.factor_update_period,
            "inverse_update_period": self.inverse_update_period,
            "fisher": str(self.fisher),
            "kl_clip": self.kl_clip,
            "fallback": keras.optimizers.serialize(self.fallback),
            "seed": self.seed,
        }

    def _damping_config(self) -> Any:
        if self._damping_schedule is not None:
            return keras.optimizers.schedules.serialize(self._damping_schedule)
        if self._adapts(self._adapts_damping):
            return keras.saving.serialize_keras_object(self._damping_rule)
        return float(self._damping.numpy())

    @staticmethod
    def _adapts(flag: keras.Variable) -> bool:
        return bool(flag.numpy())

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Creates an optimizer from the result of `get_config`."""
        config = dict(config)
        for name in ("damping", "fallback"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return super().from_config(config, custom_objects=custom_objects)


def _check_can_adapt(name: str, value: str, can_adapt: bool) -> None:
    if value != ADAPTIVE:
        raise ValueError(f"`{name}` must be a number or 'adaptive'. Received: {name}={value!r}")
    if not can_adapt:
        raise ValueError(
            f"This optimizer was created with a fixed `{name}`. Create it with "
            f"{name}='adaptive' to let it adapt. Received: {name}={value!r}"
        )
