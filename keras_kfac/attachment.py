"""The seam with Keras: hooks by which a model tells its optimizer about a training step."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.curvature.coverage import BlockSettings, CoveragePlan, plan_coverage
from keras_kfac.introspection.forward_pass import ForwardPass, is_recording, recording
from keras_kfac.introspection.losses import ModelLoss, resolve_loss
from keras_kfac.introspection.registry import find_adapters
from keras_kfac.introspection.replay import Replay, is_replaying

# In eager custom loops, training-mode passes that no step ever uses (Monte-Carlo dropout, say)
# hold on to their activations; only so many of the newest are kept.
_MOST_PENDING = 16

_UNATTACHED = (
    "KFAC is not attached to a model, so it can't see layer inputs and output gradients. Pass "
    "`callbacks=[keras_kfac.KFACCallback()]` to `fit`, or call `optimizer.attach(model)` before "
    "training."
)


class Attachment:
    """Hooks on a model, and the forward passes they saw since the last step.

    Attributes:
        model: The model.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Any,
        variables: Sequence[keras.Variable] | None,
        empirical: bool,
        replays: bool,
        on_replaced: Callable[[], None],
    ) -> None:
        self.model = model
        self._variables = variables
        self._given_loss = loss
        self._empirical = empirical
        self._replays = replays
        self._on_replaced = on_replaced
        self._pending: list[ForwardPass] = []
        self._is_inference = False
        self._hooked: list[str] = []
        # Keras goes by the name, too: it passes none to a `call` that takes `**kwargs`.
        self._call_takes_training = "training" in inspect.signature(model.call).parameters

    def install(self) -> None:
        """Puts the hooks on the model, in place of those of another optimizer."""
        other = attachment_of(self.model)
        if other is not None:
            other._on_replaced()
        self._hook("call", self._recorded_call)
        self._hook("compute_loss", self._observed_compute_loss)
        self._hook("train_step", self._fresh_step)
        self._hook("test_step", self._inference_step)
        self._hook("predict_step", self._inference_step)

    def remove(self) -> None:
        """Takes the hooks off."""
        for name in self._hooked:
            del vars(self.model)[name]
        self._hooked.clear()
        self._pending.clear()

    def _hook(self, name: str, wrapper: Callable[..., Any]) -> None:
        # Into the instance's dictionary directly: `__setattr__` would have Keras track the hook.
        original = getattr(self.model, name)
        if name in vars(self.model):
            raise ValueError(
                f"K-FAC can't hook into a model that has its own instance-level `{name}`. "
                f"Received: model {self.model.name!r}"
            )

        @tf.autograph.experimental.do_not_convert
        def hook(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        hook.attachment = self
        vars(self.model)[name] = hook
        self._hooked.append(name)

    def _recorded_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_recording() or is_replaying() or not self._is_training(args, kwargs):
            return call(*args, **kwargs)
        layers = _keras_internals.flatten_layers(self.model)
        found = [(layer, find_adapters(layer)[0]) for layer in layers]
        adaptable = [layer for layer, adapters in found if adapters]
        whole = {id(layer) for layer, adapters in found if any(a.with_activation for a in adapters)}
        replay = None
        if self._replays:
            replay = Replay(self.model, args, {**kwargs, "training": True})
        with recording(adaptable, whole, layers) as forward_pass:
            outputs = call(*args, **kwargs)
        forward_pass.outputs, forward_pass.replay = outputs, replay
        self._pending = [p for p in self._pending if p.is_usable()][1 - _MOST_PENDING :]
        self._pending.append(forward_pass)
        return outputs

    def _is_training(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        if self._is_inference:
            return False
        if any(isinstance(x, keras.KerasTensor) for x in tf.nest.flatten((args, kwargs))):
            return False
        if "training" in kwargs:
            return bool(kwargs["training"])
        # Keras passes `training` whenever it is known and `call` names it. A `call` that does not
        # name it gets none in training either: then what is no inference step is training.
        return not self._call_takes_training

    def _observed_compute_loss(
        self, compute_loss: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        names = ("x", "y", "y_pred", "sample_weight", "training")
        given = {**dict(zip(names, args)), **kwargs}
        scored = tf.nest.flatten(given.get("y_pred"))
        for forward_pass in self._pending:
            outputs = tf.nest.flatten(forward_pass.outputs)
            if len(outputs) == len(scored) and all(a is b for a, b in zip(outputs, scored)):
                forward_pass.scored = True
                forward_pass.targets = given.get("y")
                forward_pass.sample_weight = given.get("sample_weight")
        return compute_loss(*args, **kwargs)

    def _fresh_step(self, train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._pending.clear()
        return train_step(*args, **kwargs)

    def _inference_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self._is_inference = self._is_inference, True
        try:
            return step(*args, **kwargs)
        finally:
            self._is_inference = before

    def take_passes(self) -> list[ForwardPass]:
        """Forward passes that make up the loss of the step under way; forgets them.

        Passes whose outputs went through `compute_loss` are exactly those that count. In a custom
        loop without `compute_loss` it is all passes in training mode since the last step.

        Raises:
            RuntimeError: If there was none.
        """
        usable = [p for p in self._pending if p.is_usable()]
        self._pending.clear()
        passes = [p for p in usable if p.scored] or usable
        if not passes:
            raise RuntimeError(
                "K-FAC saw no forward pass of the attached model in this training step. Call the "
                "model itself with training=True in the step that applies the gradients (calling "
                "its layers one by one, or a different model that holds them, is not seen). "
                f"Received: attached model {self.model.name!r}"
            )
        return passes

    def is_trained(self, variable: keras.Variable) -> bool:
        """Whether the optimizer is to train the variable."""
        if self._variables is None:
            return bool(variable.trainable)
        return any(variable is v for v in self._variables)

    def plan(
        self,
        is_trained: Callable[[keras.Variable], bool],
        settings: BlockSettings,
        passes: Sequence[ForwardPass] | None = None,
    ) -> CoveragePlan:
        """Which layers get a curvature block, given what the forward passes showed."""
        if passes is None:
            return plan_coverage(self.model, is_trained, settings)
        called = {key for forward_pass in passes for key in forward_pass.calls}
        unreachable = {k: v for forward_pass in passes for k, v in forward_pass.unreachable.items()}
        return plan_coverage(self.model, is_trained, settings, called, unreachable)

    def loss(self) -> ModelLoss:
        """The loss to take the Fisher matrix of.

        Raises:
            ValueError: If there is none, or one without a known likelihood.
        """
        loss, weight = self._given_loss, 1.0
        if loss is None:
            loss = getattr(self.model, "loss", None) if self.model.compiled else None
            weight = self._compiled_loss_weight()
        if loss is None:
            raise ValueError(
                "K-FAC needs the loss of the model to know its Fisher matrix. Compile the model "
                "with a loss, or name it: `optimizer.attach(model, loss=...)`. Received: "
                f"model {self.model.name!r} without a loss"
            )
        if isinstance(loss, (list, tuple, dict)):
            losses = tf.nest.flatten(loss)
            loss = losses[0] if len(losses) == 1 else loss
        return resolve_loss(loss, weight, self._empirical)

    def _compiled_loss_weight(self) -> float:
        with tf.init_scope():  # Serialising reads variables, which a graph can't.
            config = self.model.get_compile_config() or {}
        weights = tf.nest.flatten(config.get("loss_weights"))
        return 1.0 if len(weights) != 1 or weights[0] is None else float(weights[0])


def attachment_of(model: keras.Model) -> Attachment | None:
    """The attachment whose hooks are on the model."""
    return getattr(vars(model).get("call"), "attachment", None)


def unattached_error() -> RuntimeError:
    """The error for training without an attached model."""
    return RuntimeError(_UNATTACHED)
