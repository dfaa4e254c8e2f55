"""The Kronecker-factored curvature block of one layer."""

import math
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kfac.curvature.regularization import (
    further_l2,
    least_l2_coefficient,
    mean_l2_coefficient,
)
from keras_kfac.curvature.spectrum import LayerSpectrum
from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.composite import weights_dtype
from keras_kfac.introspection.per_example import ExactAdapter
from keras_kfac.introspection.statistics import BatchWeights, LayerStatistics
from keras_kfac.math.eigen import eigenvalues
from keras_kfac.math.inverses import (
    ANY_DAMPING,
    ExactInverse,
    Inverse,
    Part,
    Shape,
    relative_change,
)
from keras_kfac.math.linalg import (
    Gradient,
    RowPairs,
    cast,
    epsilon,
    inner_product,
    is_finite,
    plus_diagonal,
    scalar,
    trace,
)
from keras_kfac.math.moving_average import weighted_average
from keras_kfac.math.structure import aligned, aligned_shapes, from_blocks, to_blocks

AddVariable = Callable[..., keras.Variable]
"""Creates a variable: `(name, shape, dtype, initializer="zeros")`."""

Parts = dict[str, Part]
"""Shapes and initial values of tensors by name."""


# Two ways to add up a gradient agree to so many times the precision of its terms: 7 were measured,
# for up to 4000 rows of 1024, whether these cancel or not.
_ROUNDING = 100
_PROBE = (0, 0)  # Seed.


