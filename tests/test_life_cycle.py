"""Config, saving, resuming, schedules, and the arguments of Keras's base optimizer."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, LevenbergMarquardt
from tests import helpers

SAVED, END = 5, 9  # A step that divides neither period, and the last one.
PERIODS = {"factor_update_period": 2, "inverse_update_period": 3}


@keras.saving.register_keras_serializable(package="tests")
class OwnSGD(keras.optimizers.SGD):
    """A user's own optimizer, as fallback."""


def decay(start: float = 0.1) -> keras.optimizers.schedules.LearningRateSchedule:
    return keras.optimizers.schedules.ExponentialDecay(start, decay_steps=3, decay_rate=0.5)


def sequence(examples: int) -> helpers.Data:
    """The first examples of an endless sequence."""
    x, y = helpers.vectors(END * helpers.BATCH)
    return x[:examples], y[:examples]


@keras.saving.register_keras_serializable(package="tests")
def wide_ones_by_their_inputs(layer: keras.Layer) -> str | None:
    """A rule for the structure of curvature."""
    return "input" if layer.name == "hidden" else None


# ---- Config -------------------------------------------------------------------------------------

CHANGED = {
    "learning_rate": 0.3,
    "damping": 0.5,
    "momentum": 0.5,
    "factor_ema_decay": 0.8,
    "exact_damping": True,
    "weight_sharing": {"hidden": "reduce"},
    "burn_in_steps": 3,
    "max_factor_size": 16,
    "memory_limit": 10**9,
    "product_dtype": "bfloat16",
    "factor_update_period": 3,
    "inverse_update_period": 7,
    "fisher": "exact",
    "fisher_samples": 2,
    "likelihood": "mse",
    "curvature": {"hidden": "ekfac", "Conv2D": "diagonal"},
    "kl_clip": 0.01,
    "fallback": OwnSGD(0.2, momentum=0.7),
    "seed": 11,
    "name": "other",
    "weight_decay": 0.01,
    "clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 4,
    "loss_scale_factor": 8.0,
    "gradient_accumulation_steps": 2,
}
CONFIGS = {
    "changed": CHANGED,
    "schedules": {
        "learning_rate": decay(),
        "damping": decay(0.5),
        "momentum": decay(0.9),
        "factor_ema_decay": decay(0.8),
        "kl_clip": decay(0.7),
    },
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "defaults": {},
    "rule_for_curvature": {"curvature": wide_ones_by_their_inputs},
    "own_damping_rule": {
        "damping": LevenbergMarquardt(1.0, 0.1, 9.0, 0.9, 2, reject=True, adapt_preconditioner=True)
    },
}
ROUND_TRIPS: dict[str, Callable[[KFAC], KFAC]] = {
    "from_config": lambda optimizer: KFAC.from_config(optimizer.get_config()),
    "serialize": lambda optimizer: keras.optimizers.deserialize(
        keras.optimizers.serialize(optimizer)
    ),
}


def test_config_cases_change_every_argument() -> None:
    defaults, config = KFAC().get_config(), KFAC(**CHANGED).get_config()
    unchanged = {name for name, value in config.items() if value == defaults[name]}
    assert unchanged == {"clipvalue", "global_clipnorm"}  # Excluded by `clipnorm`.
    assert set(inspect.signature(KFAC).parameters) - {"kwargs"} <= set(config)


