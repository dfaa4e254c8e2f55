"""Noisy K-FAC: weights in training are draws from the posterior, and means at all other times."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac import KFAC, KFACCallback, NegativeLogLikelihood, WeightNoise
from keras_kfac.block_normal import draws
from keras_kfac.introspection.data_likelihood import loss_scale
from keras_kfac.math.structure import to_blocks
from keras_kfac.math.update_times import is_due
from tests import helpers
from tests.reference import assert_close, kron

tfd = tfp.distributions
layers = keras.layers
RNG = np.random.default_rng(0)
NOISE, TAU, EXAMPLES = 0.4, 7.0, 24
L1L2, L2 = keras.regularizers.L1L2, keras.regularizers.L2


@pytest.fixture(autouse=True)
def _in_float64(request):
    keras.utils.set_random_seed(0)
    with helpers.precision("float32" if "in_float32" in request.fixturenames else "float64"):
        yield


@pytest.fixture
def in_float32():
    """For tests of what other precisions do."""


def noisy(means):
    """Targets that are the outputs and noise."""
    return tfd.Independent(tfd.Normal(means, tf.constant(NOISE, means.dtype)), 1)


def regularised(layer, *args, l2=0.01, **kwargs):
    """A layer with a prior of all its weights."""
    names = ("kernel_regularizer", "bias_regularizer")
    return layer(*args, **dict.fromkeys(names, L2(l2)), **kwargs)


def mlp(l2=0.01):
    return keras.Sequential(
        [
            keras.Input((helpers.FEATURES,)),
            regularised(layers.Dense, 4, "tanh", l2=l2),
            regularised(layers.Dense, helpers.CLASSES, l2=l2),
        ]
    )


def still(**kwargs):
    """An optimizer that steps nowhere."""
    return helpers.kfac(**{"learning_rate": 0.0, "momentum": 0.0, **kwargs})


def fit(model, *callbacks, optimizer=None, data=None, loss=None, compiled=None, **kwargs):
    """Trains with noise; the callbacks come before it."""
    helpers.compiled(model, optimizer or helpers.kfac(), loss, **(compiled or {}))
    noise = WeightNoise(EXAMPLES)
    options = {"callbacks": [*callbacks, noise], "epochs": 2, **kwargs}
    noise.history = helpers.fit(model, data or helpers.vectors(EXAMPLES), **options).history
    return noise


def normals(noise):
    return noise._noise._normals


# ---- The distribution ---------------------------------------------------------------------------


class Case:
    """A linear regression, in the terms of Keras."""

    def __init__(self, name, loss, scale, shape=(3,), width=1, temperature=1.0, weight=None):
        self.name, self.loss, self.scale, self.shape = name, loss, scale, shape
        self.width, self.temperature, self.weight = width, temperature, weight


def nll():
    return NegativeLogLikelihood(noisy, dtype="float64")


CASES = [
    Case("likelihood", nll, 1.0, width=2),
    Case("loss weight", nll, 3.0, weight=[3.0]),
    Case("mse", lambda: "mse", 2.0, temperature=NOISE**2),
    Case("mse of two", lambda: "mse", 1.0, width=2, temperature=NOISE**2),
    Case("positions", nll, 1 / 5, shape=(5, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_covariance_is_that_of_the_posterior(case):
    """Of Bayesian linear regression. A squared error with `T = σ²` is noise of that variance."""
    x = RNG.normal(size=(EXAMPLES, *case.shape))
    y = RNG.normal(size=(EXAMPLES, *case.shape[:-1], case.width))
    design = np.insert(x.reshape(-1, 3), 3, 1.0, axis=1)
    precision = design.T @ design / NOISE**2 + TAU * np.eye(4)
    l2 = case.scale * TAU * case.temperature / (2 * EXAMPLES)
    model = keras.Sequential(
        [keras.Input(case.shape), regularised(layers.Dense, case.width, l2=l2)]
    )
    model.compile(helpers.kfac(fisher="exact"), case.loss(), loss_weights=case.weight)
    noise = WeightNoise(EXAMPLES, case.temperature)
    helpers.fit(model, (x, y), 2, batch_size=EXAMPLES, callbacks=[noise])
    (normal,) = normals(noise)
    found = normal._replace(mean=tf.zeros_like(normal.precision)).distribution().covariance()
    assert_close(found, np.kron(np.linalg.inv(precision), np.eye(case.width)))
    assert_close(list(noise.prior_precisions.values()), [TAU * case.temperature])


def test_mean_is_that_of_the_posterior():
    """With steps of `α H⁻¹` means have the covariance `α Σ / (2 - α)`, and that of `m` `Σ / m`.

    A chi-squared number of 4 degrees is within 23.5, but for one in 10,000.
    """
    rate, burn_in, steps = 0.5, 20, 320
    x = RNG.normal(size=(EXAMPLES, 3))
    y = 9 * x @ RNG.normal(size=(3, 1)) + 9.0
    design = np.insert(x, 3, 1.0, axis=1)
    precision = design.T @ design / NOISE**2 + TAU * np.eye(4)
    best = np.linalg.solve(precision, design.T @ y / NOISE**2)[:, 0]
    likeliest = np.linalg.lstsq(design, y, rcond=None)[0][:, 0]
    model = keras.Sequential(
        [keras.Input((3,)), regularised(layers.Dense, 1, l2=TAU / (2 * EXAMPLES))]
    )
    optimizer = KFAC(rate, damping=0.0, momentum=0.0, fisher="exact", inverse_update_period=500)
    model.compile(optimizer, nll())
    watch, data = Watch(), (np.tile(x, [steps, 1]), np.tile(y, [steps, 1]))
    helpers.fit(model, data, batch_size=EXAMPLES, callbacks=[watch, WeightNoise(EXAMPLES)])
    means = np.array([np.append(*map(np.ravel, w)) for w in watch.seen[burn_in:]])
    far = np.mean(means, axis=0) - best
    assert far @ precision @ far < 23.5 / len(means)
    assert (likeliest - best) @ precision @ (likeliest - best) > 100 * 23.5 / len(means)
    spread = np.cov(means.T) @ precision
    assert abs(np.trace(spread) / 4 / (rate / (2 - rate)) - 1) < 0.15


class Watch(keras.callbacks.Callback):
    """Notes the weights after each batch."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(helpers.weights(self.model))


