"""Layer adapters: how a layer's weights, inputs and gradients become matrices.

An adapter presents one layer in the convention of `keras_kfac.math`: inputs and gradients of the
outputs as rows `[..., batch, positions, features]`, the gradients of its weights as one matrix
`[..., d_in, d_out]`. A new layer is one adapter class and one entry in `registry.py`; a layer of
several affine maps has one for each. Outputs are those before the layer's activation.
"""

import abc
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.forward_pass import ForwardPass, LayerCall
from keras_kfac.math import factors
from keras_kfac.math.example_gradients import OneHot
from keras_kfac.math.rows import Starts
from keras_kfac.math.structure import Structure, Structures

Gradients = dict[int, tf.Tensor]
"""Gradients (or directions) of a layer's variables, by `id` of the variable."""

Arrived = Sequence[tuple[Any, Sequence[Any]]]
"""Of each call of a layer: the gradients of its outputs, and what was observed."""

# A factor of more rows than this is kept in blocks on its diagonal, unless a user says otherwise:
# inverting it would hold up a step, and preconditioning by it all steps. 512 and a bias are not
# split. Chosen by benchmarks/factor_size.py.
MAX_FACTOR_SIZE = 576


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Weights that the layer itself holds, not the layers below it."""
    below = {
        id(v)
        for child in _keras_internals.flatten_layers(layer)
        if child is not layer
        for v in child.weights
    }
    return [v for v in layer.weights if id(v) not in below]


def layer_path(layer: keras.Layer) -> str:
    """What a layer is called in reports: its place in the model, where Keras knows one."""
    return getattr(layer, "path", None) or layer.name


def report_names(layers: Iterable[keras.Layer]) -> dict[int, str]:
    """Names for reports, by `id` of the layer: paths, numbered where Keras has several alike.

    Example:
    >>> twins = [keras.layers.Dense(1, name="twin") for _ in range(2)]
    >>> list(report_names(twins).values())
    ['twin', 'twin (2)']
    """
    counts: Counter[str] = Counter()
    names: dict[int, str] = {}
    for layer in layers:
        path = layer_path(layer)
        counts[path] += 1
        names[id(layer)] = path if counts[path] == 1 else f"{path} ({counts[path]})"
    return names


class LayerAdapter(abc.ABC):
    """A layer, or a part of one, whose weights have a curvature block.

    Attributes:
        layer: The adapted layer, built.
        part: Which part of the layer it is; empty if it is the whole.
        reduces: Whether inputs are averaged, and gradients summed, over positions first.
        max_factor_size: A factor of more rows is kept in blocks.
        report_names: What layers are called in reports, by `id`; others by their path.
        has_isotropic_outputs: Whether of the output factor no more than its mean eigenvalue is
            kept.
    """

    part = ""
    takes_slices = False  # Whether `to_matrix` and `from_matrix` take `tf.IndexedSlices`.
    with_activation = False  # Whether the layer's outputs are those after its activation.
    can_reduce = False  # Whether it can treat shared weights by "reduce", as `reduces` says.
    averages_inputs = True  # Whether the input factor is a mean over rows of inputs.
    has_row_pairs = False  # Whether the gradient of an example is `row_pairs`, summed up.

    def __init__(self, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> None:
        self.layer = layer
        self.reduces = False
        self.max_factor_size = MAX_FACTOR_SIZE
        self.report_names: Mapping[int, str] = {}
        self.has_isotropic_outputs = False
        self._trained = trained

    @classmethod
    def of(cls, layer: keras.Layer, trained: Callable[[keras.Variable], bool]) -> list[Self]:
        """The adapters of this class for a layer: one, for most."""
        return [cls(layer, trained)]

    @classmethod
    @abc.abstractmethod
    def methods(cls) -> Collection[str]:
        """Names of the layer's methods whose mathematics the adapter relies on."""

    @classmethod
    def unsupported_reason(cls, layer: keras.Layer, base: type[keras.Layer]) -> str | None:
        """Why `layer`, an instance of `base`, can't be adapted; `None` if it can."""
        for name in cls.methods():
            if getattr(type(layer), name) is not getattr(base, name):
                return f"{type(layer).__name__} overrides `{base.__name__}.{name}`"
        if getattr(layer, "lora_enabled", False):
            return "LoRA is enabled: the kernel is a sum of a frozen and a factored matrix"
        if layer.quantization_mode is not None:
            return f"the layer is quantized ({layer.quantization_mode})"
        return None

    @property
    def path(self) -> str:
        """What the block is called in reports."""
        return self._path_of(self.layer)

    def _path_of(self, layer: keras.Layer) -> str:
        """The name of the layer, and what the adapter is of it."""
        return f"{self.report_names.get(id(layer)) or layer_path(layer)}/{self.part}".rstrip("/")

    @property
    @abc.abstractmethod
    def variables(self) -> list[keras.Variable]:
        """The trained variables that the adapter covers."""

    def takes_part_in(self, call: LayerCall) -> bool:
        """Whether a call of the layer uses the variables."""
        return True

    @property
    def layers(self) -> Sequence[keras.Layer]:
        """The layers whose output gradients are needed."""
        return (self.layer,)

    def calls(self, forward_pass: ForwardPass) -> dict[Any, Any]:
        """The calls of the layer that use the variables, by their place among all."""
        calls = enumerate(forward_pass.calls.get(id(self.layer), []))
        return {place: call for place, call in calls if self.takes_part_in(call)}

    def arrived(self, gradients: Mapping[int, Sequence[Any]], place: Any) -> Any:
        """The output gradients of a call, of those by `id` of the layer and place of the call."""
        return gradients[id(self.layer)][place]

    @property
    def uses(self) -> Sequence["LayerAdapter"]:
        """Adapters for different uses of the variables, each with factors of its own."""
        return (self,)

    def joined(
        self, parts: Sequence[tuple["LayerAdapter", tuple[tf.Tensor, tf.Tensor]]]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The factors of the block, from those of the uses that took place."""
        ((_, factors_of_use),) = parts
        return factors_of_use

    @property
    def block(self) -> str:
        """What kind of block it has, in a word."""
        return "kronecker"

    @property
    def groups(self) -> int | None:
        """Number of independent blocks, or `None` for one block without a leading axis."""
        return None

    @property
    @abc.abstractmethod
    def dims(self) -> tuple[int, int]:
        """`(d_in, d_out)` of the block."""

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Of what `to_matrix` returns: `[..., d_in, d_out]`."""
        return (*self._leading, *self.dims)

    @property
    def structures(self) -> Structures:
        """What is kept of the input factor and the output factor."""
        rows, columns = self._structures()
        if self.has_isotropic_outputs:
            columns = Structure(columns.size, is_isotropic=True)
        return rows, columns

    def _structures(self) -> Structures:
        """What is kept unless the user wants less: of each group, all."""
        rows, columns = map(Structure, self.dims)
        if self.groups is None:
            rows, columns = (s.split(self.max_factor_size) for s in (rows, columns))
        return rows, columns

    @property
    def factor_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the input factor and the output factor."""
        return [(*self._leading, *structure.shape) for structure in self.structures]

    @abc.abstractmethod
    def input_moment(
        self,
        inputs: tf.Tensor,
        example_weights: tf.Tensor | None,
        dtype: tf.DType,
        *observed: Any,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The sum that makes up the input factor, and its weight; see `factors.input_moment`."""

    def thinned(self, inputs: tf.Tensor) -> "LayerAdapter":
        """The adapter to estimate the input factor by, where all positions are not worth it."""
        return self

    def output_factor(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """The output factor of a call, given the gradients of its outputs."""
        return factors.output_factor(self.output_rows(gradients, *observed), self.structures[1])

    def output_factor_of_calls(self, calls: Arrived, starts: Starts) -> tf.Tensor:
        """The output factor of all calls in a pass: terms of one sum, as positions are.

        Args:
            calls: What arrived at each of them.
            starts: Where the examples of each are among those of all; see `math.rows.aligned`.
        """
        return tf.add_n([self.output_factor(gradients, *seen) for gradients, seen in calls])

    def observed(self, call: LayerCall) -> tuple[Any, ...]:
        """What the output rows of a call depend on beside the gradients.

        Tensors must have a batch axis: those that come back to `output_rows` are cut to the
        examples in use, and of the type of the gradients.
        """
        return ()

    def known_mask(self, call: LayerCall) -> tf.Tensor | None:
        """Which positions of a call are no padding, as far as Keras knows; `None` if all are not.

        It may be lost behind the layer.
        """
        return None

    def mask_of(self, call: LayerCall) -> tf.Tensor | None:
        """The same, of what has no part in the loss."""
        mask = self.known_mask(call)
        if mask is None or call.loses_mask is None:
            return mask
        return tf.cast(mask, tf.bool) | call.loses_mask

    def row_mask(self, rows: tf.Tensor, *observed: Any) -> tf.Tensor | None:
        """Which of some rows `[..., batch, positions, d]` are no padding; `None` if all are not.

        Args:
            rows: Of inputs or of gradients.
            observed: What `observed` noted of the call.
        """
        return None

    def arriving(self, gradients: Any, *observed: Any) -> tf.Tensor:
        """What arrives at each row, `[batch, positions, n]`; or each example, `[batch, 1, n]`."""
        rows = self.output_rows(gradients, *observed)
        leading = rows.shape.rank - 3
        if not leading:
            return rows
        order = [leading, leading + 1, *range(leading), leading + 2]
        shape = tf.shape(rows)[leading : leading + 2]
        return tf.reshape(tf.transpose(rows, order), [*tf.unstack(shape), -1])

    @abc.abstractmethod
    def output_rows(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Rows of output gradients: `[..., batch, positions, d_out]`."""

    def row_pairs(
        self, inputs: tf.Tensor, gradients: tf.Tensor, *observed: Any
    ) -> tuple[tf.Tensor | OneHot, tf.Tensor]:
        """Rows of inputs and of output gradients, position by position: what gradients sum up."""
        raise NotImplementedError

    @abc.abstractmethod
    def to_matrix(self, gradients: Gradients) -> tf.Tensor:
        """Joins the gradients of the variables into `[..., d_in, d_out]`."""

    def row_blocks(self, gradients: Gradients) -> list[tf.Tensor]:
        """What `to_matrix` joins, one above the other, where it joins rows."""
        return [self.to_matrix(gradients)]

    @abc.abstractmethod
    def from_matrix(self, matrix: tf.Tensor) -> Gradients:
        """Inverse of `to_matrix`."""

    @property
    def _leading(self) -> list[int]:
        return [] if self.groups is None else [self.groups]
