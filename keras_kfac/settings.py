"""Settings that are fixed, follow a schedule, or adapt themselves."""

from collections.abc import Callable
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

ADAPTIVE = "adaptive"


def is_adaptive(value: Any) -> bool:
    """Whether a setting is to adapt itself."""
    return isinstance(value, str) and value == ADAPTIVE


def value_at(value: Any, iterations: Any) -> Any:
    """The value of a number or schedule at a step."""
    return value(iterations) if isinstance(value, LearningRateSchedule) else value


def to_config(value: Any) -> Any:
    """What a config holds of a number or schedule."""
    is_schedule = isinstance(value, LearningRateSchedule)
    return keras.optimizers.schedules.serialize(value) if is_schedule else value


class Setting:
    """A setting that may change while a compiled step runs, and so is a variable.

    Assigning a number fixes it, assigning `"adaptive"` sets it free again.

    Args:
        name: Its name.
        value: A number, a schedule, or `"adaptive"`.
        check: Returns a number if it is valid, and raises otherwise.
        add_variable: Creates the variables.

    Attributes:
        variable: The value, or the last one that an adaptive setting took; not that of a schedule.
        adapts: A variable: whether it adapts itself now.
        can_adapt: Whether it was created to adapt itself.
    """

    def __init__(
        self,
        name: str,
        value: Any,
        check: Callable[[Any], float],
        add_variable: Callable[..., keras.Variable],
    ) -> None:
        self.name = name
        self._check = check
        self._schedule = value if isinstance(value, LearningRateSchedule) else None
        self.can_adapt = is_adaptive(value)
        self.variable = add_variable((), dtype="float64", name=name)
        self.adapts = add_variable((), dtype="bool", name=f"adapts_{name}")
        if self.can_adapt:
            self.adapts.assign(True)
        elif self._schedule is None:
            self.variable.assign(check(value))

    def at(self, iterations: Any) -> Any:
        """The variable, or the value of the schedule at a step."""
        return self.variable if self._schedule is None else self._schedule(iterations)

    def assign(self, value: Any) -> None:
        """Fixes the value, or sets it free."""
        if isinstance(value, str):
            check_can_adapt(self.name, value, self.can_adapt)
            self.adapts.assign(True)
            return
        # As for Keras's learning rate: a compiled training step would not notice the change.
        if self._schedule is not None:
            raise TypeError(
                f"This optimizer was created with a schedule as its `{self.name}`, which is not "
                f"settable. Create it with a float instead. Received: {self.name}={value!r}"
            )
        self.variable.assign(self._check(value))
        self.adapts.assign(False)

    def config(self) -> Any:
        """The value to create the same setting again."""
        if self._schedule is not None:
            return to_config(self._schedule)
        return ADAPTIVE if bool(self.adapts.numpy()) else float(self.variable.numpy())


def check_can_adapt(name: str, value: str, can_adapt: bool) -> None:
    """Checks a word that is assigned to a setting."""
    if value != ADAPTIVE:
        raise ValueError(f"`{name}` must be a number or 'adaptive'. Received: {name}={value!r}")
    if not can_adapt:
        raise ValueError(
            f"This optimizer was created with a fixed `{name}`. Create it with "
            f"{name}='adaptive' to let it adapt. Received: {name}={value!r}"
        )
