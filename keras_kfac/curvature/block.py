"""The Kronecker-factored curvature block of one layer."""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_kfac.curvature.regularization import l2_coefficient
from keras_kfac.introspection.adapters import Gradients, LayerAdapter
from keras_kfac.introspection.statistics import LayerStatistics
from keras_kfac.math import kronecker, linalg
from keras_kfac.math.moving_average import weighted_average

AddVariable = Callable[..., keras.Variable]
"""Creates a variable: `(name, shape, dtype, initializer="zeros")`."""


class KroneckerBlock:
    """Moving averages of a layer's factors `A` and `G`, and inverses of their damped values.

    `update` and `refresh` are separate because they run on different schedules; *when* they run is
    not the block's business.

    Attributes:
        adapter: The layer.
        input_factor: `A`, `[..., d_in, d_in]`.
        output_factor: `G`, `[..., d_out, d_out]`.
        weight: Accumulated weight of the moving averages; 0 before the first update.
        input_inverse: `(A + π√λ I)⁻¹` as of the last successful refresh.
        output_inverse: `(G + √λ/π I)⁻¹` likewise.
        failed_refreshes: How often the damped factors were not positive definite.
        condition_number: That of the damped `A ⊗ G` in the 1-norm, as of the same refresh.
    """

    def __init__(self, adapter: LayerAdapter, add_variable: AddVariable) -> None:
        self.adapter = adapter
        self._l2 = l2_coefficient(adapter.variables[0])
        leading = () if adapter.groups is None else (adapter.groups,)
        dtype = adapter.variables[0].dtype
        d_in, d_out = adapter.dims
        a_shape, g_shape = (*leading, d_in, d_in), (*leading, d_out, d_out)
        self.input_factor = add_variable("input_factor", a_shape, dtype)
        self.output_factor = add_variable("output_factor", g_shape, dtype)
        self.weight = add_variable("factor_weight", (), dtype)
        # The identity until the first refresh succeeds: the block then passes the gradient on.
        self.input_inverse = add_variable("input_inverse", a_shape, dtype, _identity)
        self.output_inverse = add_variable("output_inverse", g_shape, dtype, _identity)
        self.failed_refreshes = add_variable("failed_refreshes", (), "int32")
        self.condition_number = add_variable("condition_number", (), dtype, "ones")

    def update(self, statistics: LayerStatistics, examples: tf.Tensor, decay: tf.Tensor) -> None:
        """Includes the factors of a batch in the moving averages, unless they are not finite."""
        finite = tf.logical_and(
            tf.reduce_all(tf.math.is_finite(statistics.input_factor)),
            tf.reduce_all(tf.math.is_finite(statistics.output_factor)),
        )
        weight = tf.convert_to_tensor(self.weight)
        examples = tf.cast(examples, weight.dtype)
        new_weight = weight
        for variable, new in (
            (self.input_factor, statistics.input_factor),
            (self.output_factor, statistics.output_factor),
        ):
            old = tf.convert_to_tensor(variable)
            average, new_weight = weighted_average(
                old, weight, tf.cast(new, old.dtype), examples, tf.cast(decay, old.dtype)
            )
            variable.assign(tf.where(finite, average, old))
        self.weight.assign(tf.where(finite, new_weight, weight))

    @property
    def size(self) -> int:
        """Number of weights of the block."""
        d_in, d_out = self.adapter.dims
        return d_in * d_out * (self.adapter.groups or 1)

    def trace(self) -> tf.Tensor:
        """Trace of `A ⊗ G`, undamped."""
        traces = [
            tf.linalg.trace(tf.convert_to_tensor(factor))
            for factor in (self.input_factor, self.output_factor)
        ]
        return tf.reduce_sum(traces[0] * traces[1])

    def refresh(self, damping: tf.Tensor) -> None:
        """Inverts the damped factors; keeps the previous inverses where that fails."""
        # The curvature of the regulariser of the kernel, the bulk of the weights.
        damping = linalg.scalar(damping, self.input_factor.dtype) + self._l2
        damped = kronecker.factored_damping(
            tf.convert_to_tensor(self.input_factor),
            tf.convert_to_tensor(self.output_factor),
            damping,
        )
        input_inverse, output_inverse = (linalg.spd_inverse(factor) for factor in damped)
        succeeded = tf.logical_and(
            tf.reduce_all(tf.math.is_finite(input_inverse)),
            tf.reduce_all(tf.math.is_finite(output_inverse)),
        )
        self.input_inverse.assign(tf.where(succeeded, input_inverse, self.input_inverse))
        self.output_inverse.assign(tf.where(succeeded, output_inverse, self.output_inverse))
        condition = tf.reduce_max(
            linalg.condition_number(damped[0], input_inverse)
            * linalg.condition_number(damped[1], output_inverse)
        )
        self.condition_number.assign(tf.where(succeeded, condition, self.condition_number))
        self.failed_refreshes.assign_add(tf.cast(tf.logical_not(succeeded), tf.int32))

    def precondition(self, gradients: Gradients) -> tuple[Gradients, tf.Tensor]:
        """Natural gradient of the layer's variables.

        Returns:
            The directions, and their inner product with the gradients.
        """
        gradient = self.adapter.to_matrix(gradients)
        direction = kronecker.precondition(
            gradient,
            tf.convert_to_tensor(self.input_inverse),
            tf.convert_to_tensor(self.output_inverse),
        )
        return self.adapter.from_matrix(direction), tf.reduce_sum(gradient * direction)


def _identity(shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    return tf.eye(shape[-1], batch_shape=shape[:-2], dtype=dtype)
