"""Which vectors to send backwards through a network, so that its gradients make up a Fisher matrix.

The Fisher matrix is the sum of the outer products of the gradients that arrive, over examples,
positions and passes. Which they are depends on the kind of Fisher matrix.
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.losses import Term
from keras_kfac.introspection.scored_pass import ScoredPass
from keras_kfac.math.linalg import scalar, with_rank


class Fisher(enum.StrEnum):
    """Which Fisher matrix the factors estimate."""

    SAMPLED = "sampled"
    """The true Fisher, from targets sampled from the model."""

    EXACT = "exact"
    """The true Fisher without sampling noise: one backward pass per output."""

    PROPAGATED = "curvature_propagation"
    """The true Fisher, from random signs for the columns of a root of that of the outputs."""

    EMPIRICAL = "empirical"
    """Outer products of the gradients of the training loss. A different matrix."""

    FORWARD_ONLY = "forward_only"
    """No backward pass: output factors are the identity, scaled as the Fisher of the outputs."""


Start = tuple[Any, Any]
"""Targets to differentiate, and the vectors to multiply their derivatives by; `None` for ones."""


class BackwardPasses(NamedTuple):
    """Passes backwards through one forward pass.

    Attributes:
        start: Where each of them starts, by its index, int32 scalar.
        number: How many there are; `None` for one.
    """

    start: Callable[[tf.Tensor], Start]
    number: int | tf.Tensor | None = None


def backward_passes(
    item: ScoredPass, fisher: Fisher, samples: int, seed: tf.Tensor
) -> list[BackwardPasses]:
    """The passes whose gradients make up the Fisher matrix, times `item.unit`.

    Args:
        item: The forward pass, with what counts in it.
        fisher: Which Fisher matrix.
        samples: How many targets to draw for each example.
        seed: Stateless seed, int32 `[2]`, of draws and random signs.

    Raises:
        ValueError: If it takes no pass backwards, or is not known in closed form and has to be.
    """
    if fisher is Fisher.FORWARD_ONLY:
        raise ValueError(
            "This Fisher matrix has no gradients of single examples, of which some structures of "
            "curvature are made. Choose another. Received: fisher='forward_only'"
        )
    if fisher is Fisher.EXACT:
        return [_columns(item, term, coefficients) for term, coefficients in item.terms]
    if fisher is Fisher.EMPIRICAL:
        return [BackwardPasses(lambda _: _empirical(item, seed))]
    return [_drawn(item, fisher, samples, index, seed) for index in range(samples)]


def fold(seed: tf.Tensor, index: int) -> tf.Tensor:
    """The seed of one of several draws."""
    return tf.random.experimental.stateless_fold_in(seed, index)


def _root(coefficients: tf.Tensor, item: ScoredPass, outputs: tf.Tensor) -> tf.Tensor:
    root = tf.sqrt(coefficients / scalar(item.unit, coefficients.dtype))
    return with_rank(tf.cast(root, outputs.dtype), outputs.shape.rank)


def _with_random_signs(vector: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """One for each example: on average there are no products with what has others."""
    bits = tf.random.stateless_uniform(tf.shape(vector)[:1], seed, 0, 2, tf.int32)
    return vector * with_rank(tf.cast(2 * bits - 1, vector.dtype), vector.shape.rank)


def _drawn(
    item: ScoredPass, fisher: Fisher, samples: int, index: int, seed: tf.Tensor
) -> BackwardPasses:
    """One pass of several: draws for different outputs are independent of each other."""
    own = fold(seed, index) if index else seed

    def start(_: tf.Tensor) -> Start:
        targets: list[tf.Tensor] = []
        vectors: list[tf.Tensor] = []
        for place, (term, coefficients) in enumerate(item.terms):
            outputs, likelihood = term.differentiable(term.outputs)
            draw = likelihood.sampled_vector
            if fisher is Fisher.PROPAGATED:
                draw = likelihood.propagated_vector
            seed_of_term = fold(own, place)
            vector = draw(outputs, seed_of_term)
            if term.is_empirical and len(item.terms) > 1:
                vector = _with_random_signs(vector, seed_of_term)
            targets.append(outputs)
            vectors.append(vector * _root(coefficients / samples, item, outputs))
        return targets, vectors

    return BackwardPasses(start)


def _columns(item: ScoredPass, term: Term, coefficients: tf.Tensor) -> BackwardPasses:
    """A pass for each column at each position: no cross terms between positions."""
    outputs, likelihood = term.differentiable(term.outputs)
    root = _root(coefficients, item, outputs)
    columns, positions = likelihood.columns(outputs), _positions(outputs)
    middle = tf.shape(outputs)[1:-1]
    position_shape = tf.concat([[1], middle, [1]], axis=0)[: outputs.shape.rank]

    def start(index: tf.Tensor) -> Start:
        position = tf.one_hot(index // columns, positions, dtype=outputs.dtype)
        column = likelihood.root_column(outputs, index % columns)
        return outputs, column * root * tf.reshape(position, position_shape)

    return BackwardPasses(start, columns * positions)


def _positions(outputs: tf.Tensor) -> int | tf.Tensor:
    """How many positions the outputs of an example have; a number where that is known."""
    middle: Sequence[int | None] = outputs.shape[1:-1]
    return tf.reduce_prod(tf.shape(outputs)[1:-1]) if None in middle else math.prod(middle)


def _empirical(item: ScoredPass, seed: tf.Tensor) -> Start:
    """Gradients of the training loss, scaled so that the outer products are on the Fisher's scale.

    With the loss `Σ c_p ℓ_p` and `ℓ_p = -w log r`, the matrix is `Σ c_p / w ∇ℓ_p ∇ℓ_pᵀ`, but for
    products between positions of one output. Those between outputs vanish on average: each example
    has random signs for these.
    """
    scaled = [
        (t, tf.sqrt(c / scalar(t.likelihood_weight() * item.unit, c.dtype))) for t, c in item.terms
    ]
    tape = item.forward_pass.tape
    with tape:
        totals = [term.weighted_sum(weights) for term, weights in scaled]
    if len(totals) == 1:
        return totals, None
    # A loss may be of what is behind an output, whatever Keras knows of the loss.
    logits = [_keras_internals.loss_logits(term.outputs) for term, _ in scaled]
    targets = [t.outputs if own is None else own for (t, _), own in zip(scaled, logits)]
    vectors = []
    for index, (total, target) in enumerate(zip(totals, targets)):
        vector = tape.gradient(total, target, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        vector = tf.convert_to_tensor(vector)  # Of a loss that gathers, it may be some rows.
        vectors.append(_with_random_signs(vector, fold(seed, index)))
    return targets, vectors
