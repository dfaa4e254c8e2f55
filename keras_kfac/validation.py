"""Checks of arguments, with messages that say what to do."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from keras_kfac.curvature.choice import STRUCTURES, Curvature
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.known_losses import as_likelihood
from keras_kfac.introspection.weight_sharing import AUTO, EXPAND, REDUCE, Choice
from keras_kfac.math.linalg import known_value


def check_unit_interval(name: str, value: Any, otherwise: str = "") -> float:
    """Checks a number in [0, 1)."""
    if not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ValueError(f"`{name}` must be in [0, 1){otherwise}. Received: {name}={value!r}")
    return float(value)


def check_ema_decay(value: Any) -> Any:
    """Checks a number in [0, 1), or a schedule."""
    if isinstance(value, LearningRateSchedule):
        return value
    return check_unit_interval("factor_ema_decay", value, " or a `LearningRateSchedule`")


def check_kl_clip(value: Any) -> Any:
    """Checks a positive number, a schedule, or `None`."""
    if not isinstance(value, LearningRateSchedule):
        check_positive("kl_clip", value, "a positive number, a `LearningRateSchedule` or None")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Checks a truth value."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


def check_count(name: str, value: Any) -> int:
    """Checks an int that is at least 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"`{name}` must be an int >= 0. Received: {name}={value!r}")
    return int(value)


def check_memory_limit(value: Any) -> int | None:
    """Checks a number of bytes, or `None`."""
    if value is None:
        return None
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            "`memory_limit` must be a number of bytes, an int >= 1, or None. Received: "
            f"memory_limit={value!r}"
        )
    return int(value)


def check_likelihood(value: Any) -> Any:
    """Checks a loss, a function, or a list or dict of these, or `None`."""
    each = tf.nest.flatten(value)
    if not all(v is None or isinstance(v, str) or callable(v) for v in each):
        raise ValueError(
            "`likelihood` must be a Keras loss or a function from outputs to a "
            "`tfp.distributions.Distribution`, a list or dict of these by output, or None. "
            f"Received: likelihood={value!r}"
        )
    for one in each:
        if one is not None:
            as_likelihood(one)  # Raises if there is none.
    return value


def check_product_dtype(value: Any) -> str | None:
    """Checks the dtype of the products with inverses."""
    is_known = isinstance(value, str) and value in ("bfloat16", "float32", "float64")
    if value is not None and not is_known:
        raise ValueError(
            "`product_dtype` must be 'bfloat16', 'float32', 'float64' or None. Received: "
            f"product_dtype={value!r}"
        )
    return value


def check_open_unit_interval(name: str, value: Any) -> None:
    """Checks a number in (0, 1)."""
    if not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
        raise ValueError(f"`{name}` must be in (0, 1). Received: {name}={value!r}")


def check_momentum(value: Any) -> float:
    """Checks a number in [0, 1), where a word that means something else was possible."""
    if isinstance(value, numbers.Real):
        return check_unit_interval("momentum", value)
    raise ValueError(
        "`momentum` must be 'adaptive', in [0, 1) or a `LearningRateSchedule`. Received: "
        f"momentum={value!r}"
    )


def check_no_momentum(value: Any) -> float:
    """Checks what is assigned to a momentum that was created as 0."""
    if check_momentum(value):
        raise ValueError(
            "This optimizer was created without momentum and keeps no velocities. "
            f"Received: momentum={value!r}"
        )
    return 0.0


def check_learning_rate(value: Any) -> Any:
    """Checks a number `>= 0`, which becomes a float, a schedule or a callable."""
    if isinstance(value, numbers.Real) and 0 <= float(value) < math.inf:
        return float(value)
    if isinstance(value, LearningRateSchedule) or callable(value):
        return value
    raise ValueError(
        "`learning_rate` must be 'adaptive', a finite number >= 0, a `keras.optimizers.schedules."
        f"LearningRateSchedule` or a callable. Received: learning_rate={value!r}"
    )


def check_positive(name: str, value: float | None, what: str = "a positive number or None") -> None:
    """Checks a positive number, or `None`."""
    if value is None:
        return
    if not isinstance(value, numbers.Real) or not value > 0:
        raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")


