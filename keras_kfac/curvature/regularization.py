"""What weight regularisers add to the curvature and to the loss."""

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter


def l2_coefficient(variable: keras.Variable) -> float:
    """`η` of the regulariser `½ η Σ w²` of a variable, 0 for none.

    Keras's `L2(l2)` adds `l2 Σ w²`, so `η = 2 l2`. Other regularisers take part by their gradient
    alone.
    """
    regularizer = variable.regularizer
    if isinstance(regularizer, (keras.regularizers.L2, keras.regularizers.L1L2)):
        return 2.0 * float(regularizer.l2)
    return 0.0


def mean_l2_coefficient(variables: Sequence[keras.Variable]) -> float:
    """The mean over the weights of a block, each with the coefficient of its variable.

    Biases and other vectors count if there is nothing else: they have no share in what the
    regulariser of a kernel beside them means.
    """
    matrices = [v for v in variables if len(v.shape) > 1] or variables
    sizes = [int(v.value.shape.num_elements()) for v in matrices]
    return sum(n * l2_coefficient(v) for n, v in zip(sizes, matrices)) / sum(sizes)


def least_l2_coefficient(variables: Sequence[keras.Variable]) -> float:
    """The smallest coefficient of all: what it adds to the curvature is a multiple of `I`."""
    return min(map(l2_coefficient, variables))


def further_l2(adapter: LayerAdapter, dtype: str) -> tf.Tensor | None:
    """What the coefficient of each weight is above the least one, as the gradient's matrix.

    `None` if all are the same.
    """
    least = least_l2_coefficient(adapter.variables)
    further = {id(v): l2_coefficient(v) - least for v in adapter.variables}
    if not any(further.values()):
        return None
    # No constant: there may be millions of weights.
    filled = {
        id(v): tf.fill(v.shape, tf.constant(further[id(v)], dtype)) for v in adapter.variables
    }
    return adapter.to_matrix(filled)


def penalty_change(
    variables: Sequence[keras.Variable], new_values: Mapping[int, tf.Tensor]
) -> tf.Tensor:
    """What the regularisers change by if variables take new values, by `id`; float64 scalar."""
    change = tf.zeros((), tf.float64)
    for variable in variables:
        if variable.regularizer is not None:
            before = variable.regularizer(tf.convert_to_tensor(variable.value))
            after = variable.regularizer(new_values[id(variable)])
            change += tf.cast(after, tf.float64) - tf.cast(before, tf.float64)
    return change
