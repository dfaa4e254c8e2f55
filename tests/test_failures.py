"""Bad arguments, models and data: errors say what to do, and nothing is silently harmed."""

import contextlib
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac import KFAC, KFACCallback, NegativeLogLikelihood
from tests import helpers

# ---- Arguments ----------------------------------------------------------------------------------

BAD_ARGUMENTS: list[tuple[str, Any]] = [
    ("learning_rate", "adaptiv"),
    ("learning_rate", None),
    ("learning_rate", -0.1),
    ("learning_rate", float("nan")),
    ("damping", -0.1),
    ("damping", float("nan")),
    ("damping", float("inf")),
    ("damping", "large"),
    ("damping", None),
    ("factor_update_period", 0),
    ("factor_update_period", -1),
    ("factor_update_period", 1.5),
    ("factor_update_period", "often"),
    ("inverse_update_period", 0),
    ("inverse_update_period", -1),
    ("inverse_update_period", 1.5),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("momentum", "heavy"),
    ("momentum", float("nan")),
    ("factor_ema_decay", 1.0),
    ("factor_ema_decay", -0.1),
    ("kl_clip", 0),
    ("kl_clip", -1.0),
    ("kl_clip", float("nan")),
    ("kl_clip", "small"),
    ("fisher_samples", 0),
    ("fisher_samples", 1.5),
    ("likelihood", 3),
    ("max_factor_size", 0),
    ("max_factor_size", 1.5),
    ("memory_limit", 0),
    ("memory_limit", "all"),
    ("product_dtype", "float16"),
    ("fisher", "best"),
    ("fisher", None),
    ("fallback", "adam"),
    ("fallback", keras.layers.Dense(1)),
]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_bad_argument_is_refused_by_name_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}=") as error:
        KFAC(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["learning_rate", "damping", "momentum"])
