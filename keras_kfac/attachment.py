"""The seam with Keras: hooks by which a model tells its optimizer about a training step."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.curvature.coverage import BlockSettings, CoveragePlan, plan_coverage
from keras_kfac.introspection.forward_pass import (
    ForwardPass,
    instance_attribute,
    is_recording,
)
from keras_kfac.introspection.known_losses import likelihoods_of
from keras_kfac.introspection.losses import understood
from keras_kfac.introspection.model_pass import recorded_pass
from keras_kfac.introspection.observed_losses import ObservedLosses, Terms, observed_losses
from keras_kfac.introspection.only_score import given_score, unseen_score
from keras_kfac.introspection.pending_passes import PendingPasses
from keras_kfac.introspection.replay import Replay, is_replaying
from keras_kfac.introspection.unscored import check_scored
from keras_kfac.math.likelihood import Likelihood

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
        likelihood: Any,
        variables: Sequence[keras.Variable] | None,
        replays: bool,
        on_replaced: Callable[[], None],
    ) -> None:
        self.model = model
        self._variables = variables
        self._given_loss = loss
        self._likelihood = likelihood
        self._replays = replays
        self._on_replaced = on_replaced
        self._pending = PendingPasses()
        self._observed: ObservedLosses | None = None  # While `compute_loss` runs.
        self._is_inference = False
        self._loss_scale = 0.0
        self._hooked: list[str] = []
        self._call_takes_training = False

    def install(self) -> None:
        """Puts the hooks on the model, in place of those of another optimizer."""
        other = attachment_of(self.model)
        if other is not None:
            other._on_replaced()
        # Keras goes by the name, too: it passes none to a `call` that takes `**kwargs`.
        parameters = inspect.signature(self.model.call).parameters
        self._call_takes_training = "training" in parameters
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
        self._pending = PendingPasses()

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
        hook.__signature__ = inspect.signature(original)  # Callers go by it.
        vars(self.model)[name] = hook
        self._hooked.append(name)

    def _recorded_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_recording() or is_replaying() or not self._is_training(args, kwargs):
            return call(*args, **kwargs)
        self._forget_overflow()
        replay = None
        if self._replays:
            replay = Replay(self.model, args, {**kwargs, "training": True})
        forward_pass = recorded_pass(self.model, lambda: call(*args, **kwargs))
        forward_pass.replay = replay
        self._pending.add(forward_pass)
        if self._observed is not None:
            self._observed.watch(forward_pass.outputs)
        return forward_pass.outputs

    def _forget_overflow(self) -> None:
        """Forgets passes whose gradients overflowed, in a custom loop without a graph.

        The optimizer that scales the loss does not call the one inside then, but lowers its scale.
        """
        scaling = getattr(self.model, "optimizer", None)
        if not isinstance(scaling, keras.optimizers.LossScaleOptimizer):
            return
        if not tf.executing_eagerly():
            return
        scale = float(scaling.dynamic_scale if scaling.built else scaling.initial_scale)
        if scale < self._loss_scale:
            self._pending = PendingPasses()
        self._loss_scale = scale

    def _is_training(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        # What no tape records is in no gradient that is applied.
        if self._is_inference or not _keras_internals.is_taped():
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
        if self._is_inference or is_replaying() or not _keras_internals.is_taped():
            return compute_loss(*args, **kwargs)
        if self._observed is not None:  # It calls itself; what it adds up shows outside.
            return compute_loss(*args, **kwargs)
        passes = self._pending.usable()
        with observed_losses(self.model.losses) as observed, contextlib.ExitStack() as stack:
            observed.watch([p.outputs for p in passes])
            for forward_pass in passes:
                stack.enter_context(forward_pass.tape)
            with instance_attribute(self, "_observed", observed):
                total = compute_loss(*args, **kwargs)
        for forward_pass in passes:
            forward_pass.totals.append(total)
        if passes := self._pending.usable():  # Those of calls within it, too.
            terms = observed.terms(total)
            if self._given_loss is not None:
                score = given_score(self._given_loss, args, kwargs, terms.scores)
                terms = terms._replace(scores=[score])
            _note(passes, terms)
        else:
            self._pending.note_other_graph()
        return total

    def _fresh_step(self, train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._pending = PendingPasses()
        return train_step(*args, **kwargs)

    def _inference_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self._is_inference = self._is_inference, True
        try:
            return step(*args, **kwargs)
        finally:
            self._is_inference = before

    @property
    def is_compiled(self) -> bool:
        """Whether Keras has XLA compile the training step."""
        return self.model.compiled and self.model.jit_compile and not self.model.run_eagerly

    def take_passes(self) -> list[ForwardPass]:
        """Forward passes that make up the loss of the step under way; forgets them.

        Passes whose outputs went through `compute_loss` are exactly those that count. In a custom
        loop without `compute_loss` it is all passes in training mode, under a tape, since the last
        step.

        Raises:
            RuntimeError: If there was none, or more than are kept.
            ValueError: If `compute_loss` takes no loss that tells the curvature.
        """
        pending, self._pending = self._pending, PendingPasses()
        usable = pending.usable()
        if seen := [p for p in usable if p.is_seen]:
            check_scored(self.model, seen, self.is_trained)
        passes = [p for p in usable if p.scores] or usable
        if not passes:
            where = ", called in another `tf.function` or in none" if len(pending) else ""
            raise RuntimeError(
                "K-FAC saw no forward pass of the attached model in this training step. Call the "
                "model itself with training=True, under a `tf.GradientTape` and in the same "
                "`tf.function` (if any) that applies the gradients. Calling its layers one by one, "
                "or a different model that holds them, is not seen. Received: attached model "
                f"{self.model.name!r}{where}"
            )
        pending.check_complete(passes)
        for forward_pass in passes:
            outputs = [id(output) for output in tf.nest.flatten(forward_pass.outputs)]
            scores = forward_pass.scores
            if not scores:
                scores = [unseen_score(self.model, self._given_loss, forward_pass.outputs)]
            given = self._likelihoods(forward_pass)
            places = [outputs.index(id(score.outputs)) for score in scores]
            forward_pass.terms = [understood(s, i, given[i]) for s, i in zip(scores, places)]
        return passes

    def _likelihoods(self, forward_pass: ForwardPass) -> list[Likelihood | None]:
        names = getattr(self.model, "output_names", None)
        return likelihoods_of(self._likelihood, forward_pass.outputs, names)

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


def _note(passes: Sequence[ForwardPass], terms: Terms) -> None:
    """Notes on forward passes what makes up a total loss."""
    scored = {id(score.outputs) for score in terms.scores}
    all_outputs: set[int] = set()
    for forward_pass in passes:
        outputs = {id(output) for output in tf.nest.flatten(forward_pass.outputs)}
        before = [s for s in forward_pass.scores if id(s.outputs) not in scored]
        own = [score for score in terms.scores if id(score.outputs) in outputs]
        forward_pass.scores = before + own  # Seen twice, an output counts once.
        counted = {id(score.outputs) for score in forward_pass.scores}
        found = {id(o): o for o in (*forward_pass.unscored, *terms.unscored) if id(o) in outputs}
        forward_pass.unscored = [o for key, o in found.items() if key not in counted]
        forward_pass.is_seen = True
        all_outputs |= outputs
    others = [score for score in terms.scores if id(score.outputs) not in all_outputs]
    passes[-1].other_losses += [score.loss.name for score in others]
    passes[-1].added = terms.added  # Each call of the model takes away those of the last one.


def attachment_of(model: keras.Model) -> Attachment | None:
    """The attachment whose hooks are on the model."""
    return getattr(vars(model).get("call"), "attachment", None)


def unattached_error() -> RuntimeError:
    """The error for training without an attached model."""
    return RuntimeError(_UNATTACHED)
