"""What a step is made of: the batch, preconditioned gradients, previous steps and their model."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import tensorflow as tf

from keras_kfac.curvature.model_curvature import ModelCurvature
from keras_kfac.curvature.regularization import l2_coefficient, penalty_change
from keras_kfac.introspection import gauss_newton
from keras_kfac.introspection.batch_part import BatchPart
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.gradient_rows import GradientRows
from keras_kfac.math.linalg import inner_product, is_finite, symmetric_matrix, upper_triangle
from keras_kfac.math.quadratic_model import QuadraticModel
from keras_kfac.math.step_control import kl_clip_scale
from keras_kfac.step_rule import solve

Tensors = Mapping[int, tf.Tensor]
"""Tensors by `id` of the variable. Gradients can be `tf.IndexedSlices`."""

# The model takes its curvature on this part of the batch, if that is enough: its noise is small
# beside that of the gradient, and forward-mode products cost as much as forward passes. Rows of a
# sequence count, for each is a term of the loss, but those of one example resemble each other.
MODEL_PART = BatchPart(1 / 32, min_rows=16, min_examples=2)

# Layers form at most so many groups, each with a learning rate of its own relative to the others.
# Each costs a forward-mode product. Found by trial: see docs/step-control.md.
GROUPS = 3

_SUM = tf.float64


def group_count(blocks: int) -> int:
    """The number of groups of layers that as many curvature blocks make."""
    return min(GROUPS, blocks)


class Batch(NamedTuple):
    """The batch of a step.

    Attributes:
        passes: Its forward passes.
        gradients: Those of its loss before clipping.
        rows: What some of them may be made of.
        seed: Of draws from the model.
    """

    passes: Sequence[ForwardPass]
    gradients: Tensors
    rows: GradientRows | None
    seed: tf.Tensor

    def quadratic_model(
        self,
        variables: Sequence[keras.Variable],
        directions: Sequence[Tensors],
        slopes: Sequence[tf.Tensor] = (),
    ) -> QuadraticModel:
        """The model of the loss, with its L2 regularisers, along the given directions.

        Args:
            variables: Those that the directions move.
            directions: By `id` of the variable.
            slopes: Products of the first directions with the gradient, where these are known.
        """
        weights = current_values(variables)
        curvature = gauss_newton.products(self.passes, weights, directions, MODEL_PART, self.seed)
        l2 = {id(v): coefficient for v in variables if (coefficient := l2_coefficient(v))}
        if l2:
            scaled = [{k: c * d[k] for k, c in l2.items() if k in d} for d in directions]
            curvature += _dots(directions, scaled)
        metric = _dots(directions, directions)
        others = [_dot(self.gradients, direction) for direction in directions[len(slopes) :]]
        gradient = tf.stack([*slopes, *others])
        return QuadraticModel(curvature, metric, gradient)

    def loss_change(self, variables: Sequence[keras.Variable], steps: Tensors) -> tf.Tensor:
        """What the loss, with its regularisers, changes by if the variables step so."""
        new = {key: value + steps[key] for key, value in current_values(variables).items()}
        change = gauss_newton.loss_change(self.passes, new)
        return change + penalty_change(variables, new)


def current_values(variables: Sequence[keras.Variable]) -> dict[int, tf.Tensor]:
    """The values of variables by their `id`."""
    return {id(v): tf.convert_to_tensor(v.value) for v in variables}


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Whether all gradients are finite; `None` is."""
    values = [
        g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None
    ]
    return tf.reduce_all([is_finite(value) for value in values])


def _dots(first: Sequence[Tensors], second: Sequence[Tensors]) -> tf.Tensor:
    """Inner products of all pairs, which must make a symmetric matrix.

    Sums, one by one: the product of a few long rows and columns takes several times as long.
    """
    entries = {(i, j): _dot(first[i], second[j]) for i, j in upper_triangle(len(first))}
    return symmetric_matrix(entries, len(first))


def _dot(gradients: Tensors, direction: Tensors) -> tf.Tensor:
    terms = [inner_product(gradients[key], d) for key, d in direction.items() if key in gradients]
    return tf.add_n([tf.zeros((), _SUM), *(tf.cast(term, _SUM) for term in terms)])


class Proposal(NamedTuple):
    """Directions to combine into a step with the previous one.

    Attributes:
        groups: Preconditioned gradients by `id` of the variable, for each group of layers.
        products: Of each group's with the gradient, `[groups]`.
    """

    groups: Sequence[Tensors]
    products: tf.Tensor


