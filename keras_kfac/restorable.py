"""An optimizer that can be restored before it knows its model."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras

_PREFIX = "model_state"


class RestorableOptimizer(keras.optimizers.Optimizer):
    """Keeps *model variables*, whose number and shapes only the attached model decides.

    Keras restores an optimizer by position, and drops the whole saved state if the number of
    variables differs: as it does for an optimizer fresh from `load_model`, which has not seen the
    model's layers. Here the saved state names the model variables and keeps their order, and
    loading creates them. The fallback optimizer is a part with a state of its own, which Keras
    saves and restores; it only has to be built in time.

    Args:
        fallback: Optimizer for a part of the variables.
        **kwargs: As for `keras.optimizers.Optimizer`.

    Attributes:
        model_variables: The model variables by name, in order of their creation.
        model_is_known: Whether the subclass has created all model variables for its model.
    """

    def __init__(self, fallback: keras.optimizers.Optimizer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fallback = fallback
        self.model_is_known = False
        self.model_variables: dict[str, keras.Variable] = {}

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the variables that do not depend on the attached model."""
        if not self.built:
            super().build(list(variables))

    def is_known(self, variable: keras.Variable) -> bool:
        """Whether the optimizer was built for the variable."""
        return self._var_key(variable) in self._trainable_variables_indices

    def model_variable(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str | None = None,
        initializer: Any = "zeros",
    ) -> keras.Variable:
        """The model variable of the given name: as restored from a saved state, or new.

        Raises:
            ValueError: If the restored variable has another shape.
        """
        variable = self.model_variables.get(name)
        if variable is None:
            variable = self.add_variable(shape, initializer, dtype, name=name.replace(".", "_"))
            self.model_variables[name] = variable
        elif tuple(variable.shape) != tuple(shape):
            raise ValueError(
                "The saved state of the optimizer does not fit the model. Received: "
                f"{name} of shape {tuple(variable.shape)}, expected {tuple(shape)}"
            )
        return variable

    def build_fallback(self, indices: Sequence[int]) -> None:
        """Builds the fallback for the variables of the given indices, unless it is built."""
        variables = [self._trainable_variables[index] for index in indices]
        if variables and not self.fallback.built:
            self.fallback.build(variables)

    @property
    def variables(self) -> list[keras.Variable]:
        """All state; that of a model not yet known stays aside, as an unused optimizer's would."""
        if not self.model_is_known:
            return self._base_variables()
        return super().variables + (self.fallback.variables if self.fallback.built else [])

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of all `variables`."""
        weights = list(weights)
        own = len(super().variables)
        super().set_weights(weights[:own])
        if self.fallback.built:
            self.fallback.set_weights(weights[own:])

    def _base_variables(self) -> list[keras.Variable]:
        """Variables that exist without an attached model, in a fixed order."""
        others = {id(variable) for variable in self.model_variables.values()}
        return [v for v in super().variables if id(v) not in others]

    def save_own_variables(self, store: Any) -> None:
        """Saves all state but that of the fallback, which Keras saves on its own."""
        for index, variable in enumerate(self._base_variables()):
            store[f"base.{index}"] = variable.numpy()
        for index, (name, variable) in enumerate(self.model_variables.items()):
            store[f"{_PREFIX}.{index:06}.{name}"] = variable.numpy()
        if self.fallback.built:
            store["fallback"] = [
                index
                for index, variable in enumerate(self._trainable_variables)
                if self.fallback._var_key(variable) in self.fallback._trainable_variables_indices
            ]

    def load_own_variables(self, store: Any) -> None:
        """Restores all state, before or after the optimizer is attached to the loaded model."""
        base, keys = self._base_variables(), sorted(store.keys())
        saved = sum(key.startswith("base.") for key in keys)
        if saved > len(base):
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it has "
                f"{len(base)} variables whereas the saved optimizer has {saved}. Call "
                "`optimizer.build(model.trainable_variables)` first.",
                stacklevel=2,
            )
            return
        for index in range(saved):
            base[index].assign(store[f"base.{index}"])
        for key in (key for key in keys if key.startswith(_PREFIX)):
            name, value = key.split(".", 2)[2], store[key]
            self.model_variable(name, value.shape, str(value.dtype)).assign(value)
        if "fallback" in keys:
            self.build_fallback([int(index) for index in store["fallback"]])

    def keep_loss_scale_loadable(self, wrapper: Any) -> None:
        """Makes a `LossScaleOptimizer` around this one save what a freshly loaded one can take.

        Keras saves the wrapper with all variables of the inner optimizer in one numbered list, and
        drops the list, loss scale included, if the loaded optimizer has fewer. As this optimizer
        saves its own state, the wrapper's list is to hold the rest.
        """
        if not isinstance(wrapper, keras.optimizers.LossScaleOptimizer):
            return

        def kept() -> list[keras.Variable]:
            left_out = {id(v) for v in self.variables} - {id(v) for v in self._base_variables()}
            return [v for v in wrapper.variables if id(v) not in left_out]

        def save_own_variables(store: Any) -> None:
            for index, variable in enumerate(kept()):
                store[str(index)] = variable.numpy()

        def load_own_variables(store: Any) -> None:
            for index, variable in enumerate(kept()):
                variable.assign(store[str(index)])

        vars(wrapper)["save_own_variables"] = save_own_variables
        vars(wrapper)["load_own_variables"] = load_own_variables
