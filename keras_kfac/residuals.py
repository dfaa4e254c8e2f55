"""Natural gradients of losses that are sums of squared residuals, where no Keras loss exists."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kfac.math.jacobians import Linearised, linearised, linearised_at
from keras_kfac.math.least_squares import natural_direction
from keras_kfac.math.linalg import known_value


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
    residual_fn: Any,
    variables: Sequence[keras.Variable | tf.Variable],
    damping: float | tf.Tensor = 0.0,
    *,
    points: Any = None,
    cutoff: float | None = None,
) -> NaturalGradient:
    """The exact natural gradient of `½ ‖r‖²`, for residuals `r` of any kind.

    Physics-informed networks have such losses: residuals of a differential equation at points of a
    domain, and of its boundary conditions. The Fisher matrix is that of residuals with independent
    normal noise of variance 1, `Jᵀ J` with the Jacobian `J` of the residuals: nothing is
    approximated, so this is for networks of some thousand weights, or of some thousand residuals.

    Cost: with `points`, the Jacobian takes about as long as a gradient. Without, a pass backwards
    for each residual, all of them at once, with as much memory: a thousand times that for a
    thousand points. Then the smaller of `J Jᵀ` and `Jᵀ J` is formed and decomposed.

    Works eagerly, in a `tf.function`, and under XLA; eagerly with `points`, each call traces anew.

    Args:
        residual_fn: Returns `r`: a tensor, or a structure of them, which is flattened. A mean over
            `n` points is a factor `n ** -0.5` of the residuals. With `points`, a function of them,
            or a structure of functions.
        variables: Those to differentiate by, of one float dtype, which is that of `r`.
        damping: `λ >= 0`, added to the diagonal of `Jᵀ J`.
        points: Where each residual depends on one point alone: a tensor `[points, ...]`, or a
            structure of them, for each function of `residual_fn`. It is called with one point at a
            time, as a batch `[1, ...]`, in `tf.vectorized_map`.
        cutoff: Directions in which a singular value of `J` (damped, `√(σ² + λ)`) is at most this
            part of the largest are left out. By default those that `Jᵀ J` has lost to rounding,
            2e-7 of the largest for 250 weights in float64. A smaller part takes the singular values
            of `J` itself: about four times as long, and more accurate.

    Returns:
        Loss, gradients and directions `(Jᵀ J + λ I)⁻¹ ∇`.

    Raises:
        TypeError: If `residual_fn` is no function.
        ValueError: Without variables or for those of several dtypes, for a negative damping or
            cut-off, for points of another structure than the functions, without residuals or for
            those of another dtype than the variables, if they depend on none of these, or if they
            have loops and there are `points`.

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
    dtypes = {tf.as_dtype(v.dtype).name for v in variables}
    if len(dtypes) > 1:
        raise ValueError(
            "`variables` must be of one dtype: their Jacobian is one matrix. Received: "
            f"dtypes {sorted(dtypes)}"
        )
    for name, value in (("damping", damping), ("cutoff", cutoff)):
        known = known_value(value)
        if known is not None and not known >= 0:
            raise ValueError(f"`{name}` must be at least 0. Received: {name}={value!r}")
    sources = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    residuals, jacobian, is_connected = _linearised(residual_fn, points, sources)
    if not is_connected:
        raise ValueError(
            "The residuals depend on none of the variables. `residual_fn` has to compute them from "
            "the variables each time it is called, by TensorFlow operations that have derivatives. "
            f"Received: variables={[v.name for v in variables]}"
        )
    direction = natural_direction(jacobian, residuals, damping, cutoff)
    return NaturalGradient(
        tf.nn.l2_loss(residuals),
        _unflattened(tf.linalg.matvec(jacobian, residuals, transpose_a=True), sources),
        _unflattened(direction, sources),
    )


def _linearised(residual_fn: Any, points: Any, variables: Sequence[tf.Variable]) -> Linearised:
    for function in [residual_fn] if points is None else keras.tree.flatten(residual_fn):
        if not callable(function):
            raise TypeError(
                "`residual_fn` must be a function; with `points`, it can be a structure of them. "
                f"Received: {function!r}, points={'None' if points is None else 'some'}"
            )
    if points is None:
        return linearised(residual_fn, variables)
    pairs: list[tuple[Any, Any]] = []
    try:
        keras.tree.map_structure_up_to(
            residual_fn, lambda *pair: pairs.append(pair), residual_fn, points
        )
    except ValueError as error:
        raise ValueError(
            "`points` must have a part for each function of `residual_fn`, in the same structure. "
            f"Received: {error}"
        ) from error
    parts = [linearised_at(where, fn, variables) for fn, where in pairs]
    residuals = tf.concat([part.residuals for part in parts], axis=0)
    if residuals.shape[0] == 0:
        raise ValueError(
            "`points` must have at least one point. Received: points of shapes "
            f"{[tuple(np.shape(part)) for part in tf.nest.flatten(points)]}"
        )
    return Linearised(
        residuals,
        tf.concat([part.jacobian for part in parts], axis=0),
        any(part.is_connected for part in parts),
    )


def _unflattened(vector: tf.Tensor, variables: Sequence[tf.Variable]) -> list[tf.Tensor]:
    parts = tf.split(vector, [v.shape.num_elements() for v in variables])
    return [tf.reshape(part, v.shape) for part, v in zip(parts, variables)]
