"""Masks that are lost on the way to the loss, where what they hide counts as all else does.

Keras hands masks on from layer to layer, and layers that don't know of them, or operations that are
no layers, drop them: most of them without a word.
"""

import copy
from collections.abc import Sequence

import tensorflow as tf

from keras_kfac.introspection.adapters import LayerAdapter
from keras_kfac.introspection.forward_pass import ForwardPass
from keras_kfac.introspection.losses import Term
from keras_kfac.introspection.probes import of_positions, random_vector


def without_lost_masks(
    forward_pass: ForwardPass, adapters: Sequence[LayerAdapter], seed: tf.Tensor
) -> ForwardPass:
    """The pass, with calls that lose their masks if something arrives at what these should hide.

    Random numbers are sent back from all positions that count.

    Args:
        forward_pass: The pass, with its terms.
        adapters: Those that may go by masks.
        seed: Stateless seed, int32 `[2]`.
    """
    masked = [
        (adapter, place, call)
        for adapter in adapters
        for place, call in adapter.calls(forward_pass).items()
        if adapter.known_mask(call) is not None
    ]
    if not masked:
        return forward_pass
    targets, vectors = [], []
    for index, term in enumerate(forward_pass.terms):
        own_seed = tf.random.experimental.stateless_fold_in(seed, index)
        target, vector = random_vector(term, own_seed)
        targets.append(target)
        vectors.append(of_positions(vector, _counting(term)))
    layers = {id(adapter.layer): adapter.layer for adapter, *_ in masked}.values()
    gradients = forward_pass.output_gradients(layers, targets, vectors)
    # Not in place: in a graph this may be one branch of several.
    result = copy.copy(forward_pass)
    result.calls = {key: list(calls) for key, calls in forward_pass.calls.items()}
    for adapter, place, call in masked:
        observed = adapter.observed(call)
        rows = adapter.arriving(adapter.arrived(gradients, place), *observed)
        hidden = tf.logical_not(tf.cast(adapter.row_mask(rows, *observed), tf.bool))
        is_lost = tf.reduce_any(hidden[..., tf.newaxis] & (rows != 0))
        result.calls[id(adapter.layer)][place] = call._replace(loses_mask=is_lost)
    return result


def _counting(term: Term) -> tf.Tensor:
    """Which positions count, `[batch, ...]`; of values that are of none, which examples."""
    counts = term.coefficients() > 0
    positions = term.outputs.shape[: counts.shape.rank]
    if term.likelihood is None or not counts.shape.is_compatible_with(positions):
        counts = tf.reduce_any(counts, axis=list(range(1, counts.shape.rank)))
    return counts
