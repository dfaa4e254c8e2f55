"""The hooks on the model: what they see, what they leave alone, and when they are refused."""

import copy
import functools
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFACCallback, attachment
from keras_kfac.introspection import pending_passes
from tests import helpers


class BuiltLate(keras.Model):
    """Makes its layers in `build`."""

    def build(self, input_shape: Any) -> None:
        self.hidden, self.logits = helpers.dense_layers()
        self.hidden.build(input_shape)
        self.logits.build((None, 4))

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.logits(self.hidden(x))


class PassesOn(BuiltLate):
    """`call` names no `training`, but would take it."""

    def call(self, x: tf.Tensor, **kwargs: Any) -> tf.Tensor:
        return super().call(x, **kwargs)


class Subclassed(keras.Model):
    """Layers made in `__init__`; `call` takes no `training`."""

    def __init__(self, *between: keras.Layer) -> None:
        super().__init__()
        self.hidden, self.logits = helpers.dense_layers()
        self.between = list(between)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x = self.hidden(x)
        for layer in self.between:
            x = layer(x)
        return self.logits(x)


def nested() -> keras.Model:
    keras.utils.set_random_seed(0)
    hidden, logits = helpers.dense_layers()
    inside = keras.Sequential([keras.Input((helpers.FEATURES,)), hidden], name="inside")
    inputs = keras.Input((helpers.FEATURES,))
    return keras.Model(inputs, logits(inside(inputs)))


