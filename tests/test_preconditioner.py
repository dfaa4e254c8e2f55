"""How the factors are damped, averaged before the first step, and how the damping is found."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, LevenbergMarquardt
from keras_kfac import step as step_module
from keras_kfac.damping import best
from keras_kfac.introspection.batch_part import WHOLE
from keras_kfac.math.inverses import ExactInverse, FactoredInverse, relative_change
from keras_kfac.math.kronecker import block_damping
from tests import helpers
from tests.reference import assert_close

KINDS = pytest.mark.parametrize("kind", [FactoredInverse, ExactInverse])
INVERSES = {"exact": {"exact_damping": True}, "factored": {}}


def spd(size, rng):
    root = rng.normal(size=(size, size + 2))
    return root @ root.T


def dense(inverse, d_in, d_out):
    """The matrix of an inverse, column by column."""
    columns = [
        np.ravel(inverse.precondition(tf.reshape(tf.constant(unit), (d_in, d_out))))
        for unit in np.eye(d_in * d_out)
    ]
    return np.stack(columns, axis=1)


class TestExactDamping:
    """Identity 15."""

    @pytest.mark.parametrize("damping", [1e-2, 1.0])
    @pytest.mark.parametrize("shape", [(4, 3), (1, 3), (3, 1)])
    def test_is_the_inverse_of_the_damped_product(self, shape, damping):
        rng = np.random.default_rng(1)
        a, g = spd(shape[0], rng), spd(shape[1], rng)
        inverse = ExactInverse.of(tf.constant(a), tf.constant(g), damping)
        damped = np.kron(a, g) + damping * np.eye(a.size // shape[0] * shape[1])
        expected = np.linalg.inv(damped)
        assert_close(dense(inverse, *shape), expected, 1e-10)
        assert_close(dense(inverse, *shape), expected, 1e-10)  # Nothing adds up.
        assert_close(inverse.condition_number, np.linalg.cond(damped), 1e-10)

    def test_is_not_the_factored_one(self):
        rng = np.random.default_rng(1)
        a, g = tf.constant(spd(4, rng)), tf.constant(spd(3, rng))
        exact, factored = (dense(k.of(a, g, 1.0), 4, 3) for k in (ExactInverse, FactoredInverse))
        assert np.abs(exact - factored).max() > 0.1 * np.abs(exact).max()
        undamped = (dense(k.of(a, g, 0.0), 4, 3) for k in (ExactInverse, FactoredInverse))
        assert_close(*undamped, 1e-8)

    def test_dead_layer_is_tikhonov_alone(self):
        inverse = ExactInverse.of(tf.zeros((3, 3), tf.float64), tf.eye(2, dtype=tf.float64), 0.25)
        assert_close(dense(inverse, 3, 2), 4 * np.eye(6))

    def test_without_damping_it_is_the_pseudo_inverse(self):
        """Eigenvalues below rounding are zeros, but for those of a diagonal, which is not rounded.

        With some damping they are what they are.
        """
        rng = np.random.default_rng(1)
        roots = rng.normal(size=(5, 3)), rng.normal(size=(4, 2)) * [1e-4, 1.0]
        a, g = (root @ root.T for root in roots)
        inverse = ExactInverse.of(tf.constant(a), tf.constant(g), 0.0)
        product = np.kron(a, g)
        assert_close(dense(inverse, 5, 4), np.linalg.pinv(product, rcond=1e-12), 1e-6)
        values = np.linalg.eigvalsh(product)[-6:]
        assert float(inverse.condition_number) == pytest.approx(values[-1] / values[0], rel=1e-6)
        damped = ExactInverse.of(tf.constant(a), tf.constant(g), 1e-6)
        assert_close(dense(damped, 5, 4), np.linalg.inv(product + 1e-6 * np.eye(20)), 1e-6)
        diagonal = ExactInverse.of(tf.constant([1.0, 1e-9, 0.0]), tf.constant([[2.0]]), 0.0)
        assert diagonal.precondition(tf.ones([3, 1])).numpy()[:, 0] == pytest.approx([0.5, 5e8, 0])

    def test_dead_layer_stays_without_damping(self):
        inverse = ExactInverse.of(tf.zeros((3, 3), tf.float64), tf.eye(2, dtype=tf.float64), 0.0)
        assert not np.any(dense(inverse, 3, 2)) and float(inverse.condition_number) == 1

    @pytest.mark.parametrize("groups", [None, 2])
    def test_step_is_the_preconditioned_gradient(self, groups):
        """Against the dense inverse of the factors that the optimizer keeps, for each group."""
        with helpers.precision("float64"):
            keras.utils.set_random_seed(0)
            layer = (
                keras.layers.Conv2D(4, 2, groups=groups, use_bias=False)
                if groups
                else keras.layers.Dense(4, use_bias=False)
            )
            shape = (3, 3, 2) if groups else (5,)
            outputs = [layer, keras.layers.Flatten()]
            model = keras.Sequential([keras.Input(shape), *outputs])
            optimizer = helpers.kfac(
                exact_damping=True, damping=0.3, learning_rate=1.0, momentum=0.0, kl_clip=None
            )
            model.compile(optimizer, keras.losses.MeanSquaredError(dtype="float64"))
            optimizer.attach(model)
            rng = np.random.default_rng(2)
            x = rng.normal(size=(6, *shape))
            y = rng.normal(size=(6, *model.output_shape[1:]))
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(tf.constant(x)) - y))
            gradient = tape.gradient(loss, layer.kernel.value).numpy()
            before = layer.kernel.numpy()
            model.train_on_batch(x, y)
            step = layer.kernel.numpy() - before
            a, g = (m.reshape(-1, *m.shape[-2:]) for m in helpers.factors(optimizer).values())
        count = groups or 1
        matrices = [m.reshape(-1, 4, 1) for m in (gradient, step)]
        gradient, step = (m.reshape(len(a[0]), count, -1).swapaxes(0, 1) for m in matrices)
        for group in range(count):
            damped = np.kron(a[group], g[group])
            damped += 0.3 * np.eye(len(damped))
            expected = -np.linalg.solve(damped, gradient[group].ravel())
            assert_close(step[group].ravel(), expected, 1e-8)


@KINDS
class TestRelativeChange:
    def test_is_that_of_the_matrices(self, kind):
        rng = np.random.default_rng(4)
        old, new = (
            kind.of(tf.constant(spd(4, rng)), tf.constant(spd(3, rng)), 0.5) for _ in range(2)
        )
        matrices = [dense(inverse, 4, 3) for inverse in (old, new)]
        expected = np.linalg.norm(matrices[1] - matrices[0]) / np.linalg.norm(matrices[1])
        assert_close(relative_change(old, new), expected, 1e-10)
        assert float(relative_change(new, new)) == pytest.approx(0, abs=1e-7)

    def test_a_scale_that_moves_between_the_factors_is_no_change(self, kind):
        rng = np.random.default_rng(4)
        a, g = tf.constant(spd(4, rng)), tf.constant(spd(3, rng))
        change = relative_change(kind.of(a, g, 0.5), kind.of(4 * a, g / 4, 0.5))
        assert float(change) == pytest.approx(0, abs=1e-7)


def embedded_words():
    """A model with sparse gradients, and its data."""
    keras.utils.set_random_seed(0)
    vectors = [keras.layers.Embedding(40, 5), keras.layers.Flatten()]
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), *vectors, keras.layers.Dense(helpers.CLASSES)]
    )
    return model, (np.arange(24).reshape(8, 3), np.arange(8) % helpers.CLASSES)


def steps_of(product_dtype, model, data, jit_compile=False, **kwargs):
    """The step of each weight with the first batch, along the preconditioned gradient."""
    optimizer = helpers.kfac(momentum=0.0, kl_clip=None, product_dtype=product_dtype, **kwargs)
    helpers.compiled(model, optimizer, jit_compile=jit_compile)
    before = helpers.weights(model)
    helpers.fit(model, tuple(part[: helpers.BATCH] for part in data))
    return [after - start for after, start in zip(helpers.weights(model), before)]


class TestProductDtype:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"exact_damping": True},
            {"max_factor_size": 3},
            pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        ],
        ids=["factored", "exact", "in-blocks", "xla"],
    )
    def test_bfloat16_makes_the_same_step_to_its_rounding(self, options):
        reduced, full = (
            steps_of(dtype, helpers.mlp(), helpers.vectors(), fisher="exact", **options)
            for dtype in ("bfloat16", None)
        )
        # XLA may keep more than the 8 bits.
        least = 0 if options.get("jit_compile") else 1e-4
        for a, b in zip(reduced, full):
            assert least <= np.linalg.norm(a - b) / np.linalg.norm(b) < 3e-2

    def test_of_few_rows(self):
        reduced, full = (
            steps_of(dtype, *embedded_words(), fisher="exact") for dtype in ("bfloat16", None)
        )
        assert 1e-4 < np.linalg.norm(reduced[0] - full[0]) / np.linalg.norm(full[0]) < 2e-2


class TestBurnIn:
    """Identity 23: a burn-in of K batches is their plain average."""

    def test_factors_are_the_plain_average_and_no_weight_moves(self):
        with helpers.precision("float64"):
            data = helpers.vectors(4 * helpers.BATCH)
            arguments = {"fisher": "exact", "factor_ema_decay": 0.5}
            model = helpers.compiled(helpers.mlp(), helpers.kfac(burn_in_steps=4, **arguments))
            before, singles = helpers.weights(model), []
            helpers.fit(model, data)
            for batch in helpers.batches(data):
                single = helpers.compiled(helpers.mlp(), helpers.kfac(burn_in_steps=1, **arguments))
                helpers.fit(single, batch)
                singles.append(helpers.factors(single.optimizer))
            helpers.assert_same(helpers.weights(model), before)
            optimizer = model.optimizer
            assert int(optimizer.iterations) == 0 and optimizer.burn_in_steps_left == 0
            for average, *parts in zip(
                *(f.values() for f in (helpers.factors(optimizer), *singles))
            ):
                assert_close(average, np.mean(parts, axis=0), 1e-10)
            helpers.fit(model, data)
            assert int(optimizer.iterations) == 4
            helpers.assert_different(helpers.weights(model), before)

    @pytest.mark.parametrize("decay", [0.9, pytest.param(0.2, marks=pytest.mark.slow)])
    def test_later_batches_count_more_up_to_the_decay(self, decay):
        """The factors of the steps 0 to 3, with weights that do not move."""
        with helpers.precision("float64"):
            data = helpers.vectors(4 * helpers.BATCH)
            arguments = {"fisher": "exact", "factor_ema_decay": decay, "learning_rate": 0.0}
            model = helpers.compiled(helpers.mlp(), helpers.kfac(momentum=0.0, **arguments))
            helpers.fit(model, data)
            singles = []
            for batch in helpers.batches(data):
                single = helpers.compiled(helpers.mlp(), helpers.kfac(momentum=0.0, **arguments))
                helpers.fit(single, batch)
                singles.append(helpers.factors(single.optimizer))
        weights = np.ones(4)
        for step in range(1, 4):
            weights[:step] *= min(decay, (step / (step + 1)) ** 3)
        for average, *parts in zip(
            *(f.values() for f in (helpers.factors(model.optimizer), *singles))
        ):
            assert_close(average, np.average(parts, axis=0, weights=weights), 1e-10)

    def test_sampled_targets_differ_from_batch_to_batch(self):
        models = [helpers.compiled(helpers.mlp(), helpers.kfac(burn_in_steps=n)) for n in (1, 2)]
        batch = helpers.vectors(helpers.BATCH)
        for model, repeats in zip(models, (1, 2)):
            for _ in range(repeats):
                helpers.fit(model, batch)
        one, two = (helpers.named(m.optimizer, "output_factor") for m in models)
        assert not any(np.allclose(a, b) for a, b in zip(one.values(), two.values()))

    def test_resumes_where_it_was_saved(self, tmp_path):
        model = helpers.compiled(helpers.mlp(), helpers.kfac(burn_in_steps=3))
        helpers.fit(model, helpers.vectors(2 * helpers.BATCH))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.optimizer.burn_in_steps_left == 1
        helpers.fit(loaded, helpers.vectors(3 * helpers.BATCH))
        assert int(loaded.optimizer.iterations) == 2

    def test_counts_batches_of_an_accumulated_step(self):
        optimizer = helpers.kfac(burn_in_steps=3, gradient_accumulation_steps=2)
        model = helpers.compiled(helpers.mlp(), optimizer)
        helpers.fit(model, helpers.vectors(5 * helpers.BATCH))
        assert int(optimizer.iterations) == 1

    def test_schedules_by_step_wait_for_it(self):
        optimizer = helpers.kfac(burn_in_steps=2)
        model, seen = helpers.compiled(helpers.mlp(), optimizer), []
        callback = helpers.KFACCallback(damping=lambda s: seen.append(s) or 0.1, unit="step")
        x, y = helpers.vectors(5 * helpers.BATCH)
        model.fit(x, y, helpers.BATCH, verbose=0, callbacks=[callback])
        assert seen == [0, 0, 0, 0, 1, 2]


# ---- Weak blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "expected"),
    [(2.0, 0.5), (1.0, 0.5), (0.25, 0.25), (1e-8, 0.5e-4), (0.0, 0.5)],
    ids=["stronger", "equal", "weaker", "far weaker", "dead"],
)
def test_damping_of_a_block_falls_with_the_root_of_its_strength(block, expected):
    own = block_damping(0.5, tf.constant(block, tf.float64), tf.constant(1.0, tf.float64))
    assert_close(own, expected)


def test_model_without_curvature_is_damped_as_told():
    assert float(block_damping(0.5, tf.constant(0.0), tf.constant(0.0))) == 0.5


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("adapts", [True, False], ids=["adaptive", "fixed"])
def test_weak_blocks_are_damped_less_where_the_damping_adapts(adapts, inverse):
    """A number is that damping for all blocks: the textbook's."""
    damping = LevenbergMarquardt(initial=0.1) if adapts else 0.1
    with helpers.precision("float64"):
        model = helpers.compiled(helpers.mlp(), KFAC(damping=damping, **INVERSES[inverse]))
        weak = model.layers[-1]
        weak.set_weights([1e-3 * weak.kernel, weak.bias])  # So hidden layers hardly matter.
        batch = helpers.vectors()
        helpers.fit(model, batch, batch_size=len(batch[0]))
    curvature = model.optimizer._known.curvature
    mean = float(curvature.mean_eigenvalue())
    dampings = []
    for block in curvature.blocks:
        strength = float(block.trace()) / block.size
        dampings.append(0.1 * min(1, (strength / mean) ** 0.5) if adapts else 0.1)
        a, g = (tf.convert_to_tensor(v) for v in (block.input_factor, block.output_factor))
        expected = type(block.inverse).of(a, g, dampings[-1])
        for part, other in zip(block.inverse, expected):
            assert_close(part, other)
    assert not adapts or min(dampings) < 0.01 * max(dampings)


