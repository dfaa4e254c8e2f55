"""Residuals with their Jacobian by variables, as a matrix."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf


class Linearised(NamedTuple):
    """Residuals and how they change with variables.

    Attributes:
        residuals: `[residuals]`.
        jacobian: `[residuals, weights]`: all weights of the first variable, then of the next.
        is_connected: Whether any residual depends on any variable.
    """

    residuals: tf.Tensor
    jacobian: tf.Tensor
    is_connected: bool


def linearised(residual_fn: Callable[[], Any], variables: Sequence[tf.Variable]) -> Linearised:
    """Residuals of any kind, by a pass backwards for each, all at once.

    Args:
        residual_fn: Returns a tensor or a structure of them.
        variables: Those to differentiate by.

    Raises:
        ValueError: If there are no residuals, or their dtype is not that of the variables.

    Example:
    >>> w = tf.Variable([1.0, 2.0])
    >>> linearised(lambda: w * w, [w]).jacobian.numpy().tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    with tf.GradientTape() as tape:
        tape.watch(variables)
        residuals = _flat(residual_fn(), variables)
    parts = tape.jacobian(residuals, variables)
    return Linearised(residuals, *_side_by_side(parts, variables, residuals))


def linearised_at(
    points: Any, residual_fn: Callable[[Any], Any], variables: Sequence[tf.Variable]
) -> Linearised:
    """Residuals that depend on one point each, by a pass backwards for each residual of a point.

    All points go through at once, and the gradients of each are kept apart: such a pass costs about
    what a gradient of the sum does.

    Args:
        points: A tensor `[points, ...]`, or a structure of them.
        residual_fn: Maps one point, as a batch `[1, ...]`, to a tensor or a structure of them.
        variables: Those to differentiate by.

    Raises:
        ValueError: As `linearised`, or if TensorFlow can't have all points go through at once.

    Example:
    >>> w = tf.Variable([1.0, 2.0])
    >>> x = tf.constant([[1.0, 0.0], [1.0, 3.0]])
    >>> linearised_at(x, lambda x: tf.linalg.matvec(x, w) ** 2, [w]).jacobian.numpy().tolist()
    [[2.0, 0.0], [14.0, 42.0]]
    """
    connected = []

    def at(point: Any) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(variables)
            batch = tf.nest.map_structure(lambda part: part[tf.newaxis], point)
            residuals = _flat(residual_fn(batch), variables)
            each = tf.split(residuals, residuals.shape[0])
        rows = []
        for residual in each:
            row, is_connected = _side_by_side(
                tape.gradient(residual, variables), variables, residual
            )
            rows.append(row)
            connected.append(is_connected)
        return residuals, tf.concat(rows, axis=0)

    try:
        residuals, rows = tf.vectorized_map(at, points)
    except tf.errors.OpError:  # When it runs.
        raise
    except Exception as error:  # Of whatever class: vectorising fails in many ways.
        if not connected:  # But the function is the user's.
            raise
        kind = type(error).__name__
        *_, last = str(error).strip().splitlines() or [""]
        raise ValueError(
            "TensorFlow can't differentiate these residuals at all points at once, which `points` "
            "needs: not those of a loop, such as a recurrent layer that is not unrolled. Leave "
            "`points` out, so that `residual_fn()` returns all residuals. Received: residuals for "
            f"which it fails with {kind}: {last.strip().removeprefix(f'{kind}: ')}"
        ) from error
    matrix = tf.reshape(rows, [-1, rows.shape[-1]])
    return Linearised(tf.reshape(residuals, [-1]), matrix, any(connected))


def _flat(structure: Any, variables: Sequence[tf.Variable]) -> tf.Tensor:
    """Residuals in a row, in the dtype of the variables."""
    dtype = tf.as_dtype(variables[0].dtype)
    if any(part is None for part in tf.nest.flatten(structure)):
        raise ValueError(
            "`residual_fn` must return residuals: a tensor or a structure of them. Received: "
            f"{structure!r}"
        )
    parts = [tf.convert_to_tensor(p, dtype_hint=dtype) for p in tf.nest.flatten(structure)]
    if all(part.shape.num_elements() == 0 for part in parts):
        raise ValueError(
            "`residual_fn` must return residuals. Received: tensors of shapes "
            f"{[tuple(part.shape) for part in parts]}"
        )
    others = {part.dtype.name for part in parts} - {dtype.name}
    if others:
        raise ValueError(
            "Residuals must be of the variables' dtype: cast what they are made of. Received: "
            f"residuals of {', '.join(sorted(others))} for variables of {dtype.name}"
        )
    return tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)


def _side_by_side(
    parts: Sequence[tf.Tensor | None], variables: Sequence[tf.Variable], residuals: tf.Tensor
) -> tuple[tf.Tensor, bool]:
    """Derivatives by each variable as one matrix, and whether there are any."""
    columns = []
    for part, variable in zip(parts, variables):
        size = variable.shape.num_elements()
        if part is None:
            part = tf.zeros([tf.size(residuals), size], residuals.dtype)
        columns.append(tf.reshape(part, [-1, size]))
    return tf.concat(columns, axis=1), any(part is not None for part in parts)
