"""The curvature of a model: all its blocks, updated and refreshed together."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops

from keras_kfac.curvature.block import AddVariable, BlockPlan, KroneckerBlock
from keras_kfac.curvature.spectrum import CurvatureSummary
from keras_kfac.introspection.adapters import Gradients
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.composite import CompositeAdapter
from keras_kfac.introspection.fisher_rows import fisher_rows
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.gradient_rows import GradientRows
from keras_kfac.introspection.statistics import collect
from keras_kfac.math.inverses import Inverse
from keras_kfac.math.kronecker import block_damping
from keras_kfac.math.linalg import RowPairs, scalar
from keras_kfac.math.update_times import in_turns

# Inverses are refreshed in so many turns, for no step to take much longer than another. More do not
# help a network in which one layer costs a quarter of all.
_TURNS = 4

Direction = tuple[Gradients, tf.Tensor]
"""Directions of the variables of a block, and their inner product with the gradients."""


class ModelCurvature:
    """A block-diagonal approximation of a model's Fisher matrix.

    Args:
        plans: The blocks.
        add_variable: Creates the variables.
        product_dtype: In which to multiply gradients by inverses; `None` for that of the weights.
        spares_weak_blocks: Whether `λ` is smaller for blocks of little curvature.

    Attributes:
        blocks: One block for each plan.
    """

    def __init__(
        self,
        plans: Sequence[BlockPlan],
        add_variable: AddVariable,
        product_dtype: str | None,
        spares_weak_blocks: bool,
    ) -> None:
        self._spares_weak_blocks = spares_weak_blocks
        self.blocks = [
            plan.build(_prefixed(add_variable, f"block.{index}."), product_dtype)
            for index, plan in enumerate(plans)
        ]
        for block in self.blocks:
            block.join(self.blocks)
        self._dtype = tf.float32
        if any(block.input_factor.dtype == "float64" for block in self.blocks):
            self._dtype = tf.float64

    def update(
        self,
        passes: Sequence[ForwardPass],
        fisher: Fisher,
        samples: int,
        seed: tf.Tensor,
        decay: tf.Tensor,
    ) -> None:
        """Includes the factors of the given forward passes in the moving averages."""
        each = [(block, block.observers) for block in self.blocks]
        adapters = [adapter for _, observers in each for adapter in observers]
        batch = collect(passes, adapters, fisher, seed, self._dtype, samples)
        for block, observers in each:
            if all(id(adapter) in batch.layers for adapter in observers):
                statistics = [batch.layers[id(adapter)] for adapter in observers]
                block.update(statistics, batch.weights[id(observers[0])], decay)

    @property
    def turns(self) -> list[list[int]]:
        """The blocks by index, in turns that are about as dear to refresh."""
        return in_turns([block.refresh_cost for block in self.blocks], _TURNS)

    def refresh(self, blocks: Sequence[int], dampings: Sequence[tf.Tensor]) -> None:
        """Computes the inverses of some blocks anew, and keeps those that are finite.

        Args:
            blocks: Their indices.
            dampings: Those of all blocks.
        """
        for index in blocks:
            block = self.blocks[index]
            block.keep(block.invert(dampings[index]))

    def invert(self, damping: tf.Tensor) -> list[Inverse]:
        """The inverses of all damped blocks; not finite where that fails."""
        each = zip(self.blocks, tf.unstack(self.dampings(damping)))
        return [block.invert(own) for block, own in each]

    def dampings(self, damping: tf.Tensor) -> tf.Tensor:
        """The damping of each block, `[blocks]`, for one of the model."""
        damping, sizes = scalar(damping, tf.float64), [block.size for block in self.blocks]
        if not self._spares_weak_blocks:
            return tf.fill([len(sizes)], damping)
        traces = tf.cast(self._traces(), tf.float64)
        mean = tf.reduce_sum(traces) / sum(sizes)
        return block_damping(damping, traces / sizes, mean)

    def _traces(self) -> tf.Tensor:
        """Those of the blocks, undamped, `[blocks]`."""
        return tf.stack([tf.cast(block.trace(), self._dtype) for block in self.blocks])

    def fisher_rows(
        self, passes: Sequence[ForwardPass], fisher: Fisher, samples: int, seed: tf.Tensor
    ) -> Mapping[int, tf.Tensor]:
        """The rows of a batch's Fisher matrix, for the blocks that need them.

        Args:
            passes: The forward passes.
            fisher: Which Fisher matrix.
            samples: How many targets to draw for each example.
            seed: Of the draws; that of an update makes the same.

        Returns:
            `[rows, weights]` by `id` of the adapter.
        """
        adapters: list[Any] = [block.adapter for block in self.blocks if block.needs_rows]
        if not adapters:
            return {}
        return fisher_rows(passes, adapters, fisher, samples, seed, self._dtype)

    def precondition(
        self,
        gradients: Mapping[int, tf.Tensor],
        inverses: Sequence[Inverse] | None = None,
        rows: GradientRows | None = None,
        fisher_rows: Mapping[int, tf.Tensor] | None = None,
    ) -> list[Direction]:
        """Natural gradient of all covered variables that have a gradient.

        Args:
            gradients: By `id` of the variable.
            inverses: Those to use in place of the kept ones.
            rows: What some of the gradients may be made of.
            fisher_rows: Those of the batch, if a block needs them.

        Returns:
            For each block, in the order of the layers, its directions by `id` of the variable and
            their inner product with the gradients: none and 0 for a block without gradients.

        Raises:
            ValueError: If a part of a layer has no gradient.
        """
        inverses = inverses or [block.inverse for block in self.blocks]
        inverses = [_on_batch(*pair, fisher_rows or {}) for pair in zip(self.blocks, inverses)]
        known = {} if rows is None else rows.pairs
        results: dict[int, Direction] = {}
        by_rows: list[_Task] = []
        for block, inverse in zip(self.blocks, inverses):
            present = _gradients_of(block, gradients)
            task = _Task(block, inverse, _completed(block, present), present.keys())
            if not present:
                results[id(block)] = {}, tf.zeros((), self._dtype)
            elif id(block.adapter) in known:
                by_rows.append(task)
            else:
                results[id(block)] = task.direction()
        if rows is not None and by_rows:
            directions = _directions_by_rows(by_rows, rows)
            results.update({id(t.block): d for t, d in zip(by_rows, directions)})
        return [results[id(block)] for block in self.blocks]

    def mean_eigenvalue(self) -> tf.Tensor:
        """Mean eigenvalue of the approximate Fisher matrix, undamped."""
        return tf.reduce_sum(self._traces()) / sum(block.size for block in self.blocks)

    def summary(self, damping: tf.Tensor) -> CurvatureSummary:
        """The spectra of all blocks."""
        each = zip(self.blocks, self.dampings(damping))
        return CurvatureSummary(row for block, own in each for row in block.spectra(own))

    def condition_numbers(self) -> dict[str, float]:
        """Condition numbers of the damped blocks by their paths, as of the last refresh."""
        return {b.adapter.path: float(b.inverse.condition_number) for b in self.blocks}

    def staleness(self) -> dict[str, float]:
        """Relative changes of the inverses since the refresh before, by path of the block."""
        again = [block for block in self.blocks if int(block.refreshes.numpy()) > 1]
        return {b.adapter.path: float(b.staleness) for b in again}

    def lost_updates(self) -> dict[str, int]:
        """Blocks for which the statistics of batches were not finite, and how often."""
        counts = {b.adapter.path: int(b.lost_updates.numpy()) for b in self.blocks}
        return {name: count for name, count in counts.items() if count}

    def failed_refreshes(self) -> dict[str, int]:
        """Blocks whose damped factors could not be inverted, and how often."""
        counts = {b.adapter.path: int(b.failed_refreshes.numpy()) for b in self.blocks}
        return {name: count for name, count in counts.items() if count}


class _Task(NamedTuple):
    """A block to precondition by, and the variables to step."""

    block: KroneckerBlock
    inverse: Inverse
    gradients: Gradients
    wanted: Collection[int]

    def direction(self, pairs: RowPairs | None = None) -> Direction:
        directions, product = self.block.precondition(self.gradients, self.inverse, pairs)
        return {key: own for key, own in directions.items() if key in self.wanted}, product


def _on_batch(block: KroneckerBlock, inverse: Any, rows: Mapping[int, tf.Tensor]) -> Any:
    """The inverse, with rows of the batch if it is made of these."""
    return inverse.on(rows[id(block.adapter)]) if block.needs_rows else inverse


def _gradients_of(block: KroneckerBlock, gradients: Mapping[int, tf.Tensor]) -> Gradients:
    """Those of a block: of each of its layers all, or none."""
    whole, present = block.adapter, Gradients()
    for adapter in whole.parts if isinstance(whole, CompositeAdapter) else [whole]:
        own = {id(v): gradients[id(v)] for v in adapter.variables if id(v) in gradients}
        if own and len(own) < len(adapter.variables):
            raise ValueError(
                "The trained weights of a layer changed after K-FAC built its curvature "
                "block. Compile the model again with a new optimizer after freezing. Received: "
                f"layer {adapter.layer.name!r} without gradients for "
                f"{[v.path for v in adapter.variables if id(v) not in own]}"
            )
        present |= own
    return present


def _completed(block: KroneckerBlock, present: Gradients) -> Gradients:
    """With zeros for layers without, such as that of an output without a loss."""
    missing = [v for v in block.adapter.variables if id(v) not in present]
    return present | {id(v): tf.zeros(v.shape, v.dtype) for v in missing}


def _directions_by_rows(tasks: Sequence[_Task], rows: GradientRows) -> list[Direction]:
    """Directions from the rows of the gradients where that is cheaper, else from their sums.

    A training loop can do to gradients what it likes: the rows count if they make up these.
    """

    def from_sums() -> list[Direction]:
        return [task.direction() for task in tasks]

    def from_rows() -> list[Direction]:
        each = [(task, rows.pairs[id(task.block.adapter)]) for task in tasks]
        agree = tf.reduce_all([t.block.is_made_of(pair, t.gradients) for t, pair in each])
        return ops.cond(agree, lambda: [t.direction(pair) for t, pair in each], from_sums)

    return ops.cond(rows.is_cheaper, from_rows, from_sums)


def _prefixed(add_variable: AddVariable, prefix: str) -> AddVariable:
    def add(name: str, *args: Any, **kwargs: Any) -> keras.Variable:
        return add_variable(prefix + name, *args, **kwargs)

    return add
