"""Kronecker factors from rows of layer inputs and output gradients.

The scale of the loss lives in the output gradients alone: if `g` is the back-propagated root of
the loss curvature (see `likelihood.py`), reduction, sample weights and mean over outputs included,
then with

    A = weighted mean of a aᵀ over batch and positions,    G = sum of g gᵀ over batch and positions

the product `A ⊗ G` is the block of the Fisher matrix *of the loss that is being minimised* under
the "expand" approximation of weight sharing. Under "reduce", `a` is the mean and `g` the sum over
the positions of an example before that. No count of examples or positions appears anywhere
else. Sources: M&G section 3; Grosse & Martens (2016), arXiv:1602.01407 (KFC); Eschenhagen et
al. (2023), arXiv:2311.00636 (expand and reduce).
"""

import tensorflow as tf

from keras_kfac.math.structure import Structure


def with_homogeneous_coordinate(rows: tf.Tensor) -> tf.Tensor:
    """Appends the constant 1 that multiplies the bias: `[..., d]` becomes `[..., d + 1]`."""
    return tf.concat([rows, tf.ones_like(rows[..., :1])], axis=-1)


def _merge_positions(rows: tf.Tensor) -> tf.Tensor:
    """`[..., batch, positions, d]` to `[..., batch * positions, d]`."""
    known = [*rows.shape[:-3], rows.shape[-1]]
    if None not in known:
        return tf.reshape(rows, [*known[:-1], -1, known[-1]])
    shape = tf.shape(rows)  # Gradients can lose their shape on their way.
    return tf.reshape(rows, tf.concat([shape[:-3], [-1], shape[-1:]], axis=0))


def row_weights(example_weights: tf.Tensor | None, mask: tf.Tensor) -> tf.Tensor:
    """Spreads the weight of an example over those of its positions that count.

    Args:
        example_weights: `[batch]`; `None` weights all examples alike. Weights of positions,
            `[batch, positions]`, are masked.
        mask: `[batch, positions]`, 1 for the positions that count and 0 for the others.

    Returns:
        `[batch, positions]`, on average over positions the weight of the example; 0 for an example
        of which none counts.

    Example:
    >>> mask = tf.constant([[1.0, 1.0], [1.0, 0.0]])
    >>> row_weights(tf.constant([3.0, 1.0]), mask).numpy().tolist()
    [[3.0, 3.0], [2.0, 0.0]]
    """
    if example_weights is not None and example_weights.shape.rank == 2:
        return mask * tf.cast(example_weights, mask.dtype)
    weights = tf.math.divide_no_nan(mask, tf.reduce_mean(mask, axis=1, keepdims=True))
    if example_weights is None:
        return weights
    return weights * tf.cast(example_weights, mask.dtype)[:, tf.newaxis]


