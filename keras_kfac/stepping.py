"""An optimizer that chooses the steps of the weights that curvature blocks cover."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfac.attachable import AttachableOptimizer, Built
from keras_kfac.damping import LevenbergMarquardt, best
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.gradient_rows import GradientRows
from keras_kfac.math.linalg import scalar
from keras_kfac.math.quadratic_model import QuadraticModel
from keras_kfac.math.step_control import reduction_ratio
from keras_kfac.math.update_times import gap, is_due
from keras_kfac.settings import value_at
from keras_kfac.step import Batch, Moves, Proposal, Step, Tensors, group_count
from keras_kfac.step_rule import StepRule


class SteppingOptimizer(AttachableOptimizer):
    """Combines preconditioned gradients and previous steps, and adapts the damping."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl_clip_scale = self.add_variable((), "ones", dtype="float64", name="kl_clip_scale")
        self.rejected_steps = self.add_variable((), dtype="int64", name="rejected_steps")
        self.reduction_ratio = self.add_variable((), "ones", "float64", name="reduction_ratio")
        self.step_kl = self.add_variable((), dtype="float64", name="step_kl")
        self.preconditioner_damping = self.add_variable(
            (), dtype="float64", name="preconditioner_damping"
        )
        self._step_rule = StepRule(self.add_variable)

    def _build_curvature(self, passes: Sequence[ForwardPass]) -> Built:
        is_new = self._built is None
        built = super()._build_curvature(passes)
        if is_new and self.can_adapt:
            directions = group_count(len(built.curvature.blocks)) + 1
            self._step_rule.build(self.model_variable, directions)
        return built

    @property
    def signal_share(self) -> keras.Variable:
        """The share of a step's promised slope that the next batch confirms: low is noise."""
        return self._step_rule.share.value

    def _covered_steps(
        self, batch: Batch, gradients: Tensors, learning_rate: Any
    ) -> tuple[Moves, tf.Tensor]:
        """The steps of the covered variables, and whether they are to be taken.

        Args:
            batch: The batch, with its gradients before clipping.
            gradients: The gradients to precondition, by `id` of the variable.
            learning_rate: The one to use if it is fixed.
        """
        accepted = tf.constant(True)
        if not gradients:
            return {}, accepted
        step = self._step(batch, gradients, learning_rate)
        # Scopes show in profiles.
        with tf.name_scope("refresh"):
            self._refresh(step)
        with tf.name_scope("precondition"):
            proposal = step.propose()
        with tf.name_scope("quadratic_model"):
            model = step.model(proposal) if self.can_adapt else None
        coefficients = self._coefficients(step, proposal, model)
        moves = step.combine(proposal, coefficients)
        if model is not None and self._damping_rule is not None:
            predicted = model.change(coefficients)
            with tf.name_scope("adapt_damping"):
                accepted = self._adapt_damping(self._damping_rule, predicted, step, moves)
        if model is not None:
            self._step_rule.remember(model, coefficients, accepted)
        return moves, accepted

    def _step(self, batch: Batch, gradients: Tensors, learning_rate: Any) -> Step:
        covered = [(i, v) for i, v in self._known.covered.items() if id(v) in gradients]
        previous = {
            id(variable): tf.convert_to_tensor(self.model_variables[f"velocity.{index}"])
            if self._has_momentum
            else tf.zeros(variable.shape, variable.dtype)
            for index, variable in covered
        }
        return Step(
            batch,
            self._known.curvature,
            [variable for _, variable in covered],
            gradients,
            previous,
            fixed=(scalar(learning_rate, "float64"), scalar(self.momentum, "float64")),
            is_free=(self._adapts_learning_rate.value, self._momentum.adapts.value),
            kl_clip=value_at(self.kl_clip, self.iterations),
            fisher_rows=self._known.curvature.fisher_rows(
                batch.passes, Fisher(self.fisher), self.fisher_samples, batch.seed
            ),
        )

    def _rows(self, passes: Sequence[ForwardPass]) -> GradientRows | None:
        """What gradients may be made of, unless it is plain that they are not."""
        changes = self.clipnorm, self.clipvalue, self.global_clipnorm
        if any(changes) or self.gradient_accumulation_steps:
            return None
        # Of a scaled loss Keras's pass backwards is another: theirs would not be shared.
        whole = getattr(self._require_attachment().model, "optimizer", None)
        if self.loss_scale_factor or isinstance(whole, keras.optimizers.LossScaleOptimizer):
            return None
        adapters = [block.adapter for block in self._known.curvature.blocks]
        return GradientRows.of(passes, adapters)

    def _coefficients(
        self, step: Step, proposal: Proposal, model: QuadraticModel | None
    ) -> tf.Tensor:
        """Coefficients of the groups' directions and the previous step, KL clip included."""
        rate, momentum = step.fixed
        coefficients = tf.stack([rate] * len(proposal.groups) + [momentum])
        if model is not None:
            damping = scalar(self.damping, "float64")
            coefficients = self._step_rule.choose(model, damping, step.fixed, step.is_free)
            if self._can_adapt_learning_rate:
                rate = tf.reduce_mean(coefficients[:-1])
                self._learning_rate.assign(tf.cast(rate, self._learning_rate.dtype))
            self._momentum.variable.assign(coefficients[-1])
        coefficients, clip = step.clip(proposal, coefficients)
        self.kl_clip_scale.assign(clip)
        if model is not None:
            self.step_kl.assign(model.kl(coefficients))
        return coefficients

    # ---- Damping --------------------------------------------------------------------------------

    def _adapt_damping(
        self, rule: LevenbergMarquardt, predicted: tf.Tensor, step: Step, moves: Moves
    ) -> tf.Tensor:
        """Adapts the damping if it is time to; returns whether the step is accepted."""
        damping = self._damping.variable

        def adapt() -> tf.Tensor:
            change = step.loss_change(moves)
            ratio = reduction_ratio(change, predicted)
            scale = self._known.curvature.mean_eigenvalue()
            share = tf.convert_to_tensor(self.signal_share.value)
            self.reduction_ratio.assign(ratio)
            damping.assign(rule.next(damping.value, ratio, scale, share, self.iterations))
            accepted = rule.accepts(change, ratio, self.iterations)
            self.rejected_steps.assign_add(tf.where(accepted, 0, 1))
            return accepted

        due = rule.is_due(self.iterations) & self._damping.adapts.value
        return ops.cond(due, adapt, lambda: tf.constant(True))

    def _refresh(self, step: Step) -> None:
        """Inverts the damped factors whose turn it is.

        How much to damp them is found out first, where that adapts.
        """
        curvature, rule = self._known.curvature, self._damping_rule
        damping = scalar(self.damping, "float64")
        if rule is not None:
            damping = self._started_damping(rule, step)
        if rule is not None and rule.adapt_preconditioner:
            damping = self._adapted_preconditioner_damping(rule, damping, step)
        self.preconditioner_damping.assign(damping)
        turns = curvature.turns
        # In the middle of its part of the period, where little else is due.
        due = [self._inverses_are_due((i + 0.5) / len(turns)) for i in range(len(turns))]
        each = ops.cond(
            tf.reduce_any(due),
            lambda: curvature.dampings(damping),
            lambda: tf.zeros([len(curvature.blocks)], tf.float64),
        )
        dampings = tf.unstack(each)
        for has_come, blocks in zip(due, turns):
            ops.cond(has_come, partial(curvature.refresh, blocks, dampings), lambda: None)

    def inverses_were_due(self) -> tf.Tensor:
        """Whether a period of the inverses began with the last step; boolean scalar."""
        return is_due(self.iterations - 1, self._inverse_update_period.value)

    def _inverses_are_due(self, turn: float = 0.0) -> tf.Tensor:
        return is_due(self.iterations, self._inverse_update_period.value, turn)

    def _started_damping(self, rule: LevenbergMarquardt, step: Step) -> tf.Tensor:
        """The damping, chosen by its rule before the first step."""

        def start() -> tf.Tensor:
            scale = scalar(self._known.curvature.mean_eigenvalue(), "float64")
            if not rule.calibrates:
                return scalar(rule.start(scale), "float64")
            return best(rule.candidates(scale), step.realised)

        damping = self._damping.variable
        is_first = tf.equal(self.iterations, 0) & self._damping.adapts.value
        damping.assign(ops.cond(is_first, start, lambda: tf.convert_to_tensor(damping.value)))
        return tf.convert_to_tensor(damping.value)

    def _adapted_preconditioner_damping(
        self, rule: LevenbergMarquardt, damping: tf.Tensor, step: Step
    ) -> tf.Tensor:
        is_first = tf.equal(self.iterations, 0)
        present = tf.where(is_first, damping, self.preconditioner_damping.value)

        def adapt() -> tf.Tensor:
            steps = gap(self.iterations, self._inverse_update_period.value)
            candidates = rule.neighbours(present, steps)
            return best(candidates, lambda own: step.predicted(own, damping))

        adapts = self._damping.adapts.value
        adapted = ops.cond(self._inverses_are_due() & adapts, adapt, lambda: present)
        return tf.where(adapts, adapted, damping)
