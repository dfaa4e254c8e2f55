"""Every way to run a training step: one suite over all of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import LevenbergMarquardt
from tests import helpers

EPOCHS = 3


class OwnTrainStep(keras.Sequential):
    """A user's model with its own tape."""

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


class CountedTraces(keras.Sequential):
    """Counts how often Python runs through `train_step`."""

    traces = 0

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        type(self).traces += 1
        return super().train_step(data)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to train.

    Attributes:
        train: Trains a compiled model on data for some epochs.
        compile: Arguments for `compile`.
        optimizer: Arguments for the optimizer.
        policy: The dtype policy.
        model: The class of the model.
        examples: How many; a multiple of the batch size or not.
    """

    train: Callable[..., Any] = helpers.fit
    compile: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: str = "float32"
    model: type[keras.Sequential] = keras.Sequential
    examples: int = 4 * helpers.BATCH

    def run(self, policy: str | None = None, examples: int | None = None) -> keras.Model:
        """A model trained in this mode."""
        with helpers.precision(policy or self.policy):
            model = helpers.compiled(
                helpers.cnn(self.model),
                helpers.kfac(inverse_update_period=2, **self.optimizer),
                **self.compile,
            )
            self.train(model, helpers.images(examples or self.examples), EPOCHS)
        return model


# Compiled code draws other random numbers from the same seed: `jit_compile` is compared without.
SAME_MATHEMATICS = {
    "run_eagerly": Mode(compile={"run_eagerly": True}),
    "jit_compile": Mode(compile={"jit_compile": True}, optimizer={"fisher": "exact"}),
    "steps_per_execution": Mode(compile={"steps_per_execution": 4}),
    "own_train_step": Mode(model=OwnTrainStep),
    "custom_loop": Mode(helpers.tape_loop),
    "custom_loop_in_graph": Mode(functools.partial(helpers.tape_loop, graph=True)),
    "train_on_batch": Mode(helpers.train_on_batches),
}
PRECONDITIONER = {
    **helpers.ADAPTIVE,
    "damping": LevenbergMarquardt(adapt_preconditioner=True),
    "exact_damping": True,
}
CALIBRATED = {**helpers.ADAPTIVE, "damping": LevenbergMarquardt("calibrated")}
ADAPTIVE = {
    "adaptive": Mode(optimizer=helpers.ADAPTIVE),
    "adaptive_eager": Mode(compile={"run_eagerly": True}, optimizer=helpers.ADAPTIVE),
    "adaptive_steps_per_execution": Mode(
        compile={"steps_per_execution": 4}, optimizer=helpers.ADAPTIVE
    ),
    "adaptive_custom_loop": Mode(
        functools.partial(helpers.tape_loop, graph=True, compute_loss=True),
        optimizer=helpers.ADAPTIVE,
    ),
    "adaptive_jit": Mode(
        compile={"jit_compile": True}, optimizer={**helpers.ADAPTIVE, "fisher": "exact"}
    ),
}
MODES = {
    "fit": Mode(),
    **SAME_MATHEMATICS,
    **ADAPTIVE,
    "adaptive_mixed_float16": Mode(policy="mixed_float16", optimizer=helpers.ADAPTIVE),
    "adaptive_mixed_bfloat16": Mode(policy="mixed_bfloat16", optimizer=helpers.ADAPTIVE),
    "adaptive_accumulation": Mode(
        optimizer={**helpers.ADAPTIVE, "gradient_accumulation_steps": 2},
        examples=16 * helpers.BATCH,
    ),
    "preconditioner": Mode(optimizer=PRECONDITIONER),
    "preconditioner_jit": Mode(compile={"jit_compile": True}, optimizer=PRECONDITIONER),
    "preconditioner_mixed_float16": Mode(policy="mixed_float16", optimizer=PRECONDITIONER),
    "calibrated": Mode(optimizer=CALIBRATED),
    "calibrated_eager": Mode(compile={"run_eagerly": True}, optimizer=CALIBRATED),
    "calibrated_jit": Mode(compile={"jit_compile": True}, optimizer=CALIBRATED),
    **{
        f"{name}{'_jit' * jit}": Mode(
            compile={"jit_compile": jit}, optimizer={**helpers.ADAPTIVE, "curvature": name}
        )
        for name in (
            "ekfac",
            "input",
            "inverse_free",
            "linear_exact",
            "diagonal",
            "full",
            "dense",
        )
        for jit in (False, True)
    },
    "ekfac_mixed_float16": Mode(policy="mixed_float16", optimizer={"curvature": "ekfac"}),
    "inverse_free_mixed_float16": Mode(
        policy="mixed_float16", optimizer={"curvature": "inverse_free"}
    ),
    "inverse_free_bfloat16": Mode(policy="bfloat16", optimizer={"curvature": "inverse_free"}),
    "mixed_bfloat16": Mode(policy="mixed_bfloat16"),
    "mixed_float16": Mode(policy="mixed_float16"),
    "mixed_float16_jit": Mode(policy="mixed_float16", compile={"jit_compile": True}),
    "float64": Mode(policy="float64"),
    "partial_last_batch": Mode(examples=2 * helpers.BATCH + 3),
    "gradient_accumulation": Mode(optimizer={"gradient_accumulation_steps": 2}),
}


@functools.cache
def plain_fit_in_float64(fisher: str) -> list[np.ndarray]:
    mode = Mode(optimizer={"fisher": fisher})
    return helpers.weights(mode.run("float64", examples=2 * helpers.BATCH + 3))


def updates(mode: Mode) -> int:
    """How many updates of the weights the mode makes."""
    batches = -(-mode.examples // helpers.BATCH)
    return EPOCHS * batches // mode.optimizer.get("gradient_accumulation_steps", 1)


# Compiled by XLA, each takes half a minute; one of them is enough for every change.
SLOW = (
    "preconditioner_jit",
    "calibrated_jit",
    "mixed_float16_jit",
    "input",
    "input_jit",
    "inverse_free",
    "inverse_free_jit",
    "inverse_free_mixed_float16",
    "linear_exact",
    "linear_exact_jit",
    "diagonal_jit",
    "full_jit",
    "dense_jit",
    "ekfac_jit",
    "adaptive_jit",  # Compared with the same mode without XLA further down.
)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, mode in MODES.items()
    ],
)
def test_every_mode_trains(mode: Mode) -> None:
    data = helpers.images(mode.examples)
    untrained = helpers.mean_loss(helpers.cnn(), data)
    model = mode.run()
    optimizer = helpers.inner(model)
    assert helpers.mean_loss(model, data) < 0.9 * untrained
    helpers.assert_all_finite(model)
    assert int(optimizer.iterations) == updates(mode)
    assert int(optimizer.skipped_steps) == 0
    block = mode.optimizer.get("curvature", "kronecker")
    assert helpers.blocks(optimizer) == {"conv": block, "logits": block}
    assert all(np.any(factor) for factor in helpers.factors(optimizer).values())


@pytest.mark.parametrize("mode", SAME_MATHEMATICS.values(), ids=SAME_MATHEMATICS.keys())
def test_mode_computes_what_plain_fit_computes(mode: Mode) -> None:
    model = mode.run("float64", examples=2 * helpers.BATCH + 3)
    expected = plain_fit_in_float64(str(model.optimizer.fisher))
    helpers.assert_same(helpers.weights(model), expected, rtol=1e-10, atol=1e-11)


def test_mixed_float16_computes_what_float32_does_to_its_precision() -> None:
    """The steps, with the loss scaled by 2¹⁵ on the way."""
    mode, start = Mode(optimizer={"fisher": "exact"}), helpers.weights(helpers.cnn())
    half, single = (helpers.weights(mode.run(p)) for p in ("mixed_float16", "float32"))
    for before, a, b in zip(start, half, single):
        difference = np.linalg.norm(a - b) / np.linalg.norm(b - before)
        assert 0 < difference < 0.03


@functools.cache
def adaptive_fit_in_float64(fisher: str) -> list[np.ndarray]:
    mode = Mode(optimizer={**helpers.ADAPTIVE, "fisher": fisher})
    return helpers.weights(mode.run("float64", examples=2 * helpers.BATCH + 3))


@pytest.mark.parametrize("mode", ADAPTIVE.values(), ids=ADAPTIVE.keys())
def test_adaptive_steps_are_the_same_in_every_mode(mode: Mode) -> None:
    model = mode.run("float64", examples=2 * helpers.BATCH + 3)
    expected = adaptive_fit_in_float64(str(model.optimizer.fisher))
    helpers.assert_same(helpers.weights(model), expected, rtol=1e-8, atol=1e-10)
    assert float(model.optimizer.learning_rate) > 0


@pytest.mark.parametrize("loop", [False, True], ids=["train_on_batch", "loop"])
def test_functional_models_take_arrays_eagerly(loop: bool) -> None:
    """Keras converts them within `call`, in the type of the inputs."""
    found = []
    for convert in (np.asarray, tf.constant):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((helpers.FEATURES,), dtype="float32")
        model = keras.Model(inputs, keras.layers.Dense(helpers.CLASSES)(inputs))
        helpers.compiled(model, helpers.kfac(**helpers.ADAPTIVE), run_eagerly=True)
        helpers.inner(model).attach(model)
        step = helpers.tape_step(model, None, model.optimizer) if loop else model.train_on_batch
        for x, y in helpers.batches(helpers.vectors()):
            step(convert(np.rint(4 * x).astype(np.int64)), convert(y))
        found.append(helpers.weights(model))
    helpers.assert_same(found[0], found[1])


def conv_run(data_format: str, groups: int) -> keras.Model:
    """A trained convolution on the same images in either data format.

    TensorFlow runs channels first on a CPU under XLA only, and there with a wrong gradient of the
    bias, whatever the optimizer: so no bias.
    """
    keras.utils.set_random_seed(0)
    channels_first = data_format == "channels_first"
    shape = (2, 6, 6) if channels_first else (6, 6, 2)
    pool = keras.layers.GlobalAveragePooling2D(data_format=data_format)
    conv = keras.layers.Conv2D(4, 3, groups=groups, use_bias=False, data_format=data_format)
    layers = [keras.Input(shape), conv, keras.layers.LeakyReLU(), pool, keras.layers.Dense(3)]
    model = helpers.compiled(
        keras.Sequential(layers), helpers.kfac(fisher="exact"), jit_compile=True
    )
    x, y = helpers.images(4 * helpers.BATCH)
    x = np.concatenate([x, x[:, ::-1] ** 2], axis=-1)
    helpers.fit(model, (np.moveaxis(x, -1, 1) if channels_first else x, y))
    return model


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_data_formats_train_alike(groups: int) -> None:
    with helpers.precision("float64"):
        first, last = (conv_run(name, groups) for name in ("channels_first", "channels_last"))
    assert set(helpers.blocks(first.optimizer).values()) == {"kronecker"}
    helpers.assert_same(helpers.weights(first), helpers.weights(last), rtol=1e-10, atol=1e-12)
    actual, expected = (list(helpers.factors(m.optimizer).values()) for m in (first, last))
    helpers.assert_same(actual, expected, rtol=1e-10, atol=1e-12)


def test_activation_of_any_kind_is_the_same_as_one_by_name() -> None:
    """A layer, a function and a name as `activation=`."""
    runs = []
    for activation in ("relu", keras.layers.ReLU(), lambda x: tf.nn.relu(x)):
        keras.utils.set_random_seed(0)
        hidden = keras.layers.Dense(4, activation)
        model = keras.Sequential([keras.Input((helpers.FEATURES,)), hidden, keras.layers.Dense(3)])
        helpers.fit(helpers.compiled(model), helpers.vectors())
        runs.append(helpers.weights(model))
    helpers.assert_same(runs[1], runs[0], rtol=1e-6)
    helpers.assert_same(runs[2], runs[0], rtol=1e-6)


def traces(optimizer: keras.optimizers.Optimizer, callbacks: list[Any]) -> int:
    CountedTraces.traces = 0
    model = helpers.compiled(helpers.mlp(cls=CountedTraces), optimizer)
    x, y = helpers.vectors(2 * helpers.BATCH + 3)
    model.fit(x, y, batch_size=helpers.BATCH, epochs=4, callbacks=callbacks, verbose=0)
    return CountedTraces.traces


def test_training_is_traced_no_more_often_than_with_adam() -> None:
    kfac = helpers.kfac(inverse_update_period=3)
    with_adam = traces(keras.optimizers.Adam(), [])
    assert 0 < traces(kfac, [helpers.KFACCallback()]) <= with_adam
    assert int(kfac.iterations) == 12


ACCUMULATED = {
    "plain": {},
    "kl_clip": {"kl_clip": 1e-4},
    "rare_refreshes": {"factor_update_period": 2, "inverse_update_period": 3},
    "clipnorm": {"clipnorm": 0.1, "weight_decay": 0.1},
}


@pytest.mark.parametrize("kwargs", ACCUMULATED.values(), ids=ACCUMULATED.keys())
def test_accumulating_micro_batches_equals_one_large_batch(kwargs: dict[str, Any]) -> None:
    models = []
    with helpers.precision("float64"):
        for micro_steps in (1, 2):
            optimizer = helpers.kfac(
                fisher="exact",
                gradient_accumulation_steps=None if micro_steps == 1 else micro_steps,
                **kwargs,
            )
            model = helpers.compiled(helpers.mlp(), optimizer)
            helpers.fit(model, helpers.vectors(64), batch_size=16 // micro_steps)
            models.append(model)
    once, accumulated = models
    assert int(accumulated.optimizer.iterations) == int(once.optimizer.iterations) == 4
    helpers.assert_same(helpers.weights(accumulated), helpers.weights(once), rtol=1e-10)
    actual, expected = (helpers.factors(m.optimizer) for m in (accumulated, once))
    helpers.assert_same(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_micro_batches_equal_one_large_batch_for_many_steps(fisher: str) -> None:
    """Identity 8: thirty steps of four micro-batches of 6 are those of batches of 24."""
    models = []
    with helpers.precision("float64"):
        for micro_steps in (None, 4):
            optimizer = helpers.kfac(fisher=fisher, gradient_accumulation_steps=micro_steps)
            model = helpers.compiled(helpers.cnn(), optimizer)
            data = helpers.images(24 * 5)
            helpers.fit(model, data, epochs=6, batch_size=24 // (micro_steps or 1))
            assert int(optimizer.iterations) == 30
            models.append(model)
    once, accumulated = models
    helpers.assert_same(helpers.weights(accumulated), helpers.weights(once), rtol=1e-9, atol=1e-12)
    actual, expected = (helpers.factors(m.optimizer) for m in (accumulated, once))
    helpers.assert_same(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_loss_scale_changes_neither_factors_nor_weights(fisher: str) -> None:
    runs = []
    with helpers.precision("float64"):
        for scale in (None, 1e4):
            model = helpers.compiled(
                helpers.mlp(), helpers.kfac(fisher=fisher, loss_scale_factor=scale)
            )
            helpers.fit(model, helpers.vectors(), epochs=2)
            runs.append((helpers.weights(model), helpers.factors(model.optimizer)))
    for actual, expected in zip(runs[1], runs[0]):
        helpers.assert_same(actual, expected, rtol=1e-10, atol=1e-12)


def scaled_run(fisher: str, scales: list[float], overflow_at: int | None = None) -> keras.Model:
    """A model trained under a loss scale that changes from batch to batch."""
    optimizer = keras.optimizers.LossScaleOptimizer(helpers.kfac(fisher=fisher))
    model = helpers.compiled(helpers.mlp(), optimizer)
    optimizer.build(model.trainable_variables)
    kfac = helpers.inner(model).attach(model)
    for index, (x, y) in enumerate(helpers.batches(helpers.vectors(8 * helpers.BATCH))):
        if index == overflow_at:
            before = helpers.state(kfac), helpers.weights(model)
            optimizer.dynamic_scale.assign(np.inf)
            model.train_on_batch(x, y)
            helpers.assert_same(helpers.state(kfac), before[0])
            helpers.assert_same(helpers.weights(model), before[1])
        optimizer.dynamic_scale.assign(scales[index % len(scales)])
        model.train_on_batch(x, y)
    assert int(kfac.iterations) == 8
    return model


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_many_positions_that_count_little_count_in_float16(fisher: str) -> None:
    """What each of them does is no number that float16 has."""
    x, y = np.random.default_rng(0).normal(size=(4, 32, 32, 1)), np.ones((4, 32, 32), int)
    if fisher == "exact":
        x, y = x[:1, :8, :8], y[:1, :8, :8]
    weight, found = 1e-4 if fisher != "exact" else 1e-6, []
    for policy in ("float32", "mixed_float16"):
        with helpers.precision(policy):
            keras.utils.set_random_seed(0)
            layers = [keras.layers.Conv2D(3, 1), keras.layers.Conv2D(2, 1)]
            model = keras.Sequential([keras.Input((*x.shape[1:3], 1)), *layers])
            optimizer = helpers.kfac(fisher=fisher, learning_rate=0.0, damping=1e-6)
            helpers.compiled(model, optimizer, loss_weights=weight)
            helpers.fit(model, (x, y), batch_size=4)
            found.append(helpers.factors(helpers.inner(model)))
    for key, expected in found[0].items():
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(found[1][key], expected, atol=0.02 * scale)


@pytest.mark.parametrize("overflow_at", [0, 1])
def test_overflow_in_a_custom_loop_changes_nothing(overflow_at: int) -> None:
    """Where Keras does not tell the optimizer inside of the step."""

    def run(overflows: bool) -> list[np.ndarray]:
        optimizer = keras.optimizers.LossScaleOptimizer(helpers.kfac(), initial_scale=8.0)
        model = helpers.compiled(helpers.mlp(), optimizer)
        helpers.inner(model).attach(model)
        variables = model.trainable_variables
        for index, (x, y) in enumerate(helpers.batches(helpers.vectors())):
            repeats = 2 if overflows and index == overflow_at else 1
            for factor in [np.inf, 1.0][-repeats:]:
                with tf.GradientTape() as tape:
                    outputs = model(x, training=True)
                    loss = model.compute_loss(x, y, outputs)
                    scaled = factor * optimizer.scale_loss(loss)
                optimizer.apply(tape.gradient(scaled, [v.value for v in variables]), variables)
        return [*helpers.weights(model), *helpers.factors(helpers.inner(model)).values()]

    plain, overflown = run(False), run(True)
    helpers.assert_same(overflown, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_cyclic_loss_scale_and_overflow_change_nothing(fisher: str) -> None:
    """Identity 25; a step that overflows leaves factors, inverses and counters untouched."""
    with helpers.precision("float64"):
        plain = scaled_run(fisher, [1.0])
        scaled = scaled_run(fisher, [100.0, 1e4, 100.0, 1.0], overflow_at=3)
    helpers.assert_same(helpers.weights(scaled), helpers.weights(plain), rtol=1e-10, atol=1e-12)
    actual, expected = (helpers.state(helpers.inner(m)) for m in (scaled, plain))
    helpers.assert_same(actual, expected, rtol=1e-10, atol=1e-12)
