"""Random numbers that are sent back from an output, to see where they arrive."""

import tensorflow as tf

from keras_kfac.introspection.losses import Term
from keras_kfac.math.linalg import with_rank


def random_vector(term: Term, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What to differentiate of a term, and random numbers of its shape.

    Args:
        term: The term of the loss.
        seed: Stateless seed, int32 `[2]`.
    """
    outputs, _ = term.differentiable(term.outputs)
    return outputs, tf.random.stateless_normal(tf.shape(outputs), seed, dtype=outputs.dtype)


def of_positions(vector: tf.Tensor, amounts: tf.Tensor) -> tf.Tensor:
    """The vector, times an amount for each position, `[batch, ...]`."""
    return vector * with_rank(tf.cast(amounts, vector.dtype), vector.shape.rank)