# ---- The search for the damping -----------------------------------------------------------------


def test_best_leaves_out_what_is_not_finite():
    values = tf.constant([4.0, 1.0, 2.0, 3.0], tf.float64)
    score = lambda x: tf.where(x < 1.5, np.nan, x)  # noqa: E731
    assert float(best(values, score)) == 2.0
    assert float(best(values, lambda x: x * np.nan)) == 4.0


def loss_after_a_step(damping):
    optimizer = KFAC(damping=damping, fisher="exact", momentum=0.0, kl_clip=None)
    model = helpers.compiled(helpers.mlp(), optimizer, run_eagerly=True)
    batch = helpers.vectors()
    helpers.fit(model, batch, batch_size=len(batch[0]))
    return helpers.mean_loss(model, batch), model.optimizer


@pytest.mark.parametrize("inverse", INVERSES)
def test_calibration_finds_what_lowers_the_loss_of_the_first_batch_most(inverse, monkeypatch):
    monkeypatch.setattr(helpers, "KFAC", KFAC)
    with helpers.precision("float64"):
        loss, optimizer = loss_after_a_step(LevenbergMarquardt("calibrated", minimum=1e-12))
        scale = float(optimizer._known.curvature.mean_eigenvalue())
        tried = [scale * 10.0**k for k in range(-3, 4)]
        rules = [LevenbergMarquardt(damping, minimum=1e-12) for damping in tried]
        losses = [loss_after_a_step(rule)[0] for rule in rules]
    assert loss == pytest.approx(min(losses), rel=1e-6)
    assert max(losses) > 1.01 * min(losses)
    assert float(optimizer.preconditioner_damping) == pytest.approx(tried[np.argmin(losses)])


