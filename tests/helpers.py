"""Small models, small data and ways to train, shared by the tests of the life with Keras."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kfac import KFAC, KFACCallback

BATCH = 8
FEATURES = 5
CLASSES = 3

Data = tuple[np.ndarray, np.ndarray]


# ---- Data and models ----------------------------------------------------------------------------


def vectors(examples: int = 3 * BATCH) -> Data:
    """Inputs `[examples, 5]` with a label each."""
    x = np.random.default_rng(0).normal(size=(examples, FEATURES))
    return x, np.argmax(x[:, :CLASSES], axis=1)


def images(examples: int = 3 * BATCH) -> Data:
    """Inputs `[examples, 6, 6, 1]` with a label each."""
    x = np.random.default_rng(0).normal(size=(examples, 6, 6, 1))
    return x, np.argmax(x[:, :CLASSES, 0, 0], axis=1)


def dense_layers() -> list[keras.Layer]:
    return [
        keras.layers.Dense(4, activation="tanh", name="hidden"),
        keras.layers.Dense(CLASSES, name="logits"),
    ]


def mlp(*between: keras.Layer, cls: type[keras.Sequential] = keras.Sequential) -> keras.Model:
    """Two dense layers, with the given layers in between."""
    keras.utils.set_random_seed(0)
    hidden, logits = dense_layers()
    return cls([keras.Input((FEATURES,)), hidden, *between, logits], name="mlp")


@keras.saving.register_keras_serializable(package="tests")
class Unknown(keras.layers.Layer):
    """A layer that no adapter knows: its weights go to the fallback optimizer."""

    def build(self, input_shape: tuple) -> None:
        self.scale = self.add_weight(shape=input_shape[1:], initializer="ones")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs * self.scale


class Places(keras.layers.Layer):
    """Adds a vector for each position: a table that is called on positions, not on examples."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.table = keras.layers.Embedding(positions, width, name="table")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs + self.table(tf.range(self.table.input_dim))


