"""The hyperparameters of K-FAC: fixed, scheduled or adaptive, also in the midst of training."""

from typing import Any, Self

import keras

from keras_kfac import validation
from keras_kfac.curvature.choice import Curvature, curvature_to_config
from keras_kfac.damping import LevenbergMarquardt
from keras_kfac.introspection.weight_sharing import Choice
from keras_kfac.restorable import RestorableOptimizer
from keras_kfac.settings import ADAPTIVE, Setting, check_can_adapt, is_adaptive, to_config

_FACTOR_UPDATE_PERIOD = 10  # Unless said otherwise, or inverses are refreshed more often.


class ConfiguredOptimizer(RestorableOptimizer):
    """Holds the arguments of `KFAC`, which describes them.

    What may change while a compiled step runs is a variable: periods, and every `Setting`.
    """

    def __init__(
        self,
        learning_rate: Any,
        damping: Any,
        momentum: Any,
        factor_ema_decay: Any,
        factor_update_period: int | None,
        inverse_update_period: int,
        curvature: Curvature,
        likelihood: Any,
        fisher: str,
        fisher_samples: int,
        exact_damping: bool,
        weight_sharing: Choice,
        kl_clip: Any,
        burn_in_steps: int,
        max_factor_size: int,
        memory_limit: int | None,
        product_dtype: str | None,
        fallback: keras.optimizers.Optimizer | None,
        seed: int,
        name: str,
        **kwargs: Any,
    ) -> None:
        fallback = validation.check_fallback(fallback)
        adapts = is_adaptive(learning_rate)
        initial = 0.0 if adapts else validation.check_learning_rate(learning_rate)
        super().__init__(fallback, learning_rate=initial, name=name, **kwargs)
        self._can_adapt_learning_rate = adapts
        self._adapts_learning_rate = self.add_variable(
            (), dtype="bool", name="adapts_learning_rate"
        )
        self._adapts_learning_rate.assign(adapts)
        self.factor_ema_decay = validation.check_ema_decay(factor_ema_decay)
        self.curvature = validation.check_curvature(curvature)
        self.likelihood = validation.check_likelihood(likelihood)
        self.fisher = validation.check_fisher(fisher, self.curvature)
        self.fisher_samples = validation.check_positive_int("fisher_samples", fisher_samples)
        self.exact_damping = validation.check_bool("exact_damping", exact_damping)
        self.weight_sharing = validation.check_weight_sharing(weight_sharing)
        self.kl_clip = validation.check_kl_clip(kl_clip)
        self.burn_in_steps = validation.check_count("burn_in_steps", burn_in_steps)
        self.max_factor_size = validation.check_positive_int("max_factor_size", max_factor_size)
        self.memory_limit = validation.check_memory_limit(memory_limit)
        self.product_dtype = validation.check_product_dtype(product_dtype)
        self.seed = seed
        self._factor_update_period = self.add_variable((), dtype="int64", name="factor_period")
        self._inverse_update_period = self.add_variable((), dtype="int64", name="inverse_period")
        if factor_update_period is None:
            validation.check_positive_int("inverse_update_period", inverse_update_period)
            factor_update_period = min(_FACTOR_UPDATE_PERIOD, inverse_update_period)
        self.set_update_periods(factor_update_period, inverse_update_period)
        self._has_momentum = momentum != 0
        check = validation.check_momentum if self._has_momentum else validation.check_no_momentum
        self._momentum = Setting("momentum", momentum, check, self.add_variable)
        self._damping_rule = _damping_rule(damping)
        damping = damping if self._damping_rule is None else ADAPTIVE
        self._damping = Setting("damping", damping, validation.check_damping, self.add_variable)

    @property
    def can_adapt(self) -> bool:
        """Whether anything was created to adapt itself; if not, no step is modelled."""
        return (
            self._can_adapt_learning_rate
            or self._momentum.can_adapt
            or self._damping_rule is not None
        )

    @property
    def learning_rate(self) -> Any:
        """The learning rate `α`: a variable (the rate of the last step, if adaptive), or a value.

        Assigning a float fixes an adaptive rate, `"adaptive"` sets it free again.
        """
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, str):
            check_can_adapt("learning_rate", value, self._can_adapt_learning_rate)
            self._adapts_learning_rate.assign(True)
            return
        keras.optimizers.Optimizer.learning_rate.fset(self, value)
        self._adapts_learning_rate.assign(False)

    @property
    def momentum(self) -> Any:
        """The momentum `μ`: a variable (that of the last step, if adaptive), or a schedule's value.

        Assigning a float fixes an adaptive momentum, `"adaptive"` sets it free again.
        """
        return self._momentum.at(self.iterations)

    @momentum.setter
    def momentum(self, value: float | str) -> None:
        self._momentum.assign(value)

    @property
    def damping(self) -> Any:
        """The damping `λ`: a variable, to which floats can be assigned, or a schedule's value.

        Assigning a float fixes an adaptive damping, `"adaptive"` sets it free again.
        """
        return self._damping.at(self.iterations)

    @damping.setter
    def damping(self, value: float | str) -> None:
        self._damping.assign(value)

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
        if bool(self._adapts_learning_rate.numpy()):
            config["learning_rate"] = ADAPTIVE
        damping = self._damping.config()
        if damping == ADAPTIVE:
            damping = keras.saving.serialize_keras_object(self._damping_rule)
        return {
            **config,
            "damping": damping,
            "momentum": self._momentum.config(),
            "factor_ema_decay": to_config(self.factor_ema_decay),
            "factor_update_period": self.factor_update_period,
            "inverse_update_period": self.inverse_update_period,
            "curvature": curvature_to_config(self.curvature),
            "likelihood": keras.saving.serialize_keras_object(self.likelihood),
            "fisher": str(self.fisher),
            "fisher_samples": self.fisher_samples,
            "exact_damping": self.exact_damping,
            "weight_sharing": self.weight_sharing,
            "kl_clip": to_config(self.kl_clip),
            "burn_in_steps": self.burn_in_steps,
            "max_factor_size": self.max_factor_size,
            "memory_limit": self.memory_limit,
            "product_dtype": self.product_dtype,
            "fallback": keras.optimizers.serialize(self.fallback),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Creates an optimizer from the result of `get_config`."""
        config = dict(config)
        for name in (
            "damping",
            "momentum",
            "factor_ema_decay",
            "kl_clip",
            "curvature",
            "likelihood",
            "fallback",
        ):
            if isinstance(config.get(name), (dict, list)):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return super().from_config(config, custom_objects=custom_objects)


def _damping_rule(damping: Any) -> LevenbergMarquardt | None:
    if is_adaptive(damping):
        return LevenbergMarquardt()
    return damping if isinstance(damping, LevenbergMarquardt) else None
