"""Models of several outputs: their losses add up, and so do their Fisher matrices."""

import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac import KFAC, NegativeLogLikelihood
from keras_kfac.introspection import forward_pass, registry, statistics
from keras_kfac.introspection.losses import Score, understood
from tests import helpers
from tests.cases import LOSS, factors, mlp
from tests.reference import assert_close, kron

layers = keras.layers
RNG = np.random.default_rng(0)


def learned_scale(outputs):
    mean, log_scale = tf.unstack(outputs, axis=-1)
    return tfp.distributions.Normal(mean, tf.exp(log_scale))


LOSSES = {
    "classes": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "numbers": lambda: "mse",
    "scale": lambda: NegativeLogLikelihood(learned_scale),
}
WIDTHS = {"classes": 3, "numbers": 2, "scale": 2}


def network(names, as_dict=False):
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    h = layers.Dense(5, "tanh", bias_initializer="random_normal", name="trunk")(x)
    outputs = {name: layers.Dense(WIDTHS[name], name=name)(h) for name in names}
    return keras.Model(x, outputs if as_dict else list(outputs.values()))


def targets(names, examples):
    y = {
        "classes": RNG.integers(0, 3, examples),
        "numbers": RNG.normal(size=(examples, 2)),
        "scale": RNG.normal(size=examples),
    }
    return {name: y[name] for name in names}


def in_form(values, form):
    return values if form == "dict" else list(values.values())


def ggn(model, x, y, sample_weight, layer):
    """Of the total loss as Keras computes it: Jacobian and Hessian of each output by itself."""
    with tf.GradientTape(persistent=True) as tape:
        outputs = tf.nest.flatten(model(x, training=True))
    total = 0
    for index, output in enumerate(outputs):
        size = int(np.prod(output.shape))
        jacobian = tape.jacobian(output, [v.value for v in layer.weights])
        if any(j is None for j in jacobian):
            continue
        jacobian = np.concatenate([np.reshape(j, [size, -1]) for j in jacobian], axis=1)
        with tf.GradientTape() as outer:
            outer.watch(output)
            with tf.GradientTape() as inner:
                inner.watch(output)
                parts = [*outputs[:index], output, *outputs[index + 1 :]]
                packed = tf.nest.pack_sequence_as(model.output, parts)
                value = model.compute_loss(x, y, packed, sample_weight)
            gradient = inner.gradient(value, output)
        hessian = np.reshape(outer.jacobian(gradient, output), [size, size])
        total = total + jacobian.T @ hessian @ jacobian
    return total


@pytest.mark.parametrize(
    ("form", "loss_weights", "weighted"),
    [("dict", False, False), ("dict", True, True), ("list", True, True)],
)
def test_exact_factors_of_one_example_equal_the_ggn(form, loss_weights, weighted):
    """Identity 5, for losses whose Hessian is their Fisher matrix."""
    names = ["classes", "numbers"]
    with helpers.precision("float64"):
        model = network(names, as_dict=form == "dict")
        weights = {"classes": 0.3, "numbers": 2.0}
        optimizer = helpers.kfac(fisher="exact", learning_rate=0.0)
        model.compile(
            optimizer,
            in_form({name: LOSSES[name]() for name in names}, form),
            loss_weights=in_form(weights, form) if loss_weights else None,
        )
        x, y = RNG.normal(size=(1, 4)), in_form(targets(names, 1), form)
        each = in_form({"classes": np.array([0.5]), "numbers": np.array([3.0])}, form)
        sample_weight = each if weighted else None
        optimizer.attach(model)
        model.train_on_batch(x, y, sample_weight=sample_weight)
        blocks = {row.layer: i for i, row in enumerate(optimizer.coverage())}
        for name in ("trunk", *names):
            prefix = f"block.{blocks[name]}."
            a, g = (
                optimizer.model_variables[f"{prefix}{side}_factor"] for side in ("input", "output")
            )
            expected = ggn(model, tf.constant(x), y, sample_weight, model.get_layer(name))
            assert_close(kron(a, g), expected)


# ---- Gradients of the training targets ----------------------------------------------------------


