"""Exact Gauss-Newton products and changes of the loss, from replayed forward passes."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfac.introspection.batch_part import WHOLE, BatchPart, parts_for_whole, places_of
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.observed_losses import AddedLoss
from keras_kfac.introspection.replay import Weights, tangents
from keras_kfac.math.linalg import symmetric_matrix, upper_triangle

# Sums over a batch, and differences of losses, need more digits than the terms have.
_SUM = tf.float64

_Entries = dict[tuple[int, int], tf.Tensor]


def products(
    passes: Sequence[ForwardPass],
    weights: Weights,
    directions: Sequence[Weights],
    part: BatchPart = WHOLE,
    seed: Any = (0, 0),
) -> tf.Tensor:
    """Products `dᵢᵀ C dⱼ` in the generalised Gauss-Newton matrix `C` of the batch's loss.

    `C` is the Fisher matrix of the model, scaled for the loss as it is. No matrix is formed: one
    forward-mode derivative of the outputs for each direction.

    Args:
        passes: Forward passes that make up the loss, with its terms.
        weights: Weights to differentiate by, with their values.
        directions: Directions in the space of these weights; what one leaves out stays as it is.
        part: How much of the batch to take `C` on; it then stands for the whole.
        seed: Stateless seed, int32 `[2]`, where products are estimates: see
            `Likelihood.curvature_products`.

    Returns:
        Float64 tensor `[len(directions), len(directions)]`, symmetric.

    Source: Schraudolph (2002), section 3; Martens & Grosse (2015), section 6.4 and appendix C.
    """
    size = len(directions)
    entries = {pair: tf.zeros((), _SUM) for pair in upper_triangle(size)}
    for index, forward_pass in enumerate(passes):
        pass_seed = tf.random.experimental.stateless_fold_in(seed, index)
        for place, product in _of_pass(forward_pass, weights, directions, part, pass_seed):
            entries[place] += product
    return symmetric_matrix(entries, size)


def _of_pass(
    forward_pass: ForwardPass,
    weights: Weights,
    directions: Sequence[Weights],
    part: BatchPart,
    seed: tf.Tensor,
) -> list[tuple[tuple[int, int], tf.Tensor]]:
    """The products of each term of the loss, by their place in the matrix."""
    terms = forward_pass.terms
    coefficients = [tf.cast(term.coefficients(), _SUM) for term in terms]
    places = None
    if not part.is_whole:
        places = places_of(part, coefficients, seed)
        coefficients = [tf.gather(c, places) for c in parts_for_whole(coefficients, places)]

    def differentiable(outputs: Any) -> list[tf.Tensor]:
        flat = tf.nest.flatten(outputs)
        return [term.differentiable(flat[term.index], places)[0] for term in terms]

    outputs, vectors = tangents(forward_pass.again, weights, directions, differentiable, places)
    products = []
    for index, term in enumerate(terms):
        _, curvature = term.differentiable(term.outputs, places)
        own_seed = tf.random.experimental.stateless_fold_in(seed, index)
        along = [each[index] for each in vectors]
        found = curvature.curvature_products(outputs[index], along, own_seed)
        for place, product in found.items():
            total = tf.reduce_sum(tf.cast(product, _SUM) * coefficients[index])
            products.append((place, total))
    return products


def loss_change(passes: Sequence[ForwardPass], weights: Weights) -> tf.Tensor:
    """What the batch's loss changes by if some weights take other values; float64 scalar.

    The losses of the targets count, and those that layers add; regularisers of weights are the
    caller's.

    Raises:
        RuntimeError: If the targets are not known.
    """
    change = tf.zeros((), _SUM)
    for forward_pass in passes:
        structure, added = forward_pass.again.outputs_and_losses(weights)
        outputs = tf.nest.flatten(structure)
        change += _added_change(forward_pass.added, added)
        for term in forward_pass.terms:
            coefficients = tf.cast(term.coefficients(), _SUM)
            difference = term.values(outputs[term.index]) - term.values(term.outputs)
            change += tf.reduce_sum(coefficients * tf.cast(difference, _SUM))
    return change


def _added_change(before: Sequence[AddedLoss], after: Sequence[tf.Tensor]) -> tf.Tensor:
    """What the losses that layers add change by, in a total in which they count alike.

    Keras tells them in another order than the calls come in: only their sums can be compared, if
    all of them are in the total.
    """
    if not before or len(before) != len(after):
        return tf.zeros((), _SUM)
    weight = tf.reduce_mean([tf.cast(tf.reduce_mean(loss.weight), _SUM) for loss in before])
    old = tf.add_n([tf.reduce_sum(tf.cast(loss.value, _SUM)) for loss in before])
    new = tf.add_n([tf.reduce_sum(tf.cast(loss, _SUM)) for loss in after])
    return weight * (new - old)
