"""An optimizer that is attached to the model it trains, and keeps its curvature."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Self

import keras
import tensorflow as tf
from keras import ops

from keras_kfac import _keras_internals, validation
from keras_kfac.attachment import Attachment, unattached_error
from keras_kfac.curvature.coverage import BlockSettings, Coverage
from keras_kfac.curvature.model_curvature import ModelCurvature
from keras_kfac.curvature.spectrum import CurvatureSummary
from keras_kfac.hyperparameters import ConfiguredOptimizer
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.replay import tensors_of
from keras_kfac.math.inverses import ExactInverse, FactoredInverse
from keras_kfac.math.linalg import scalar
from keras_kfac.math.update_times import growing_decay, is_due
from keras_kfac.settings import value_at


@dataclasses.dataclass(frozen=True)
class Built:
    """What the first step finds out about the attached model."""

    curvature: ModelCurvature
    coverage: Coverage
    covered: dict[int, keras.Variable]  # by index among the trained variables
    outputs: list[tf.TensorShape]  # of those of the model that are tensors, batch included
    has_masks: bool  # Whether some outputs have a mask.


class AttachableOptimizer(ConfiguredOptimizer):
    """Sees the layers of one model while that trains, and keeps their curvature."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attachment: Attachment | None = None
        self._built: Built | None = None
        self._burnt_in = self.add_variable((), dtype="int64", name="burnt_in")

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
        weights as usual, in one `tf.function` or none. All forward passes in training mode and
        under a tape since the last step are taken to be terms of the loss, unless
        `model.compute_loss` is used: then those whose outputs it saw, with their sample weights. An
        output that two of its calls in a step score counts once. A `compute_loss` of your own calls
        instances of `keras.losses.Loss` on the outputs; what it adds to these has no part in the
        Fisher matrix. Call the model with `training=False` for gradients that the optimizer does
        not apply, as where a GAN's discriminator has a part in the step of the generator, and
        attach after a warm-up under another optimizer.

        Args:
            model: The model that `optimizer` trains.
            loss: Its loss, if it is not compiled with one: a name, function or `keras.Loss`. It
                counts what a loss of the output in its place does, and the loss weight of a model
                that is compiled with one output; else it is taken as it is.
            variables: The variables to train, if not all trainable variables of the model: for a
                model that shares layers with another.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: If the optimizer is attached to another model or was built for other
                variables, or the model has nothing to train.
            NotImplementedError: Under a distribution strategy that mirrors variables.
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
            self.likelihood,
            variables,
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

    # ---- Curvature ------------------------------------------------------------------------------

    def coverage(self) -> Coverage:
        """Tells for every layer with weights which curvature block covers it, or why none does.

        After the first step the rows say what is the case, before it what is to be expected.

        Raises:
            RuntimeError: If the optimizer is not attached.
            ValueError: If the model is not built yet, or lacks a layer that `curvature` or
                `weight_sharing` names.
        """
        if self._built is not None:
            return self._built.coverage
        attachment = self._require_attachment()
        if not attachment.model.built:
            raise ValueError(
                "The layers of a model that is not built are not known yet. Build it or train one "
                f"step first. Received: model {attachment.model.name!r}"
            )
        return attachment.plan(attachment.is_trained, self._block_settings).rows

    def condition_numbers(self) -> dict[str, float]:
        """Condition number (in the 1-norm) of each layer's damped `A ⊗ G`.

        By path of the layer, as in `coverage()`, as of the last refresh; empty before the first
        step. It is the product of those of the two factors, each of which float32 can invert up
        to 1e7 or so. Damped exactly, it is that of the matrix that gradients are divided by, in
        the 2-norm; undamped, directions of no curvature are left out.
        """
        return {} if self._built is None else self._built.curvature.condition_numbers()

    def curvature_summary(self) -> CurvatureSummary:
        """The spectrum of each layer's `A ⊗ G` beside its damping; empty before the first step.

        Prints as a table; its `plot()` draws them (with Matplotlib). Takes the eigenvalues of all
        factors, which is as dear as some refreshes.

        Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
        >>> model.compile(KFAC(), "mse")
        >>> _ = model.fit(np.eye(4), np.ones([4, 3]), verbose=0, callbacks=[KFACCallback()])
        >>> (row,) = model.optimizer.curvature_summary()
        >>> row.layer.endswith("dense"), row.input_eigenvalues.shape, row.output_eigenvalues.shape
        (True, (5,), (3,))
        """
        if self._built is None:
            return CurvatureSummary()
        return self._built.curvature.summary(tf.convert_to_tensor(self.damping))

    def staleness(self) -> dict[str, float]:
        """By how much the last refresh changed each layer's inverse of the damped `A ⊗ G`.

        Relative, in the Frobenius norm, by path of the layer; empty before the second refresh. A
        small one says that inverses can be refreshed more rarely.
        """
        return {} if self._built is None else self._built.curvature.staleness()

    @property
    def _block_settings(self) -> BlockSettings:
        inverse_type = ExactInverse if self.exact_damping else FactoredInverse
        return BlockSettings(
            self.curvature, self.weight_sharing, inverse_type, self.max_factor_size
        )

    @property
    def findings(self) -> Built | None:
        """The curvature, and what else the first step found out; `None` before it."""
        return self._built

    @property
    def _known(self) -> Built:
        if self._built is None:  # `apply` builds it; nothing else calls what needs it.
            raise unattached_error()
        return self._built

    def _build_curvature(self, passes: Sequence[ForwardPass]) -> Built:
        if self._built is not None:
            return self._built
        attachment = self._require_attachment()
        plan = attachment.plan(self.is_known, self._block_settings, passes)
        if not plan.blocks:
            raise ValueError(
                "K-FAC covers no layer of this model; use another optimizer. Received: model "
                f"{attachment.model.name!r}\n{plan.rows}"
            )
        plan.rows.check_memory(self.memory_limit)
        plan.rows.empirical_losses = self._empirical_losses(passes)
        curvature = ModelCurvature(
            plan.blocks,
            self.model_variable,
            self.product_dtype,
            spares_weak_blocks=self._damping_rule is not None,
        )
        covered = {self._get_variable_index(v): v for b in plan.blocks for v in b.adapter.variables}
        if self._has_momentum:
            for index, variable in covered.items():
                self.model_variable(f"velocity.{index}", variable.shape, variable.dtype)
        others = [i for i in range(len(self._trainable_variables)) if i not in covered]
        self.build_fallback(others)
        outputs = tensors_of(passes[-1].outputs)
        has_masks = any(_keras_internals.mask_of(output) is not None for output in outputs)
        shapes = [output.shape for output in outputs]
        self._built = Built(curvature, plan.rows, covered, shapes, has_masks)
        self.model_is_known = True
        self.keep_loss_scale_loadable(getattr(attachment.model, "optimizer", None))
        return self._built

    def _empirical_losses(self, passes: Sequence[ForwardPass]) -> list[str]:
        """Losses that only have an empirical Fisher matrix; warns if another was asked for."""
        terms = [term for forward_pass in passes for term in forward_pass.terms]
        unknown = sorted({t.score.loss.name for t in terms if t.is_empirical})
        if unknown and self.fisher == Fisher.SAMPLED:
            warnings.warn(
                "K-FAC knows no predictive distribution for a loss, and takes its empirical Fisher "
                "matrix, of the training targets, in place of the true one. If the loss is a "
                "negative log-likelihood, say so by keras_kfac.NegativeLogLikelihood or "
                "KFAC(likelihood=...). Losses: " + ", ".join(unknown),
                stacklevel=2,
            )
        return unknown

    def _is_burning_in(self) -> tf.Tensor:
        if not self.burn_in_steps:
            return tf.constant(False)  # So that nothing is traced for it.
        return tf.convert_to_tensor(self._burnt_in.value < self.burn_in_steps)

    def _step_seed(self) -> tf.Tensor:
        """Stateless seed of the step, or micro-batch."""
        draw = tf.cast(self._iterations + self._burnt_in.value, tf.int32)
        return tf.stack([self.seed, draw])

    def _update_factors(
        self,
        curvature: ModelCurvature,
        passes: Sequence[ForwardPass],
        is_burning_in: tf.Tensor,
    ) -> None:
        micro_steps = self.gradient_accumulation_steps or 1
        is_first = tf.equal(self._iterations % micro_steps, 0)
        # The micro-batches of one step form a plain mean, and so do the batches of the burn-in.
        decay = scalar(value_at(self.factor_ema_decay, self.iterations), "float64")
        age = tf.cast(self.iterations, "int64") + self._burnt_in.value
        decay = tf.minimum(decay, growing_decay(age, self._factor_update_period.value))
        decay = tf.where(is_first & ~is_burning_in, decay, 1.0)
        seed = self._step_seed()

        def update() -> None:
            curvature.update(passes, Fisher(self.fisher), self.fisher_samples, seed, decay)

        due = is_due(self.iterations, self._factor_update_period.value) | is_burning_in
        with tf.name_scope("factors"):
            ops.cond(due, update, lambda: None)
        self._burnt_in.assign_add(tf.cast(is_burning_in, "int64"))

    @property
    def burn_in_steps_left(self) -> int:
        """How many batches are still to go into the factors alone."""
        return max(0, self.burn_in_steps - int(self._burnt_in.numpy()))