def images():
    scale = {"gamma_regularizer": L2(0.02), "beta_regularizer": L2(0.02)}
    return [
        keras.Input((6, 6, 1)),
        regularised(layers.Conv2D, 4, 3, strides=2, name="conv"),
        layers.LayerNormalization(**scale),
        regularised(layers.Conv2D, 4, 2, groups=2, name="groups"),
        layers.Flatten(),
        regularised(layers.Dense, helpers.CLASSES),
    ]


def tokens():
    return [
        keras.Input((5,), dtype="int32"),
        layers.Embedding(7, 4, embeddings_regularizer=L2(0.03)),
        regularised(layers.SimpleRNN, 4, recurrent_regularizer=L2(0.01)),
        regularised(layers.Dense, helpers.CLASSES),
    ]


def model_and_data(name):
    if name == "images":
        return keras.Sequential(images()), helpers.images(EXAMPLES)
    if name == "tokens":
        return keras.Sequential(tokens()), (RNG.integers(0, 7, (EXAMPLES, 5)), helpers.vectors()[1])
    return mlp(), helpers.vectors(EXAMPLES)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("images", {}),
        ("images", {"curvature": "ekfac"}),
        ("tokens", {}),
        ("vectors", {"max_factor_size": 3}),
        ("vectors", {"curvature": "full"}),
        ("vectors", {"curvature": "dense"}),
    ],
    ids=str,
)
def test_blocks(name, options):
    """Covariances are multiples of the exact inverses, `c T / N`, if these are not damped."""
    model, data = model_and_data(name)
    optimizer = helpers.kfac(damping=0.0, exact_damping=True, **options)
    noise = fit(model, optimizer=optimizer, data=data)
    noise._noise.renew(in_any_case=True)
    for normal, block in zip(normals(noise), optimizer.findings.curvature.blocks, strict=True):
        vector = tf.constant(RNG.normal(size=block.adapter.matrix_shape))
        parts = to_blocks(vector, block.adapter.structures)
        found = tf.reduce_sum(normal.standardized(parts) ** 2)
        inverse = block.inverse
        assert_close(EXAMPLES * found, tf.reduce_sum(parts * inverse.precondition(parts)))
    means = helpers.weights(model)
    with noise.applied():
        helpers.assert_different(helpers.weights(model), means)
    helpers.assert_same(helpers.weights(model), means)