@pytest.mark.parametrize("power", [-6, -4, -2, 2, 4, 6])
def test_preconditioner_damping_goes_where_the_model_is_lowest(power, monkeypatch):
    """Where the block is exact, that is at the damping of the model; from afar it comes back."""
    monkeypatch.setattr(step_module, "MODEL_PART", WHOLE)
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 4)), rng.normal(size=(40, 2))
    rule = LevenbergMarquardt(0.5, 0.5, 0.5, adapt_preconditioner=True)
    factor = rule.decay**2
    with helpers.precision("float64"):
        optimizer = KFAC(
            damping=rule,
            momentum=0.0,
            exact_damping=True,
            fisher="exact",
            factor_update_period=1,
            inverse_update_period=2,
        )
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(optimizer, keras.losses.MeanSquaredError(dtype="float64"))
        optimizer.attach(model)
        model.train_on_batch(x, y)
        assert float(optimizer.preconditioner_damping) == pytest.approx(0.5)
        optimizer.preconditioner_damping.assign(0.5 * factor**power)
        optimizer.iterations.assign(8)  # From there on refreshes keep to their period.
        values = []
        for _ in range(10):
            model.train_on_batch(x, y)
            values.append(float(optimizer.preconditioner_damping))
    there = [power - np.sign(power) * min(k, abs(power)) for k in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(values[::2], 0.5 * factor ** np.array(there), rtol=1e-6)


def test_preconditioner_damping_is_the_damping_unless_it_adapts():
    optimizer = helpers.kfac(damping=LevenbergMarquardt(0.5, period=100))
    helpers.fit(helpers.compiled(helpers.mlp(), optimizer), helpers.vectors())
    assert float(optimizer.preconditioner_damping) == 0.5


def test_fixing_the_damping_fixes_that_of_the_preconditioner():
    rule = LevenbergMarquardt(0.5, adapt_preconditioner=True)
    optimizer = helpers.kfac(damping=rule)
    model = helpers.compiled(helpers.mlp(), optimizer)
    helpers.fit(model, helpers.vectors())
    assert float(optimizer.preconditioner_damping) != 0.5
    optimizer.damping = 0.25
    helpers.fit(model, helpers.vectors())
    assert float(optimizer.preconditioner_damping) == 0.25


# ---- Schedules ----------------------------------------------------------------------------------

DECAY = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.1])


@pytest.mark.parametrize("name", ["momentum", "factor_ema_decay", "kl_clip", "damping"])
def test_schedule_is_the_value_at_each_step(name):
    """Like an optimizer whose constant changes between the steps."""
    runs = []
    for value in (DECAY, None):
        with helpers.precision("float64"):
            optimizer = helpers.kfac(**({name: value} if value else {name: 0.5}))
            model = helpers.compiled(helpers.mlp(), optimizer, run_eagerly=True)
            for step, batch in enumerate(helpers.batches(helpers.vectors(4 * helpers.BATCH))):
                if value is None:
                    setattr(optimizer, name, 0.5 if step <= 1 else 0.1)
                helpers.fit(model, batch)
        runs.append(helpers.weights(model))
    helpers.assert_same(*runs, rtol=1e-6)


def test_scheduled_momentum_is_not_settable():
    optimizer = KFAC(momentum=DECAY)
    with pytest.raises(TypeError, match=r"schedule as its `momentum`.*Received: momentum=0.5"):
        optimizer.momentum = 0.5
    assert float(optimizer.momentum) == 0.5