class Move(NamedTuple):
    """The step of a variable, in its parts: `-rate * direction + momentum * previous`.

    Passes over all weights are limited by memory: it is added up only where it must be.
    """

    rate: tf.Tensor
    direction: tf.Tensor
    momentum: tf.Tensor
    previous: tf.Tensor

    def total(self) -> tf.Tensor:
        """The step as a tensor."""
        return self.momentum * self.previous - self.rate * self.direction


Moves: TypeAlias = Mapping[int, Move]
"""By `id` of the variable."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step in the making, with what does not change while alternatives are tried.

    Attributes:
        batch: The batch.
        curvature: Preconditions.
        variables: Those to step.
        gradients: What to precondition, by `id` of the variable.
        previous: The previous step likewise.
        fixed: Learning rate and momentum to use where they are not free.
        is_free: Whether each is to be solved for.
        kl_clip: Bound of the KL clip.
        fisher_rows: What the Fisher matrix of the batch is made of, for blocks that need it.
    """

    batch: Batch
    curvature: ModelCurvature
    variables: Sequence[keras.Variable]
    gradients: Tensors
    previous: Tensors
    fixed: tuple[tf.Tensor, tf.Tensor]
    is_free: tuple[tf.Tensor, tf.Tensor]
    kl_clip: Any
    fisher_rows: Tensors

    def propose(self, damping: tf.Tensor | None = None) -> Proposal:
        """Preconditions by the inverses that are kept, or by those of a damping to try."""
        inverses = None if damping is None else self.curvature.invert(damping)
        rows = self.batch.rows if damping is None else None
        blocks = self.curvature.precondition(self.gradients, inverses, rows, self.fisher_rows)
        count = group_count(len(blocks))
        bounds = [len(blocks) * i // count for i in range(count + 1)]
        groups: list[Tensors] = []
        products = []
        for start, end in itertools.pairwise(bounds):
            parts = blocks[start:end]
            groups.append({key: d for directions, _ in parts for key, d in directions.items()})
            products.append(tf.add_n([tf.cast(product, _SUM) for _, product in parts]))
        return Proposal(groups, tf.stack(products))

    def model(self, proposal: Proposal) -> QuadraticModel:
        """The model of the loss along the new directions, downhill, and the previous step."""
        directions = [*proposal.groups, self.previous]
        signs = tf.constant([-1.0] * len(proposal.groups) + [1.0], _SUM)
        # Products are with what was preconditioned, which clipping may have changed.
        is_same = all(g is self.batch.gradients[key] for key, g in self.gradients.items())
        slopes = tf.unstack(proposal.products) if is_same else ()
        model = self.batch.quadratic_model(self.variables, directions, slopes)
        return model.along(tf.linalg.diag(signs))

    def clip(self, proposal: Proposal, coefficients: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The KL clip.

        Returns:
            Coefficients of the step after it, and the factor that it put on the new directions.
        """
        if self.kl_clip is None:
            return coefficients, tf.ones((), _SUM)
        new = coefficients[:-1]
        scale = kl_clip_scale(proposal.products, new, self.kl_clip)
        return tf.concat([scale * new, coefficients[-1:]], axis=0), scale

    def combine(self, proposal: Proposal, coefficients: tf.Tensor) -> Moves:
        """The step of each variable, given the coefficients of all directions."""
        *rates, momentum = tf.unstack(coefficients)

        def move(rate: tf.Tensor, key: int, direction: tf.Tensor) -> Move:
            rate, own_momentum, previous = (
                tf.cast(x, direction.dtype) for x in (rate, momentum, self.previous[key])
            )
            return Move(rate, direction, own_momentum, previous)

        return {
            key: move(rate, key, direction)
            for rate, group in zip(rates, proposal.groups)
            for key, direction in group.items()
        }

    def loss_change(self, moves: Moves) -> tf.Tensor:
        """What the batch's loss changes by in a step; float64 scalar."""
        steps = {key: move.total() for key, move in moves.items()}
        return self.batch.loss_change(self.variables, steps)

    def predicted(self, preconditioner_damping: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
        """The minimum of the damped model if the preconditioner were damped so."""
        model = self.model(self.propose(preconditioner_damping))
        return model.value(solve(model, damping, self.fixed, self.is_free), damping)

    def realised(self, damping: tf.Tensor) -> tf.Tensor:
        """What the batch's loss would change by with this damping."""
        proposal = self.propose(damping)
        coefficients = solve(self.model(proposal), damping, self.fixed, self.is_free)
        coefficients, _ = self.clip(proposal, coefficients)
        return self.loss_change(self.combine(proposal, coefficients))