def test_eigenbases_of_factors():
    """Where the inverses are damped factor by factor, eigenbases are made for the noise."""
    model, data = model_and_data("images")
    optimizer = helpers.kfac(damping=100.0)
    noise = fit(model, optimizer=optimizer, data=data)
    noise._noise.renew(in_any_case=True)
    block = optimizer.findings.curvature.blocks[0]
    fisher = kron(block.input_factor, block.output_factor)
    normal = normals(noise)[0]
    found = normal._replace(mean=tf.zeros_like(normal.precision)).distribution().covariance()
    assert_close(EXAMPLES * found, np.linalg.inv(fisher + 0.02 * np.eye(len(fisher))))


def test_eigenvalues_that_may_be_rounding_count(in_float32):
    """The pseudo-inverse that undamped steps take is none of the noise."""
    model, data = model_and_data("vectors")
    noise = fit(model, optimizer=helpers.kfac(damping=100.0), data=data)
    block = noise.model.optimizer.findings.curvature.blocks[0]
    size = block.input_factor.shape[0]
    block.input_factor.assign(np.diag(np.geomspace(1, 1e-7, size)))
    values = block.eigenbasis().eigenvalues.numpy()
    assert (np.max(values, axis=-1) > 0).all()


def test_draws_in_blocks():
    """Their covariance is that of the blocks that make up the matrix."""
    model, data = model_and_data("vectors")
    noise = fit(model, optimizer=helpers.kfac(max_factor_size=3), data=data)
    adapter, normal = noise._noise._adapters[0], normals(noise)[0]
    kernel, bias = (id(v) for v in adapter.variables)

    def one(index):
        (drawn,) = draws([adapter], [normal], tf.stack([0, index]))
        return tf.concat([drawn[kernel], drawn[bias][tf.newaxis]], axis=0)

    many = tf.function(lambda n: tf.map_fn(one, tf.range(n), fn_output_signature=tf.float64))
    vector = tf.constant(RNG.normal(size=adapter.matrix_shape))
    expected = tf.reduce_sum(normal.standardized(to_blocks(vector, adapter.structures)) ** 2)
    found = tf.reduce_sum(many(20000) * vector, axis=[1, 2])
    assert abs(np.mean(found**2) / expected - 1) < 0.05  # Five standard errors.


def test_is_renewed_with_the_inverses():
    optimizer = still(factor_update_period=2, inverse_update_period=2)
    seen = []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if noise._noise is not None:
                seen.append(normals(noise)[0].precision.numpy())

    model = helpers.compiled(mlp(), optimizer)
    noise = WeightNoise(EXAMPLES)
    helpers.fit(model, helpers.vectors(EXAMPLES), 5, callbacks=[noise, Note()])
    changes = [not np.array_equal(*pair) for pair in itertools.pairwise(seen)]
    # The first of those seen is that of step 1, after the factors of step 0.
    assert changes == [bool(is_due(step, 2)) for step in range(1, 14)]
    assert not all(changes)


# ---- Means at all other times ------------------------------------------------------------------


class Seen(keras.Sequential):
    """Notes its weights in the midst of steps."""

    def train_step(self, data):
        vars(self).setdefault("training", []).append(helpers.weights(self))
        return super().train_step(data)

    def test_step(self, data):
        vars(self).setdefault("testing", []).append(helpers.weights(self))
        return super().test_step(data)


