"""Spectra of symmetric matrices that are known by their products alone."""

import tensorflow as tf

from keras_kfac.math.linalg import scalar, symmetrize


def mean_and_error(draws: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean of independent draws `[n]`, `n > 1`, and its standard error.

    Example:
    >>> [float(x) for x in mean_and_error(tf.constant([1.0, 3.0]))]
    [2.0, 1.0]
    """
    count = scalar(draws.shape[0] - 1, draws.dtype)
    return tf.reduce_mean(draws), tf.math.reduce_std(draws) / tf.sqrt(count)


def trace_estimate(
    operator: tf.linalg.LinearOperator, draws: int, seed: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """An unbiased estimate of the trace, and its standard error, by random signs.

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix".
    """
    size = operator.shape[-1]
    bits = tf.random.stateless_uniform([size, draws], [seed, 0], 0, 2, tf.int32)
    signs = tf.cast(2 * bits - 1, operator.dtype)
    return mean_and_error(tf.reduce_sum(signs * operator.matmul(signs), axis=0))


def largest_eigenvalues(
    operator: tf.linalg.LinearOperator, count: int, steps: int, seed: int
) -> tf.Tensor:
    """The largest eigenvalues of a self-adjoint operator, by the block method of Lanczos.

    Blocks are as wide as the number of eigenvalues, so that none is missed that occurs several
    times. Where the blocks would fill the space, the matrix is formed instead.

    Args:
        operator: `[size, size]`.
        count: How many.
        steps: Blocks to take, each of `count` products.
        seed: Of the vectors to start with.

    Returns:
        `[count]`, falling.

    Source: Golub & Van Loan (2013), "Matrix Computations", section 10.3.6, with complete
    reorthogonalisation.

    Example:
    >>> diagonal = tf.linalg.LinearOperatorDiag([3.0] * 2 + [1.0] * 50)
    >>> largest_eigenvalues(diagonal, 3, 4, 0).numpy().round(5).tolist()
    [3.0, 3.0, 1.0]
    """
    size = operator.shape[-1]
    if count * steps >= size:
        return _falling_eigenvalues(operator.to_dense())[:count]
    start = tf.random.stateless_normal([size, count], [seed, 1], dtype=operator.dtype)
    blocks = [tf.linalg.qr(start).q]
    for _ in range(steps - 1):
        new = operator.matmul(blocks[-1])
        # Once leaves rounding errors that grow; and what is nothing but these, because the blocks
        # hold all that there is, has to be made orthogonal after it is scaled up.
        for _ in range(3):
            for block in blocks:
                new -= tf.matmul(block, tf.matmul(block, new, transpose_a=True))
            new = tf.linalg.qr(new).q
        blocks.append(new)
    basis = tf.concat(blocks, axis=1)
    small = tf.matmul(basis, operator.matmul(basis), transpose_a=True)
    return _falling_eigenvalues(small)[:count]


def _falling_eigenvalues(matrix: tf.Tensor) -> tf.Tensor:
    return tf.reverse(tf.linalg.eigvalsh(symmetrize(matrix)), [0])
