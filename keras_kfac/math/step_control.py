"""Rules that bound the length of a step."""

import tensorflow as tf

from keras_kfac.math.linalg import scalar


def kl_clip_scale(inner_product: tf.Tensor, learning_rate: tf.Tensor, kl_clip: float) -> tf.Tensor:
    """Factor that keeps the quadratic estimate of a step's KL divergence below a bound.

    For the preconditioned gradient `v = F̆⁻¹ ∇`, the squared length of the step in the damped
    Fisher metric is `η² vᵀ F̆ v = η² vᵀ ∇`: twice the KL divergence between the model before and
    after, to second order. (The product with the *gradient* already holds the metric.)

    Args:
        inner_product: `vᵀ ∇` summed over all blocks, scalar.
        learning_rate: `η`.
        kl_clip: Bound `κ > 0` on `η² vᵀ ∇`.

    Returns:
        `min(1, sqrt(κ / (η² vᵀ ∇)))`, a scalar in [0, 1]; 1 if the step is zero.

    Source: Ba, Grosse & Martens (2017), "Distributed second-order optimization using
    Kronecker-factored approximations", section 5.

    Example:
    >>> float(kl_clip_scale(tf.constant(4.0), tf.constant(0.5), 0.25))
    0.5
    """
    squared_length = tf.square(scalar(learning_rate, inner_product.dtype)) * inner_product
    bound = scalar(kl_clip, inner_product.dtype)
    # Rounding can make the product of a tiny step negative.
    longer = squared_length > bound
    safe = tf.where(longer, squared_length, bound)
    return tf.sqrt(bound / safe)