def two_numbers(softmax=False):
    """A trunk, its two outputs, and a loss of each with its weight."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4,), dtype="float64")
    options = {"bias_initializer": "random_normal", "dtype": "float64"}
    h = layers.Dense(3, "tanh", name="trunk", **options)(x)
    classes = layers.Dense(2, "softmax" if softmax else None, **options)(h)
    model = keras.Model(x, [classes, layers.Dense(3, **options)(h)])
    crossentropy = keras.losses.CategoricalCrossentropy(from_logits=not softmax, dtype="float64")
    return model, [(crossentropy, 1.0), (keras.losses.MeanSquaredError(dtype="float64"), 4.0)]


def trunk_factors(model, x, losses, y, seed=0):
    trunk = model.get_layer("trunk")
    (adapter,) = registry.adapt(trunk, lambda v: True)
    with forward_pass.recording([trunk]) as recorded:
        outputs = model(x, training=True)
    recorded.terms = [
        understood(Score(loss, outputs[i], tf.constant(y[i]), None, weight), i)
        for i, (loss, weight) in losses.items()
    ]
    options = (statistics.Fisher.EMPIRICAL, tf.constant([seed, 0]), tf.float64)
    return statistics.collect([recorded], [adapter], *options).layers[id(adapter)]


@pytest.mark.parametrize("softmax", [False, True])
def test_empirical_matrices_of_outputs_add_up_on_average(softmax):
    """Of one example, over all patterns of signs: exactly."""
    model, losses = two_numbers(softmax)
    x, y = RNG.normal(size=(1, 4)), [np.eye(2)[:1], RNG.normal(size=(1, 3))]
    alone = [trunk_factors(model, x, {i: own}, y)[1] for i, own in enumerate(losses)]
    patterns = {}
    for seed in range(12):
        _, g = trunk_factors(model, x, dict(enumerate(losses)), y, seed)
        patterns.setdefault(round(float(tf.reduce_sum(g)), 9), g)
    plus, minus = patterns.values()
    assert_close((plus + minus) / 2, alone[0] + alone[1])
    assert np.abs(plus - minus).max() > 0.1 * np.abs(plus).max()


def test_empirical_signs_are_of_each_example():
    """What is left of the products between outputs falls as the root of the examples."""
    model, losses = two_numbers()
    x, copies = RNG.normal(size=(1, 4)), 2000
    y = [np.eye(2)[:1], RNG.normal(size=(1, 3))]
    alone = [trunk_factors(model, x, {i: own}, y)[1] for i, own in enumerate(losses)]
    x, y = np.tile(x, (copies, 1)), [np.tile(own, (copies, 1)) for own in y]
    _, g = trunk_factors(model, x, dict(enumerate(losses)), y)
    expected = (alone[0] + alone[1]).numpy()
    # Twice the product of the gradients is at most the sum of their squares.
    assert 0 < np.abs(g - expected).max() < 5 / np.sqrt(copies) * np.trace(expected)


# ---- Outputs of one number for each example, without an axis of features ------------------------


def without_axis(model):
    """The same numbers, as a vector."""
    return keras.Sequential([*model.layers, layers.Reshape((), dtype="float64")])


@pytest.mark.parametrize("fisher", ["exact", "sampled", "curvature_propagation", "empirical"])
@pytest.mark.parametrize("name", ["mse", "bce-logits"])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_a_vector_of_outputs_is_a_column(name, fisher, reduction):
    x = RNG.normal(size=(6, 4))
    y = RNG.integers(0, 2, (6, 1)).astype(float)
    model = mlp((4, 3, 1))
    flat = without_axis(model)
    flat.build((None, 4))
    loss = LOSS[name].make(reduction)
    # Keras averages a vector of outputs in the loss, whatever the reduction.
    expected = factors(model, LOSS[name].make(), x, y, fisher)
    for (a, g), (b, h) in zip(factors(flat, loss, x, y[:, 0], fisher), expected):
        assert_close(a, b)
        assert_close(g, h)


def test_a_vector_of_outputs_learns():
    keras.utils.set_random_seed(0)
    body = [layers.Dense(8, "tanh"), layers.Dense(1), layers.Reshape(())]
    model = helpers.compiled(keras.Sequential([keras.Input((4,)), *body]), KFAC(), "mse")
    x = RNG.normal(size=(128, 4))
    history = helpers.fit(model, (x, x[:, 0]), epochs=10, batch_size=32).history["loss"]
    assert history[-1] < 0.2 * history[0]
    assert not model.optimizer.coverage().empirical_losses


def test_a_vector_of_outputs_is_no_distribution_over_classes():
    model = helpers.compiled(
        without_axis(mlp((4, 3, 1))), KFAC(), keras.losses.CategoricalCrossentropy()
    )
    with pytest.raises(ValueError, match=r"shape \(batch, ..., features\)"):
        helpers.fit(model, (RNG.normal(size=(8, 4)), np.ones(8)))


@pytest.mark.parametrize(
    ("fisher", "jit_compile"),
    [
        ("sampled", False),
        pytest.param("exact", False, marks=pytest.mark.slow),
        pytest.param("empirical", False, marks=pytest.mark.slow),
        pytest.param("sampled", True, marks=pytest.mark.slow),
    ],
)
def test_learns(fisher, jit_compile):
    names = ["classes", "numbers", "scale"]
    model = network(names, as_dict=True)
    loss = {name: LOSSES[name]() for name in names}
    model.compile(KFAC(fisher=fisher), loss, jit_compile=jit_compile)
    x = RNG.normal(size=(128, 4))
    y = {
        "classes": np.argmax(x[:, :3], axis=1),
        "numbers": x[:, :2] * 2,
        "scale": x[:, 3] * 0.1,
    }
    history = helpers.fit(model, (x, y), epochs=10, batch_size=32).history["loss"]
    assert history[-1] < history[0] - 1
    assert model.optimizer.coverage().fraction == 1


@pytest.mark.filterwarnings("ignore:Exception encountered", "ignore:Gradients do not exist")
def test_an_output_without_loss_has_no_part():
    """It is called, trained by nothing, and its gradient is `None`."""
    model = network(["classes", "numbers"], as_dict=True)
    model.compile(KFAC(), {"classes": LOSSES["classes"]()})
    x = RNG.normal(size=(64, 4))
    before = model.get_layer("numbers").kernel.numpy()
    history = helpers.fit(model, (x, {"classes": np.argmax(x[:, :3], axis=1)}), epochs=5).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    np.testing.assert_array_equal(model.get_layer("numbers").kernel, before)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_outputs_that_are_no_tensors_have_no_part(run_eagerly):
    x, found = RNG.normal(size=(16, 4)), []
    for others in ({"cache": None, "count": 3, "rate": 0.5}, {}):
        keras.utils.set_random_seed(0)
        model = helpers.WithOthers(lambda x, others=others: others)
        # One that adapts all of itself, and one that looks at the outputs of its pass.
        optimizer = helpers.kfac(**(helpers.ADAPTIVE if run_eagerly else {}))
        helpers.compiled(model, optimizer, {"y": "mse"}, run_eagerly=run_eagerly)
        weights = {"sample_weight": {"y": np.arange(16) % 2}}
        helpers.fit(model, (x, {"y": x[:, :3]}), **weights)
        found.append(helpers.weights(model))
    helpers.assert_same(found[0], found[1])


def test_losses_are_seen_on_this_thread_and_in_training_only():
    from keras_kfac.introspection.observed_losses import observed_losses

    loss, call = keras.losses.MeanSquaredError(), keras.losses.Loss.__call__
    one, two = tf.constant([[1.0]]), tf.constant([[2.0]])
    with observed_losses(), observed_losses() as observed:
        assert keras.losses.Loss.__call__ is not call
        total = 3 * loss(one, two) + loss(two, one)
        ignored = loss(one, one)
    first, second = observed.terms(total).scores
    assert (float(first.weight), float(second.weight)) == (3.0, 1.0)
    assert first.outputs is two and second.outputs is one
    assert float(ignored) == 0
    assert keras.losses.Loss.__call__ is call


@pytest.mark.filterwarnings("always")
def test_loss_of_another_tensor_is_named():
    """Of a part of the outputs: its gradient counts, its curvature can't."""

    class Sliced(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = keras.losses.MeanSquaredError(name="of_first")
            whole = super().compute_loss(x, y, y_pred, sample_weight)
            return whole + loss(y[:, :1], y_pred[:, :1])

    inputs = keras.Input((4,))
    model = Sliced(inputs, keras.layers.Dense(2)(inputs))
    model.compile(KFAC(), "mse")
    x = RNG.normal(size=(16, 4))
    with pytest.warns(UserWarning, match=r"a tensor that the model does not return.*of_first"):
        helpers.fit(model, (x, x[:, :2]))
    helpers.assert_all_finite(model)


# ---- A total that is made otherwise than of losses of the outputs -------------------------------


class Computes(keras.Model):
    """Computes its loss by a function of the targets and the outputs."""

    total = None

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return type(self).total(y, y_pred)


class Scaled(keras.Model):
    """A training step of its own, whose loss is of another tensor than the output."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, 2.0 * self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return {"loss": loss}


def squares(y, y_pred):
    return keras.ops.mean(keras.losses.mean_squared_error(y, y_pred))


class CalledOtherwise(keras.losses.Loss):
    """Overrides what Keras calls, in which sample weights and the reduction are."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return squares(tf.cast(y_true, y_pred.dtype), y_pred)


class Joint(keras.losses.Loss):
    """Of two outputs at once."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred[0] * y_pred[1]), axis=-1)


SQUARES, JOINT = keras.losses.MeanSquaredError(), Joint()
OF_ONE = {
    "function": lambda y, p: 10 * squares(y["a"], p["a"]),
    "transformed": lambda y, p: SQUARES(y["a"], 2.0 * p["a"]),
    "called_otherwise": lambda y, p: CalledOtherwise()(y["a"], p["a"]),
    "graph_of_its_own": lambda y, p: tf.function(SQUARES)(y["a"], p["a"]),
}
OF_B = {
    "function": lambda y, p: SQUARES(y["a"], p["a"]) + squares(y["b"], p["b"]),
    "transformed": lambda y, p: SQUARES(y["a"], p["a"]) + SQUARES(y["b"], 2.0 * p["b"]),
    "target": lambda y, p: SQUARES(p["b"], p["a"]),
    "joint": lambda y, p: SQUARES(y["a"], p["a"]) + JOINT(y["a"], (p["a"], p["b"])),
    "weight": lambda y, p: SQUARES(y["a"], p["a"], tf.exp(p["b"][:, 0])),
}


def computing(total, names=("a", "b"), **kwargs):
    """A model of some outputs from a trunk."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, name="trunk")(inputs)
    outputs = {name: layers.Dense(2, name=name)(hidden) for name in names}
    own = type("Own", (Computes,), {"total": staticmethod(total)})
    model = own(inputs, outputs)
    optimizer = helpers.kfac(**{"fisher": "exact", "momentum": 0.0, **kwargs})
    model.compile(optimizer.attach(model), dict.fromkeys(names, "mse"))
    return model


def train(model, **kwargs):
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    y = dict.fromkeys(("a", "b"), x[:, :2])
    if kwargs:
        model.compile(model.optimizer, "mse", **kwargs)
    before = helpers.weights(model)
    try:
        model.train_on_batch(x, y)
    except ValueError:
        helpers.assert_same(helpers.weights(model), before)
        raise


def refused(model, received, **kwargs):
    """The warning, too, would be wrong then."""
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(
            ValueError, match=rf"an instance of `keras.losses.Loss`.* Received: {received}"
        ),
    ):
        train(model, **kwargs)


