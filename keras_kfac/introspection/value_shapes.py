"""What shapes the values of a loss can have, before its reduction, and their weights."""

import tensorflow as tf

OF_FEATURES = (
    "With a likelihood, weights are for examples or positions of the outputs (batch, ..., "
    "features), not for single features: K-FAC can't tell what each counts."
)
# Sums of weights differ by no more than this where the weights don't.
_ROUNDING = 1e-4


def check_weights(weights: tf.TensorShape, values: tf.TensorShape) -> None:
    """Checks that there is a weight for each value of a loss, or for those along one of its axes.

    Keras broadcasts weights `[N, N]` for values `[N]`, and sums up their products. It does so with
    the one value of a loss that is not kept for each example, too, which all weights count for. And
    it has weights `[N]` for values `[N, N]` count along the last axis. A single one is for all.

    Raises:
        ValueError: If there are others.
    """
    if not weights.rank or not values.rank or weights.num_elements() == 1:
        return
    own, others = weights, values
    if own.rank == others.rank + 1 and own[-1] == 1:
        own = own[:-1]
    elif others.rank == own.rank + 1 and others[-1] == 1:
        others = others[:-1]
    fits = own.rank == others.rank and all(
        size is None or other is None or size in (1, other) for size, other in zip(own, others)
    )
    if not fits:
        raise ValueError(
            "Sample weights must have the shape of the loss before its reduction; those of "
            "examples are of shape (batch, 1) if that has more axes than one. Received: sample "
            f"weights of shape {weights} for a loss of shape {values}"
        )


def check_replaced(own: tf.TensorShape, values: tf.TensorShape) -> None:
    """Checks that a loss that is named has values as the one in its place, which is not reduced.

    Args:
        own: Of what each of those counts; `[]` if they are reduced.
        values: Of the loss, after its reduction.

    Raises:
        ValueError: If their numbers of axes differ.
    """
    if own.rank not in (0, values.rank):
        raise ValueError(
            "The loss that `attach(model, loss=...)` names must have values of the shape of "
            "those that the one in its place has, which is not reduced. Received: values of "
            f"shape {values} in place of {own}"
        )


def is_for_all(values: tf.Tensor, outputs: tf.Tensor) -> bool:
    """Whether a loss has one value for the whole batch, be it of a shape `[1, ...]`."""
    return not values.shape.rank or (values.shape.num_elements() == 1 and outputs.shape[0] != 1)


def checked(values: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """The values of a loss, if there is one for each example, or one for all.

    Args:
        values: These.
        outputs: What they are of, `[batch, ...]`.

    Raises:
        ValueError: If there are others.
        tf.errors.InvalidArgumentError: Likewise, where only the run of a graph tells.
    """
    check_positions(values, outputs, 1)
    if is_for_all(values, outputs) or None not in (values.shape[0], outputs.shape[0]):
        return values
    message, sizes = _message(values, outputs), (tf.shape(values)[0], tf.shape(outputs)[0])
    # What is made of them fails as well, and must not be first.
    with tf.control_dependencies([tf.debugging.assert_equal(*sizes, message)]):
        return tf.identity(values)


def check_positions(values: tf.Tensor, outputs: tf.Tensor, rank: int) -> None:
    """Checks that a loss has one value for each position, or one for all, where sizes are known.

    Args:
        values: Those of the loss.
        outputs: What it is of, `[batch, ...]`.
        rank: How many axes to look at: 1 for the examples.

    Raises:
        ValueError: If it has others.
    """
    if is_for_all(values, outputs):
        return
    for axis, (own, size) in enumerate(zip(values.shape[:rank], outputs.shape)):
        if None not in (own, size) and own != size and (own != 1 or axis == 0):
            raise ValueError(_message(values, outputs))


def checked_alike(by_value: tf.Tensor, rank: int) -> tf.Tensor:
    """What the values of a loss count, if those of a position count alike; under XLA, unchecked.

    Args:
        by_value: What each counts, `[..., features]`.
        rank: How many axes tell the positions apart.

    Raises:
        tf.errors.InvalidArgumentError: If they don't; in a graph, when it runs.
    """
    if by_value.shape.rank == rank:
        return by_value
    features = list(range(rank, by_value.shape.rank))
    largest = tf.reduce_max(tf.abs(by_value))
    # Exactly 0 for equal numbers, in half precision too; NaN, of which steps are left out, is none.
    spread = tf.reduce_max(by_value, features) - tf.reduce_min(by_value, features)
    differs = tf.reduce_max(spread) > _ROUNDING * largest
    check = tf.debugging.assert_equal(differs, False, OF_FEATURES)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(by_value)


def _message(values: tf.Tensor, outputs: tf.Tensor) -> str:
    return (
        "A loss must have one value for each example (or each position), or one for all; leave "
        f"examples out by sample weights. Received: a loss of shape {values.shape} for outputs of "
        f"shape {outputs.shape}"
    )