def check_finite_positive(name: str, value: Any) -> float:
    """Checks a positive number that is finite."""
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
    return float(value)


def check_finite_not_negative(name: str, value: Any) -> float:
    """Checks a finite number that is at least 0."""
    if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"`{name}` must be a number >= 0. Received: {name}={value!r}")
    return float(value)


def check_positive_scalar(name: str, value: Any) -> None:
    """Checks a positive number that is finite, or a scalar tensor of one, if it can be known."""
    if tf.is_tensor(value) and value.shape.rank == 0:
        known = known_value(value)
        if known is None:
            return
        value = known.item()
    check_finite_positive(name, value)


def check_damping(value: Any) -> float:
    """Checks a finite number that is at least 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            "`damping` must be 'adaptive', a `LevenbergMarquardt` rule, a number >= 0 or a "
            f"`keras.optimizers.schedules.LearningRateSchedule`. Received: damping={value!r}"
        )
    return number


def check_periods(factor_update_period: int, inverse_update_period: int) -> None:
    """Checks positive ints, the first not above the second."""
    check_positive_int("factor_update_period", factor_update_period)
    check_positive_int("inverse_update_period", inverse_update_period)
    if inverse_update_period < factor_update_period:
        raise ValueError(
            "Refreshing inverses more often than their factors change is wasted work: "
            "`inverse_update_period` must be at least `factor_update_period`. Received: "
            f"inverse_update_period={inverse_update_period}, "
            f"factor_update_period={factor_update_period}"
        )


def check_staleness(low: float, high: float, shortest: int, longest: int) -> None:
    """Checks the bounds of a schedule by staleness."""
    check_positive("low", low, "a positive number")
    check_positive("high", high, "a positive number")
    check_positive_int("shortest", shortest)
    check_positive_int("longest", longest)
    if low >= high or shortest > longest:
        raise ValueError(
            "Bounds must be in order: low < high and shortest <= longest. Received: "
            f"low={low!r}, high={high!r}, shortest={shortest!r}, longest={longest!r}"
        )


def check_plateau(factor: float, min_delta: float) -> None:
    """Checks how `DampingOnPlateau` changes the damping, and when."""
    check_positive("factor", factor, "a positive number other than 1")
    if factor is None or factor == 1:
        raise ValueError(f"`factor` must be a positive number other than 1. Received: {factor=}")
    if not isinstance(min_delta, numbers.Real) or not min_delta >= 0:
        raise ValueError(f"`min_delta` must be a number >= 0. Received: {min_delta=}")


def check_positive_int(name: str, value: Any) -> int:
    """Checks an int that is at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}")
    return int(value)


def check_damping_bounds(
    initial: Any, minimum: float | None, maximum: float | None, word: str
) -> None:
    """Checks positive numbers in order, each of which may be missing; the first may be a word."""
    if isinstance(initial, str) and initial == word:
        initial = None
    check_positive("initial", initial, f"a positive number, {word!r} or None")
    given = {"minimum": minimum, "initial": initial, "maximum": maximum}
    for name, value in given.items():
        check_positive(name, value)
    present = [value for value in given.values() if value is not None]
    if present != sorted(present):
        raise ValueError(
            "The damping must start between its floor and its ceiling: minimum <= initial <= "
            f"maximum. Received: {', '.join(f'{n}={v!r}' for n, v in given.items())}"
        )


def check_fisher(value: str, curvature: Curvature) -> str:
    """Checks the name of a kind of Fisher matrix, for a structure of curvature."""
    choices = [str(member) for member in Fisher]
    if value not in choices:
        raise ValueError(f"`fisher` must be one of {choices}. Received: fisher={value!r}")
    names = curvature.values() if isinstance(curvature, Mapping) else [curvature]
    without = [name for name, block in STRUCTURES.items() if not block.needs_gradients]
    if value == Fisher.FORWARD_ONLY and callable(curvature):
        raise ValueError(
            "With fisher='forward_only' `curvature` can't be a function: it would have to return "
            f"one of {without} for each layer, which is not known beforehand. Use a dict. "
            f"Received: curvature={curvature!r}"
        )
    if value == Fisher.FORWARD_ONLY and not all(name in without for name in names):
        raise ValueError(
            "fisher='forward_only' has no gradients of single examples, which structures other "
            f"than {without} are made of. Received: curvature={curvature!r}"
        )
    return str(value)