def shared() -> keras.Model:
    """A layer called twice."""
    hidden, logits = helpers.dense_layers()
    inputs = keras.Input((helpers.FEATURES,))
    return keras.Model(inputs, logits(hidden(inputs) + hidden(-2 * inputs)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "sequential": helpers.mlp,
    "unbuilt": helpers.unbuilt_mlp,
    "built_late": BuiltLate,
    "passes_on": PassesOn,
    "subclassed": Subclassed,
    "nested": nested,
    "shared": shared,
}
KRONECKER = {"hidden": "kronecker", "logits": "kronecker"}


def hook_names(model: keras.Model) -> list[str]:
    return sorted(name for name, value in vars(model).items() if hasattr(value, "attachment"))


def fingerprint(model: keras.Model) -> dict[int, dict[str, Any]]:
    """The instance dictionaries of the model and of all its layers."""
    return {id(layer): dict(vars(layer)) for layer in model._flatten_layers()}


def trained(make: Callable[[], keras.Model], epochs: int = 1, **kwargs: Any) -> keras.Model:
    model = helpers.compiled(make(), helpers.kfac(**kwargs))
    helpers.fit(model, helpers.vectors(), epochs=epochs)
    return model


# ---- Attaching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_attached_model_trains_with_every_layer_covered(make: Callable[[], keras.Model]) -> None:
    model = helpers.compiled(make())
    assert model.optimizer.attach(model) is model.optimizer
    losses = helpers.fit(model, helpers.vectors(), epochs=5).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert helpers.blocks(model.optimizer) == KRONECKER
    helpers.assert_all_finite(model)


def test_attaching_again_changes_nothing() -> None:
    model = helpers.compiled(helpers.mlp())
    model.optimizer.attach(model)
    before = fingerprint(model)
    model.optimizer.attach(model)
    assert fingerprint(model) == before


def test_attaching_to_another_model_is_refused_until_detached() -> None:
    model, other = helpers.compiled(helpers.mlp()), helpers.mlp()
    model.optimizer.attach(model)
    with pytest.raises(ValueError, match=r"attached to another model.*detach.*Received: model"):
        model.optimizer.attach(other)
    model.optimizer.detach()
    model.optimizer.attach(other)
    assert hook_names(other) and not hook_names(model)


def test_attaching_after_training_another_model_is_refused() -> None:
    model, other = trained(helpers.mlp), helpers.mlp()
    model.optimizer.detach()
    with pytest.raises(ValueError, match=r"built for other variables.*Received: unknown"):
        model.optimizer.attach(other)


def test_detach_and_attach_again_continues_as_if_nothing_happened() -> None:
    model, expected = trained(helpers.mlp), trained(helpers.mlp)
    model.optimizer.detach()
    model.optimizer.attach(model)
    for m in (model, expected):
        helpers.fit(m, helpers.vectors())
    helpers.assert_same(helpers.weights(model), helpers.weights(expected))


def test_recompiling_replaces_the_hooks() -> None:
    model = trained(helpers.mlp)
    old, new = model.optimizer, helpers.kfac()
    helpers.fit(helpers.compiled(model, new), helpers.vectors())
    with pytest.raises(RuntimeError, match="not attached"):
        old.apply(list(model.trainable_variables))
    assert int(old.iterations) == int(new.iterations) == 3
    new.detach()
    assert hook_names(model) == []


def test_recompiling_with_another_optimizer_and_detaching_leaves_a_plain_model() -> None:
    model = trained(helpers.mlp)
    old = model.optimizer
    helpers.compiled(model, keras.optimizers.SGD(0.1))
    old.detach()
    model.fit(*helpers.vectors(), verbose=0)
    assert hook_names(model) == [] and int(old.iterations) == 3


def test_model_loaded_from_disk_trains(tmp_path: Path) -> None:
    trained(helpers.mlp).save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert hook_names(model) == []
    helpers.fit(model, helpers.vectors())
    assert int(model.optimizer.iterations) == 6


def test_model_without_supported_layer_is_refused_with_the_table() -> None:
    model = keras.Sequential([keras.Input((helpers.FEATURES,)), helpers.Unknown()])
    helpers.compiled(model, loss="mse")
    x, _ = helpers.vectors()
    with pytest.raises(ValueError, match=r"(?s)covers no layer.*fallback.*Unknown"):
        helpers.fit(model, (x, x))


# ---- Frozen, added and special layers -----------------------------------------------------------


def freeze_kernel(layer: keras.Layer) -> None:
    layer.kernel.trainable = False


def freeze_bias(layer: keras.Layer) -> None:
    layer.bias.trainable = False


def freeze_layer(layer: keras.Layer) -> None:
    layer.trainable = False


FREEZE = {"kernel": freeze_kernel, "bias": freeze_bias, "layer": freeze_layer}


@pytest.mark.parametrize("part", FREEZE)
def test_parts_frozen_before_training_stay_and_the_rest_trains(part: str) -> None:
    model = helpers.mlp()
    hidden = model.get_layer("hidden")
    FREEZE[part](hidden)
    before = {id(v): v.numpy() for v in model.weights}
    trainable = {id(v) for v in model.trainable_variables}
    helpers.fit(helpers.compiled(model), helpers.vectors())
    changed = {id(v) for v in model.weights if (v.numpy() != before[id(v)]).any()}
    assert changed == trainable
    expected = "frozen" if part == "layer" else "kronecker"
    assert helpers.blocks(model.optimizer) == {"hidden": expected, "logits": "kronecker"}


@pytest.mark.parametrize("remake", [True, False])
def test_layer_frozen_after_attaching_stays_and_the_rest_trains(remake: bool) -> None:
    model = trained(helpers.mlp)
    model.get_layer("hidden").trainable = False
    if remake:  # Keras keeps the traced function, and what was trainable then, otherwise.
        model.make_train_function(force=True)
    else:
        model.run_eagerly = True
    before = helpers.weights(model)
    helpers.train_on_batches(model, helpers.vectors())
    after = helpers.weights(model)
    helpers.assert_same(after[:2], before[:2])
    helpers.assert_different(after[2:], before[2:])


def test_bias_alone_frozen_after_the_first_step_is_refused() -> None:
    model = trained(helpers.mlp)
    freeze_bias(model.get_layer("hidden"))
    model.make_train_function(force=True)
    with pytest.raises(ValueError, match=r"changed after K-FAC built.*Received: layer 'hidden'"):
        model.train_on_batch(*helpers.vectors(helpers.BATCH))


def unfreeze(model: keras.Model) -> None:
    model.get_layer("hidden").trainable = True


def add_layer(model: keras.Model) -> None:
    model.add(keras.layers.Dense(helpers.CLASSES, name="added"))


@pytest.mark.parametrize("change", [unfreeze, add_layer])
def test_layers_unfrozen_or_added_later_are_refused(
    change: Callable[[keras.Model], None],
) -> None:
    model = helpers.mlp()
    freeze_layer(model.get_layer("hidden"))
    helpers.fit(helpers.compiled(model), helpers.vectors())
    change(model)
    with pytest.raises(ValueError, match=r"built for other variables.*Received: unknown"):
        helpers.fit(model, helpers.vectors())


def test_lora_goes_to_the_fallback_with_a_reason() -> None:
    model = helpers.mlp()
    model.get_layer("hidden").enable_lora(2)
    losses = helpers.fit(helpers.compiled(model), helpers.vectors(), epochs=5).history["loss"]
    assert losses[-1] < losses[0]
    assert helpers.blocks(model.optimizer) == {"hidden": "fallback", "logits": "kronecker"}
    assert "LoRA" in helpers.reasons(model.optimizer)["hidden"]


def test_quantized_layer_says_so_and_the_rest_trains() -> None:
    model = helpers.mlp()
    model.get_layer("hidden").quantize("int8")
    losses = helpers.fit(helpers.compiled(model), helpers.vectors(), epochs=5).history["loss"]
    assert losses[-1] < losses[0]
    assert helpers.blocks(model.optimizer) == {"hidden": "fallback", "logits": "kronecker"}
    assert helpers.reasons(model.optimizer)["hidden"] == "the layer is quantized (int8)"


class Mapped(keras.Layer):
    """Calls a layer of its own inside a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(4, name="looped")

    def build(self, input_shape: Any) -> None:
        self.inner.build(input_shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(lambda row: self.inner(row[tf.newaxis])[0], x)


class Wrapped(Mapped):
    """Calls a layer of its own inside a function of its own."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.function(self.inner)(x)


@pytest.mark.parametrize("cls", [Mapped, Wrapped])
def test_layer_called_inside_a_graph_of_its_own_goes_to_the_fallback(
    cls: type[keras.Layer],
) -> None:
    model = helpers.compiled(Subclassed(cls()))
    before = helpers.fit(model, helpers.vectors()).history["loss"][0]
    assert helpers.fit(model, helpers.vectors(), epochs=4).history["loss"][-1] < before
    assert helpers.blocks(model.optimizer) == {**KRONECKER, "looped": "fallback"}
    assert "out of reach" in helpers.reasons(model.optimizer)["looped"]


def test_layer_that_is_never_called_goes_to_the_fallback_with_a_reason() -> None:
    model = Subclassed()
    model.unused = keras.layers.Dense(2, name="unused")
    model.unused.build((None, 2))
    helpers.compiled(model).optimizer.attach(model)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        helpers.train_on_batches(model, helpers.vectors())
    assert helpers.blocks(model.optimizer) == {**KRONECKER, "unused": "fallback"}
    assert "not called" in helpers.reasons(model.optimizer)["unused"]


def test_coverage_is_a_table_before_and_after_the_first_step() -> None:
    model = helpers.compiled(helpers.mlp_with_batch_normalization())
    freeze_layer(model.get_layer("logits"))
    with pytest.raises(RuntimeError, match="not attached"):
        model.optimizer.coverage()
    model.optimizer.attach(model)
    before = model.optimizer.coverage()
    helpers.fit(model, helpers.vectors())
    after = model.optimizer.coverage()
    assert list(before) == list(after)
    expected = {"hidden": "kronecker", "norm": "full", "unknown": "fallback", "logits": "frozen"}
    assert helpers.blocks(model.optimizer) == expected
    assert [row.weights for row in after] == [24, 8, 4, 0]
    assert after.fraction == 32 / 36
    lines = str(after).splitlines()
    assert lines[0].split() == ["layer", "type", "weights", "block", "reason"]
    assert len(lines) == 6 and lines[-1].startswith("88.9 %")


def test_coverage_of_an_unbuilt_model_is_refused() -> None:
    model = helpers.compiled(helpers.unbuilt_mlp())
    model.optimizer.attach(model)
    with pytest.raises(ValueError, match=r"not built.*Received"):
        model.optimizer.coverage()


# ---- Which forward passes count -----------------------------------------------------------------


class TwoTerms(keras.Sequential):
    """A training step with two forward passes, both scored."""

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = sum(self.compute_loss(s * x, y, self(s * x, training=True)) for s in (1.0, -2.0))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


class OneTermOfTwo(keras.Sequential):
    """A training step with a scored pass, and one that the loss does not see."""

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        self(-2.0 * x, training=True)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        self(3.0 * x, training=True)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}