class WithOthers(keras.Model):
    """Returns other things beside the output `"y"`: what a function makes of the inputs."""

    def __init__(self, others: Callable[[tf.Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.dense, self.others = keras.layers.Dense(CLASSES), others

    def call(self, x: tf.Tensor, training: bool = False) -> dict[str, Any]:
        return {**self.others(x), "y": self.dense(x)}


def mlp_with_batch_normalization() -> keras.Model:
    """A model of all kinds of blocks, and with weights that go to the fallback optimizer."""
    return mlp(keras.layers.BatchNormalization(name="norm"), Unknown(name="unknown"))


def unbuilt_mlp() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(dense_layers(), name="mlp")


def cnn(cls: type[keras.Sequential] = keras.Sequential) -> keras.Model:
    keras.utils.set_random_seed(0)
    return cls(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(2, 3, strides=2, activation="tanh", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES, name="logits"),
        ],
        name="cnn",
    )


def crossentropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def kfac(**kwargs: Any) -> KFAC:
    """An optimizer that renews factors and inverses at every step, and steps far.

    Nothing adapts itself unless asked to.
    """
    defaults = {
        "learning_rate": 0.1,
        "damping": 0.1,
        "momentum": 0.9,
        "kl_clip": 1e-2,
        "factor_update_period": 1,
        "inverse_update_period": 1,
    }
    return KFAC(**{**defaults, **kwargs})


ADAPTIVE = {"learning_rate": "adaptive", "momentum": "adaptive", "damping": "adaptive"}


def compiled(
    model: keras.Model, optimizer: Any = None, loss: Any = None, **kwargs: Any
) -> keras.Model:
    model.compile(
        optimizer=optimizer or kfac(), loss=crossentropy() if loss is None else loss, **kwargs
    )
    return model


# ---- Training -----------------------------------------------------------------------------------


def fit(model: keras.Model, data: Data, epochs: int = 1, **kwargs: Any) -> keras.callbacks.History:
    """Trains by `fit` with the callback, on the batches in their order."""
    callbacks = [KFACCallback(), *kwargs.pop("callbacks", [])]
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(*data, epochs=epochs, callbacks=callbacks, **options)


def batches(data: Data, size: int = BATCH) -> list[Data]:
    x, y = data
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def fit_steps(model: keras.Model, start: int, stop: int, make: Callable[[int], Data]) -> None:
    """Trains by `fit` on batches `start` to `stop` of an endless sequence."""
    x, y = make(stop * BATCH)
    fit(model, (x[start * BATCH :], y[start * BATCH :]))


def train_on_batches(model: keras.Model, data: Data, epochs: int = 1, size: int = BATCH) -> None:
    inner(model).attach(model)
    for _ in range(epochs):
        for x, y in batches(data, size):
            model.train_on_batch(x, y)


def tape_step(model: keras.Model, loss: Any, optimizer: Any) -> Callable[..., Any]:
    """One step of a custom loop, with the model's `compute_loss` if `loss` is `None`."""

    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            if loss is None:
                value = model.compute_loss(x, y, model(x, training=True))
            else:
                value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return value

    return step


def tape_loop(
    model: keras.Model,
    data: Data,
    epochs: int = 1,
    graph: bool = False,
    compute_loss: bool = False,
) -> None:
    """Trains by a custom loop."""
    inner(model).attach(model)
    step = tape_step(model, None if compute_loss else model.loss, model.optimizer)
    step = tf.function(step, reduce_retracing=True) if graph else step
    for _ in range(epochs):
        for x, y in batches(data):
            step(tf.constant(x, keras.config.floatx()), tf.constant(y))


# ---- State --------------------------------------------------------------------------------------


def inner(model: keras.Model) -> KFAC:
    """The K-FAC optimizer, inside a `LossScaleOptimizer` or not."""
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def state(optimizer: KFAC) -> dict[str, np.ndarray]:
    """All of its state, that of the fallback included, by the names under which it is saved."""
    result: dict[str, Any] = {}
    optimizer.save_own_variables(result)
    if optimizer.fallback.built:
        saved: dict[str, Any] = {}
        optimizer.fallback.save_own_variables(saved)
        result.update({f"fallback/{name}": value for name, value in saved.items()})
    return {name: np.array(value) for name, value in result.items()}


def named(optimizer: KFAC, ending: str) -> dict[str, np.ndarray]:
    """The part of the state whose names end so; it is an error if there is none."""
    result = {name: value for name, value in state(optimizer).items() if name.endswith(ending)}
    assert result, f"no state ends in {ending}: {list(state(optimizer))}"
    return result


def factors(optimizer: KFAC) -> dict[str, np.ndarray]:
    return {**named(optimizer, "input_factor"), **named(optimizer, "output_factor")}


def inverses(optimizer: KFAC) -> dict[str, np.ndarray]:
    return {**named(optimizer, "input_inverse"), **named(optimizer, "output_inverse")}


def weights(model: keras.Model) -> list[np.ndarray]:
    return [np.array(w) for w in model.get_weights()]


def mean_loss(model: keras.Model, data: Data) -> float:
    """The crossentropy of the model's outputs, which are logits."""
    x, y = data
    outputs = np.asarray(model.predict(x, verbose=0), np.float32)
    return float(crossentropy()(y, outputs))


def blocks(optimizer: KFAC) -> dict[str, str]:
    """Which block covers which layer, by the last part of the layer's path."""
    return {row.layer.split("/")[-1]: row.block for row in optimizer.coverage()}


def reasons(optimizer: KFAC) -> dict[str, str]:
    return {row.layer.split("/")[-1]: row.reason for row in optimizer.coverage()}


# ---- Assertions ---------------------------------------------------------------------------------


def assert_same(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Asserts equality of arrays, or of lists or dicts of them; by default bit for bit."""
    if isinstance(expected, dict):
        assert sorted(actual) == sorted(expected)
        actual = [actual[name] for name in expected]
        expected = list(expected.values())
    if not isinstance(expected, Sequence):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


def assert_all_finite(model: keras.Model) -> None:
    """Asserts that weights and the optimizer's state are finite."""
    for value in [*weights(model), *state(inner(model)).values()]:
        assert np.all(np.isfinite(value))


def assert_different(actual: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> None:
    """Asserts that every array has changed."""
    assert len(actual) == len(other)
    for a, b in zip(actual, other):
        assert not np.array_equal(a, b)


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Another dtype policy for the body; `float64` is the dtype of everything then."""
    floatx, before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64" if policy == "float64" else floatx)
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(before)