class TestMeans:
    """An optimizer that steps nowhere leaves them as they are, bit for bit."""

    def test_weights_are_noisy_in_batches_only(self):
        model = Seen(mlp().layers)
        model.build((None, helpers.FEATURES))
        means = helpers.weights(model)
        data = helpers.vectors(EXAMPLES)
        watch = Watch()
        fit(model, watch, optimizer=still(), compiled={"run_eagerly": True}, validation_data=data)
        first, *others = vars(model)["training"]
        helpers.assert_same(first, means)
        assert len(others) == 5
        for one, other in itertools.pairwise(others):
            helpers.assert_different(one, means)
            helpers.assert_different(one, other)
        for weights in [*vars(model)["testing"], *watch.seen, helpers.weights(model)]:
            helpers.assert_same(weights, means)

    @pytest.mark.parametrize(
        "compiled",
        [{}, pytest.param({"jit_compile": True}, marks=pytest.mark.slow)],
        ids=str,
    )
    def test_in_graphs(self, compiled, tmp_path):
        """Saved in the midst of training, too, and whatever the order of the callbacks."""
        model = mlp()
        means, data = helpers.weights(model), helpers.vectors(helpers.BATCH)
        checkpoint = keras.callbacks.ModelCheckpoint(
            tmp_path / "{epoch}-{batch}.weights.h5", save_freq=1, save_weights_only=True
        )
        noise = fit(
            model,
            Watch(),
            checkpoint,
            optimizer=still(),
            compiled=compiled,
            data=data,
            epochs=4,
            validation_data=data,
        )
        losses, values = noise.history["loss"], noise.history["val_loss"]
        assert np.ptp(values) == 0 and np.isclose(losses[0], values[0])
        assert len(set(losses)) == 4 and min(np.diff(losses)) != 0
        saved = sorted(tmp_path.iterdir())
        assert len(saved) == 4
        for path in saved:
            other = mlp()
            other.load_weights(path)
            helpers.assert_same(helpers.weights(other), means)

    def test_steps_are_those_at_the_draw(self):
        """They are taken by the means: with the noise of all, a step is what the batch says."""
        model = mlp()
        helpers.compiled(model, helpers.kfac())
        noise, data = WeightNoise(EXAMPLES), helpers.vectors(helpers.BATCH)
        helpers.fit(model, data, 3, callbacks=[noise])
        means = helpers.weights(model)
        noise._noise.renew(in_any_case=False)
        with noise._noise.applied(0, model.optimizer.batches_seen):
            before = helpers.weights(model)
            model.train_on_batch(*data)
            steps = [a - b for a, b in zip(helpers.weights(model), before)]
        expected = [mean + step for mean, step in zip(means, steps)]
        helpers.assert_same(helpers.weights(model), expected)
        helpers.assert_different(before, means)

    @pytest.mark.filterwarnings("ignore:Your input ran out of data")
    def test_errors_in_a_batch(self):
        """Whatever stops training, also the end of data of unknown length."""

        def endless():
            x, y = helpers.vectors(helpers.BATCH)
            for _ in range(3):
                yield x, y
            if fails:
                raise RuntimeError("No more.")

        model, fails = mlp(), False
        means = helpers.weights(model)
        helpers.compiled(model, still())
        x, y = helpers.vectors(helpers.BATCH)
        spec = tf.TensorSpec(x.shape, x.dtype), tf.TensorSpec(y.shape, y.dtype)
        data = tf.data.Dataset.from_generator(endless, output_signature=spec)
        callbacks = [KFACCallback(), WeightNoise(EXAMPLES)]
        model.fit(data.repeat(2), verbose=0, shuffle=False, callbacks=callbacks)
        helpers.assert_same(helpers.weights(model), means)
        fails = True
        with pytest.raises(Exception, match="No more"):
            model.fit(data, verbose=0, shuffle=False, callbacks=callbacks)
        helpers.assert_same(helpers.weights(model), means)
        losses = model.fit(x, y, verbose=0, epochs=2).history["loss"]
        assert losses == [losses[0]] * 2  # No noise is left over.

    def test_errors_of_other_callbacks(self):
        """Noise that was about to come comes once at most, and goes."""
        model, data = mlp(), helpers.vectors(helpers.BATCH)
        means = helpers.weights(model)

        class Stop(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                if noise._noise is not None:
                    raise RuntimeError("No more.")

        helpers.compiled(model, still())
        noise = WeightNoise(EXAMPLES)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="No more"):
                helpers.fit(model, data, 3, callbacks=[noise, Stop()])
        losses = model.fit(*data, verbose=0, epochs=3).history["loss"]
        assert losses[1] == losses[2]
        helpers.assert_same(helpers.weights(model), means)

    def test_gradient_accumulation(self):
        """Each micro-batch has a draw; weights move with the last."""
        watch = Watch()
        fit(mlp(), watch, optimizer=helpers.kfac(gradient_accumulation_steps=2))
        for index, pair in enumerate(itertools.pairwise(watch.seen), start=1):
            check = helpers.assert_different if index % 2 else helpers.assert_same
            check(*pair)

    def test_micro_batches_have_draws_of_their_own(self):
        noise = fit(mlp(), optimizer=helpers.kfac(gradient_accumulation_steps=2))
        known, found = noise._noise, []
        applied = known.applied

        def noted(purpose, index):
            found.append(int(index))
            return applied(purpose, index)

        known.applied = noted
        helpers.fit(noise.model, helpers.vectors(EXAMPLES), epochs=2, callbacks=[noise])
        assert len(set(found)) == len(found) > 2

    def test_skipped_steps(self):
        """Batches that are not finite, and then with another draw."""
        model, watch = mlp(), Watch()
        x, y = helpers.vectors(EXAMPLES)
        x[helpers.BATCH : 2 * helpers.BATCH] = np.nan
        with pytest.warns(UserWarning, match="skipped"):
            fit(model, watch, data=(x, y), epochs=1)
        helpers.assert_same(watch.seen[1], watch.seen[0])
        assert int(model.optimizer.batches_seen) == 3

    def test_loss_scaling(self, in_float32):
        with helpers.precision("mixed_float16"):
            model = mlp()
        means = helpers.weights(model)
        helpers.compiled(model, keras.optimizers.LossScaleOptimizer(still()))
        noise = WeightNoise(EXAMPLES)
        helpers.fit(model, helpers.vectors(EXAMPLES), callbacks=[noise])
        helpers.assert_same(helpers.weights(model), means)
        with noise.applied():
            helpers.assert_different(helpers.weights(model), means)


