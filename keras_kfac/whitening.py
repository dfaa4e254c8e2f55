"""Whitening as a reparametrisation: layers that centre and whiten what goes into the next layer.

Source: Desjardins, Simonyan, Pascanu & Kavukcuoglu (2015), "Natural neural networks",
arXiv:1507.00210 (PRONG).
"""

from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals, validation
from keras_kfac.introspection.adapters import layer_path
from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.introspection.forward_pass import LayerCall, recording
from keras_kfac.introspection.readers import affine_readers
from keras_kfac.math.linalg import is_finite
from keras_kfac.math.rows import rows_of_positions
from keras_kfac.math.whitening import (
    in_plain_coordinates,
    in_white_coordinates,
    mean_and_covariance,
    whitener,
)

MODES = ("full", "diagonal", "centring")


@keras.saving.register_keras_serializable(package="keras_kfac")
class Whitening(keras.layers.Layer):
    """Centres and whitens its inputs, for the affine layer that follows: `z = U (a - c)`.

    Mean `c` and matrix `U = (Σ + ε I)^(-1/2)` are weights that are not trained. At first they do
    nothing; `rewhiten`, or `WhiteningCallback` in `fit`, takes them from data and rewrites the
    next layer so that the network stays the function that it is. What changes are the coordinates
    in which the optimizer steps: gradient descent then steps as it would in the plain ones along
    the gradient times the inverse second moment of the inputs.

    Args:
        mode: What of the covariance `Σ` counts: `"full"`, its `"diagonal"`, as batch
            normalisation has it, or nothing (`"centring"`).
        epsilon: `ε >= 0`, the damping of variances. It bounds `U` where inputs hardly vary; those
            that are constant need it.
        **kwargs: As for `keras.layers.Layer`.

    Inputs and outputs have the shape `[batch, ..., features]`; positions share mean and matrix. A
    mask is passed on, and what it hides counts for neither.

    Raises:
        ValueError: For arguments out of range.

    Example:
    >>> whitening, dense = Whitening(epsilon=0.0), keras.layers.Dense(1)
    >>> model = keras.Sequential([keras.Input((2,)), whitening, dense])
    >>> x = np.array([[1.0, 0.0], [3.0, 4.0], [5.0, -4.0]], "float32")
    >>> before = model(x)
    >>> rewhiten(model, x)
    >>> bool(np.allclose(model(x), before, atol=1e-5))
    True
    >>> z = whitening(x)
    >>> np.abs(tf.matmul(z, z, transpose_a=True) / 3).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, mode: str = "full", epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
        self.mode = mode
        self.epsilon = validation.check_finite_not_negative("epsilon", epsilon)
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes `mean` `[d]` and, but for `"centring"`, `matrix` `[d, d]` or `[d]`."""
        size = input_shape[-1]
        self.mean = self.add_weight(
            name="mean", shape=(size,), initializer="zeros", trainable=False
        )
        self.matrix = None
        if self.mode != "centring":
            is_full = self.mode == "full"
            self.matrix = self.add_weight(
                name="matrix",
                shape=(size, size) if is_full else (size,),
                initializer="identity" if is_full else "ones",
                trainable=False,
            )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """`U (a - c)`."""
        centred = inputs - self.mean
        if self.matrix is None:
            return centred
        if self.mode == "full":
            return keras.ops.matmul(centred, self.matrix)
        return centred * self.matrix

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """That of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "mode": self.mode, "epsilon": self.epsilon}


def rewhiten(model: keras.Model, x: Any) -> None:
    """Takes means and covariances anew, and rewrites weights so that the model's function stays.

    The layers that read the output of a `Whitening` layer are rewritten: `Dense` and
    `EinsumDense` layers, and convolutions that don't pad, with a bias each and nothing in between.
    What an optimizer remembers of earlier steps (momentum, moments) is of the old coordinates.

    Args:
        model: A functional or sequential model, or one that holds such models, with `Whitening`
            layers.
        x: Inputs as for `model(x)`, as many as determine a covariance: a few times the number of
            features. They pass the model once, in inference mode.

    Raises:
        ValueError: If the model has no such layer, `x` is a dataset, a layer's output is read by
            anything else, its inputs are not finite, or their covariance has no inverse root. Then
            nothing has changed.

    Example: see `Whitening`.
    """
    layers = [v for v in _keras_internals.flatten_layers(model) if isinstance(v, Whitening)]
    if not layers:
        raise ValueError(
            "There is nothing to whiten. Received: model "
            f"{model.name!r} without a `Whitening` layer"
        )
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        raise ValueError(
            "`x` must be inputs as the model is called with: of a dataset, those of a large batch. "
            f"Received: x={x!r}"
        )
    with recording(layers) as recorded:
        model(tf.nest.map_structure(tf.convert_to_tensor, x), training=False)
    # All is computed before anything is assigned: a model is rewritten as a whole or not at all.
    changes = []
    for layer in layers:
        readers = affine_readers(model, layer)
        calls = recorded.calls.get(id(layer), [])
        if len(calls) != 1:
            raise ValueError(
                f"{layer_path(layer)!r} must be called once in a pass through the model. Received: "
                f"{len(calls)} calls"
            )
        changes += _rewritten(layer, readers, calls[0])
    for variable, value in changes:
        variable.assign(tf.cast(value, variable.dtype))


def _rewritten(
    layer: Whitening, readers: list[AffineAdapter], call: LayerCall
) -> list[tuple[keras.Variable, tf.Tensor]]:
    """New values of the weights of a layer and its readers, in double precision."""
    rows = rows_of_positions(tf.cast(call.inputs, tf.float64))
    mean, covariance = mean_and_covariance(rows, call.mask, is_diagonal=layer.mode != "full")
    if not is_finite(covariance):
        raise ValueError(
            "Inputs must be finite to have a mean and a covariance. Received: others at "
            f"{layer_path(layer)!r}"
        )
    old_mean, old_matrix = tf.cast(layer.mean, tf.float64), tf.ones_like(mean)
    matrix = inverse = tf.ones_like(mean)
    if layer.matrix is not None:
        old_matrix = tf.cast(layer.matrix, tf.float64)
        matrix, inverse = whitener(covariance, layer.epsilon)
    if not is_finite(matrix):
        raise ValueError(
            f"The inputs of {layer_path(layer)!r} have a covariance without an inverse root: give "
            f"more examples or a larger `epsilon`. Received: {rows.shape[0]} examples, "
            f"epsilon={layer.epsilon}"
        )
    changes = [(layer.mean, mean)]
    if layer.matrix is not None:
        changes.append((layer.matrix, matrix))
    for reader in readers:
        weights = reader.to_matrix({id(v): tf.cast(v, tf.float64) for v in reader.variables})
        plain = in_plain_coordinates(weights, old_mean, old_matrix)
        values = reader.from_matrix(in_white_coordinates(plain, mean, inverse))
        changes += [(v, values[id(v)]) for v in reader.variables]
    return changes


class WhiteningCallback(keras.callbacks.Callback):
    """Calls `rewhiten` when `fit` begins, and again after every so many batches.

    Args:
        x: Inputs to take the statistics from, as for `rewhiten`: a random part of the training
            data.
        period: Number of batches from one time to the next, a positive int. With
            `steps_per_execution` it can be late by less than that.

    Raises:
        ValueError: For another period; in training as `rewhiten`.

    Example:
    >>> model = keras.Sequential([keras.Input((2,)), Whitening(), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(3.0, size=(32, 2)).astype("float32")
    >>> history = model.fit(x, x[:, :1], verbose=0, callbacks=[WhiteningCallback(x, period=10)])
    >>> bool(np.allclose(model.layers[0].mean, x.mean(0)))
    True
    """

    def __init__(self, x: Any, period: int = 100) -> None:
        super().__init__()
        self.x = x
        self.period = validation.check_positive_int("period", period)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Whitens for the first time."""
        rewhiten(self.model, self.x)
        self._waited = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Batches are counted from 0 again."""
        self._last = -1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Whitens again if it is time to."""
        self._waited += batch - self._last
        self._last = batch
        if self._waited >= self.period:
            self._waited = 0
            rewhiten(self.model, self.x)
