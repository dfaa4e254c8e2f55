"""Kronecker-factored curvature: damping and preconditioning.

Source: Martens & Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", arXiv:1503.05671 (M&G below).
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.math.linalg import (
    Gradient,
    left_product,
    right_product,
    scalar,
    scaled_plus_identity,
    trace,
)


def mean_eigenvalue(factor: tf.Tensor) -> tf.Tensor:
    """Trace over dimension, `[...]`; blocks of one matrix have it in common."""
    mean = trace(factor) / factor.shape[-1]
    is_in_blocks = factor.shape.rank == 4
    return tf.reduce_mean(mean, axis=[0, 1], keepdims=True) if is_in_blocks else mean


def is_number(factor: tf.Tensor) -> bool:
    """Whether a factor is 1 x 1, and not one of several such blocks."""
    is_in_blocks = factor.shape.rank == 4 and factor.shape[:2].num_elements() > 1
    return factor.shape[-1] == 1 and not is_in_blocks


def product_for_sum(
    products: Sequence[tuple[tf.Tensor, tf.Tensor]],
) -> tuple[tf.Tensor, tf.Tensor]:
    """The Kronecker product that has the partial traces of a sum of Kronecker products.

    Of `Σ A_k ⊗ G_k` these are `Σ tr(G_k) A_k` and `Σ tr(A_k) G_k`. It is positive semi-definite if
    all factors are, of the same trace as the sum, and equal to it if all `A_k`, or all `G_k`, are
    multiples of one.

    Args:
        products: `A_k` and `G_k` of each term, `[d, d]`, or their diagonals `[d]`.

    Returns:
        `A` of trace 1, and `G`; zeros if the sum is zero.

    Example:
    >>> a, g = product_for_sum([(tf.ones([2]), tf.eye(2)), (tf.ones([2]), 3 * tf.eye(2))])
    >>> a.numpy().tolist(), g.numpy().tolist()
    ([0.5, 0.5], [[8.0, 0.0], [0.0, 8.0]])
    """
    first = tf.add_n([trace(g) * a for a, g in products])
    second = tf.add_n([trace(a) * g for a, g in products])
    return tf.math.divide_no_nan(first, trace(first)), second


def block_damping(damping: tf.Tensor, block: tf.Tensor, model: tf.Tensor) -> tf.Tensor:
    """Damping of a block whose curvature may be far below that of the whole model.

    Args:
        damping: `λ` of the model, scalar.
        block: Mean eigenvalue of the block, scalar; or of several, `[blocks]`.
        model: Mean eigenvalue of all blocks together, scalar.

    Returns:
        `λ min(1, √(block / model))`: halfway, on the scale of logarithms, between one damping for
        all and one in proportion to the block. `λ` for a block of zero (a dead layer).

    Source: ours, found by trial: see docs/step-control.md.

    Example:
    >>> float(block_damping(tf.constant(0.5), tf.constant(0.0625), tf.constant(1.0)))
    0.125
    """
    is_weaker = (block > 0) & (block < model)
    ratio = tf.where(is_weaker, block, 1) / tf.where(is_weaker, model, 1)
    return scalar(damping, ratio.dtype) * tf.sqrt(ratio)


def factored_damping(
    input_factor: tf.Tensor, output_factor: tf.Tensor, damping: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits Tikhonov damping of `A ⊗ G` over its factors (M&G section 6.3).

    Returns `A + π√λ I` and `G + √λ/π I` with `π² = (tr A / dim A) / (tr G / dim G)`. Their
    Kronecker product exceeds `A ⊗ G + λ I` by `π√λ (I ⊗ G) + √λ/π (A ⊗ I)`, which is positive
    semi-definite. The split does not change when a scale moves from one factor to the other.

    Two cases are exact instead. A 1 x 1 factor takes no damping, so that the product is
    `A ⊗ G + λ I`. A factor of trace zero (a dead layer) makes the block `λ I`.

    Args:
        input_factor: `A`, `[..., d_in, d_in]`, its diagonal `[d_in]`, or blocks `[k, 1, b, b]`.
        output_factor: `G`, `[..., d_out, d_out]`, `[d_out]`, or `[1, l, c, c]`.
        damping: `λ >= 0`, scalar, in units of the curvature (loss per squared weight).

    Returns:
        The two damped factors, shapes as given.

    Example:
    >>> a, g = factored_damping(4.0 * tf.eye(2), tf.eye(3), tf.constant(0.25))
    >>> float(a[0, 0]), float(g[0, 0])  # π = 2, √λ = 0.5
    (5.0, 1.25)
    """
    factors = input_factor, output_factor
    means = [mean_eigenvalue(factor) for factor in factors]
    alive = tf.reduce_all([mean > 0 for mean in means], axis=0)
    scale = tf.cast(alive, input_factor.dtype)
    amounts = split_damping(means, [is_number(factor) for factor in factors], damping)
    a, g = (scaled_plus_identity(scale, f, amount) for f, amount in zip(factors, amounts))
    return a, g


def split_damping(
    means: Sequence[tf.Tensor], are_numbers: Sequence[bool], damping: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """What `factored_damping` adds to the diagonals of `A` and `G`.

    Args:
        means: Mean eigenvalues of both factors, `[...]`.
        are_numbers: Whether each is 1 x 1.
        damping: `λ >= 0`, scalar.

    Returns:
        `π√λ` and `√λ/π`; `√λ` for both where either mean is zero.
    """
    mean_a, mean_g = means
    damping = scalar(damping, mean_a.dtype)
    alive = tf.logical_and(mean_a > 0, mean_g > 0)
    one = tf.ones((), mean_a.dtype)
    safe_a, safe_g = tf.where(alive, mean_a, one), tf.where(alive, mean_g, one)
    root = tf.sqrt(damping)
    if are_numbers[0]:
        damping_a, damping_g = tf.zeros_like(damping), damping / safe_a
    elif are_numbers[1]:
        damping_a, damping_g = damping / safe_g, tf.zeros_like(damping)
    else:
        pi = tf.sqrt(safe_a / safe_g)
        damping_a, damping_g = pi * root, root / pi
    return tf.where(alive, damping_a, root), tf.where(alive, damping_g, root)


def precondition(
    gradient: Gradient, input_inverse: tf.Tensor, output_inverse: tf.Tensor
) -> Gradient:
    """Natural gradient of a block: `A⁻¹ ∇W G⁻¹`, `[..., d_in, d_out]`."""
    # The cheaper order of the two products depends on the shape of the gradient only through
    # the sum d_in + d_out, which is the same for both: no choice to make.
    return left_product(input_inverse, right_product(gradient, output_inverse))
