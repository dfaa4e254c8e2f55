"""Exact Gauss-Newton products and changes of the loss, from replayed forward passes."""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.introspection.batch_part import WHOLE, BatchPart, whole_over_part
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import ModelLoss, single_output
from keras_kfac.introspection.replay import Weights, tangents
from keras_kfac.math.linalg import symmetric_matrix, upper_triangle

# Sums over a batch, and differences of losses, need more digits than the terms have.
_SUM = tf.float64


def products(
    passes: Sequence[ForwardPass],
    loss: ModelLoss,
    weights: Weights,
    directions: Sequence[Weights],
    part: BatchPart = WHOLE,
) -> tf.Tensor:
    """Products `dᵢᵀ C dⱼ` in the generalised Gauss-Newton matrix `C` of the batch's loss.

    `C` is the Fisher matrix of the model, scaled for the loss as it is. No matrix is formed: one
    forward-mode derivative of the outputs for each direction.

    Args:
        passes: Forward passes that make up the loss.
        loss: The loss.
        weights: Weights to differentiate by, with their values.
        directions: Directions in the space of these weights; what one leaves out stays as it is.
        part: How much of the batch to take `C` on; it then stands for the whole.

    Returns:
        Float64 tensor `[len(directions), len(directions)]`, symmetric.

    Source: Schraudolph (2002), section 3; Martens & Grosse (2015), section 6.4 and appendix C.
    """
    size = len(directions)
    entries = {pair: tf.zeros((), _SUM) for pair in upper_triangle(size)}
    for forward_pass in passes:
        outputs = single_output(forward_pass)
        coefficients = loss.coefficients(outputs, forward_pass.sample_weight)
        coefficients, examples = tf.cast(coefficients, _SUM), None
        if not part.is_whole:
            examples = part.examples(tf.shape(coefficients))
            coefficients = coefficients[:examples] * whole_over_part(coefficients, examples)
        natural, vectors = tangents(
            forward_pass.again, weights, directions, loss.natural_outputs, examples
        )
        for i, j in entries:
            product = loss.known_likelihood.curvature_product(natural, vectors[i], vectors[j])
            entries[i, j] += tf.reduce_sum(tf.cast(product, _SUM) * coefficients)
    return symmetric_matrix(entries, size)


def loss_change(passes: Sequence[ForwardPass], loss: ModelLoss, weights: Weights) -> tf.Tensor:
    """What the batch's loss changes by if some weights take other values; float64 scalar.

    Only the loss of the targets counts; regularisers are the caller's.

    Raises:
        RuntimeError: If the targets are not known.
    """
    change = tf.zeros((), _SUM)
    for forward_pass in passes:
        before = single_output(forward_pass)
        after = tf.nest.flatten(forward_pass.again.outputs(weights))[0]
        coefficients = tf.cast(loss.coefficients(before, forward_pass.sample_weight), _SUM)
        targets = forward_pass.single_target()
        difference = loss.values(targets, after) - loss.values(targets, before)
        change += tf.reduce_sum(coefficients * tf.cast(difference, _SUM))
    return change
