"""Evidence of a prior precision, under Laplace's approximation.

With the maximum `θ` of the posterior, the precision `H` of the likelihood there, the eigenvalues
`s` of `H`, and the prior `N(0, I/τ)` of `P` weights,

    log p(D | τ) ≈ log p(D | θ) + P/2 log τ - τ/2 ‖θ‖² - ½ Σ log(s + τ).

Source: MacKay (1992), "Bayesian interpolation", sections 3 and 4.
"""

import tensorflow as tf
import tensorflow_probability as tfp

# A relative change of the precision too small to matter, and steps that reach it from anywhere.
_TOLERANCE = 1e-13
_MAX_STEPS = 200


def log_evidence(
    log_likelihood: tf.Tensor, eigenvalues: tf.Tensor, squared_norm: tf.Tensor, precision: tf.Tensor
) -> tf.Tensor:
    """The logarithm of the evidence, which can be differentiated by all arguments.

    Args:
        log_likelihood: `log p(D | θ)`.
        eigenvalues: `s >= 0`, `[P]`.
        squared_norm: `‖θ‖²`.
        precision: `τ > 0`.

    Example:
    >>> zero, one = tf.constant(0.0), tf.constant(1.0)
    >>> float(log_evidence(zero, tf.constant([0.0, 0.0]), one, one))  # the data say nothing
    -0.5
    """
    volumes = tf.math.log(precision) - tf.math.log(eigenvalues + precision)
    return log_likelihood + 0.5 * (tf.reduce_sum(volumes) - precision * squared_norm)


def effective_dimension(eigenvalues: tf.Tensor, precision: tf.Tensor) -> tf.Tensor:
    """How many directions the data determine: `γ = Σ s / (s + τ)`.

    Example:
    >>> float(effective_dimension(tf.constant([0.0, 1.0, 3.0]), tf.constant(1.0)))
    1.25
    """
    return tf.reduce_sum(eigenvalues / (eigenvalues + precision))


def best_precision(eigenvalues: tf.Tensor, squared_norm: tf.Tensor) -> tf.Tensor:
    """The precision of largest evidence, at fixed `θ`.

    The derivative of the evidence by `log τ` is `(γ - τ ‖θ‖²) / 2`. The first term falls with `τ`
    and the second one grows, so there is one maximum, and bounds of it are known.

    Args:
        eigenvalues: `s >= 0`, `[P]`, not all zero, in float64.
        squared_norm: `‖θ‖² > 0`.

    Returns:
        Scalar; not a number if the arguments leave no maximum.

    Example:
    >>> s = tf.constant([1.0, 3.0], "float64")
    >>> tau = best_precision(s, tf.constant(2.0, "float64"))
    >>> np.allclose(effective_dimension(s, tau), 2.0 * tau)
    True
    """

    def slope(log_precision: tf.Tensor) -> tf.Tensor:
        precision = tf.exp(log_precision)
        return effective_dimension(eigenvalues, precision) - precision * squared_norm

    highest = tf.cast(tf.size(eigenvalues), squared_norm.dtype) / squared_norm
    lowest = effective_dimension(eigenvalues, highest) / squared_norm
    found = tfp.math.find_root_chandrupatla(
        slope,
        tf.math.log(lowest),
        tf.math.log(highest),
        position_tolerance=_TOLERANCE,
        max_iterations=_MAX_STEPS,
    )
    return tf.exp(found.estimated_root)