# XLA sees the same graph: once is enough.
WAYS = [(name, {"run_eagerly": eager}) for name in OF_ONE for eager in (False, True)]


@pytest.mark.parametrize(("name", "mode"), [*WAYS, ("function", {"jit_compile": True})])
def test_a_total_without_losses_of_outputs_is_refused(name, mode):
    """The loss that the model is compiled with is none of it."""
    refused(computing(OF_ONE[name], ["a"]), r"model .* with a total of outputs \['a'\]", **mode)


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("name", OF_B)
def test_an_output_with_layers_of_its_own_needs_a_loss(name, run_eagerly):
    received = r"model .* of outputs \['b'\] without one, behind which are layers \['b'\]"
    refused(computing(OF_B[name]), received, run_eagerly=run_eagerly)


def test_adaptive_steps_name_the_remedy_first():
    """Not that the loop should use `compute_loss`: it does."""
    refused(computing(OF_ONE["function"], ["a"], **helpers.ADAPTIVE), r"model .* \['a'\]")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_what_compute_loss_is_called_with_is_the_output(run_eagerly):
    inputs = keras.Input((4,))
    model = Scaled(inputs, layers.Dense(2)(inputs))
    helpers.compiled(model, helpers.kfac(), "mse", run_eagerly=run_eagerly)
    x = RNG.normal(size=(8, 4))
    with pytest.raises(ValueError, match=r"as the model returns it.* Received: .* without any"):
        helpers.fit(model, (x, x[:, :2]))


