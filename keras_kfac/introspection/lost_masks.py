"""Masks that are lost on the way to the loss, where what they hide counts as all else does.

Keras hands masks on from layer to layer, and layers that don't know of them, or operations that are
no layers, drop them: most of them without a word.
"""

import copy
from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.probes import of_positions, random_vector


def without_lost_masks(
    forward_pass: ForwardPass, adapters: Sequence[LayerAdapter], seed: tf.Tensor
) -> ForwardPass:
    """The pass, with masks that hide nothing where something arrives at what they should hide.

    Random numbers are sent back from all positions that count.

    Args:
        forward_pass: The pass, with its terms.
        adapters: Those that may go by masks.
        seed: Stateless seed, int32 `[2]`.
    """
    masked = [
        (adapter, place, call, mask)
        for adapter in adapters
        for place, call in adapter.calls(forward_pass).items()
        if (mask := adapter.mask_of(call)) is not None
    ]
    if not masked:
        return forward_pass
    targets, vectors = [], []
    for index, term in enumerate(forward_pass.terms):
        own_seed = tf.random.experimental.stateless_fold_in(seed, index)
        target, vector = random_vector(term, own_seed)
        targets.append(target)
        vectors.append(of_positions(vector, term.coefficients() > 0))
    layers = {id(adapter.layer): adapter.layer for adapter, *_ in masked}.values()
    gradients = forward_pass.output_gradients(layers, targets, vectors)
    # Not in place: in a graph this may be one branch of several.
    result = copy.copy(forward_pass)
    result.calls = {key: list(calls) for key, calls in forward_pass.calls.items()}
    for adapter, place, call, mask in masked:
        observed = adapter.observed(call)
        rows = adapter.arriving(adapter.arrived(gradients, place), *observed)
        hidden = tf.logical_not(tf.cast(adapter.row_mask(rows, *observed), tf.bool))
        is_lost = tf.reduce_any(hidden[..., tf.newaxis] & (rows != 0))
        seen = call._replace(mask=tf.cast(mask, tf.bool) | is_lost)
        result.calls[id(adapter.layer)][place] = seen
    return result
