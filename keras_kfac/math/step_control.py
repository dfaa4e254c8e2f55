"""Rules that bound the length of a step."""

import tensorflow as tf

from keras_kfac.math.linalg import scalar

# Reduction ratios above and below which the model is trusted more or less.
GOOD, POOR = 0.75, 0.25


def kl_clip_scale(inner_product: tf.Tensor, learning_rate: tf.Tensor, kl_clip: float) -> tf.Tensor:
    """Factor that keeps the quadratic estimate of a step's KL divergence below a bound.

    For the preconditioned gradient `v = F̆⁻¹ ∇`, the squared length of the step in the damped
    Fisher metric is `η² vᵀ F̆ v = η² vᵀ ∇`: twice the KL divergence between the model before and
    after, to second order. (The product with the *gradient* already holds the metric.)

    Args:
        inner_product: `vᵀ ∇`, scalar, or `[k]` for groups of blocks.
        learning_rate: `η`, likewise.
        kl_clip: Bound `κ > 0` on `η² vᵀ ∇`, summed over groups.

    Returns:
        `min(1, sqrt(κ / (η² vᵀ ∇)))`, a scalar in [0, 1]; 1 if the step is zero.

    Source: Ba, Grosse & Martens (2017), "Distributed second-order optimization using
    Kronecker-factored approximations", section 5.

    Example:
    >>> float(kl_clip_scale(tf.constant(4.0), tf.constant(0.5), 0.25))
    0.5
    """
    rate = scalar(learning_rate, inner_product.dtype)
    squared_length = tf.reduce_sum(tf.square(rate) * inner_product)
    bound = scalar(kl_clip, inner_product.dtype)
    # Rounding can make the product of a tiny step negative.
    longer = squared_length > bound
    safe = tf.where(longer, squared_length, bound)
    return tf.sqrt(bound / safe)


def levenberg_marquardt(
    damping: tf.Tensor,
    ratio: tf.Tensor,
    decay: float | tf.Tensor,
    minimum: tf.Tensor,
    maximum: tf.Tensor,
) -> tf.Tensor:
    """The damping for the next steps, given how well the quadratic model predicted this one.

    Args:
        damping: `λ`, scalar.
        ratio: Change of the loss over the change that the model predicted; NaN if either is.
        decay: Factor in (0, 1) by which the damping falls, or rises by its inverse.
        minimum: Floor of the damping.
        maximum: Its ceiling.

    Returns:
        `decay * λ` if the ratio is above ¾, `λ / decay` if it is below ¼ or NaN, else `λ`; within
        the bounds.

    Source: Martens & Grosse (2015), section 6.5; Moré (1978).

    Example:
    >>> float(levenberg_marquardt(tf.constant(8.0), tf.constant(0.9), 0.5, 1e-3, 1e3))
    4.0
    """
    good = ratio > GOOD
    fair = ratio >= POOR
    decay = scalar(decay, damping.dtype)
    changed = tf.where(good, damping * decay, tf.where(fair, damping, damping / decay))
    bounds = (scalar(bound, damping.dtype) for bound in (minimum, maximum))
    return tf.clip_by_value(changed, *bounds)


def reduction_ratio(change: tf.Tensor, predicted: tf.Tensor) -> tf.Tensor:
    """The change of the loss over the predicted change, for Levenberg-Marquardt.

    Args:
        change: Change of the loss in a step.
        predicted: The change that the quadratic model predicted.

    Returns:
        Their ratio; NaN where the model predicted no decrease, for the ratio says nothing then.
    """
    expected = predicted < 0
    safe = tf.where(expected, predicted, -1)
    return tf.where(expected, change / safe, scalar(float("nan"), change.dtype))