def test_misspelt_adaptive_is_told_the_right_word(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be 'adaptive'.*={'adaptiv'!r}$"):
        KFAC(**{name: "adaptiv"})


@pytest.mark.parametrize(("inverse", "factor"), [(4, 4), (20, 10), (50, 10)])
def test_factors_are_updated_as_often_as_inverses_or_every_ten_steps(inverse, factor) -> None:
    assert KFAC(inverse_update_period=inverse).factor_update_period == factor


def test_inverses_more_often_than_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wasted work.*Received: inverse_update_period=4,"):
        KFAC(factor_update_period=5, inverse_update_period=4)


def test_int_is_a_learning_rate() -> None:
    assert float(KFAC(learning_rate=1).learning_rate) == 1.0


SETTERS: dict[str, Callable[[KFAC], Any]] = {
    "damping": lambda optimizer: setattr(optimizer, "damping", -1.0),
    "periods": lambda optimizer: optimizer.set_update_periods(0, 1),
    "order_of_periods": lambda optimizer: optimizer.set_update_periods(3, 2),
}


@pytest.mark.parametrize("setter", SETTERS.values(), ids=SETTERS.keys())
def test_bad_assignment_is_refused_and_changes_nothing(setter: Callable[[KFAC], Any]) -> None:
    optimizer = KFAC()
    config = optimizer.get_config()
    with pytest.raises(ValueError, match="Received: "):
        setter(optimizer)
    assert optimizer.get_config() == config


@pytest.mark.parametrize("model", [None, "model", keras.layers.Dense(1), lambda x: x])
def test_attaching_to_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a `keras.Model`. Received: model="):
        KFAC().attach(model)


# ---- Models and losses --------------------------------------------------------------------------


def unattached(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    model.fit(x, y, verbose=0)


def attached(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    helpers.fit(model, (x, y))


def without_compute_loss(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    helpers.tape_loop(model, (x, y))


def own_loss_without_compute_loss(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    model.optimizer.attach(model)
    step = helpers.tape_step(
        model, lambda y, outputs: tf.reduce_mean(own_loss(y, outputs)), model.optimizer
    )
    step(tf.constant(x), tf.constant(y))


def both_losses_without_compute_loss(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    model.optimizer.attach(model)
    loss = helpers.crossentropy()
    step = helpers.tape_step(
        model, lambda y, outputs: sum(loss(y, output) for output in outputs), model.optimizer
    )
    step(tf.constant(x), tf.constant(y))


def two_outputs() -> keras.Model:
    inputs = keras.Input((helpers.FEATURES,))
    return keras.Model(inputs, [keras.layers.Dense(helpers.CLASSES)(inputs) for _ in range(2)])


def without_trainable_weights() -> keras.Model:
    model = helpers.mlp()
    model.trainable = False
    return model


def own_loss(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


class NoLoss(keras.Sequential):
    """A training step of its own, compiled without loss."""

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        loss = helpers.tape_step(self, helpers.crossentropy(), self.optimizer)(x, y)
        return {"loss": loss}


def mlp_without_loss() -> keras.Model:
    return helpers.mlp(cls=NoLoss)


def one_hot(y: np.ndarray) -> np.ndarray:
    return np.eye(helpers.CLASSES)[y]


class Case:
    """What is trained how, and what it should say."""

    def __init__(
        self,
        error: type[Exception],
        match: str,
        make: Callable[[], keras.Model] = helpers.mlp,
        train: Callable[..., None] = attached,
        loss: Any = None,
        labels: Callable[[np.ndarray], Any] = np.asarray,
        **kwargs: Any,
    ) -> None:
        self.error, self.match, self.make, self.train = error, match, make, train
        self.loss, self.labels, self.kwargs = loss, labels, kwargs


CASES = {
    "unattached": Case(
        RuntimeError,
        r"callbacks=\[keras_kfac.KFACCallback\(\)\].*attach\(model\)",
        train=unattached,
    ),
    "unknown_loss": Case(
        ValueError,
        "no exact Fisher.*CategoricalCrossentropy.*NegativeLogLikelihood.*empirical.*Received",
        loss="cosine_similarity",
        labels=one_hot,
        fisher="exact",
    ),
    "own_loss": Case(
        ValueError, "MeanSquaredError.*empirical.*Received: loss=", loss=own_loss, fisher="exact"
    ),
    "two_outputs": Case(
        ValueError,
        "which loss belongs to which output.*compute_loss.*Received: a model with 2 outputs",
        make=two_outputs,
        train=both_losses_without_compute_loss,
        loss=["sparse_categorical_crossentropy"] * 2,
    ),
    "empirical_without_compute_loss": Case(
        RuntimeError,
        "compute_loss.*fisher='sampled'",
        train=without_compute_loss,
        fisher="empirical",
    ),
    "unknown_loss_without_compute_loss": Case(
        RuntimeError,
        r"compute_loss.* or use KFAC\(likelihood=...\), as none is known for .*own_loss",
        train=own_loss_without_compute_loss,
        loss=own_loss,
    ),
    "one_hot_labels": Case(ValueError, "shape", labels=one_hot),
    "no_trainable_weights": Case(
        ValueError, "no trainable weights.*Received", make=without_trainable_weights
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_training_is_refused_with_the_remedy(case: Case) -> None:
    model = case.make()
    loss = helpers.crossentropy() if case.loss is None else case.loss
    helpers.compiled(model, helpers.kfac(**case.kwargs), loss)
    before = helpers.weights(model)
    x, y = helpers.vectors()
    with pytest.raises(case.error, match=case.match):
        case.train(model, x, case.labels(y))
    helpers.assert_same(helpers.weights(model), before)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_negative_sample_weights_are_refused(run_eagerly: bool) -> None:
    model = helpers.compiled(helpers.mlp(), run_eagerly=run_eagerly)
    before = helpers.weights(model)
    x, y = helpers.vectors(helpers.BATCH)
    model.optimizer.attach(model)
    weights = np.linspace(-1, 1, helpers.BATCH)
    with pytest.raises(tf.errors.InvalidArgumentError, match="sample weights that are at least 0"):
        model.train_on_batch(x, y, sample_weight=weights)
    helpers.assert_same(helpers.weights(model), before)


def test_negative_sample_weights_are_refused_under_xla() -> None:
    """Nothing can be raised there: the batch is left out, and the callback raises."""
    model = helpers.compiled(helpers.mlp(), jit_compile=True)
    x, y = helpers.vectors(2 * helpers.BATCH)
    weights = np.ones(2 * helpers.BATCH)
    weights[0] = -1
    train = {"batch_size": helpers.BATCH, "shuffle": False, "verbose": 0}
    train["callbacks"] = [KFACCallback()]
    with pytest.raises(ValueError, match=r"at least 0.* Received: .*negative weights: 1$"):
        model.fit(x, y, sample_weight=weights, epochs=3, **train)
    optimizer = helpers.inner(model)
    assert (int(optimizer.iterations), int(optimizer.refused_batches)) == (1, 1)
    assert np.all(np.isfinite(np.concatenate([w.ravel() for w in helpers.weights(model)])))
    with warnings.catch_warnings():  # It is old news after that.
        warnings.simplefilter("error", UserWarning)
        model.fit(x, y, sample_weight=np.ones_like(weights), **train)


def test_sample_weights_of_another_shape_are_refused() -> None:
    """Keras takes `[N, N]` for a loss `[N]`, and sums up all products."""
    model = helpers.compiled(helpers.mlp(), helpers.kfac())
    x, y = helpers.vectors(helpers.BATCH)
    optimizer = helpers.inner(model).attach(model)
    with pytest.raises(ValueError, match=r"must have the shape of the loss.* Received: .*\(8, 8\)"):
        model.train_on_batch(x, y, sample_weight=np.ones([helpers.BATCH, helpers.BATCH]))
    assert int(optimizer.iterations) == 0


def labelled(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Of those entries that are known, one after the other."""
    is_known = tf.math.is_finite(y_true)
    return tf.square(tf.boolean_mask(y_true, is_known) - tf.boolean_mask(y_pred, is_known))


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"likelihood": "mse"}, helpers.ADAPTIVE])
def test_values_of_some_examples_are_refused(kwargs: dict[str, Any], run_eagerly: bool) -> None:
    """In a graph as it runs, where the number is known."""
    model = helpers.compiled(helpers.mlp(), helpers.kfac(**kwargs), labelled)
    model.run_eagerly = run_eagerly
    x, y = helpers.vectors(helpers.BATCH)
    before, targets = helpers.weights(model), np.where(y[:, np.newaxis] == 0, np.nan, one_hot(y))
    error = ValueError if run_eagerly else tf.errors.InvalidArgumentError
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(error, match=r"one for all; leave .* by sample weights. Rec"),
    ):
        helpers.fit(model, (x, targets))
    helpers.assert_same(helpers.weights(model), before)


def of_two_features(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    return tf.square(y_true[:, :2] - y_pred[:, :2])


@pytest.mark.parametrize(
    ("fisher", "weights"),
    [("sampled", None), ("empirical", None), ("empirical", np.ones([helpers.BATCH, 1]))],
    ids=["sampled", "empirical", "weighted"],
)
def test_values_that_are_not_of_positions_are_refused_where_these_matter(fisher, weights) -> None:
    x, y = helpers.vectors(helpers.BATCH)
    model = helpers.compiled(helpers.mlp(), helpers.kfac(fisher=fisher), of_two_features)
    model.run_eagerly = True
    helpers.inner(model).attach(model)
    if fisher == "empirical" and weights is None:
        model.train_on_batch(x, one_hot(y))
        return
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match=r"each position.* Received: .*\(8, 2\) .*\(8, 3\)$"),
    ):
        model.train_on_batch(x, one_hot(y), weights)


@pytest.mark.parametrize("mode", ["graph", "eager", pytest.param("xla", marks=pytest.mark.slow)])
def test_weights_that_are_no_numbers_are_not_taken_for_negative(mode) -> None:
    """The step is left out, as any whose gradients are not finite."""
    model = helpers.compiled(helpers.mlp(), run_eagerly=mode == "eager", jit_compile=mode == "xla")
    before = helpers.weights(model)
    x, y = helpers.vectors(helpers.BATCH)
    optimizer = helpers.inner(model).attach(model)
    model.train_on_batch(x, y, np.full(helpers.BATCH, np.nan))
    helpers.assert_same(helpers.weights(model), before)
    assert (int(optimizer.skipped_steps), int(optimizer.refused_batches)) == (1, 0)


def test_gradients_without_variables_need_a_built_optimizer() -> None:
    """As with any optimizer of Keras."""
    model = helpers.compiled(helpers.mlp())
    optimizer = helpers.inner(model).attach(model)
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables])


def test_negative_loss_weights_are_refused() -> None:
    model = helpers.compiled(helpers.mlp(), helpers.kfac(), loss_weights=-1.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="loss weights and sample weights"):
        helpers.fit(model, helpers.vectors())


def unsampleable(outputs: tf.Tensor) -> Any:
    class Unsampleable(tfp.distributions.Normal):
        def _sample_n(self, n: Any, seed: Any = None) -> Any:
            raise NotImplementedError

    return Unsampleable(outputs[..., 0], 1.0)


def vectors_of(outputs: tf.Tensor) -> Any:
    return tfp.distributions.Normal(outputs, 1.0)


def no_distribution(outputs: tf.Tensor) -> Any:
    return outputs


def constant(outputs: tf.Tensor) -> Any:
    return tfp.distributions.Normal(tf.zeros(tf.shape(outputs)[:1]), 1.0)


LIKELIHOODS: dict[str, tuple[Any, type[Exception], str]] = {
    "not_for_each_position": (
        vectors_of,
        ValueError,
        # From the beginning: Keras adds lines to what is raised in a branch of the step.
        r"^A likelihood must be one distribution for each position.*Independent.*"
        r" Received: outputs of shape \(8, 3\)",
    ),
    "no_distribution": (
        no_distribution,
        ValueError,
        r"^A likelihood must be a function from outputs to a.* Received: one that returns",
    ),
    "constant": (constant, ValueError, r"must depend on the outputs.* Received: .*Normal"),
    "unsampleable": (
        unsampleable,
        ValueError,
        r"needs draws.*'empirical' with numbers as.* Received: .*Unsampleable",
    ),
}


@pytest.mark.parametrize("case", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_likelihoods_that_do_not_fit_are_refused(case: tuple[Any, ...]) -> None:
    likelihood, error, match = case
    model = helpers.compiled(helpers.mlp(), helpers.kfac(likelihood=likelihood))
    before = helpers.weights(model)
    with pytest.raises(error, match=match):
        helpers.fit(model, helpers.vectors())
    helpers.assert_same(helpers.weights(model), before)


def test_targets_that_are_no_draw_are_refused() -> None:
    loss = NegativeLogLikelihood(lambda f: tfp.distributions.Independent(vectors_of(f), 1))
    model = helpers.compiled(helpers.mlp(), loss=loss)
    x, _ = helpers.vectors()
    with pytest.raises(ValueError, match=r"shape of a draw.*Received: targets of shape \(8, 2\)"):
        helpers.fit(model, (x, np.zeros([len(x), 2])))


def test_model_without_loss_is_refused_until_it_is_named() -> None:
    model = mlp_without_loss()
    model.compile(optimizer=helpers.kfac())
    with pytest.raises(ValueError, match=r"attach\(model, loss=...\).*Received"):
        helpers.fit(model, helpers.vectors())
    model.compile(optimizer=helpers.kfac())
    model.optimizer.attach(model, loss=helpers.crossentropy())
    before = helpers.mean_loss(model, helpers.vectors())
    helpers.fit(model, helpers.vectors(), epochs=5)
    assert helpers.mean_loss(model, helpers.vectors()) < before


@pytest.mark.parametrize("loss", ["mae", own_loss, keras.losses.Huber()])
def test_unknown_loss_trains_with_the_empirical_fisher(loss: Any) -> None:
    model = helpers.compiled(helpers.mlp(), helpers.kfac(fisher="empirical"), loss)
    x, y = helpers.vectors()
    y = y if loss is own_loss else one_hot(y)
    losses = helpers.fit(model, (x, y), epochs=5).history["loss"]
    assert losses[-1] < losses[0]
    helpers.assert_all_finite(model)


def test_several_replicas_are_refused() -> None:
    script = """
        import keras, numpy as np, tensorflow as tf
        (cpu,) = tf.config.list_physical_devices("CPU")
        half = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [half, half])
        from keras_kfac import KFAC, KFACCallback
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            model.compile(optimizer=KFAC(), loss="mse")
        try:
            model.fit(np.eye(2), np.ones((2, 1)), verbose=0, callbacks=[KFACCallback()])
        except NotImplementedError as error:
            print("REFUSED", error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    message = "Received: a MirroredStrategy of 2 replicas"
    assert "REFUSED" in result.stdout and message in result.stdout, result.stderr[-2000:]


def compiled_under(strategy: tf.distribute.Strategy) -> keras.Model:
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(optimizer=KFAC(), loss="mse")
    return model


def test_one_mirrored_device_is_refused() -> None:
    model = compiled_under(tf.distribute.MirroredStrategy(["CPU:0"]))
    with pytest.raises(NotImplementedError, match="Received: a MirroredStrategy of 1 replicas"):
        helpers.fit(model, (np.eye(2), np.ones((2, 1))))


def test_one_device_strategy_trains() -> None:
    model = compiled_under(tf.distribute.OneDeviceStrategy("CPU:0"))
    x = np.random.default_rng(0).normal(size=(32, 2))
    losses = helpers.fit(model, (x, x.sum(axis=1)), epochs=5).history["loss"]
    assert losses[-1] < losses[0] / 10


# ---- Data and numbers ---------------------------------------------------------------------------


def poisoned(data: helpers.Data, bad_batches: list[int], value: float = np.nan) -> helpers.Data:
    x, y = data
    x = x.copy()
    for batch in bad_batches:
        x[batch * helpers.BATCH + 3, 1] = value
    return x, y


def without(data: helpers.Data, bad_batches: list[int]) -> helpers.Data:
    kept = [b for i, b in enumerate(helpers.batches(data)) if i not in bad_batches]
    x, y = (np.concatenate(parts) for parts in zip(*kept))
    return x, y


def fit_attached(model: keras.Model, data: helpers.Data) -> None:
    """`fit` without the callback."""
    model.optimizer.attach(model)
    model.fit(*data, batch_size=helpers.BATCH, shuffle=False, verbose=0)


POISONED: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], list[int], float]] = {
    "callback": (helpers.fit, {}, {}, [1], np.nan),
    "attached_only": (fit_attached, {}, {}, [1], np.nan),
    "first_batch": (helpers.fit, {}, {}, [0], np.nan),
    "two_batches": (helpers.fit, {}, {}, [1, 3], np.nan),
    "infinity": (helpers.fit, {}, {}, [2], np.inf),
    "jit_compile": (helpers.fit, {"jit_compile": True}, {"fisher": "exact"}, [1], np.nan),
    "run_eagerly": (helpers.fit, {"run_eagerly": True}, {}, [1], np.nan),
    "empirical": (helpers.fit, {}, {"fisher": "empirical"}, [1], np.nan),
    "weight_decay": (helpers.fit, {}, {"weight_decay": 0.1}, [1], np.nan),
}


@pytest.mark.parametrize("case", POISONED.values(), ids=POISONED.keys())
def test_batch_that_is_not_finite_is_left_out_and_counted(case: tuple[Any, ...]) -> None:
    train, compile_kwargs, kwargs, bad, value = case
    models = [
        helpers.compiled(helpers.mlp(), helpers.kfac(**kwargs), **compile_kwargs) for _ in range(2)
    ]
    data = helpers.vectors(5 * helpers.BATCH)
    train(models[0], without(data, bad))
    with pytest.warns(UserWarning, match=rf"skipped {len(bad)} .*\({len(bad)} in all\)") as caught:
        train(models[1], poisoned(data, bad, value))
    assert len([w for w in caught if "K-FAC skipped" in str(w.message)]) == 1
    assert int(models[1].optimizer.skipped_steps) == len(bad)
    assert int(models[1].optimizer.iterations) == 5 - len(bad)
    helpers.assert_all_finite(models[1])
    helpers.assert_same(helpers.weights(models[1]), helpers.weights(models[0]))
    actual, expected = (helpers.factors(m.optimizer) for m in reversed(models))
    helpers.assert_same(actual, expected)


def test_skipped_steps_are_reported_for_each_epoch_with_the_total() -> None:
    model = helpers.compiled(helpers.mlp())
    data = poisoned(helpers.vectors(), [1])
    with pytest.warns(UserWarning, match="K-FAC skipped") as caught:
        helpers.fit(model, data, epochs=2)
    messages = [str(w.message) for w in caught if "K-FAC skipped" in str(w.message)]
    assert len(messages) == 2 and "(1 in all)" in messages[0] and "(2 in all)" in messages[1]
    helpers.fit(model, helpers.vectors())  # Does not warn again.


@pytest.mark.parametrize("jit_compile", [False, True])
def test_labels_out_of_range_never_reach_the_weights(jit_compile: bool) -> None:
    model = helpers.compiled(helpers.mlp(), jit_compile=jit_compile)
    x, y = helpers.vectors(helpers.BATCH)
    before = helpers.weights(model)
    wrong = np.where(np.arange(helpers.BATCH) == 2, 17, y)
    with warnings.catch_warnings(), contextlib.suppress(tf.errors.InvalidArgumentError):
        warnings.filterwarnings("ignore", "K-FAC skipped 1 ")
        helpers.fit(model, (x, wrong))  # An error, or NaN, depending on the device.
    helpers.assert_same(helpers.weights(model), before)
    helpers.fit(model, (x, y))
    assert int(model.optimizer.iterations) == 1
    helpers.assert_all_finite(model)


def repeated(examples: int) -> helpers.Data:
    """Every batch is one example over and over: its factors have rank one."""
    x, y = helpers.vectors(examples)
    return np.repeat(x[:1], examples, axis=0), np.repeat(y[:1], examples)


@pytest.mark.parametrize("compile_kwargs", [{}, {"jit_compile": True}])
def test_singular_factors_without_damping_are_reported(compile_kwargs: dict[str, Any]) -> None:
    model = helpers.compiled(helpers.mlp(), helpers.kfac(damping=0.0), **compile_kwargs)
    with pytest.warns(UserWarning, match="could not be inverted") as caught:
        helpers.fit(model, repeated(3 * helpers.BATCH))
    assert len([w for w in caught if "could not be inverted" in str(w.message)]) == 1
    assert "hidden" in str(caught[0].message)
    helpers.assert_all_finite(model)


def test_damping_assigned_later_inverts_the_singular_factors() -> None:
    model = helpers.compiled(helpers.mlp(), helpers.kfac(damping=0.0))
    with pytest.warns(UserWarning, match="could not be inverted"):
        helpers.fit(model, repeated(helpers.BATCH))
    before = helpers.inverses(model.optimizer)
    model.optimizer.damping = 0.1
    helpers.fit(model, repeated(helpers.BATCH))
    after = helpers.inverses(model.optimizer)
    assert any((after[name] != before[name]).any() for name in before)
    helpers.assert_all_finite(model)