class TwoTermsWithin(keras.Sequential):
    """The second forward pass of the two is made by `compute_loss`."""

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        other = self(-2.0 * x, training=True)
        return sum(super(TwoTermsWithin, self).compute_loss(x, y, p) for p in (y_pred, other))


@functools.cache
def one_step(cls: type[keras.Sequential], scale: float = 1.0) -> dict[str, np.ndarray]:
    """Factors after one step on a batch."""
    with helpers.precision("float64"):
        model = helpers.compiled(helpers.mlp(cls=cls), helpers.kfac(fisher="exact"))
        x, y = helpers.vectors(helpers.BATCH)
        helpers.fit(model, (scale * x, y))
    return helpers.factors(model.optimizer)


@pytest.mark.parametrize("cls", [TwoTerms, TwoTermsWithin])
def test_factors_of_two_scored_passes_are_those_of_the_sum(cls: type[keras.Sequential]) -> None:
    both, first, second = one_step(cls), *(one_step(keras.Sequential, s) for s in (1.0, -2.0))
    for name, factor in both.items():
        share = 0.5 if name.endswith("input_factor") else 1.0
        expected = share * (first[name] + second[name])
        np.testing.assert_allclose(factor, expected, rtol=1e-10, atol=1e-12)


def test_passes_that_are_not_scored_do_not_count_beside_one_that_is() -> None:
    actual, expected = one_step(OneTermOfTwo), one_step(keras.Sequential)
    helpers.assert_same(actual, expected, rtol=1e-10, atol=1e-12)


