"""An optimizer that is attached to the model it trains."""

from collections.abc import Sequence
from typing import Any, Self

import keras

from keras_kfac import validation
from keras_kfac.attachment import Attachment, unattached_error
from keras_kfac.hyperparameters import ConfiguredOptimizer
from keras_kfac.introspection.statistics import Fisher


class AttachableOptimizer(ConfiguredOptimizer):
    """Sees the layers of one model while that trains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attachment: Attachment | None = None

    def attach(
        self,
        model: keras.Model,
        loss: Any = None,
        variables: Sequence[keras.Variable] | None = None,
    ) -> Self:
        """Lets the optimizer see the model's layers while it trains.

        Hooks on the model watch training steps until `detach`. They change neither its results nor
        its config, weights or saved files. Nothing is allocated before the first step, so the model
        need not be built yet.

        In a custom loop, call the model and apply the gradients of the loss to its trainable
        weights as usual. All forward passes in training mode since the last step are taken to be
        terms of the loss, unless `model.compute_loss` is used: then those whose outputs it saw,
        with their sample weights.

        Args:
            model: The model that `optimizer` trains.
            loss: Its loss, if it is not compiled with one: a name, function or `keras.Loss`.
            variables: The variables to train, if not all trainable variables of the model: for a
                model that shares layers with another.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: If the optimizer is attached to another model or was built for other
                variables, or the model has nothing to train.
            NotImplementedError: Under a distribution strategy with several replicas.
        """
        validation.check_attachable(model)
        if self._attachment is not None and self._attachment.model is not model:
            raise ValueError(
                "The optimizer is attached to another model. Call `optimizer.detach()` first, or "
                "create a new optimizer. Received: "
                f"model={model.name!r}, attached to {self._attachment.model.name!r}"
            )
        validation.check_trainable(model, variables, self.is_known if self.built else None)
        if self._attachment is not None:
            if loss is None and variables is None:
                return self
            self._attachment.remove()
        self._attachment = Attachment(
            model,
            loss,
            variables,
            empirical=self.fisher == Fisher.EMPIRICAL,
            persistent_tape=self.fisher == Fisher.EXACT,
            replays=self.can_adapt,
            on_replaced=self.detach,
        )
        self._attachment.install()
        return self

    def detach(self) -> None:
        """Takes every hook off the model again. Factors and velocities stay."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _require_attachment(self) -> Attachment:
        if self._attachment is None:
            raise unattached_error()
        return self._attachment
