"""The block-tridiagonal inverse of a chain of dense layers.

Source: Martens & Grosse (2015), arXiv:1503.05671, section 4.3.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.curvature.block import BlockPlan, KroneckerBlock, Parts
from keras_kfac.curvature.regularization import mean_l2_coefficient
from keras_kfac.curvature.spectrum import LayerSpectrum
from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.affine import DenseAdapter
from keras_kfac.introspection.chains import chain_break
from keras_kfac.introspection.composite import CrossAdapter, JointWeightsAdapter, weights_dtype
from keras_kfac.math.inverses import Inverse, Shape
from keras_kfac.math.linalg import RowPairs, scalar, trace
from keras_kfac.math.tridiagonal import ChainInverse, Pair


class ChainAdapter(JointWeightsAdapter):
    """The layers of a chain, with what neighbours have in common.

    Attributes:
        between: What each layer and the next have in common.
    """

    def __init__(self, parts: Sequence[LayerAdapter]) -> None:
        super().__init__(parts)
        self.between = [CrossAdapter(pair) for pair in itertools.pairwise(parts)]

    @property
    def observers(self) -> list[LayerAdapter]:
        """The layers, then pairs of neighbours."""
        return [*self.parts, *self.between]


class TridiagonalBlock(KroneckerBlock):
    """`A ⊗ G` of each layer, and products of moments for what lies between neighbours.

    What lies between others is as if the gradients of a layer depended on those of all layers above
    it through the next one. Damping is factored, and factors are whole.
    """

    kind = "tridiagonal"
    keeps_fisher = False
    needs_gradients = True
    is_joint = True
    adapter: ChainAdapter

    @classmethod
    def unsuitable(cls, adapter: LayerAdapter) -> str | None:
        """Why the structure can't be had for a layer; `None` if it can."""
        if not isinstance(adapter, DenseAdapter):
            return "it is for chains of Dense layers"
        if adapter.kernel is None:
            return "its kernel is frozen: the bias alone sees no inputs"
        return "it has rows for each position, not their mean" if adapter.reduces else None

    @classmethod
    def plan(cls, adapter: LayerAdapter, inverse_type: type[Inverse]) -> BlockPlan:
        """What to build for a layer that it suits.

        Raises:
            ValueError: If it is to be damped exactly.
        """
        cls.check_factored(adapter, inverse_type)
        adapter.max_factor_size = max(adapter.dims)
        return super().plan(adapter, inverse_type)

    @classmethod
    def merged(cls, plans: Sequence[BlockPlan], model: keras.Model) -> BlockPlan:
        """One block for the chain.

        Raises:
            ValueError: If the layers are no chain.
        """
        adapters = [plan.adapter for plan in plans]
        reason = chain_break(model, [adapter.layer for adapter in adapters])
        if reason is not None:
            raise ValueError(
                "`curvature` can be 'tridiagonal' for one chain of Dense layers, each of which "
                f"leads to the next alone. Choose it for such by name. Received: model "
                f"{model.name!r}, in which {reason}"
            )
        return plans[0]._replace(adapter=ChainAdapter(adapters))

    @classmethod
    def averages(cls, adapter: Any) -> dict[str, Shape]:
        """Factors of each layer, then moments between neighbours."""
        shapes = [shape for observer in adapter.observers for shape in observer.factor_shapes]
        names = ("input_factor", "output_factor")
        return {f"{names[i % 2]}.{i // 2}": shape for i, shape in enumerate(shapes)}

    @classmethod
    def inverse_parts(cls, adapter: Any, inverse_type: type[Inverse]) -> Parts:
        """Those of the identity."""
        shapes = [tuple(part.factor_shapes) for part in adapter.parts]
        return {f"inverse.{i}": part for i, part in enumerate(ChainInverse.start(shapes))}

    @property
    def observers(self) -> Sequence[LayerAdapter]:
        """The layers, then pairs of neighbours."""
        return self.adapter.observers

    @property
    def refresh_cost(self) -> int:
        """About so many multiplications make the inverse."""
        return sum(d**3 for part in self.adapter.parts for d in part.dims)

    def _pairs(self) -> tuple[list[Pair], list[Pair]]:
        """Factors of the layers, and moments between neighbours."""
        values = [tf.convert_to_tensor(v) for v in self._averages]
        pairs = list(zip(values[::2], values[1::2]))
        layers = len(self.adapter.parts)
        return pairs[:layers], pairs[layers:]

    def trace(self) -> tf.Tensor:
        """The sum of those of the layers."""
        return tf.add_n([trace(a) * trace(g) for a, g in self._pairs()[0]])

    def spectra(self, damping: tf.Tensor) -> list[LayerSpectrum]:
        """The eigenvalues of the factors of each layer."""
        each = [[tf.linalg.eigvalsh(f).numpy() for f in pair] for pair in self._pairs()[0]]
        dampings = [float(own) for own in self._dampings(damping)]
        paths = [part.path for part in self.adapter.parts]
        return [LayerSpectrum(path, a, g, d) for path, (a, g), d in zip(paths, each, dampings)]

    def invert(self, damping: tf.Tensor) -> Any:
        """The inverse of the damped chain as it is now; not finite where that fails."""
        factors, between = self._pairs()
        return ChainInverse.of(factors, between, self._dampings(damping))

    def _dampings(self, damping: tf.Tensor) -> list[tf.Tensor]:
        """That of each layer, with its own regulariser."""
        damping = scalar(damping, self.input_factor.dtype)
        return [damping + mean_l2_coefficient(part.variables) for part in self.adapter.parts]

    @property
    def inverse(self) -> Any:
        """The inverse as of the last successful refresh."""
        return ChainInverse.from_parts([tf.convert_to_tensor(part) for part in self._inverse])

    def precondition(
        self, gradients: Gradients, inverse: Any, pairs: RowPairs | None = None
    ) -> tuple[Gradients, tf.Tensor]:
        """Natural gradient of the variables of all layers."""
        parts = self.adapter.parts
        gradients = {key: tf.convert_to_tensor(value) for key, value in gradients.items()}
        matrices = [part.to_matrix(gradients) for part in parts]
        dtype = self._product_dtype or self.input_factor.dtype
        inverse, matrices = tf.nest.map_structure(lambda t: tf.cast(t, dtype), (inverse, matrices))
        directions: Gradients = {}
        for part, matrix in zip(parts, inverse.precondition(matrices)):
            directions |= part.from_matrix(tf.cast(matrix, weights_dtype(part)))
        return directions, self._products(gradients, directions)
