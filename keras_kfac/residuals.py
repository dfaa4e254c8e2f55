"""Natural gradients of losses that are sums of squared residuals, where no Keras loss exists."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kfac.math.least_squares import natural_direction


class NaturalGradient(NamedTuple):
    """What `natural_gradient` finds.

    Attributes:
        loss: `½ ‖r‖²`, scalar.
        gradients: Those of the loss by the variables.
        directions: The natural gradient, shaped likewise: a step goes against it.
    """

    loss: tf.Tensor
    gradients: list[tf.Tensor]
    directions: list[tf.Tensor]


def natural_gradient(
    residual_fn: Callable[[], Any],
    variables: Sequence[keras.Variable | tf.Variable],
    damping: float | tf.Tensor = 0.0,
) -> NaturalGradient:
    """The exact natural gradient of `½ ‖r‖²`, for residuals `r` of any kind.

    Physics-informed networks have such losses: residuals of a differential equation at points of a
    domain, and of its boundary conditions. The Fisher matrix is that of residuals with independent
    normal noise of variance 1, `Jᵀ J` with the Jacobian `J` of the residuals: nothing is
    approximated, so this is for networks of some thousand weights, or of some thousand residuals:
    the smaller of `J Jᵀ` and `Jᵀ J` is decomposed. The Jacobian takes a pass backwards for each
    residual, all of them at once, with as much memory.

    Works eagerly, in a `tf.function`, and under XLA.

    Args:
        residual_fn: Returns `r`: a tensor, or a structure of them, which is flattened. A mean over
            `n` points is a factor `n ** -0.5` of the residuals.
        variables: Those to differentiate by, of one float dtype.
        damping: `λ >= 0`, added to the diagonal of `Jᵀ J`. Without it, directions in which that is
            zero to rounding are left out.

    Returns:
        Loss, gradients and directions `(Jᵀ J + λ I)⁻¹ ∇`.

    Raises:
        ValueError: Without variables, for a negative damping, or if the residuals depend on none of
            the variables.

    Example:
    >>> w = keras.Variable([0.0, 0.0], dtype="float64")
    >>> x = tf.constant([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], "float64")
    >>> found = natural_gradient(lambda: tf.linalg.matvec(x, w) - [1.0, 3.0, 5.0], [w])
    >>> w.assign_sub(found.directions[0]).numpy().round(9).tolist()  # 1 + 2 x
    [1.0, 2.0]

    Source: Müller & Zeinhofer (2023), "Achieving high accuracy with PINNs via energy natural
    gradient descent", arXiv:2302.13163.
    """
    variables = list(variables)
    if not variables:
        raise ValueError("`variables` must not be empty. Received: variables=[]")
    if not tf.is_tensor(damping) and not damping >= 0:
        raise ValueError(f"`damping` must be at least 0. Received: damping={damping!r}")
    sources = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        parts = [tf.reshape(part, [-1]) for part in tf.nest.flatten(residual_fn())]
        residuals = tf.concat(parts, axis=0)
    jacobians = tape.jacobian(residuals, sources)
    if all(j is None for j in jacobians):
        raise ValueError(
            "The residuals depend on none of the variables. Received: variables="
            f"{[v.name for v in variables]}"
        )
    count = residuals.shape[0]
    rows = [
        tf.zeros([count, _size(v)], residuals.dtype) if j is None else tf.reshape(j, [count, -1])
        for v, j in zip(variables, jacobians)
    ]
    jacobian = tf.ensure_shape(tf.concat(rows, axis=1), [count, sum(map(_size, variables))])
    gradient = tf.linalg.matvec(jacobian, residuals, transpose_a=True)
    direction = natural_direction(jacobian, residuals, damping)
    return NaturalGradient(
        tf.nn.l2_loss(residuals),
        _unflattened(gradient, variables),
        _unflattened(direction, variables),
    )


def _size(variable: keras.Variable | tf.Variable) -> int:
    return int(tf.TensorShape(variable.shape).num_elements())


def _unflattened(vector: tf.Tensor, variables: Sequence[Any]) -> list[tf.Tensor]:
    parts = tf.split(vector, [_size(v) for v in variables])
    return [tf.reshape(part, v.shape) for part, v in zip(parts, variables)]
