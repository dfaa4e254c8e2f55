"""Exponential moving average that is unbiased from its first value."""

import tensorflow as tf


def weighted_average(
    value: tf.Tensor,
    weight: tf.Tensor,
    new_value: tf.Tensor,
    new_weight: tf.Tensor,
    decay: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One step of an exponentially decaying weighted mean.

    After values `S_1 ... S_t` of weights `n_1 ... n_t` the result is
    `Σ decay^(t-i) n_i S_i / Σ decay^(t-i) n_i`, without a start value to debias. A `decay` of 1
    gives the plain weighted mean.

    Args:
        value: Mean so far; ignored while `weight` is 0.
        weight: Accumulated weight so far, scalar.
        new_value: Value to include, shaped as `value`.
        new_weight: Its weight, scalar, `>= 0`.
        decay: Factor in [0, 1] for the weight of what came before.

    Returns:
        The new mean and the new accumulated weight.

    Example:
    >>> mean, weight = weighted_average(0.0, 0.0, 3.0, 1.0, 0.5)
    >>> mean, weight = weighted_average(mean, weight, 6.0, 1.0, 0.5)
    >>> float(mean), float(weight)  # (0.5 * 3 + 6) / 1.5
    (5.0, 1.5)
    """
    total = decay * weight + new_weight
    share = share_of_new(weight, new_weight, decay)
    return value + (new_value - value) * share, total


def share_of_new(weight: tf.Tensor, new_weight: tf.Tensor, decay: tf.Tensor) -> tf.Tensor:
    """Part of the new value in the new mean, in [0, 1]; 1 for the first, 0 if nothing counts.

    Arguments as for `weighted_average`.
    """
    return tf.math.divide_no_nan(tf.convert_to_tensor(new_weight), decay * weight + new_weight)