def mean_rows(
    rows: tf.Tensor, example_weights: tf.Tensor | None = None, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """One row for each example, for the "reduce" approximation: the mean over its positions.

    Args:
        rows: `[..., batch, positions, d]`.
        example_weights: `[batch]`; `None` weights all examples alike.
        mask: `[batch, positions]`, 1 for the positions that count and 0 for the others.

    Returns:
        `[..., batch, 1, d]`, and the weights of the examples: 0 for one of which no position
        counts.

    Example:
    >>> rows = tf.constant([[[1.0], [3.0]], [[5.0], [7.0]]])
    >>> mean_rows(rows, mask=tf.constant([[1.0, 1.0], [0.0, 1.0]]))[0].numpy().tolist()
    [[[2.0]], [[7.0]]]
    """
    if mask is None:
        return tf.reduce_mean(rows, axis=-2, keepdims=True), example_weights
    counts = tf.reduce_sum(mask, axis=1)
    weights = tf.cast(counts > 0, rows.dtype)
    if example_weights is not None:
        weights *= tf.cast(example_weights, rows.dtype)
    # `where` and not a product alone: 0 * inf of an ignored row must be 0.
    kept = tf.where(mask[..., tf.newaxis] > 0, rows, tf.zeros_like(rows))
    total = tf.reduce_sum(kept, axis=-2, keepdims=True)
    return tf.math.divide_no_nan(total, counts[:, tf.newaxis, tf.newaxis]), weights


def input_moment(
    rows: tf.Tensor, weights: tf.Tensor | None = None, structure: Structure | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum of `a aᵀ` over examples and positions, and the weight of the sum.

    The input factor `A` is the first over the second; both add up over several calls of a layer.

    Args:
        rows: `[..., batch, positions, d_in]`.
        weights: Of examples `[batch]`, or of rows `[batch, positions]`; non-negative, any scale;
            `None` weights all alike. What has weight 0 does not count, whatever it holds.
        structure: What to compute of the matrix; all by default.

    Returns:
        `[..., d_in, d_in]`, or what the structure keeps of it, and a scalar.
    """
    rows, total = _weighted(rows, weights)
    return _moment(rows, structure), total


def cross_moment(
    rows: tf.Tensor, others: tf.Tensor, weights: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """`input_moment` of the inputs of two layers: the sum of `a bᵀ`, and its weight.

    Args:
        rows: `[batch, positions, d]`.
        others: `[batch, positions, e]`.
        weights: Of examples `[batch]`, or of rows `[batch, positions]`; `None` weights all alike.

    Returns:
        `[d, e]` and a scalar.

    Example:
    >>> rows = tf.constant([[[1.0]], [[2.0]]])
    >>> [float(np.sum(x)) for x in cross_moment(rows, 10 * rows)]
    [50.0, 2.0]
    """
    rows, total = _weighted(rows, weights)
    others, _ = _weighted(others, weights)
    return cross_product(rows, others), total


def _weighted(rows: tf.Tensor, weights: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows by the roots of their weights, and the sum of these."""
    shape = tf.cast(tf.shape(rows), rows.dtype)
    if weights is None:
        return rows, shape[-3] * shape[-2]
    weights = tf.cast(weights, rows.dtype)
    total = tf.reduce_sum(weights)
    if weights.shape.rank == 1:
        weights, total = weights[:, tf.newaxis], total * shape[-2]
    weights = weights[..., tf.newaxis]
    # `where` and not a product alone: 0 * inf of an ignored row must be 0.
    return tf.where(weights > 0, rows * tf.sqrt(weights), tf.zeros_like(rows)), total


def index_moment(indices: tf.Tensor, size: int, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`input_moment` of one-hot rows: a diagonal matrix.

    Args:
        indices: Where each row is 1, integers in `[0, size)`.
        size: Number of columns of the rows.
        weights: Of each row, shaped as `indices`, non-negative.

    Returns:
        The diagonal `[size]` and a scalar.

    Example:
    >>> diagonal, weight = index_moment(tf.constant([0, 2, 2]), 3, tf.ones([3]))
    >>> diagonal.numpy().tolist(), float(weight)
    ([1.0, 0.0, 2.0], 3.0)
    """
    return tf.math.unsorted_segment_sum(weights, indices, size), tf.reduce_sum(weights)


def output_factor(rows: tf.Tensor, structure: Structure | None = None) -> tf.Tensor:
    """Output factor `G`: the sum of `g gᵀ` over examples and positions, or a part of it."""
    return _moment(rows, structure)


def cross_product(rows: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """The sum of `g hᵀ` over examples and positions, of the output gradients of two layers."""
    return tf.matmul(_merge_positions(rows), _merge_positions(others), transpose_a=True)


def _moment(rows: tf.Tensor, structure: Structure | None) -> tf.Tensor:
    if structure is not None and structure.is_diagonal:
        return tf.reduce_sum(tf.square(rows), axis=[-3, -2])
    if structure is not None and structure.is_isotropic:
        total = tf.reduce_sum(tf.square(rows), axis=[-3, -2, -1]) / structure.size
        return total[..., tf.newaxis, tf.newaxis]
    merged = _merge_positions(rows)
    if structure is not None and structure.blocks > 1:
        merged = structure.parts(merged)
    return tf.matmul(merged, merged, transpose_a=True)