class KroneckerBlock:
    """Moving averages of a layer's factors `A` and `G`, and inverses of their damped values.

    `update` and `refresh` are separate because they run on different schedules; *when* they run is
    not the block's business. Other structures of curvature are subclasses: see `choice.py`.

    Args:
        adapter: The layer.
        add_variable: Creates the block's variables.
        inverse_type: How the product of the factors is damped.
        product_dtype: In which to multiply gradients by inverses; `None` for that of the weights.

    Attributes:
        adapter: The layer.
        input_factor: `A`, `[..., d_in, d_in]`, or what its structure keeps of it.
        output_factor: `G`, `[..., d_out, d_out]`, likewise.
        weight: Accumulated weight of those of output factors; 0 before the first update.
        failed_refreshes: How often the damped factors could not be inverted.
        refreshes: How often they could.
        lost_updates: How often the statistics of a batch were not finite.
        staleness: Relative change of the inverse in the last successful refresh.
    """

    kind: str | None = None  # What it is called in `coverage()`; as the adapter says, if `None`.
    is_joint = False  # Whether there is one block for all layers that have the structure.
    replaces_exact = False  # Whether it is for layers, too, that have an exact block as they are.
    needs_rows = False  # Whether its inverse is made of rows of the batch: see `ModelCurvature`.
    needs_gradients = False  # Whether it is made of gradients of single examples.
    factorises = True  # Whether matrices are factorised in the precision of the weights.
    needs_bases = False  # Whether it has averages in the bases of a refresh, made after one.
    keeps_fisher = True  # Whether `A ⊗ G` is the layer's Fisher matrix, and its factors are kept.

    @classmethod
    def unsuitable(cls, adapter: LayerAdapter) -> str | None:
        """Why the structure can't be had for a layer; `None` if it can."""
        return None

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> "BlockPlan":
        """What to build for a layer that it suits.

        Args:
            adapter: The layer.
            inverse_type: As the user would like it damped, if there is a choice.
        """
        return BlockPlan(cls, adapter, inverse_type, cls.kind or adapter.block)

    @classmethod
    def check_factored(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> None:
        """Refuses to damp a structure exactly that can only be damped by its factors.

        Raises:
            ValueError: If it is to be.
        """
        if inverse_type is ExactInverse:
            raise ValueError(
                f"`curvature` {cls.kind!r} can only be damped factor by factor, not exactly as "
                "exact_damping=True and `laplace` need it. Received: layer "
                f"{adapter.path!r}"
            )

    @classmethod
    def merged(cls, plans: "Sequence[BlockPlan]", model: keras.Model) -> "BlockPlan":
        """One block for all layers that have the structure, which `is_joint`.

        Args:
            plans: Those of each layer, in the order of the model.
            model: The model.

        Raises:
            ValueError: If these layers can't have it together.
        """
        raise NotImplementedError

    @classmethod
    def note(cls, adapter: LayerAdapter) -> str:
        """What there is to say of it in `coverage()`; nothing, for most."""
        return ""

    @classmethod
    def averages(cls, adapter: LayerAdapter) -> dict[str, Shape]:
        """Names and shapes of the moving averages: factors of each observer, one by one."""
        return dict(zip(("input_factor", "output_factor"), adapter.factor_shapes))

    @classmethod
    def inverse_parts(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> Parts:
        """Names, shapes and initial values of the parts of the inverse: those of the identity."""
        shapes = aligned_shapes(adapter.factor_shapes, adapter.structures)
        return dict(zip(inverse_type._fields, inverse_type.start(*shapes)))

    def __init__(
        self,
        adapter: LayerAdapter,
        add_variable: AddVariable,
        inverse_type: type[Inverse],
        product_dtype: str | None = None,
    ) -> None:
        self.adapter = adapter
        self._product_dtype = product_dtype
        # A Kronecker product is damped by one number, a matrix of the weights by one for each.
        self._damps_each = isinstance(adapter, ExactAdapter)
        common = least_l2_coefficient if self._damps_each else mean_l2_coefficient
        self._l2 = common(adapter.variables)
        dtype = weights_dtype(adapter)
        averages = self.averages(adapter).items()
        self._averages = [add_variable(name, shape, dtype) for name, shape in averages]
        self.input_factor, self.output_factor = self._averages[:2]
        names = ("input_weight", "output_weight")
        self._weights = [add_variable(name, (), dtype) for name in names]
        _, self.weight = self._weights
        self._inverse_type = inverse_type
        self._structures = adapter.structures
        # The identity until the first refresh succeeds: the block then passes the gradient on.
        self._inverse = [
            add_variable(name, shape, dtype, initial)
            for name, (shape, initial) in self.inverse_parts(adapter, inverse_type).items()
        ]
        self.failed_refreshes = add_variable("failed_refreshes", (), "int64")
        self.refreshes = add_variable("refreshes", (), "int64")
        self.lost_updates = add_variable("lost_updates", (), "int64")
        self.staleness = add_variable("staleness", (), dtype)

    def join(self, blocks: "Sequence[KroneckerBlock]") -> None:
        """Gets to know all blocks of the model, in the order of the layers."""

    @property
    def observers(self) -> Sequence[LayerAdapter]:
        """Adapters whose statistics an update takes, that of the block first."""
        return [self.adapter]

    def update(
        self, statistics: Sequence[LayerStatistics], weights: BatchWeights, decay: tf.Tensor
    ) -> None:
        """Includes the statistics of a batch in the moving averages, unless they are not finite.

        Args:
            statistics: Those of each observer.
            weights: What the batch counts beside others.
            decay: Of the moving averages.
        """
        new = [factor for own in statistics for factor in own[:2]][: len(self._averages)]
        # Not a branch: one for each block takes seconds to trace.
        finite = tf.reduce_all([is_finite(factor) for factor in new])
        self.lost_updates.assign_add(tf.cast(~finite, tf.int64))
        for side, count in enumerate(weights):
            weight = tf.convert_to_tensor(self._weights[side])
            total = weight
            for variable, factor in zip(self._averages[side::2], new[side::2]):
                old = tf.convert_to_tensor(variable)
                average, total = weighted_average(
                    old,
                    weight,
                    tf.cast(factor, old.dtype),
                    tf.cast(count, weight.dtype),
                    tf.cast(decay, old.dtype),
                )
                variable.assign(tf.where(finite, average, old))
            self._weights[side].assign(tf.where(finite, total, weight))

    @property
    def size(self) -> int:
        """Number of weights of the block."""
        d_in, d_out = self.adapter.dims
        return d_in * d_out * (self.adapter.groups or 1)

    @property
    def refresh_cost(self) -> int:
        """About so many multiplications make the inverses."""
        matrices = [shape for shape in self.adapter.factor_shapes if len(shape) > 1]
        return sum(math.prod(shape) * shape[-1] for shape in matrices)

    def trace(self) -> tf.Tensor:
        """Trace of `A ⊗ G`, undamped."""
        a, g = aligned(self._factors(), self._structures)
        copies = math.prod(structure.copies for structure in self._structures)
        return copies * tf.reduce_sum(trace(a) * trace(g))

    def spectra(self, damping: tf.Tensor) -> list[LayerSpectrum]:
        """The eigenvalues of the factors as they are now, for each layer."""
        each = aligned(self._whole_factors(), self._structures)
        values = (eigenvalues(f) for f in each)
        a, g = (np.repeat(v, s.copies, axis=-1) for v, s in zip(values, self._structures))
        damping = float(damping) + mean_l2_coefficient(self.adapter.variables)
        return [LayerSpectrum(self.adapter.path, a, g, damping)]

    def _factors(self) -> list[tf.Tensor]:
        """Those that the block is the product of."""
        return [tf.convert_to_tensor(f) for f in (self.input_factor, self.output_factor)]

    def _whole_factors(self) -> list[tf.Tensor]:
        """The same for reports, which may take their time."""
        return self._factors()

    def invert(self, damping: tf.Tensor) -> Inverse:
        """The inverse of the damped factors as they are now; not finite where that fails."""
        damping = scalar(damping, self.input_factor.dtype) + self._l2
        a, g = self._aligned_factors()
        further = self._further_l2()
        if further is not None:
            g = plus_diagonal(g, further[0])
        return self._inverse_type.of(a, g, damping)

    def _further_l2(self) -> tf.Tensor | None:
        """What regularisers add to the damping of single weights, `[1, weights]`, if they do."""
        return further_l2(self.adapter, self.input_factor.dtype) if self._damps_each else None

    def _aligned_factors(self) -> list[tf.Tensor]:
        """Those to invert, with the axes of the gradient's blocks if it has any."""
        factors = [s.filled(f) for s, f in zip(self._structures, self._factors())]
        return aligned(factors, self._structures)

    def eigenbasis(self) -> ExactInverse:
        """Eigenvectors and eigenvalues of the undamped block, of one that `keeps_fisher`.

        Those that are kept as of the last refresh, if any are, else those of the factors as they
        are now.
        """
        if self._inverse_type is ExactInverse and self._further_l2() is None:
            return typing.cast(ExactInverse, self.inverse)
        a, g = self._aligned_factors()
        return ExactInverse.of(a, g, scalar(ANY_DAMPING, a.dtype))

    def keep(self, inverse: Inverse) -> None:
        """Keeps an inverse for the next steps; the previous one if it is not finite."""
        finite, change = self._replace_inverse(inverse)
        self.staleness.assign(tf.where(finite, change, self.staleness))
        self.refreshes.assign_add(tf.cast(finite, tf.int64))
        self.failed_refreshes.assign_add(tf.cast(~finite, tf.int64))

    def _replace_inverse(self, inverse: Inverse) -> tuple[tf.Tensor, tf.Tensor]:
        """Keeps an inverse if it is finite; returns whether it is, and its relative change."""
        old, parts = self.inverse, tf.nest.flatten(inverse)
        finite = tf.reduce_all([is_finite(part) for part in parts])
        change = tf.cast(relative_change(old, inverse), self.staleness.dtype)
        for variable, before, part in zip(self._inverse, tf.nest.flatten(old), parts):
            variable.assign(tf.where(finite, part, before))
        return finite, change

    @property
    def inverse(self) -> Inverse:
        """The inverse as of the last successful refresh."""
        return self._inverse_type(*(tf.convert_to_tensor(part) for part in self._inverse))

    def is_made_of(self, pairs: RowPairs, gradients: Gradients) -> tf.Tensor:
        """Whether the gradients are the sum of these rows, to rounding; bool scalar.

        Both are multiplied by one random vector: what differs does so there, but for bad luck, and
        a vector costs nothing. Rounding is relative to the rows as well as to their sum, in which
        they may cancel.
        """
        parts = self.adapter.row_blocks(gradients)
        probe = tf.random.stateless_normal([parts[0].shape[-1], 1], _PROBE, dtype=parts[0].dtype)
        expected = tf.concat([tf.matmul(part, probe) for part in parts], axis=-2)
        outputs = tf.matmul(pairs.outputs, probe)
        actual = tf.matmul(pairs.inputs, outputs, transpose_a=True)
        terms = tf.norm(pairs.inputs, axis=-1, keepdims=True) * outputs
        size = tf.norm(expected) + tf.norm(terms)
        return tf.norm(actual - expected) <= _ROUNDING * epsilon(probe.dtype) * size

    def precondition(
        self, gradients: Gradients, inverse: Inverse, pairs: RowPairs | None = None
    ) -> tuple[Gradients, tf.Tensor]:
        """Natural gradient of the layer's variables.

        Args:
            gradients: By `id` of the variable.
            inverse: Of the damped factors.
            pairs: The rows that the gradients are made of, to work on in their place.

        Returns:
            The directions, and their inner product with the gradients.
        """
        adapter = self.adapter
        if not adapter.takes_slices:
            gradients = {key: tf.convert_to_tensor(value) for key, value in gradients.items()}
        matrix = adapter.to_matrix(gradients) if pairs is None else pairs
        blocks = self._product(to_blocks(matrix, self._structures), inverse)
        matrix = from_blocks(blocks, self._structures)
        directions = adapter.from_matrix(matrix)
        return directions, self._products(gradients, directions)

    def _products(self, gradients: Gradients, directions: Gradients) -> tf.Tensor:
        """The inner product of both, in the type of the block: layers may be of several."""
        each = [inner_product(gradients[key], value) for key, value in directions.items()]
        return tf.add_n([tf.cast(product, self.input_factor.dtype) for product in each])

    def _product(self, matrix: Gradient, inverse: Inverse) -> Gradient:
        dtype = self.input_factor.dtype
        if self._product_dtype in (None, dtype):
            return inverse.precondition(matrix)
        inverse = self._inverse_type(*(tf.cast(part, self._product_dtype) for part in inverse))
        return cast(inverse.precondition(cast(matrix, self._product_dtype)), dtype)


class BlockPlan(NamedTuple):
    """A block that is to be built.

    Attributes:
        block_type: Its class.
        adapter: The layer.
        inverse_type: How it is damped.
        name: What kind of block it is, in a word.
    """

    block_type: type[KroneckerBlock]
    adapter: LayerAdapter
    inverse_type: type[Inverse]
    name: str

    def build(self, add_variable: AddVariable, product_dtype: str | None) -> KroneckerBlock:
        """The block."""
        return self.block_type(self.adapter, add_variable, self.inverse_type, product_dtype)

    @property
    def memory(self) -> int:
        """Bytes that the block keeps."""
        adapter = self.adapter
        parts = self.block_type.inverse_parts(adapter, self.inverse_type).values()
        shapes = [*self.block_type.averages(adapter).values(), *(shape for shape, _ in parts)]
        numbers = sum(map(math.prod, shapes))
        return tf.as_dtype(weights_dtype(adapter)).size * numbers