def check_curvature(value: Curvature) -> Curvature:
    """Checks the name of a structure, such names by layer, or a function."""
    if isinstance(value, Mapping):
        are_keys = all(isinstance(k, str) or _is_layer_class(k) for k in value)
        if are_keys and all(name in STRUCTURES for name in value.values()):
            return dict(value)
    elif (isinstance(value, str) and value in STRUCTURES) or callable(value):
        return value
    raise ValueError(
        f"`curvature` must be one of {list(STRUCTURES)}, a dict from names, paths or classes of "
        "layers to these, or a function of a layer that returns one or None. Received: "
        f"curvature={value!r}"
    )


def _is_layer_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, keras.Layer)


def check_weight_sharing(value: Choice) -> Choice:
    """Checks the name of an approximation, or such names by layer."""
    if isinstance(value, Mapping):
        if all(choice in (EXPAND, REDUCE) for choice in value.values()):
            return dict(value)
    elif value in (AUTO, EXPAND, REDUCE):
        return value
    raise ValueError(
        f"`weight_sharing` must be {AUTO!r}, {EXPAND!r} or {REDUCE!r}, or a dict from names of "
        f"layers to one of the last two. Received: weight_sharing={value!r}"
    )


def check_fallback(
    value: keras.optimizers.Optimizer | None,
) -> keras.optimizers.Optimizer:
    """Checks the fallback optimizer; `None` is Adam."""
    if value is None:
        return keras.optimizers.Adam()
    if not isinstance(value, keras.optimizers.Optimizer):
        raise ValueError(
            f"`fallback` must be a `keras.optimizers.Optimizer`. Received: fallback={value!r}"
        )
    return value


def check_attachable(model: Any) -> None:
    """Checks a model that hooks can be put on."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    for strategy in (tf.distribute.get_strategy(), getattr(model, "distribute_strategy", None)):
        if strategy is not None and _has_replicas(strategy):
            raise NotImplementedError(
                "K-FAC does not support training on several replicas yet. Train on one device, "
                "without a distribution strategy or with `tf.distribute.OneDeviceStrategy`. "
                f"Received: a {type(strategy).__name__} of {strategy.num_replicas_in_sync} replicas"
            )


def _has_replicas(strategy: tf.distribute.Strategy) -> bool:
    """Whether variables are mirrored, if only on one device: that takes other ways to step them."""
    kinds = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    return strategy.num_replicas_in_sync > 1 or isinstance(strategy, kinds)


def check_trainable(
    model: keras.Model,
    variables: Sequence[keras.Variable] | None,
    is_known: Callable[[keras.Variable], bool] | None,
) -> None:
    """Checks that there is something to train, known to an optimizer that is already built.

    Args:
        model: The model to attach; nothing is checked before it is built.
        variables: Those to train, if not all trainable variables of the model.
        is_known: Whether the optimizer was built for a variable; `None` if it is not built.
    """
    if not model.built:
        return
    trained = model.trainable_variables if variables is None else variables
    if not trained:
        raise ValueError(
            "The model has no trainable weights: there is nothing to optimise. "
            f"Received: model={model.name!r}"
        )
    unknown = [v.path for v in trained if is_known is not None and not is_known(v)]
    if unknown:
        raise ValueError(
            "The optimizer was built for other variables. Create a new optimizer for another "
            "model, or after layers were added or unfrozen. "
            f"Received: unknown variables {unknown}"
        )


def check_damping_schedule(value: Any) -> None:
    """Checks a function, or `None`."""
    if value is not None and not callable(value):
        raise ValueError(
            "The callback's `damping` must be a function of the epoch or step; give a constant to "
            f"the optimizer. Received: damping={value!r}"
        )


def check_unit(value: str) -> str:
    """Checks what schedules count."""
    if value not in ("epoch", "step"):
        raise ValueError(f"`unit` must be 'epoch' or 'step'. Received: unit={value!r}")
    return value