@pytest.mark.parametrize("round_trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=CONFIGS.keys())
def test_config_round_trip_keeps_every_argument(
    arguments: dict[str, Any], round_trip: Callable[[KFAC], KFAC]
) -> None:
    arguments = {**arguments, "fallback": copy.deepcopy(arguments.get("fallback"))}
    optimizer = KFAC(**arguments)
    restored = round_trip(optimizer)
    assert restored is not optimizer
    assert restored.get_config() == optimizer.get_config()
    assert type(restored.fallback) is type(optimizer.fallback)
    np.testing.assert_allclose(restored.damping, optimizer.damping)
    np.testing.assert_allclose(restored.learning_rate, optimizer.learning_rate)


# ---- Saving and resuming ------------------------------------------------------------------------


class Subclassed(keras.Model):
    """Layers made in `__init__`, built by the first batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden, self.logits = helpers.dense_layers()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.logits(self.hidden(x))


def subclassed() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.saving.register_keras_serializable("tests")(Subclassed)(name="subclassed")


VARIANTS: dict[str, tuple[Callable[[], keras.Model], dict[str, Any], str]] = {
    "plain": (helpers.mlp, {}, "float32"),
    "unbuilt": (helpers.unbuilt_mlp, {}, "float32"),
    "subclassed": (subclassed, {}, "float32"),
    "no_momentum": (helpers.mlp, {"momentum": 0.0}, "float32"),
    "batch_normalization": (helpers.mlp_with_batch_normalization, {}, "float32"),
    "use_ema": (helpers.mlp, {"use_ema": True, "ema_overwrite_frequency": 2}, "float32"),
    "schedules": (helpers.mlp, {"learning_rate": decay(), "damping": decay(0.5)}, "float32"),
    "adaptive": (helpers.mlp_with_batch_normalization, helpers.ADAPTIVE, "float32"),
    "exact_damping": (helpers.mlp, {"exact_damping": True}, "float32"),
    "ekfac": (helpers.mlp_with_batch_normalization, {"curvature": "ekfac"}, "float32"),
    "inverse_free": (helpers.mlp, {"curvature": "inverse_free"}, "float32"),
    "structures": (
        helpers.mlp_with_batch_normalization,
        {"curvature": {"hidden": "input", "logits": "diagonal", "norm": "full"}},
        "float32",
    ),
    "joint": (
        helpers.mlp_with_batch_normalization,
        {"curvature": {"hidden": "tridiagonal", "logits": "tridiagonal", "norm": "dense"}},
        "float32",
    ),
    "preconditioner": (
        helpers.mlp,
        {
            **helpers.ADAPTIVE,
            "damping": LevenbergMarquardt("calibrated", adapt_preconditioner=True),
        },
        "float32",
    ),
    "mixed_bfloat16": (helpers.mlp, {}, "mixed_bfloat16"),
    "mixed_float16": (helpers.mlp_with_batch_normalization, {}, "mixed_float16"),
    "float64": (helpers.mlp, {}, "float64"),
    "accumulation": (
        helpers.mlp_with_batch_normalization,
        {"gradient_accumulation_steps": 2},
        "float32",
    ),
}


def fresh(variant: str) -> keras.Model:
    make, kwargs, _ = VARIANTS[variant]
    return helpers.compiled(make(), helpers.kfac(**PERIODS, **kwargs))


def trained(variant: str, steps: int) -> keras.Model:
    model = fresh(variant)
    helpers.fit_steps(model, 0, steps, sequence)
    return model


def whole_state(model: keras.Model) -> dict[str, np.ndarray]:
    """Weights, and every variable of the optimizer and what wraps it."""
    result = helpers.state(helpers.inner(model))
    if model.optimizer is not helpers.inner(model):
        result["scale"] = model.optimizer.dynamic_scale.numpy()
        result["step_counter"] = model.optimizer.step_counter.numpy()
    result.update({f"weight.{i}": w for i, w in enumerate(helpers.weights(model))})
    return result


def through_file(model: keras.Model, directory: Path) -> keras.Model:
    model.save(directory / "model.keras")
    return keras.saving.load_model(directory / "model.keras")


def through_file_twice(model: keras.Model, directory: Path) -> keras.Model:
    """Loads, and saves again before anything is attached."""
    return through_file(through_file(model, directory), directory)


def through_pickle(model: keras.Model, directory: Path) -> keras.Model:
    return pickle.loads(pickle.dumps(model))


WAYS = {"file": through_file, "file_twice": through_file_twice, "pickle": through_pickle}
VARIANTS_AND_WAYS = [(variant, "file") for variant in VARIANTS] + [
    (variant, way)
    for variant in ("batch_normalization", "mixed_float16")
    for way in ("file_twice", "pickle")
]


@pytest.mark.parametrize(("variant", "way"), VARIANTS_AND_WAYS)
def test_resumed_training_equals_uninterrupted_bit_for_bit(
    variant: str, way: str, tmp_path: Path
) -> None:
    with helpers.precision(VARIANTS[variant][2]):
        model = trained(variant, SAVED)
        restored = WAYS[way](model, tmp_path)
        helpers.assert_same(whole_state(restored), whole_state(model))
        for continued in (model, restored):
            helpers.fit_steps(continued, SAVED, END, sequence)
    micro_steps = model.optimizer.get_config().get("gradient_accumulation_steps") or 1
    assert int(helpers.inner(restored).iterations) == END // micro_steps
    helpers.assert_same(whole_state(restored), whole_state(model))
    helpers.assert_all_finite(restored)


def test_interrupted_training_equals_training_in_one_go() -> None:
    interrupted, whole = trained("plain", SAVED), trained("plain", END)
    helpers.fit_steps(interrupted, SAVED, END, sequence)
    helpers.assert_same(whole_state(interrupted), whole_state(whole))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("variant", ["plain", "batch_normalization"])
def test_checkpoint_restores_an_attached_model_before_and_after_its_first_step(
    variant: str, steps: int, tmp_path: Path
) -> None:
    model = trained(variant, SAVED)
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    restored = fresh(variant)
    helpers.fit_steps(restored, 0, steps, sequence) if steps else restored.optimizer.attach(
        restored
    )
    tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).restore(saved)
    for continued in (model, restored):
        helpers.fit_steps(continued, SAVED, END, sequence)
    helpers.assert_same(whole_state(restored), whole_state(model))


@pytest.mark.parametrize("variant", ["plain", "batch_normalization", "mixed_float16"])
@pytest.mark.parametrize("steps", [0, 3])
def test_weights_file_restores_an_attached_model_before_and_after_its_first_step(
    variant: str, steps: int, tmp_path: Path
) -> None:
    with helpers.precision(VARIANTS[variant][2]):
        model, restored = trained(variant, SAVED), fresh(variant)
        helpers.inner(restored).attach(restored)
        if steps:
            helpers.fit_steps(restored, 0, steps, sequence)
        else:
            restored.optimizer.build(restored.trainable_variables)
        model.save_weights(tmp_path / "all.weights.h5")
        restored.load_weights(tmp_path / "all.weights.h5")
        for continued in (model, restored):
            helpers.fit_steps(continued, SAVED, END, sequence)
    helpers.assert_same(whole_state(restored), whole_state(model))


def with_automatic_names() -> keras.Model:
    """Every such model gets layers of other names."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(helpers.CLASSES)]
    return keras.Sequential([keras.Input((helpers.FEATURES,)), *layers])


def test_state_fits_a_model_with_other_layer_names(tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        models.append(helpers.compiled(with_automatic_names(), helpers.kfac(**PERIODS)))
    model, restored = models
    helpers.fit_steps(model, 0, SAVED, sequence)
    model.save_weights(tmp_path / "all.weights.h5")
    restored.optimizer.build(restored.trainable_variables)
    restored.load_weights(tmp_path / "all.weights.h5")
    for continued in models:
        helpers.fit_steps(continued, SAVED, END, sequence)
    helpers.assert_same(whole_state(restored), whole_state(model))


class TwoOfAName(keras.Model):
    """Two layers with the same name and the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = keras.layers.Dense(4, activation="tanh", name="same")
        self.b = keras.layers.Dense(4, name="same")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.b(self.a(x))


def test_layers_of_the_same_name_have_factors_of_their_own() -> None:
    keras.utils.set_random_seed(0)
    model = helpers.compiled(TwoOfAName())
    x, y = helpers.vectors()
    helpers.fit(model, (x[:, :4], y))
    assert len(helpers.named(model.optimizer, "input_factor")) == 2


def test_backup_and_restore_resumes_bit_for_bit(tmp_path: Path) -> None:
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    data, variant = helpers.vectors(), "batch_normalization"
    whole, interrupted, resumed = (fresh(variant) for _ in range(3))
    helpers.fit(whole, data, epochs=4)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        helpers.fit(interrupted, data, epochs=4, callbacks=[backup, Interrupt()])
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    history = helpers.fit(resumed, data, epochs=4, callbacks=[backup])
    assert history.epoch == [2, 3]
    helpers.assert_same(whole_state(resumed), whole_state(whole))


def test_variables_are_all_state_and_set_weights_restores_it() -> None:
    model, other = trained("batch_normalization", END), trained("batch_normalization", 1)
    variables = model.optimizer.variables
    assert len({id(v) for v in variables}) == len(variables)
    values = [v.numpy() for v in variables]
    stored = [v for name, v in helpers.state(model.optimizer).items() if name != "fallback"]
    assert len(values) == len(stored)
    other.optimizer.set_weights(values)
    helpers.assert_same([v.numpy() for v in other.optimizer.variables], values)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    trained("plain", SAVED).optimizer.save_own_variables(saved)
    wider = keras.Sequential(
        [
            keras.Input((helpers.FEATURES,)),
            keras.layers.Dense(6, name="hidden"),
            keras.layers.Dense(helpers.CLASSES, name="logits"),
        ]
    )
    model = helpers.compiled(wider, helpers.kfac(**PERIODS))
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"does not fit the model\. Received"):
        model.optimizer.load_own_variables(saved)
        helpers.fit(model, helpers.vectors())


# ---- Schedules ----------------------------------------------------------------------------------


def changed_at(history: list[dict[str, np.ndarray]]) -> list[int]:
    """The steps at which any value differs from that of the step before."""
    pairs = itertools.pairwise(history)
    return [step for step, (a, b) in enumerate(pairs, 1) if any((a[k] != b[k]).any() for k in a)]


# More often at first: a quarter of the steps taken, up to the period; later once a period.
DUE = {
    1: range(30),
    2: [*range(7), *range(8, 30, 2)],
    5: [*range(7), 8, 10, 12, 15, 19, 20, 25],
}
# Inverses of the two layers then have turns of their own, a quarter of a period in, and three.
TURNS = {
    1: [range(30), range(30)],
    2: [[*range(7), *range(8, 30, 2)], [*range(7), *range(9, 30, 2)]],
    5: [[*range(7), 8, 10, 12, 15, 19, *late] for late in ((21, 26), (23, 28))],
}


@pytest.mark.parametrize(("factor_period", "inverse_period"), [(1, 1), (1, 5), (2, 5), (2, 2)])
@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_factors_and_inverses_change_at_their_times_only(
    factor_period: int, inverse_period: int, steps_per_execution: int
) -> None:
    optimizer = helpers.kfac(
        factor_update_period=factor_period, inverse_update_period=inverse_period
    )
    model = helpers.compiled(helpers.mlp(), optimizer, steps_per_execution=steps_per_execution)
    factors, inverses = [], []
    for step in range(0, 30, steps_per_execution):
        helpers.fit_steps(model, step, step + steps_per_execution, helpers.vectors)
        factors.append(helpers.factors(optimizer))
        inverses.append(helpers.inverses(optimizer))

    def executions(steps: Iterable[int]) -> list[int]:
        return sorted({step // steps_per_execution for step in steps} - {0})

    assert changed_at(factors) == executions(DUE[factor_period])
    for block, due in enumerate(TURNS[inverse_period]):
        own = [{k: v for k, v in i.items() if f".block.{block}." in k} for i in inverses]
        assert changed_at(own) == executions(due)


@pytest.mark.parametrize("name", ["learning_rate", "damping"])
def test_schedule_equals_setting_the_value_before_each_step(name: str) -> None:
    schedule = decay(0.5)
    scheduled = helpers.compiled(helpers.mlp(), helpers.kfac(**{name: schedule}))
    by_hand = helpers.compiled(helpers.mlp(), helpers.kfac())
    for step in range(END):
        setattr(by_hand.optimizer, name, float(schedule(step)))
        for model in (scheduled, by_hand):
            helpers.fit_steps(model, step, step + 1, sequence)
    helpers.assert_same(helpers.weights(scheduled), helpers.weights(by_hand), rtol=1e-5, atol=1e-7)
    assert float(getattr(scheduled.optimizer, name)) == pytest.approx(float(schedule(END)))


def test_damping_assigned_between_fits_takes_effect() -> None:
    model = trained("plain", 1)
    before = helpers.inverses(model.optimizer)
    model.optimizer.damping = 1e6
    helpers.fit_steps(model, 1, 4, sequence)
    after = helpers.inverses(model.optimizer)
    assert all(np.abs(after[name]).max() < np.abs(before[name]).max() for name in before)


def test_learning_rate_scheduler_sets_the_learning_rate_of_the_steps() -> None:
    model = helpers.compiled(helpers.mlp(), helpers.kfac(momentum=0.0))
    recorded = [helpers.weights(model)]
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.0 if epoch else 0.25),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: recorded.append(helpers.weights(model))
        ),
    ]
    logs = helpers.fit(model, helpers.vectors(), epochs=2, callbacks=callbacks).history
    assert logs["learning_rate"] == [0.25, 0.0]
    helpers.assert_different(recorded[1], recorded[0])
    helpers.assert_same(recorded[2], recorded[1])


def test_reduce_on_plateau_lowers_the_learning_rate() -> None:
    model = fresh("plain")
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1e9)
    helpers.fit(model, helpers.vectors(), epochs=3, callbacks=[plateau])
    assert float(model.optimizer.learning_rate) < 0.1


# ---- Arguments of Keras's base optimizer --------------------------------------------------------

BASE_ARGUMENTS = {
    "none": {},
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.02},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "weight_decay": {"weight_decay": 0.25},
    "weight_decay_and_clipnorm": {"weight_decay": 0.25, "clipnorm": 0.05},
}


def clipped(gradients: list[np.ndarray], arguments: dict[str, float]) -> list[np.ndarray]:
    """The documented meaning of the three arguments."""
    norms = [np.linalg.norm(g) for g in gradients]
    if "clipnorm" in arguments:
        return [g * min(1, arguments["clipnorm"] / n) for g, n in zip(gradients, norms)]
    if "clipvalue" in arguments:
        return [np.clip(g, -arguments["clipvalue"], arguments["clipvalue"]) for g in gradients]
    if "global_clipnorm" in arguments:
        return [g * min(1, arguments["global_clipnorm"] / np.linalg.norm(norms)) for g in gradients]
    return gradients


def gradients_of(model: keras.Model, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        loss = model.loss(y, model(x))
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


@pytest.mark.parametrize("arguments", BASE_ARGUMENTS.values(), ids=BASE_ARGUMENTS.keys())
def test_clipping_precedes_preconditioning_and_weight_decay_is_decoupled(
    arguments: dict[str, float],
) -> None:
    rate = 0.1
    with helpers.precision("float64"):
        dense = keras.layers.Dense(helpers.CLASSES, bias_initializer="random_normal")
        model = keras.Sequential([keras.Input((helpers.FEATURES,)), dense])
        optimizer = helpers.kfac(learning_rate=rate, kl_clip=None, momentum=0.0, **arguments)
        helpers.compiled(model, optimizer)
        data = helpers.vectors(helpers.BATCH)
        before, gradients = helpers.weights(model), gradients_of(model, *data)
        helpers.fit(model, data)
    kernel, bias = clipped(gradients, arguments)
    clips = any("clip" in name for name in arguments)
    assert np.array_equal(kernel, gradients[0]) != clips
    (a,) = helpers.named(optimizer, "input_inverse").values()
    (g,) = helpers.named(optimizer, "output_inverse").values()
    direction = a @ np.vstack([kernel, bias]) @ g
    kept = 1 - rate * arguments.get("weight_decay", 0.0)
    expected = [
        before[0] * kept - rate * direction[:-1],
        before[1] * kept - rate * direction[-1],
    ]
    helpers.assert_same(helpers.weights(model), expected, rtol=1e-10, atol=1e-13)


def test_use_ema_averages_the_weights_and_ends_with_the_average() -> None:
    momentum, recorded = 0.5, []
    model = helpers.compiled(helpers.mlp(), helpers.kfac(use_ema=True, ema_momentum=momentum))
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: recorded.append(helpers.weights(model))
    )
    helpers.fit(model, helpers.vectors(), callbacks=[record])
    average = recorded[0]
    for weights in recorded[1:]:
        average = [momentum * a + (1 - momentum) * w for a, w in zip(average, weights)]
    helpers.assert_same(helpers.weights(model), average, rtol=1e-5, atol=1e-7)


def test_constraints_are_applied_after_the_step() -> None:
    model = helpers.mlp(keras.layers.Dense(4, kernel_constraint="non_neg", name="constrained"))
    helpers.fit(helpers.compiled(model), helpers.vectors(), epochs=2)
    kernel = model.get_layer("constrained").kernel.numpy()
    assert kernel.min() == 0.0 and kernel.max() > 0.0