# ---- Use ----------------------------------------------------------------------------------------


class TestUse:
    def path(self, seed=0, fits=1):
        keras.utils.set_random_seed(1)
        model = helpers.compiled(mlp(), helpers.kfac())
        noise = WeightNoise(EXAMPLES, seed=seed)
        for _ in range(fits):
            helpers.fit(model, helpers.vectors(EXAMPLES), 4 // fits, callbacks=[noise])
        return helpers.weights(model)

    def test_seeds(self):
        """The same path, in one fit or several."""
        path = self.path()
        helpers.assert_same(self.path(), path)
        helpers.assert_same(self.path(fits=2), path)
        helpers.assert_different(self.path(seed=1), path)

    def test_draws_afterwards(self):
        model = mlp()
        noise = fit(model)
        drawn = []
        for index in (0, 0, 1):
            with noise.applied(index):
                drawn.append(helpers.weights(model))
        helpers.assert_same(drawn[0], drawn[1])
        helpers.assert_different(drawn[0], drawn[2])

    def test_another_model(self):
        noise = fit(mlp())
        other = helpers.compiled(mlp(), helpers.kfac())
        helpers.fit(other, helpers.vectors(EXAMPLES), callbacks=[noise])
        before = helpers.weights(other)
        with noise.applied():
            helpers.assert_different(helpers.weights(other), before)

    def test_temperature(self):
        """Noise is in proportion to its root."""
        noises = []
        for temperature in (1.0, 0.25):
            keras.utils.set_random_seed(1)
            model = helpers.compiled(mlp(), still(fisher="exact"))
            noise = WeightNoise(EXAMPLES, temperature)
            helpers.fit(model, helpers.vectors(helpers.BATCH), 2, callbacks=[noise])
            means = helpers.weights(model)
            with noise.applied():
                noises.append([w - m for w, m in zip(helpers.weights(model), means)])
        helpers.assert_same(noises[1], [0.5 * n for n in noises[0]], rtol=1e-9, atol=1e-12)

    def test_uncovered_weights_are_fixed(self):
        unknown = helpers.Unknown(name="unknown")
        model = keras.Sequential([keras.Input((helpers.FEATURES,)), unknown, *mlp().layers])
        with pytest.warns(UserWarning, match=r"and no noise:(.|\n)*Unknown .* fallback"):
            noise = fit(model)
        before = unknown.scale.numpy()
        with noise.applied():
            helpers.assert_same(unknown.scale.numpy(), before)

    def test_draws_that_are_not_finite(self, in_float32):
        """They are left out; here the precision is zero in float32."""
        model = mlp()
        means = helpers.weights(model)
        helpers.compiled(model, still())
        noise = WeightNoise(EXAMPLES, temperature=1e308)
        with pytest.warns(UserWarning, match=r"^\d+ draws .* were not finite, and left out"):
            helpers.fit(model, helpers.vectors(EXAMPLES), callbacks=[noise])
        with noise.applied():
            helpers.assert_same(helpers.weights(model), means)


# ---- Refusals -----------------------------------------------------------------------------------


class TestRefusals:
    def check(self, message, model=None, optimizer=None, error=ValueError, loss=None, **compiled):
        data = helpers.vectors(EXAMPLES)
        compiled = {"run_eagerly": True, **compiled}  # There is nothing to trace for.
        with pytest.raises(error, match=message):
            fit(model or mlp(), optimizer=optimizer, data=data, loss=loss, compiled=compiled)

    @pytest.mark.parametrize("value", [0, -1, 2.5, True])
    def test_examples(self, value):
        with pytest.raises(ValueError, match=r"`training_examples` must be a positive int"):
            WeightNoise(value)

    @pytest.mark.parametrize("value", [0, -1.0, np.inf, np.nan, "cold"])
    def test_temperatures(self, value):
        with pytest.raises(ValueError, match=r"`temperature` must be a positive number. Received"):
            WeightNoise(EXAMPLES, temperature=value)

    def test_numbers_of_draws(self):
        with pytest.raises(ValueError, match=r"`seed` must be an int >= 0. Received: seed=-1"):
            WeightNoise(EXAMPLES, seed=-1)
        with pytest.raises(RuntimeError, match=r"from the second training step on. Received"):
            WeightNoise(EXAMPLES).applied()
        with pytest.raises(RuntimeError, match=r"from the second training step on. Received"):
            _ = WeightNoise(EXAMPLES).prior_precisions
        with pytest.raises(ValueError, match=r"`draw` must be an int >= 0"):
            fit(mlp()).applied(-1)

    def test_training(self):
        self.check(r"drawn for each batch.*Received: steps_per_execution=2", steps_per_execution=2)
        self.check(r"with their noise. Received", optimizer=helpers.kfac(use_ema=True))
        self.check(
            r"no prior.*Received: weight_decay=0.1", optimizer=helpers.kfac(weight_decay=0.1)
        )
        self.check(
            r"output factors.*Received: fisher='forward_only'",
            optimizer=helpers.kfac(fisher="forward_only"),
        )

    def test_other_optimizers(self):
        model = mlp()
        model.compile("sgd", helpers.crossentropy())
        with pytest.raises(ValueError, match=r"needs a model compiled with.*Received"):
            model.fit(*helpers.vectors(), verbose=0, callbacks=[WeightNoise(EXAMPLES)])

    @pytest.mark.parametrize("name", ["inverse_free", "tridiagonal", "linear_exact"])
    def test_structures(self, name):
        self.check(
            rf"'{name}' keeps no Fisher matrix.*Received", optimizer=helpers.kfac(curvature=name)
        )

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"kernel_regularizer": L2(0.1)},
            {"kernel_regularizer": L2(0.1), "bias_regularizer": L2(0.2)},
            dict.fromkeys(("kernel_regularizer", "bias_regularizer"), L1L2(0.1, 0.1)),
            {"use_bias": False, "kernel_regularizer": keras.regularizers.L1(0.1)},
        ],
        ids=["none", "kernel alone", "two", "both norms", "absolute"],
    )
    def test_priors(self, options):
        """The message says which regulariser is a prior."""
        dense = layers.Dense(helpers.CLASSES, **options)
        unit = f"{1 / (2 * EXAMPLES):.3g}"
        self.check(
            rf"one for all weights of a layer. `keras.regularizers.L2\({unit}\)` .*Received: layer",
            keras.Sequential([keras.Input((helpers.FEATURES,)), dense]),
        )

    def test_constraints(self):
        dense = regularised(layers.Dense, helpers.CLASSES, kernel_constraint="unit_norm")
        self.check(
            r"can't be constrained.*Received: constraints of \['.*kernel'\]",
            keras.Sequential([keras.Input((helpers.FEATURES,)), dense]),
        )

    def test_losses(self):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        self.check(r"mean over examples. Received: reduction='sum'", loss=loss)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
        self.check(r"`ignore_class` have no part.*Received", loss=loss)

    @pytest.mark.parametrize("kind", ["samples", "classes", "dataset"])
    def test_weights_of_examples(self, kind):
        """Refused in the first batch, which has no noise yet, too."""
        x, y = helpers.vectors(EXAMPLES)
        weights = np.full(EXAMPLES, 100.0)
        data, options = (x, y), {"sample_weight": weights}
        if kind == "classes":
            options = {"class_weight": dict.fromkeys(range(helpers.CLASSES), 100.0)}
        elif kind == "dataset":
            data = (tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(4),)
            options = {"batch_size": None}
        with pytest.raises(ValueError, match=r"Sample weights, and class w.*Received: data of 3"):
            fit(mlp(), data=data, compiled={"run_eagerly": True}, **options)

    def test_no_weights_of_examples(self):
        """A dataset may say so."""
        data = tf.data.Dataset.from_tensor_slices(helpers.vectors(EXAMPLES)).batch(12)
        data = (data.map(lambda x, y: (x, y, None)),)
        options = {"batch_size": None, "epochs": 1, "compiled": {"run_eagerly": True}}
        assert fit(mlp(), data=data, **options).prior_precisions

    def test_masks(self):
        body = [keras.layers.Masking(), regularised(layers.Dense, 2)]
        model = keras.Sequential([keras.Input((5, 3)), *body])
        helpers.compiled(model, helpers.kfac(), "mse")
        x = RNG.normal(size=(EXAMPLES, 5, 3))
        with pytest.raises(ValueError, match=r"another scale in each batch.* Received: a model"):
            helpers.fit(model, (x, x[..., :2]), callbacks=[WeightNoise(EXAMPLES)])


@pytest.mark.parametrize(
    ("loss", "shape", "weight", "expected"),
    [
        ("mse", (None, 3), None, 2 / 3),
        ("mse", (None, 7, 3), 0.5, 1 / 21),
        ("sparse_categorical_crossentropy", (None, 3), None, 1.0),
        ("binary_crossentropy", (None, 4), 2.0, 0.5),
    ],
)
def test_scale_of_losses(loss, shape, weight, expected):
    model = keras.Sequential([keras.Input(shape[1:]), layers.Activation("sigmoid")])
    model.compile("sgd", loss, loss_weights=weight)
    assert np.isclose(loss_scale(model, [tf.TensorShape(shape)]), expected, rtol=1e-6)


def test_scales_that_are_unknown():
    model = keras.Sequential([keras.Input((None, 3))])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"number of positions.*Received: outputs of shape"):
        loss_scale(model, [tf.TensorShape((None, None, 3))])
    with pytest.raises(ValueError, match=r"models of one output.*Received"):
        loss_scale(model, [tf.TensorShape((None, 3))] * 2)
    model.compile("sgd", "cosine_similarity")
    with pytest.raises(ValueError, match=r"knows no predictive distribution.*Received"):
        loss_scale(model, [tf.TensorShape((None, 3))])
