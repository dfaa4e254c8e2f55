"""Optimizer variables whose number and shapes the attached model decides."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

_PREFIX = "model_state"


class ModelState:
    """Variables by name, created when the model is known, or before that from a saved state.

    A saved state names its variables and keeps their order, so that an optimizer can be restored
    whole before it is attached to the loaded model.

    Args:
        add_variable: `Optimizer.add_variable`.
    """

    def __init__(self, add_variable: Callable[..., keras.Variable]) -> None:
        self._add_variable = add_variable
        self._variables: dict[str, keras.Variable] = {}

    def __getitem__(self, name: str) -> keras.Variable:
        return self._variables[name]

    def __iter__(self) -> Iterator[keras.Variable]:
        return iter(self._variables.values())

    def variable(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str | None = None,
        initializer: Any = "zeros",
    ) -> keras.Variable:
        """The variable of the given name: as restored from a saved state, or new.

        Raises:
            ValueError: If the restored variable has another shape.
        """
        variable = self._variables.get(name)
        if variable is None:
            variable = self._add_variable(shape, initializer, dtype, name=name.replace(".", "_"))
            self._variables[name] = variable
        elif tuple(variable.shape) != tuple(shape):
            raise ValueError(
                "The saved state of the optimizer does not fit the model. Received: "
                f"{name} of shape {tuple(variable.shape)}, expected {tuple(shape)}"
            )
        return variable

    def save(self, store: Any) -> None:
        """Writes all variables to a Keras store, their order in the keys."""
        for index, (name, variable) in enumerate(self._variables.items()):
            store[f"{_PREFIX}.{index:06}.{name}"] = variable.numpy()

    def load(self, store: Any) -> None:
        """Creates or assigns the variables of a Keras store."""
        for key in sorted(store.keys()):
            if key.startswith(_PREFIX):
                name = key.split(".", 2)[2]
                value = store[key]
                self.variable(name, value.shape, str(value.dtype)).assign(value)


def keep_loss_scale_loadable(
    optimizer: Any, model_variables: Callable[[], Sequence[keras.Variable]]
) -> None:
    """Makes a `LossScaleOptimizer` around K-FAC save only what a freshly loaded one can take.

    Keras saves the wrapper with all variables of the inner optimizer in one numbered list, and
    drops the whole list, loss scale included, if the loaded optimizer has fewer. K-FAC saves its
    own state; the wrapper's list is to hold the rest.

    Args:
        optimizer: The optimizer of the attached model.
        model_variables: The variables that a loaded optimizer does not have yet.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return

    def save_own_variables(store: Any) -> None:
        left_out = {id(variable) for variable in model_variables()}
        kept = [v for v in optimizer.variables if id(v) not in left_out]
        for index, variable in enumerate(kept):
            store[str(index)] = variable.numpy()

    vars(optimizer)["save_own_variables"] = save_own_variables