def attached(model: keras.Model) -> tuple[keras.Model, tf.Tensor, tf.Tensor]:
    """In the midst of training by a custom loop, and a batch."""
    optimizer = helpers.kfac(fisher="exact", learning_rate=0.0, momentum=0.0, factor_ema_decay=0.0)
    optimizer.attach(helpers.compiled(model, optimizer))
    x, y = map(tf.constant, helpers.vectors(helpers.BATCH))
    helpers.tape_step(model, model.loss, optimizer)(x, y)
    return model, x, y


def taped_call(model: keras.Model, x: tf.Tensor) -> tf.Tensor:
    """A pass that a gradient may be of."""
    with tf.GradientTape():
        return model(x, training=True)


def test_eager_pass_is_no_term_of_a_traced_step() -> None:
    model, x, y = attached(helpers.mlp())
    expected = helpers.factors(model.optimizer)
    taped_call(model, 100.0 * x)
    tf.function(helpers.tape_step(model, model.loss, model.optimizer))(x, y)
    helpers.assert_same(helpers.factors(model.optimizer), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_scored", [False, True])
def test_gradients_of_an_eager_pass_are_not_applied_in_a_graph(is_scored: bool) -> None:
    model, x, y = attached(helpers.mlp())
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        outputs = model(x, training=True)
        loss = model.compute_loss(x, y, outputs) if is_scored else model.loss(y, outputs)
    apply = tf.function(lambda gradients: model.optimizer.apply(gradients, variables))
    with pytest.raises(RuntimeError, match=r"same `tf.function`(?s:.*)Received.*or in none"):
        apply(tape.gradient(loss, variables))


def test_loss_of_an_eager_pass_in_a_graph_is_not_seen() -> None:
    """Nor are its sample weights."""
    model, x, y = attached(helpers.mlp())
    weights = tf.constant(np.eye(len(x))[0])
    with tf.GradientTape() as tape:
        loss = tf.function(model.compute_loss)(x, y, model(x, training=True), weights)
    gradients = tape.gradient(loss, model.trainable_variables)
    with pytest.raises(RuntimeError, match=r"does not call the model.*Received: a model"):
        model.optimizer.apply(gradients, model.trainable_variables)


def test_eager_pass_stays_while_something_else_is_traced() -> None:
    model, x, y = attached(helpers.mlp())
    expected = helpers.factors(model.optimizer)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    tf.function(lambda: model.compute_loss(x, y, taped_call(model, 100.0 * x)))()
    model.optimizer.apply(tape.gradient(loss, model.trainable_variables))
    helpers.assert_same(helpers.factors(model.optimizer), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("graph", [False, True])
def test_what_no_tape_records_is_no_term(graph: bool) -> None:
    """Validation in the midst of a step, by a model whose `call` is not told of it."""
    model, x, y = attached(Subclassed())
    expected = helpers.factors(model.optimizer)

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
        model.compute_loss(x, y, model(100.0 * x))
        model(100.0 * x)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)

    (tf.function(step) if graph else step)()
    helpers.assert_same(helpers.factors(model.optimizer), expected, rtol=1e-5, atol=1e-7)


MANY = 18


def step_of_many(model: keras.Model, x: tf.Tensor, loss: Callable[..., tf.Tensor] | None) -> None:
    """The loss of each forward pass follows that, if it is the model's, or all come last."""
    score = functools.partial(model.compute_loss, x) if loss is None else loss
    y = tf.zeros(len(x), "int32")
    with tf.GradientTape() as tape:
        outputs = (model(x, training=True) for _ in range(MANY))
        outputs = outputs if loss is None else list(outputs)
        total = sum(score(y, each) for each in outputs)
    model.optimizer.apply(tape.gradient(total, model.trainable_variables))


def test_every_scored_pass_counts_however_many() -> None:
    model, x, _ = attached(helpers.mlp())
    expected = helpers.factors(model.optimizer)
    expected = {k: v * (MANY if k.endswith("output_factor") else 1) for k, v in expected.items()}
    step_of_many(model, x, None)
    helpers.assert_same(helpers.factors(model.optimizer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_scored", [False, True])
def test_step_of_more_passes_than_are_kept_is_refused(is_scored: bool) -> None:
    model, x, _ = attached(helpers.mlp())
    loss = functools.partial(model.compute_loss, x) if is_scored else model.loss
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match=rf"compute_loss.*Received: {MANY} forward passes"),
    ):
        step_of_many(model, x, loss)


def test_step_of_more_scored_passes_than_are_kept_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a warm-up under another optimizer, whose passes would pile up."""
    monkeypatch.setattr(pending_passes, "_MOST_SCORED", MANY - 2)
    model, x, _ = attached(helpers.mlp())
    with pytest.raises(RuntimeError, match=rf"warm-up.*detach.*Received: {MANY} forward passes"):
        step_of_many(model, x, None)


def test_passes_that_no_step_is_after_may_be_many() -> None:
    model, x, y = attached(helpers.mlp())
    expected = helpers.factors(model.optimizer)
    for _ in range(MANY):
        taped_call(model, 100.0 * x)
    helpers.tape_step(model, None, model.optimizer)(x, y)
    helpers.assert_same(helpers.factors(model.optimizer), expected, rtol=1e-5, atol=1e-7)


def test_step_without_forward_pass_is_refused() -> None:
    model = helpers.compiled(helpers.mlp())
    model.optimizer.attach(model)
    gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(RuntimeError, match=r"no forward pass.*Received"):
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables))


# ---- A loss that is named -----------------------------------------------------------------------


class Weighs(keras.Sequential):
    """Losses of its own, of the output."""

    losses_of_output = (3.0,)

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        return sum(w * helpers.crossentropy()(y, y_pred) for w in self.losses_of_output)


class WeighsTwice(Weighs):
    losses_of_output = (1.0, 2.0)


def factors_by_name(cls: type[keras.Sequential], train: Callable[..., None], **kwargs: Any) -> Any:
    """After a step, of a loss that is named while another may be compiled."""
    model = helpers.mlp(cls=cls)
    optimizer = helpers.kfac(fisher="exact")
    model.compile(optimizer, run_eagerly=True, **kwargs)
    optimizer.attach(model, loss=helpers.crossentropy())
    train(model, helpers.vectors(helpers.BATCH))
    return helpers.named(optimizer, "output_factor")


def test_loss_that_is_named_counts_what_that_of_the_model_does() -> None:
    """Its loss weight, or what it is multiplied by in `compute_loss`."""
    loss = helpers.crossentropy()
    expected = factors_by_name(keras.Sequential, helpers.train_on_batches, loss=loss)
    weighted = {"loss": loss, "loss_weights": 3.0}
    for found in (
        factors_by_name(keras.Sequential, helpers.train_on_batches, **weighted),
        factors_by_name(keras.Sequential, helpers.tape_loop, **weighted),
        factors_by_name(Weighs, helpers.train_on_batches),
    ):
        helpers.assert_same(found, {k: 3 * v for k, v in expected.items()}, rtol=1e-5, atol=1e-7)


class Reduces(keras.Sequential):
    """A loss that K-FAC does not know, reduced by itself or not."""

    class Loss(keras.losses.Loss):
        def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
            return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    reduction = "sum"

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        return tf.reduce_sum(self.Loss(reduction=self.reduction)(y, y_pred)) / len(y)


class LeavesUnreduced(Reduces):
    reduction = "none"


class LeavesUnreducedByNone(Reduces):
    reduction = None  # Keras's other name for it.


class Averages(Reduces):
    """Its loss has one value, which no reduction changes."""

    class Loss(Reduces.Loss):
        def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
            return tf.reduce_mean(super().call(y_true, y_pred))

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        return self.Loss(reduction=self.reduction)(y, y_pred)


class AveragesUnreduced(Averages):
    reduction = "none"


class LeavesOneValue(LeavesUnreduced):
    class Loss(Reduces.Loss):
        def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
            return super().call(y_true, y_pred)[:, tf.newaxis]


REDUCING = [Reduces, LeavesUnreduced, LeavesUnreducedByNone, Averages, AveragesUnreduced]


@pytest.mark.parametrize("cls", REDUCING)
def test_loss_that_is_named_is_reduced_as_that_of_the_model(cls: type[keras.Sequential]) -> None:
    loss = helpers.crossentropy()
    expected = factors_by_name(keras.Sequential, helpers.train_on_batches, loss=loss)
    found = factors_by_name(cls, helpers.train_on_batches)
    helpers.assert_same(found, expected, rtol=1e-5, atol=1e-7)


def test_loss_that_is_named_has_the_values_of_that_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"must have values of the shape.*Received: values of"):
        factors_by_name(LeavesOneValue, helpers.train_on_batches)


def test_one_name_for_several_losses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names one loss.* Received: losses \['sparse.*sparse"):
        factors_by_name(WeighsTwice, helpers.train_on_batches)


# ---- Two models, two optimizers -----------------------------------------------------------------


def gan() -> tuple[keras.Model, keras.Model, keras.Model]:
    """Generator, discriminator, and the one after the other."""
    keras.utils.set_random_seed(0)
    generator = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="generate")])
    discriminator = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(4, activation="tanh", name="see"),
            keras.layers.Dense(1, name="judge"),
        ]
    )
    return generator, discriminator, keras.Sequential([generator, discriminator])


def test_gan_trains_alternately_with_two_optimizers_in_one_function() -> None:
    generator, discriminator, both = gan()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    d_opt, g_opt = helpers.kfac(momentum=0.0), helpers.kfac(momentum=0.0)
    d_opt.attach(discriminator, loss=loss)
    g_opt.attach(both, loss=loss, variables=generator.trainable_variables)
    ones, zeros = tf.ones((helpers.BATCH, 1)), tf.zeros((helpers.BATCH, 1))

    @tf.function
    def step(real: tf.Tensor, noise: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        fake = generator(noise)
        with tf.GradientTape() as tape:
            scores = discriminator(tf.concat([real, fake], 0), training=True)
            d_loss = loss(tf.concat([ones, zeros], 0), scores)
        variables = discriminator.trainable_variables
        d_opt.apply_gradients(zip(tape.gradient(d_loss, variables), variables))
        with tf.GradientTape() as tape:
            g_loss = loss(ones, both(noise, training=True))
        variables = generator.trainable_variables
        g_opt.apply_gradients(zip(tape.gradient(g_loss, variables), variables))
        return d_loss, g_loss

    rng = np.random.default_rng(0)
    real = tf.constant(rng.normal(3.0, 0.1, size=(helpers.BATCH, 2)), tf.float32)
    noise = tf.constant(rng.normal(size=(helpers.BATCH, 3)), tf.float32)
    for still, moving, optimizer in (
        (discriminator, generator, d_opt),
        (generator, discriminator, g_opt),
    ):
        optimizer.learning_rate = 0.0
        before = helpers.weights(still), helpers.weights(moving)
        for _ in range(5):
            assert np.all(np.isfinite(step(real, noise)))
        helpers.assert_same(helpers.weights(still), before[0])
        helpers.assert_different(helpers.weights(moving), before[1])
        optimizer.learning_rate = 0.1
    assert helpers.blocks(d_opt) == {"see": "kronecker", "judge": "kronecker"}
    expected = {"generate": "kronecker", "see": "frozen", "judge": "frozen"}
    assert helpers.blocks(g_opt) == expected
    assert int(d_opt.iterations) == int(g_opt.iterations) == 10


# ---- What the hooks leave alone -----------------------------------------------------------------


def archive(model: keras.Model, directory: Path) -> dict[str, bytes]:
    """The config in a saved file."""
    model.save(directory / "model.keras")
    with zipfile.ZipFile(directory / "model.keras") as file:
        return {"config.json": file.read("config.json")}


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_hooks_leave_every_instance_dictionary_as_it_was(
    make: Callable[[], keras.Model], run_eagerly: bool
) -> None:
    model = helpers.compiled(make(), run_eagerly=run_eagerly)
    model.predict(helpers.vectors()[0], verbose=0)
    before = fingerprint(model)
    model.optimizer.attach(model)
    hooks = hook_names(model)
    attached = fingerprint(model)
    for name in hooks:
        del attached[id(model)][name]
    assert hooks and attached == before
    model.optimizer.detach()
    assert fingerprint(model) == before


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_training_leaves_nothing_of_the_hooks_on_the_layers(
    make: Callable[[], keras.Model], run_eagerly: bool
) -> None:
    model = helpers.compiled(make(), run_eagerly=run_eagerly)
    model.predict(helpers.vectors()[0], verbose=0)
    layers = model._flatten_layers(include_self=False)
    before = {id(layer): (set(vars(layer)), getattr(layer, "activation", None)) for layer in layers}
    model.optimizer.attach(model)
    model.train_on_batch(*helpers.vectors())
    for layer in model._flatten_layers(include_self=False):
        assert (set(vars(layer)), getattr(layer, "activation", None)) == before[id(layer)]
    model.optimizer.detach()
    assert hook_names(model) == []


def test_hooks_change_neither_config_nor_weights_nor_file_nor_results(tmp_path: Path) -> None:
    model = helpers.compiled(helpers.mlp())
    x, y = helpers.vectors()

    def facts() -> tuple[Any, ...]:
        results = model.predict(x, verbose=0), np.array(model.evaluate(x, y, verbose=0))
        file = archive(model, tmp_path)
        return (model.get_config(), model.to_json(), len(model.weights), file), results

    facts_before, results_before = facts()
    model.optimizer.attach(model)
    facts_attached, results_attached = facts()
    assert facts_attached == facts_before
    helpers.assert_same(results_attached, results_before)


COPIES: dict[str, Callable[[keras.Model], keras.Model]] = {
    "clone_model": keras.models.clone_model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("make", [helpers.mlp, nested])
def test_attached_model_can_be_copied_and_the_copy_has_no_hooks(
    make: Callable[[], keras.Model], copied: Callable[[keras.Model], keras.Model]
) -> None:
    model = trained(make)
    other = copied(model)
    assert hook_names(other) == []
    other.set_weights(model.get_weights())
    x, _ = helpers.vectors()
    helpers.assert_same(other.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)
    before = helpers.weights(model)
    helpers.fit(helpers.compiled(other), helpers.vectors())
    helpers.assert_same(helpers.weights(model), before)
    assert hook_names(model)


def test_summary_of_an_attached_model_is_that_of_the_model() -> None:
    model, lines = helpers.compiled(helpers.mlp()), ([], [])
    model.summary(print_fn=lambda line, **_: lines[0].append(line))
    model.optimizer.attach(model)
    model.summary(print_fn=lambda line, **_: lines[1].append(line))
    assert lines[0] and lines[1] == lines[0]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass that is recorded."""
    passes: list[int] = []
    original = attachment.recorded_pass

    def counted(*args: Any) -> Any:
        passes.append(1)
        return original(*args)

    monkeypatch.setattr(attachment, "recorded_pass", counted)
    return passes


INFERENCE: dict[str, Callable[[keras.Model, np.ndarray, np.ndarray], Any]] = {
    "evaluate": lambda model, x, y: model.evaluate(x, y, verbose=0),
    "predict": lambda model, x, y: model.predict(x, verbose=0),
    "test_on_batch": lambda model, x, y: model.test_on_batch(x, y),
    "predict_on_batch": lambda model, x, y: model.predict_on_batch(x),
}


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("make", [helpers.mlp, BuiltLate, Subclassed])
@pytest.mark.parametrize("infer", INFERENCE.values(), ids=INFERENCE.keys())
def test_inference_records_nothing(
    infer: Callable[..., Any],
    make: Callable[[], keras.Model],
    run_eagerly: bool,
    recorded: list[int],
) -> None:
    model = helpers.compiled(make(), run_eagerly=run_eagerly)
    model.optimizer.attach(model)
    data = helpers.vectors(helpers.BATCH)
    infer(model, *data)
    assert recorded == []
    model.train_on_batch(*data)
    assert recorded
    recorded.clear()
    infer(model, *data)
    assert recorded == []


@pytest.mark.parametrize("make", [helpers.mlp, Subclassed])
def test_validation_in_fit_records_nothing(
    make: Callable[[], keras.Model], recorded: list[int]
) -> None:
    model = helpers.compiled(make(), run_eagerly=True)
    model.predict(helpers.vectors()[0], verbose=0)  # Builds the model.
    helpers.fit(model, helpers.vectors(), epochs=2, validation_data=helpers.vectors())
    assert len(recorded) == int(model.optimizer.iterations) == 6


def test_direct_call_for_inference_records_nothing(recorded: list[int]) -> None:
    model = helpers.compiled(helpers.mlp())
    model.optimizer.attach(model)
    helpers.compiled(model).optimizer.attach(model)  # With the hooks of the other on.
    x, _ = helpers.vectors(helpers.BATCH)
    model(x)
    model(x, training=False)
    model(keras.Input((helpers.FEATURES,)), training=True)
    model(x, training=True)  # Under no tape.
    with tf.GradientTape() as tape, tape.stop_recording():
        model(x, training=True)
    assert recorded == []
    with tf.GradientTape():
        model(x, training=True)
    assert recorded == [1]


class Fails(keras.Layer):
    """Raises in a call, when told to."""

    fails = False

    def call(self, x: tf.Tensor) -> tf.Tensor:
        if self.fails:
            raise ArithmeticError("told to")
        return x


def failing_activation(x: tf.Tensor) -> tf.Tensor:
    if Fails.fails:
        raise ArithmeticError("told to")
    return x


@pytest.mark.parametrize("where", ["layer", "activation"])
def test_exception_in_a_forward_pass_leaves_the_layers_as_they_were(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    activation = failing_activation if where == "activation" else None
    between = [keras.layers.Dense(4, activation=activation, name="between"), Fails()]
    model = helpers.compiled(helpers.mlp(*between), run_eagerly=True)
    model.optimizer.attach(model)
    data = helpers.vectors(helpers.BATCH)
    model.train_on_batch(*data)
    config = [layer.get_config() for layer in model.layers]
    before = fingerprint(model)
    monkeypatch.setattr(Fails, "fails", True)
    with pytest.raises(ArithmeticError, match="told to"):
        model.train_on_batch(*data)
    assert fingerprint(model) == before
    assert [layer.get_config() for layer in model.layers] == config
    monkeypatch.setattr(Fails, "fails", False)
    model.train_on_batch(*data)
    assert int(model.optimizer.iterations) == 2


def test_callback_refuses_a_model_with_another_optimizer() -> None:
    model = helpers.compiled(helpers.mlp(), keras.optimizers.SGD())
    with pytest.raises(ValueError, match=r"callback needs a model compiled.*Received: optimizer"):
        model.fit(*helpers.vectors(), verbose=0, callbacks=[KFACCallback()])


def test_callback_logs_damping_clip_and_skipped_steps() -> None:
    model = helpers.compiled(helpers.mlp(), helpers.kfac(kl_clip=1e-6))
    logs = helpers.fit(model, helpers.vectors(), epochs=2).history
    assert logs["damping"] == pytest.approx([0.1, 0.1]) and logs["skipped_steps"] == [0, 0]
    assert all(0 < scale < 0.5 for scale in logs["kl_clip_scale"])


def test_layer_without_gradient_leaves_the_steps_of_the_others():
    """Called, but not part of the loss: its gradient is `None`, its group of layers is empty."""

    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)
            self.unused = keras.layers.Dense(4)

        def call(self, x):
            hidden = self.first(x)
            self.unused(hidden)
            return self.last(hidden)

    model = helpers.compiled(Unused(), helpers.kfac(**helpers.ADAPTIVE))
    x, y = helpers.vectors()
    model(x)
    before = [variable.numpy() for variable in model.unused.variables]
    first = model.first.kernel.numpy()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        helpers.fit(model, (x, y))
    helpers.assert_same([variable.numpy() for variable in model.unused.variables], before)
    assert not np.array_equal(model.first.kernel.numpy(), first)
    assert np.isfinite(float(model.optimizer.learning_rate))
