"""What weight regularisers add to the curvature and to the loss."""

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf


def l2_coefficient(variable: keras.Variable) -> float:
    """`η` of the regulariser `½ η Σ w²` of a variable, 0 for none.

    Keras's `L2(l2)` adds `l2 Σ w²`, so `η = 2 l2`. Other regularisers take part by their gradient
    alone.
    """
    regularizer = variable.regularizer
    if isinstance(regularizer, (keras.regularizers.L2, keras.regularizers.L1L2)):
        return 2.0 * float(regularizer.l2)
    return 0.0


def penalty_change(
    variables: Sequence[keras.Variable], new_values: Mapping[int, tf.Tensor]
) -> tf.Tensor:
    """What the regularisers change by if variables take new values, by `id`; float64 scalar."""
    change = tf.zeros((), tf.float64)
    for variable in variables:
        if variable.regularizer is not None:
            before = variable.regularizer(tf.convert_to_tensor(variable.value))
            after = variable.regularizer(new_values[id(variable)])
            change += tf.cast(after - before, tf.float64)
    return change
