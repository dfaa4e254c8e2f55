"""Which curvature block covers which weights of a model, and why others have none."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.curvature.block import BlockPlan, KroneckerBlock
from keras_kfac.curvature.choice import Curvature, CurvatureChoice
from keras_kfac.introspection.adapters import (
    LayerAdapter,
    layer_path,
    own_variables,
    report_names,
)
from keras_kfac.introspection.composite import weights_dtype
from keras_kfac.introspection.registry import adapt, find_adapters, has_entry
from keras_kfac.introspection.weight_sharing import Choice, WeightSharing
from keras_kfac.math.inverses import Inverse


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """How the trained weights of one layer get their steps.

    Attributes:
        layer: Path of the layer, with a number where others before it have the same one. In
            `curvature` and `weight_sharing` a path chooses all layers that have it.
        layer_type: Its class.
        weights: Number of trained weights it owns (scalars, not tensors).
        block: Its curvature block: `"kronecker"`, `"ekfac"`, `"input"`, `"inverse_free"`,
            `"linear_exact"`, `"full"`, `"diagonal"`, `"dense"`, `"sample_space"` or
            `"tridiagonal"`; or `"fallback"` or `"frozen"`.
        reason: Why it has no curvature block, or a coarser one than it could have; or why shared
            weights are treated by "reduce"; or empty.
        memory: Bytes that the factors and inverses of its blocks take.
    """

    layer: str
    layer_type: str
    weights: int
    block: str
    reason: str = ""
    memory: int = 0


class Coverage(list[CoverageRow]):
    """Rows of `KFAC.coverage()`; prints as a table.

    Attributes:
        memory: Bytes that the factors and inverses of all blocks take.
        empirical_losses: Names of losses that are no known likelihood: their Fisher matrix is the
            empirical one, of the training targets. Known after the first step.
    """

    memory = 0
    empirical_losses: Sequence[str] = ()

    @property
    def fraction(self) -> float:
        """Share of the trained weights that a curvature block covers, in [0, 1]."""
        total = sum(row.weights for row in self)
        covered = sum(row.weights for row in self if row.block not in ("fallback", "frozen"))
        return covered / total if total else 0.0

    def check_memory(self, limit: int | None) -> None:
        """Refuses to take more than a number of bytes.

        Raises:
            ValueError: If the blocks need more.
        """
        if limit is None or self.memory <= limit:
            return
        largest = max(self, key=lambda row: row.memory)
        raise ValueError(
            f"Factors and inverses of this model take {self.memory:,} bytes, {largest.memory:,} of "
            f"them for layer {largest.layer!r}. Lower `max_factor_size`, freeze layers, or raise "
            f"the limit. Received: memory_limit={limit!r}"
        )

    def __str__(self) -> str:
        header = ("layer", "type", "weights", "block", "reason")
        table = [header] + [
            (row.layer, row.layer_type, f"{row.weights:,}", row.block, row.reason) for row in self
        ]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]])
            for line in table
        ]
        lines.append(
            f"{100 * self.fraction:.1f} % of the trained weights have a curvature block. Factors "
            f"and inverses take {self.memory / 2**20:,.1f} MiB."
        )
        if self.empirical_losses:
            names = ", ".join(self.empirical_losses)
            lines.append(f"Empirical Fisher matrix of losses without known likelihood: {names}.")
        return "\n".join(line.rstrip() for line in lines)


class CoveragePlan(NamedTuple):
    """The blocks to build, and the table that says so."""

    blocks: list[BlockPlan]
    rows: Coverage


class BlockSettings(NamedTuple):
    """What a user says of the blocks.

    Attributes:
        curvature: Which structure the curvature of each layer has.
        weight_sharing: How to treat weights that are used at many positions.
        inverse_type: How blocks are damped.
        max_factor_size: Factors of more rows are kept in blocks.
    """

    curvature: Curvature
    weight_sharing: Choice
    inverse_type: type[Inverse]
    max_factor_size: int


def plan_coverage(
    model: keras.Model,
    is_trained: Callable[[keras.Variable], bool],
    settings: BlockSettings,
    called: Collection[int] | None = None,
    unreachable: Mapping[int, str] | None = None,
) -> CoveragePlan:
    """Decides for every layer with weights whether a curvature block covers it.

    Args:
        model: A built model.
        is_trained: Whether a variable is among those the optimizer trains.
        settings: How the blocks are to be.
        called: `id`s of the layers that a forward pass called; `None` before the first pass.
        unreachable: Reasons why a layer's tensors can't be had, by `id` of the layer.

    Raises:
        ValueError: If `curvature` or `weight_sharing` name layers that the model does not have, or
            that can't be treated so, or a layer's weights have too few digits for its block.
    """
    sharing = WeightSharing(model, settings.weight_sharing)
    choice = CurvatureChoice(model, settings.curvature)
    layers = _keras_internals.flatten_layers(model)
    names = report_names(layer for layer in layers if own_variables(layer) or has_entry(layer))
    blocks: list[_Block] = []
    reasons: dict[int, str] = {}  # Why a variable has no block, by its `id`.
    holders: dict[int, keras.Layer] = {}  # The layer in whose block it is, likewise.
    for layer in layers:  # Those above come first: a recurrent layer before its cell.
        found, reason = _adapters(layer, is_trained, called, unreachable or {})
        sharing.check(layer, found)
        own = layer.weights if has_entry(layer) else own_variables(layer)
        trained = [v for v in own if is_trained(v)]
        holder = next((holders[id(v)] for v in trained if id(v) in holders), None)
        if holder is not None and not found:
            reason = f"name {layer_path(holder)!r}, in whose block its weights are"
        choice.check(layer, own, found, reason if trained else "")
        for adapter in found:
            adapter.reduces = adapter.can_reduce and bool(sharing.reduces(layer))
            for use in (adapter, *adapter.uses):
                use.report_names = names
                use.max_factor_size = settings.max_factor_size
            block_type, note = choice.of(adapter)
            blocks.append(_Block(block_type.plan(adapter, settings.inverse_type), note))
            holders.update((id(v), layer) for v in adapter.variables)
        for variable in own:
            reasons.setdefault(id(variable), reason)
    blocks = _merged(blocks, model)
    for block in blocks:
        _check_precision(block.plan)
    covered = {id(v): block for block in blocks for v in block.plan.adapter.variables}
    rows = Coverage()
    rows.memory = sum(block.plan.memory for block in blocks)
    for layer in layers:
        own = own_variables(layer)
        trained = [v for v in own if is_trained(v)]
        if own:
            name = names[id(layer)]
            rows.append(_row(name, layer, trained, covered, reasons, sharing))
    return CoveragePlan([block.plan for block in blocks], rows)


class _Block(NamedTuple):
    """A block to be built, and why it is not the chosen one, or nothing."""

    plan: BlockPlan
    note: str

    def share(self, variables: Sequence[keras.Variable]) -> float:
        """Which part of its weights these hold."""
        own = _size(self.plan.adapter.variables)
        keys = {id(v) for v in variables}
        return _size([v for v in self.plan.adapter.variables if id(v) in keys]) / own


def _size(variables: Sequence[keras.Variable]) -> int:
    """Number of weights."""
    return sum(int(v.value.shape.num_elements()) for v in variables)


def _merged(blocks: Sequence[_Block], model: keras.Model) -> list[_Block]:
    """With one block, where the first of them is, in place of those of layers that share it."""
    merged: list[_Block] = []
    found: set[type[KroneckerBlock]] = set()
    for block in blocks:
        block_type = block.plan.block_type
        if not block_type.is_joint:
            merged.append(block)
        elif block_type not in found:
            found.add(block_type)
            plans = [b.plan for b in blocks if b.plan.block_type is block_type]
            plan = block_type.merged(plans, model)
            merged.append(_Block(plan, plan.block_type.note(plan.adapter)))
    return merged


def _check_precision(plan: BlockPlan) -> None:
    """Refuses blocks with matrices to factorise, of weights in a type in which nothing does that.

    Raises:
        ValueError: If it is one.
    """
    dtype = tf.as_dtype(weights_dtype(plan.adapter))
    factorises = plan.block_type.factorises and not plan.block_type.needs_rows
    matrices = [s for s in plan.adapter.factor_shapes if len(s) > 1 and s[-1] > 1]
    if dtype.size >= 4 or not factorises or not matrices:
        return
    raise ValueError(
        f"TensorFlow factorises no matrix in {dtype.name}, as this block would have it. Choose "
        "curvature 'inverse_free' for the layer, or 'diagonal' if its block is exact; or keep its "
        f"weights in float32, as the dtype policy 'mixed_{dtype.name}' does. Received: layer "
        f"{plan.adapter.path!r}, block {plan.name!r}"
    )


def _row(
    name: str,
    layer: keras.Layer,
    trained: Sequence[keras.Variable],
    covered: Mapping[int, _Block],
    reasons: Mapping[int, str],
    sharing: WeightSharing,
) -> CoverageRow:
    kind = type(layer).__name__
    if not trained:
        return CoverageRow(name, kind, 0, "frozen", "no trained weights")
    weights = _size(trained)
    blocks = list({id(b): b for v in trained for b in [covered.get(id(v))] if b}.values())
    if not blocks:
        return CoverageRow(name, kind, weights, "fallback", reasons[id(trained[0])])
    adapters = [block.plan.adapter for block in blocks]
    sharing.check(layer, adapters)  # Of a cell, adapters are those of its recurrent layer.
    notes = [*(block.note for block in blocks), *map(_coarseness, adapters)]
    if any(adapter.reduces for adapter in adapters):
        notes.append(sharing.reduces(layer))
    needed = sum(block.plan.memory * block.share(trained) for block in blocks)
    reason = "; ".join(dict.fromkeys(filter(None, notes)))
    return CoverageRow(name, kind, weights, blocks[0].plan.name, reason, round(needed))


def _coarseness(adapter: LayerAdapter) -> str:
    """Which factors are kept in blocks."""
    sides = zip(("input", "output"), adapter.structures)
    large = [f"{name} factor in {s.blocks} blocks" for name, s in sides if s.blocks > 1]
    if not large:
        return ""
    size = " x ".join(f"{d:,}" for d in adapter.dims)
    return f"{size} is large: {' and '.join(large)}"


def _adapters(
    layer: keras.Layer,
    is_trained: Callable[[keras.Variable], bool],
    called: Collection[int] | None,
    unreachable: Mapping[int, str],
) -> tuple[list[LayerAdapter], str]:
    classes, reason = find_adapters(layer)
    if not classes:
        return [], reason
    if id(layer) in unreachable:
        return [], unreachable[id(layer)]
    if called is not None and id(layer) not in called:
        return [], "not called in the model's forward pass"
    return adapt(layer, is_trained), ""