def two_heads(kind):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, name="trunk")(inputs)
    return kind(inputs, {name: layers.Dense(2, name=name)(hidden) for name in "ab"})


class OneByOne(keras.Model):
    """A training step that computes the loss of each output by itself."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = tf.add_n([self.compute_loss(x, y[name], outputs[name]) for name in outputs])
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return {"loss": loss}


@pytest.mark.parametrize("run_eagerly", [pytest.param(False, marks=pytest.mark.slow), True])
def test_losses_of_outputs_may_be_computed_one_by_one(run_eagerly):
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    y, found = dict.fromkeys(("a", "b"), x[:, :2]), []
    for kind, loss in ((keras.Model, dict.fromkeys(y, "mse")), (OneByOne, "mse")):
        model = two_heads(kind)
        optimizer = helpers.kfac(fisher="exact", **helpers.ADAPTIVE)
        model.compile(optimizer.attach(model), loss, run_eagerly=run_eagerly)
        model.train_on_batch(x, y)
        found.append([*helpers.factors(optimizer).values(), *model.get_weights()])
    helpers.assert_same(*found, rtol=1e-5, atol=1e-7)


class CallsItself(keras.Model):
    """Its total is of those for each output."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, dict):
            return SQUARES(y, y_pred, sample_weight)
        each = [self.compute_loss(x, y[k], y_pred[k], sample_weight) for k in "ab"]
        return 3.0 * each[0] + each[1]


@pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "graph"])
def test_compute_loss_may_call_itself(run_eagerly):
    x, found = np.random.default_rng(0).normal(size=(8, 4)), []
    for kind in (keras.Model, CallsItself):
        model = two_heads(kind)
        optimizer = helpers.kfac(fisher="exact").attach(model)
        losses, weights = dict.fromkeys("ab", "mse"), {"a": 3.0, "b": 1.0}
        model.compile(optimizer, losses, loss_weights=weights, run_eagerly=run_eagerly)
        model.train_on_batch(x, dict.fromkeys("ab", x[:, :2]), np.arange(8.0))
        found.append(helpers.factors(optimizer))
    helpers.assert_same(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stops", [True, False])
def test_targets_that_lead_to_no_trained_layer_are_constants(stops):
    """The model returns them without a gradient, or those of another that is not trained."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, name="trunk")(inputs)
    still = layers.Dense(2, trainable=False)(hidden if stops else inputs)
    still = layers.Lambda(tf.stop_gradient)(still) if stops else still
    outputs = {"a": layers.Dense(2)(hidden), "b": still}
    own = type("Own", (Computes,), {"total": staticmethod(lambda y, p: SQUARES(p["b"], p["a"]))})
    model = own(inputs, outputs)
    model.compile(helpers.kfac().attach(model), {"a": "mse", "b": "mse"}, run_eagerly=True)
    with warnings.catch_warnings(action="error", category=UserWarning):
        train(model)


PENALTIES = {
    "of_an_output_with_loss": (["a"], lambda p: squares(0.0, p["a"]), None),
    "of_layers_with_loss": (["a", "b"], lambda p: squares(0.0, p["b"]), r"Outputs: b$"),
}


@pytest.mark.parametrize(
    ("name", "run_eagerly"),
    [*((name, True) for name in PENALTIES), ("of_layers_with_loss", False)],
)
def test_penalties_count_by_their_gradient_alone(name, run_eagerly):
    """Of an output which has a loss, or none of whose trained layers is without."""
    names, penalty, warning = PENALTIES[name]
    totals = [
        lambda y, p: SQUARES(y["a"], p["a"]),
        lambda y, p: SQUARES(y["a"], p["a"]) + 5 * penalty(p),
    ]
    found, messages = [], []
    for total, eager in zip(totals, (True, run_eagerly)):
        model = computing(total, names)
        for output in names[1:]:
            model.get_layer(output).trainable = False
        before = model.get_layer("trunk").kernel.numpy()
        with warnings.catch_warnings(record=True, action="always") as caught:
            train(model, run_eagerly=eager)
        messages += [str(w.message) for w in caught if "keras.losses.Loss" in str(w.message)]
        step = model.get_layer("trunk").kernel.numpy() - before
        found.append((helpers.factors(model.optimizer), step))
    assert len(messages) == (warning is not None)
    assert all(re.search(warning, message) for message in messages)
    (factors_of_loss, step_of_loss), (factors_of_both, step_of_both) = found
    helpers.assert_same(factors_of_both, factors_of_loss, rtol=1e-5, atol=1e-7)
    assert np.abs(step_of_both - step_of_loss).max() > 0.1 * np.abs(step_of_loss).max()


def output_factors(optimizer):
    return list(helpers.named(optimizer, "output_factor").values())


class Activation(layers.Layer):
    """TensorFlow's softmax or sigmoid, which Keras finds in graphs only."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [tf.nn.softmax, tf.nn.sigmoid], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_what_keras_sees_behind_an_operation(function, fisher):
    """In a graph its cross-entropies are of the logits, without one of the probabilities."""
    is_softmax = function is tf.nn.softmax
    loss = "categorical_crossentropy" if is_softmax else "binary_crossentropy"
    found = []
    for eager in (False, True):
        keras.utils.set_random_seed(0)
        x = keras.Input((4,))
        heads = [layers.Dense(3, name=name)(x) for name in ("classes", "numbers")]
        model = keras.Model(x, [Activation(function)(heads[0]), heads[1]])
        optimizer = helpers.kfac(fisher=fisher, learning_rate=0.0, momentum=0.0)
        model.compile(optimizer.attach(model), [loss, "mse"], run_eagerly=eager)
        inputs = np.random.default_rng(0).normal(size=(16, 4))
        model.train_on_batch(inputs, [np.eye(3)[np.arange(16) % 3], inputs[:, :3]])
        found.append(output_factors(optimizer))
    assert len(found[0]) == 2 and np.trace(found[0][0]) > 0
    for own, other in zip(*found):
        assert_close(own, other, 1e-4)


def test_logits_that_are_probabilities():
    """Keras takes the logits behind them, however they were made, and warns."""
    x, found = RNG.normal(size=(6, 4)), []
    for last in (layers.Softmax(), Activation(tf.nn.softmax)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3), last])
        optimizer = helpers.kfac(fisher="exact", learning_rate=0.0, momentum=0.0)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile(optimizer.attach(model), loss)
        with warnings.catch_warnings(action="ignore"):
            model.train_on_batch(x, np.eye(3)[[0, 1, 2, 0, 1, 2]])
        found.append(output_factors(optimizer))
    assert_close(*(g[0] for g in found), 1e-5)


class OfTwoTargets(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return sum(keras.ops.mean(keras.ops.square(y_true[k] - y_pred), axis=-1) for k in "uv")


@pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "graph"])
def test_targets_of_one_loss_may_be_several(run_eagerly):
    settings = {"fisher": "empirical", **helpers.ADAPTIVE}
    model = computing(lambda y, p: OfTwoTargets()(y, p["a"]), ["a"], **settings)
    model.compile(model.optimizer, run_eagerly=run_eagerly)
    x = RNG.normal(size=(64, 4)).astype("float32")
    before = float(model.train_on_batch(x, {"u": x[:, :2], "v": x[:, 2:]}))
    assert float(model.train_on_batch(x, {"u": x[:, :2], "v": x[:, 2:]})) < before
    assert float(model.optimizer.signal_share) > 0
