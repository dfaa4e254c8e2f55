"""Steps that choose themselves: the quadratic model, the damping that follows it, who decides."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, KFACCallback, LevenbergMarquardt, step_rule
from keras_kfac import step as step_module
from keras_kfac.introspection import forward_pass, gauss_newton
from keras_kfac.introspection.batch_part import WHOLE, BatchPart
from keras_kfac.introspection.losses import Score, understood
from keras_kfac.introspection.replay import Replay
from keras_kfac.math import step_control
from keras_kfac.math.quadratic_model import QuadraticModel, group_rates, minimise
from keras_kfac.step_rule import SignalShare, Typical, solve
from tests import helpers
from tests.cases import LOSSES, first_places, mlp, without_head_activation
from tests.reference import assert_close, dense_ggn, loss_value

RNG = np.random.default_rng(0)
layers = keras.layers


@pytest.fixture
def whole_batch(monkeypatch):
    """The quadratic model on all examples of a batch."""
    monkeypatch.setattr(step_module, "MODEL_PART", WHOLE)


@pytest.fixture
def float64():
    with helpers.precision("float64"):
        yield


# ---- Exact products -----------------------------------------------------------------------------


def recorded_pass(model, x, loss, y=None, sample_weight=None):
    replay = Replay(model, (tf.convert_to_tensor(x),), {"training": True})
    with forward_pass.recording([]) as recorded:
        recorded.outputs = model(x, training=True)
    recorded.replay = replay
    score = Score(loss, recorded.outputs, y, sample_weight, is_complete=y is not None)
    recorded.terms = [understood(score, 0)]
    return recorded


def random_directions(model, count):
    return [
        {id(v): tf.constant(RNG.normal(size=v.shape)) for v in model.trainable_variables}
        for _ in range(count)
    ]


def flat(model, direction):
    return np.concatenate([np.ravel(direction[id(v)]) for v in model.trainable_variables])


def weights_of(model):
    return step_module.current_values(model.trainable_variables)


class TestProducts:
    """Identity 17: products without a matrix against the dense GGN of the Keras loss."""

    @pytest.mark.parametrize("case", LOSSES, ids=str)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_equal_the_dense_ggn(self, case, weighted):
        model, loss = mlp((4, 5, 3), head=case), case.make()
        x, y = RNG.normal(size=(6, 4)), case.targets(RNG, (6, 3))
        sample_weight = RNG.uniform(0.5, 2, 6) if weighted else None
        logits_of = None if case.activation is None else without_head_activation
        directions = random_directions(model, 3)
        products = gauss_newton.products(
            [recorded_pass(model, x, loss, sample_weight=sample_weight)],
            weights_of(model),
            directions,
        )
        matrix = dense_ggn(
            model, loss, x, y, model.trainable_variables, sample_weight, logits_of=logits_of
        )
        vectors = np.stack([flat(model, d) for d in directions])
        assert_close(products, vectors @ matrix @ vectors.T)

    def test_are_those_of_the_hessian_for_relu(self):
        """Identity 19, diagonal blocks: the GGN of a layer is its Hessian if relu is the bend."""
        loss = keras.losses.MeanSquaredError(dtype="float64")
        model = mlp((4, 6, 3), activation="relu")
        x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
        variable = model.trainable_variables[0]
        direction = {
            id(v): tf.constant(RNG.normal(size=v.shape)) * (1.0 if v is variable else 0.0)
            for v in model.trainable_variables
        }
        product = gauss_newton.products(
            [recorded_pass(model, x, loss)],
            weights_of(model),
            [direction],
        )
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                value = loss_value(model, loss, x, y)
            gradient = inner.gradient(value, variable.value)
        hessian = outer.jacobian(gradient, variable.value)
        vector = np.ravel(direction[id(variable)])
        hessian = np.reshape(hessian, [vector.size, vector.size])
        assert_close(product, [[vector @ hessian @ vector]])

    @pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
    def test_part_of_a_batch_stands_for_the_whole(self, reduction, monkeypatch):
        """On a batch that repeats its first quarter."""
        monkeypatch.setattr(gauss_newton, "places_of", first_places)
        model = mlp((4, 5, 3))
        loss = keras.losses.MeanSquaredError(reduction, dtype="float64")
        x = np.tile(RNG.normal(size=(3, 4)), (4, 1))
        arguments = (
            [recorded_pass(model, x, loss)],
            weights_of(model),
            random_directions(model, 2),
        )
        quarter = gauss_newton.products(*arguments, BatchPart(0.25))
        assert_close(quarter, gauss_newton.products(*arguments))

    def test_are_those_of_the_gradients_for_a_loss_without_likelihood(self):
        """The empirical Fisher matrix: `1/N Σ (gₙᵀ u) (gₙᵀ v)`."""
        model, loss = mlp((4, 5, 3)), keras.losses.CosineSimilarity(dtype="float64")
        x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3))
        directions = random_directions(model, 2)
        products = gauss_newton.products(
            [recorded_pass(model, x, loss, tf.constant(y))], weights_of(model), directions
        )
        along = []
        for n in range(6):
            with tf.GradientTape() as tape:
                value = loss_value(model, loss, x[n : n + 1], y[n : n + 1])
            gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
            gradient = np.concatenate([np.ravel(g) for g in gradients])
            along.append([gradient @ flat(model, d) for d in directions])
        assert_close(products, np.transpose(along) @ along / 6)

    @pytest.mark.parametrize("case", LOSSES, ids=str)
    def test_half_of_it_is_the_kl_divergence(self, case):
        """Identity 18: `KL(p_θ ‖ p_θ+εv) ≈ ½ ε² vᵀFv` by TFP's closed forms, times `w`."""
        model = mlp((4, 5, 3), head=case)
        x, epsilon = RNG.normal(size=(6, 4)), 1e-4
        (direction,) = random_directions(model, 1)
        weights = weights_of(model)
        recorded = recorded_pass(model, x, case.make())
        product = gauss_newton.products([recorded], weights, [direction])
        (term,) = recorded.terms
        before, likelihood = term.differentiable(model(x, training=True))
        for v in model.trainable_variables:
            v.assign_add(epsilon * direction[id(v)])
        after, _ = term.differentiable(model(x, training=True))
        divergence = likelihood.make(before).kl_divergence(likelihood.make(after))
        kl = tf.reduce_mean(divergence) * term.likelihood_weight()
        assert np.sqrt(2 * kl / (epsilon**2 * product[0, 0])) == pytest.approx(1, abs=1e-3)


# ---- Replays ------------------------------------------------------------------------------------


class TestReplay:
    def model(self):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, "tanh"),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                layers.Dense(3, activity_regularizer="l2"),
            ]
        )

    def test_draws_the_same_dropout_and_changes_no_state(self):
        model, x = self.model(), tf.constant(RNG.normal(size=(6, 4)), tf.float32)
        replay = Replay(model, (x,), {"training": True})
        outputs = model(x, training=True)
        state = [v.numpy() for v in model.non_trainable_variables]
        again = replay.outputs({})
        np.testing.assert_array_equal(again, outputs)
        helpers.assert_same([v.numpy() for v in model.non_trainable_variables], state)
        assert not np.array_equal(model(x, training=True), outputs), "dropout is no dropout"

    def test_uses_the_given_weights_and_leaves_the_models(self):
        model, x = self.model(), tf.constant(RNG.normal(size=(6, 4)), tf.float32)
        replay = Replay(model, (x,), {"training": True})
        before = helpers.weights(model)
        zeros = {id(v): tf.zeros(v.shape) for v in model.trainable_variables}
        np.testing.assert_array_equal(replay.outputs(zeros), np.zeros((6, 3)))
        helpers.assert_same(helpers.weights(model), before)

    def test_part_of_the_batch_is_its_beginning(self):
        model = mlp((4, 5, 3))
        x = tf.constant(RNG.normal(size=(6, 4)))
        replay = Replay(model, (x,), {"training": True})
        assert_close(replay.outputs({}, lambda batch: batch[:2]), model(x[:2]))

    @pytest.mark.filterwarnings("ignore:Layer 'functional.* does not support masking")
    def test_arrays_are_cut_as_tensors_are(self):
        """Functional models are called with them as they come, and with masks."""
        inputs = keras.Input((3, 4))
        model = keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Dense(2)(inputs)))
        x, mask = RNG.normal(size=(6, 3, 4)), RNG.random((6, 3)) < 0.5
        expected = model(x, mask=mask)
        assert np.abs(model(x) - expected).max() > 0.1
        for given in (x, tf.constant(x)):
            part = Replay(model, (given,), {"mask": mask}).of_examples(tf.constant([5, 2]))
            assert_close(part.outputs({}), tf.gather(expected, [5, 2]), 1e-6)
        taken = Replay(model, (np.arange(6),), {"flag": np.bool_(True)})
        assert taken.argument("inputs").dtype == tf.int64

    def test_works_where_call_does_not_take_training(self):
        class Plain(keras.Model):
            def __init__(self):
                super().__init__()
                self.dropout, self.dense = layers.Dropout(0.5), layers.Dense(2)

            def call(self, x):
                return self.dense(self.dropout(x))

        model, x = Plain(), tf.ones((4, 10))
        model(x)
        replay = Replay(model, (x,), {"training": True})
        outputs = model(x, training=True)
        np.testing.assert_array_equal(replay.outputs({}), outputs)


# ---- The quadratic model ------------------------------------------------------------------------


def random_model(rng=RNG):
    root = rng.normal(size=(2, 5))
    return tf.constant(root @ root.T), tf.constant(rng.normal(size=2) - 2)


class TestMinimiser:
    """Identity 20."""

    def value(self, matrix, gradient, w):
        return 0.5 * w @ matrix.numpy() @ w + gradient.numpy() @ w

    def test_no_other_step_is_better(self):
        rng = np.random.default_rng(3)
        for _ in range(20):
            matrix, gradient = random_model(rng)
            best = minimise(matrix, gradient).numpy()
            if best[0] == 0:  # A rate that would be negative.
                continue
            assert self.value(matrix, gradient, best) == pytest.approx(gradient.numpy() @ best / 2)
            for other in best + rng.normal(size=(50, 2)):
                assert self.value(matrix, gradient, best) <= self.value(matrix, gradient, other)

    def test_one_fixed(self):
        matrix, gradient = random_model()
        (a, b), (_, c) = matrix.numpy()
        g, h = gradient.numpy()
        rate, momentum = minimise(matrix, gradient, (0.3, 0.0), (False, True)).numpy()
        assert (rate, momentum) == pytest.approx((0.3, -(h + b * 0.3) / c))
        rate, momentum = minimise(matrix, gradient, (0.0, 0.2), (True, False)).numpy()
        assert (rate, momentum) == pytest.approx((max(-(g + b * 0.2) / a, 0), 0.2))
        fixed = minimise(matrix, gradient, (0.3, 0.2), (False, False)).numpy()
        assert tuple(fixed) == pytest.approx((0.3, 0.2))

    def test_without_a_previous_step(self):
        matrix, gradient = tf.constant([[4.0, 0.0], [0.0, 0.0]]), tf.constant([-2.0, 0.0])
        assert minimise(matrix, gradient).numpy().tolist() == [0.5, 0.0]
        nothing = minimise(tf.zeros((2, 2)), tf.zeros(2))
        assert nothing.numpy().tolist() == [0.0, 0.0]

    def test_parallel_directions_count_once(self):
        matrix = tf.constant([[1.0, 2.0], [2.0, 4.0]], tf.float64)
        assert minimise(matrix, tf.constant([-1.0, -2.0], tf.float64)).numpy().tolist() == [1, 0]

    def test_bounds(self):
        matrix, gradient = tf.eye(2), tf.constant([1.0, -3.0])
        bounded = minimise(matrix, gradient, momentum_range=(0.0, 0.5)).numpy()
        assert bounded.tolist() == [0.0, 0.5]


class TestGroupRates:
    """Rates of groups of layers, relative to each other."""

    def test_solve_the_shrunken_system(self):
        root = np.random.default_rng(0).normal(size=(3, 9))
        matrix, gradient = root @ root.T, np.array([-1.0, -3.0, -2.0])
        expected = np.linalg.solve(matrix + 0.2 * np.diag(np.diag(matrix)), -gradient)
        assert (expected > 0).all()
        rates = group_rates(tf.constant(matrix), tf.constant(gradient))
        assert_close(rates, expected / expected.mean())

    def test_ignore_the_scale_of_each_direction(self):
        """A direction twice as long gets half the rate: the step is the same."""
        matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
        gradient, scale = np.array([-1.0, -2.0]), np.array([2.0, 1.0])
        rates = group_rates(tf.constant(matrix), tf.constant(gradient)).numpy()
        scaled = group_rates(
            tf.constant(matrix * np.outer(scale, scale)), tf.constant(gradient * scale)
        ).numpy()
        assert_close(scaled * scale / (scaled * scale)[1], rates / rates[1])

    def test_are_never_negative(self):
        matrix = tf.constant([[1.0, 0.99], [0.99, 1.0]], tf.float64)
        rates = group_rates(matrix, tf.constant([-1.0, -0.1], tf.float64)).numpy()
        assert rates.tolist() == [2.0, 0.0]
        rates = group_rates(matrix, tf.constant([-1.0, 0.5], tf.float64)).numpy()
        assert rates.tolist() == [2.0, 0.0]

    def test_are_alike_where_nothing_is_known(self):
        rates = group_rates(tf.zeros((3, 3), tf.float64), tf.zeros(3, tf.float64))
        assert rates.numpy().tolist() == [1.0, 1.0, 1.0]

    def test_noise_and_a_fixed_rate_make_them_alike(self):
        eye = tf.eye(3, dtype=tf.float64)
        model = QuadraticModel(eye, eye, tf.constant([-1.0, -3.0, -0.1], tf.float64))
        both, fixed = (True, True), (tf.constant(0.5, tf.float64), tf.constant(0.0, tf.float64))
        known = solve(model, tf.constant(0.0, tf.float64), fixed, both).numpy()
        assert known[1] == pytest.approx(3 * known[0])
        noisy = solve(model, tf.constant(0.0, tf.float64), fixed, both, 0.0).numpy()
        assert noisy[1] == pytest.approx(noisy[0])
        given = solve(model, tf.constant(0.0, tf.float64), fixed, (False, True)).numpy()
        assert given[:2].tolist() == [0.5, 0.5]


class Adding(layers.Layer):
    """Adds a loss that is linear in its inputs, which it passes on."""

    def call(self, inputs):
        self.add_loss(0.7 * tf.reduce_mean(inputs))
        return inputs


def linear_regression(l2=None, examples=40, **options):
    """A model whose loss is exactly quadratic."""
    keras.utils.set_random_seed(0)
    dense = layers.Dense(2, dtype="float64", kernel_regularizer=l2, **options)
    model = keras.Sequential([keras.Input((4,), dtype="float64"), dense])
    return model, RNG.normal(size=(examples, 4)), RNG.normal(size=(examples, 2))


def train(model, optimizer, x, y, steps, **kwargs):
    optimizer.attach(model)
    model.compile(optimizer, keras.losses.MeanSquaredError(dtype="float64"), **kwargs)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return optimizer


EVERY_STEP = {"factor_update_period": 1, "inverse_update_period": 1, "fisher": "exact"}


MODELLED = {
    "adaptive": {},
    "fixed": {"learning_rate": 0.1, "momentum": 0.5},
    "l2": {},
    "weight_decay": {"weight_decay": 0.1},
    "clipped": {"kl_clip": 1e-4},
    "clipnorm": {"clipnorm": 0.01},
    "loss_scale": {"loss_scale_factor": 64.0},
}


@pytest.mark.usefixtures("whole_batch", "float64")
class TestExactQuadratic:
    @pytest.mark.parametrize("name", MODELLED)
    def test_ratio_is_one(self, name):
        """Identity 21: the prediction leaves damping out, and takes L2 regularisers in."""
        model, x, y = linear_regression(keras.regularizers.L2(0.25) if name == "l2" else None)
        rule = LevenbergMarquardt(initial=0.1, period=1)
        optimizer = KFAC(damping=rule, **EVERY_STEP, **MODELLED[name])
        train(model, optimizer, x, y, 0)
        for _ in range(4):
            model.train_on_batch(x, y)
            assert float(optimizer.reduction_ratio) == pytest.approx(1, abs=1e-8)

    @pytest.mark.parametrize("kind", ["layer", "activity"])
    def test_ratio_counts_what_layers_add(self, kind):
        """A linear loss changes the gradient alone, so that the model is as exact as before."""
        options = {"activity_regularizer": lambda out: 0.7 * tf.reduce_mean(out)}
        model, x, y = linear_regression(**(options if kind == "activity" else {}))
        if kind == "layer":
            model.add(Adding(dtype="float64"))
        optimizer = KFAC(damping=LevenbergMarquardt(initial=0.1, period=1), **EVERY_STEP)
        train(model, optimizer, x, y, 0)
        assert len(model.losses) in (0, 1)
        for _ in range(4):
            model.train_on_batch(x, y)
            assert float(optimizer.reduction_ratio) == pytest.approx(1, abs=1e-8)

    def test_ratio_without_what_layers_add_differs(self, monkeypatch):
        monkeypatch.setattr(gauss_newton, "_added_change", lambda *_: tf.zeros((), tf.float64))
        model, x, y = linear_regression()
        model.add(Adding(dtype="float64"))
        optimizer = KFAC(damping=LevenbergMarquardt(initial=0.1, period=1), **EVERY_STEP)
        train(model, optimizer, x, y, 1)
        assert abs(float(optimizer.reduction_ratio) - 1) > 0.05

    def test_ratio_is_not_one_with_damping_inside(self):
        """The negative half: at the damped minimiser, damping inside makes the ratio exceed 1."""
        matrix, gradient = random_model()
        model = QuadraticModel(matrix, tf.eye(2, dtype=tf.float64), gradient)
        step = minimise(model.damped(0.5), gradient)
        inside = QuadraticModel(model.damped(0.5), model.metric, gradient)
        ratio = step_control.reduction_ratio(model.change(step), inside.change(step))
        assert float(ratio) > 1.05

    def test_ratio_without_the_regulariser_differs(self, monkeypatch):
        monkeypatch.setattr(step_module, "l2_coefficient", lambda variable: 0.0)
        model, x, y = linear_regression(keras.regularizers.L2(0.25))
        optimizer = KFAC(damping=LevenbergMarquardt(initial=0.1, period=1), **EVERY_STEP)
        train(model, optimizer, x, y, 1)
        assert abs(float(optimizer.reduction_ratio) - 1) > 0.05

    def test_undamped_step_is_the_exact_minimiser(self):
        """Along both directions nothing is left to gain, and two steps reach the optimum."""
        model, x, y = linear_regression()
        optimizer = KFAC(damping=0.0, factor_ema_decay=0.0, **EVERY_STEP)
        train(model, optimizer, x, y, 1)
        homogeneous = np.c_[x, np.ones(len(x))]
        solution = np.linalg.lstsq(homogeneous, y, rcond=None)[0]
        assert_close(np.vstack(model.get_weights()), solution, 1e-8)
        assert float(optimizer.learning_rate) == pytest.approx(1, rel=1e-6)

    def test_step_kl_is_half_the_squared_length(self):
        model, x, y = linear_regression()
        before = np.vstack(model.get_weights())
        optimizer = train(model, KFAC(damping=0.1, **EVERY_STEP), x, y, 1)
        step = np.vstack(model.get_weights()) - before
        outputs = np.c_[x, np.ones(len(x))] @ step
        # Keras averages over both outputs: ½ δᵀCδ with C = 2/2 · E[ā āᵀ].
        assert float(optimizer.step_kl) == pytest.approx(0.5 * np.mean(np.sum(outputs**2, 1)))

    def test_signal_share_is_one_without_noise(self):
        model, x, y = linear_regression()
        optimizer = KFAC(damping=1.0, **EVERY_STEP)
        train(model, optimizer, x, y, 4)
        assert float(optimizer.signal_share) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize(("found", "counted"), [(-1e6, 1.0), (1e6, -1.0), (-0.5, 0.5)])
    def test_one_batch_says_no_more_of_noise_than_was_promised(self, found, counted):
        """Two steps promise 1 each; the first keeps half, the second is as given."""
        measure = SignalShare(new_variable)
        step = tf.constant([1.0, 0.0], tf.float64)

        def model(found):
            zeros = tf.zeros([2, 2], tf.float64)
            return QuadraticModel(zeros, zeros, tf.constant([-1.0, found], tf.float64))

        measure.remember(model(0.0), step)
        assert float(measure.measure(model(-0.5))) == pytest.approx(0.5)
        measure.remember(model(0.0), step)
        expected = max((0.98 * 0.5 + counted) / 1.98, 0.01)
        assert float(measure.measure(model(found))) == pytest.approx(expected)

    def test_what_was_promised_before_the_loss_fell_is_forgotten(self):
        """A noisy step promises 100,000 times as much as those after it, which are exact."""
        measure = SignalShare(new_variable)
        step, zeros = tf.constant([1.0, 0.0], tf.float64), tf.zeros([2, 2], tf.float64)

        def share_after(promise, found):
            slopes = tf.constant([[-promise, 0.0], [0.0, -found]], tf.float64)
            measure.remember(QuadraticModel(zeros, zeros, slopes[0]), step)
            return float(measure.measure(QuadraticModel(zeros, zeros, slopes[1])))

        assert share_after(100.0, 0.0) == pytest.approx(0.01)
        assert [share_after(1e-3, 1e-3) for _ in range(200)][-1] > 0.7

    def test_signal_share_is_small_where_gradients_are_noise(self):
        model, x, _ = linear_regression(examples=8)
        optimizer = KFAC(damping=1.0, **EVERY_STEP)
        noise = np.random.default_rng(5).normal(size=(60 * 8, 2))
        loss = keras.losses.MeanSquaredError(dtype="float64")
        helpers.fit(helpers.compiled(model, optimizer, loss), (np.tile(x, (60, 1)), noise))
        assert float(optimizer.signal_share) < 0.5


# ---- Damping ------------------------------------------------------------------------------------


LM_TABLE = {0.1: 2.0, 0.25: 1.0, 0.5: 1.0, 0.75: 1.0, 0.9: 0.5, -0.44: 2.0, float("nan"): 2.0}


@pytest.mark.parametrize(("ratio", "factor"), LM_TABLE.items())
def test_table_of_damping_updates(ratio, factor):
    """Identity 21."""
    new = step_control.levenberg_marquardt(tf.constant(3.0), tf.constant(ratio), 0.5, 1e-3, 1e3)
    assert float(new) == pytest.approx(3 * factor)


@pytest.mark.parametrize(("ratio", "bound"), [(0.9, 2.0), (0.1, 4.0)])
def test_damping_stays_within_its_bounds(ratio, bound):
    new = step_control.levenberg_marquardt(tf.constant(3.0), tf.constant(ratio), 0.5, 2.0, 4.0)
    assert float(new) == bound


@pytest.mark.parametrize(("change", "predicted"), [(-1.0, 0.0), (0.5, 0.4), (float("nan"), -1.0)])
def test_ratio_says_nothing_without_a_predicted_decrease(change, predicted):
    """A fall that the model did not foresee, and a rise that it did, are no good predictions."""
    ratio = step_control.reduction_ratio(tf.constant(change), tf.constant(predicted))
    assert np.isnan(ratio)


def test_damping_changes_every_period_only():
    rule = LevenbergMarquardt(initial=8.0, minimum=1e-9, decay=0.5, period=3)
    optimizer, values = helpers.kfac(damping=rule, momentum=0.0), []
    model = helpers.compiled(helpers.mlp(), optimizer)
    for batch in helpers.batches(helpers.vectors(7 * helpers.BATCH)):
        helpers.train_on_batches(model, batch)
        values.append(float(optimizer.damping))
    assert values[:2] == [8.0, 8.0] and values[2] == values[3] == values[4] != 8.0
    assert values[2] in (8.0 * 0.125, 8.0 / 0.125)
    assert values[5] == values[6] != values[4]


def test_damping_starts_from_the_scale_of_the_loss():
    """A loss that is a hundred times larger has a damping that is, and takes the same steps."""
    runs = []
    for factor in (1.0, 100.0):
        with helpers.precision("float64"):
            model = helpers.compiled(
                helpers.mlp(), helpers.kfac(**helpers.ADAPTIVE, kl_clip=None), loss_weights=[factor]
            )
            helpers.fit(model, helpers.vectors(10 * helpers.BATCH))
        runs.append((helpers.weights(model), float(model.optimizer.damping)))
    assert runs[1][1] == pytest.approx(100 * runs[0][1])
    helpers.assert_same(runs[1][0], runs[0][0], rtol=1e-7)


def rising(reject):
    """An optimizer whose fixed learning rate is far too large."""
    rule = LevenbergMarquardt(initial=1e-3, period=1, reject=reject)
    return helpers.kfac(learning_rate=1e3, damping=rule, kl_clip=None)


def test_rejected_step_leaves_everything_as_it_was():
    model = helpers.compiled(helpers.mlp_with_batch_normalization(), rising(reject=True))
    before = helpers.weights(model)[:2] + helpers.weights(model)[-2:]
    helpers.fit(model, helpers.vectors(3 * helpers.BATCH))
    optimizer = model.optimizer
    assert int(optimizer.rejected_steps) == 3
    helpers.assert_same(helpers.weights(model)[:2] + helpers.weights(model)[-2:], before)
    assert not any(np.any(v) for k, v in helpers.state(optimizer).items() if "velocity" in k)
    assert int(optimizer.fallback.iterations) == 0
    assert float(optimizer.damping) > 1e-3


def test_step_that_raises_the_loss_is_taken_unless_rejected():
    model = helpers.compiled(helpers.mlp(), rising(reject=False))
    before = helpers.weights(model)
    helpers.fit(model, helpers.vectors(3 * helpers.BATCH))
    assert int(model.optimizer.rejected_steps) == 0
    helpers.assert_different(helpers.weights(model), before)


def test_step_to_a_loss_that_is_not_finite_is_always_undone():
    optimizer = helpers.kfac(
        learning_rate=1e38, damping=LevenbergMarquardt(1e-9, period=1), kl_clip=None
    )
    model = helpers.compiled(helpers.mlp(), optimizer, "mse")
    x, y = helpers.vectors(2 * helpers.BATCH)
    helpers.fit(model, (x, np.eye(3)[y]))
    assert int(optimizer.rejected_steps) == 2
    assert all(np.isfinite(w).all() for w in helpers.weights(model))
    assert np.isfinite(float(optimizer.signal_share))


START_TABLE = {0.4: 1 / 0.95**5, 0.1: 1 / 0.95**20, float("nan"): 1 / 0.95**20, 0.6: 1.0}


@pytest.mark.parametrize(("ratio", "factor"), START_TABLE.items())
def test_start_undoes_what_the_model_did_not_foresee_and_raises_the_damping(ratio, factor):
    rule, ratio = LevenbergMarquardt(), tf.constant(ratio, tf.float64)
    damping, scale = tf.constant(8.0, tf.float64), tf.constant(1e-9, tf.float64)
    new = rule.next(damping, ratio, scale, tf.constant(1.0, tf.float64), tf.constant(3))
    assert float(new) == pytest.approx(8.0 * factor)
    accepted = rule.accepts(tf.constant(-1.0), ratio, tf.constant(3))
    assert bool(accepted) == (factor == 1)
    assert bool(rule.accepts(tf.constant(-1.0), ratio, tf.constant(20)))


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (LevenbergMarquardt(), [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 24, 29]),
        (LevenbergMarquardt(period=1), list(range(30))),
        (LevenbergMarquardt(initial=1.0), [4, 9, 14, 19, 24, 29]),
    ],
)
def test_damping_adapts_more_often_while_its_scale_is_not_known(rule, steps):
    assert [step for step in range(30) if rule.is_due(tf.constant(step))] == steps


@pytest.mark.parametrize(("share", "floor"), [(1.0, 0.0), (0.5, 8 / 16), (0.01, 0.99**4 * 8)])
def test_floor_rises_with_the_noise(share, floor):
    """Relative to the mean eigenvalue, here 8."""
    damping = tf.constant(1e-6, tf.float64)
    share = tf.constant(share, tf.float64)
    new = LevenbergMarquardt().next(damping, tf.constant(0.9), tf.constant(8.0), share, 100)
    assert float(new) == pytest.approx(max(floor, 1e-6 * 0.95**5))


# ---- Who is in charge ---------------------------------------------------------------------------


def trained_adaptively(epochs=1, **kwargs):
    model = helpers.compiled(helpers.mlp(), helpers.kfac(**{**helpers.ADAPTIVE, **kwargs}))
    helpers.fit(model, helpers.vectors(6 * helpers.BATCH), epochs=epochs)
    return model


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 0.125), ("momentum", 0.25), ("damping", 0.5)]
)
def test_assigning_fixes_and_adaptive_frees(name, value):
    model = trained_adaptively()
    optimizer, data = model.optimizer, helpers.vectors(6 * helpers.BATCH)
    assert float(getattr(optimizer, name)) > 0 or name == "momentum"
    setattr(optimizer, name, value)
    assert optimizer.get_config()[name] == value
    helpers.fit(model, data)
    assert float(getattr(optimizer, name)) == value
    setattr(optimizer, name, "adaptive")
    helpers.fit(model, data)
    assert float(getattr(optimizer, name)) != value
    restored = KFAC.from_config(optimizer.get_config())
    assert restored.get_config() == optimizer.get_config()
    assert restored.get_config()[name] != value


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "damping"])
def test_what_was_created_fixed_cannot_adapt(name):
    optimizer = helpers.kfac()
    with pytest.raises(ValueError, match=f"created with a fixed `{name}`.*Received: {name}="):
        setattr(optimizer, name, "adaptive")
    with pytest.raises(ValueError, match=f"`{name}` must be a number or 'adaptive'"):
        setattr(optimizer, name, "fast")


def test_reduce_lr_on_plateau_takes_over():
    model = helpers.compiled(helpers.mlp(), helpers.kfac(**helpers.ADAPTIVE))
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=9)
    helpers.fit(model, helpers.vectors(), epochs=3, callbacks=[plateau])
    fixed = float(model.optimizer.learning_rate)
    assert model.optimizer.get_config()["learning_rate"] == fixed > 0


def test_one_of_them_may_be_adaptive():
    for name in helpers.ADAPTIVE:
        model = helpers.compiled(helpers.mlp(), helpers.kfac(**{name: "adaptive"}))
        before = helpers.weights(model)
        helpers.fit(model, helpers.vectors(6 * helpers.BATCH))
        helpers.assert_different(helpers.weights(model), before)
        config = model.optimizer.get_config()
        adaptive = {n for n in helpers.ADAPTIVE if not isinstance(config[n], float)}
        assert adaptive == {name}


def test_momentum_of_an_optimizer_without_velocities_cannot_be_set():
    with pytest.raises(ValueError, match=r"keeps no velocities\. Received: momentum=0.5"):
        helpers.kfac(momentum=0.0).momentum = 0.5


def test_history_shows_what_was_chosen():
    model = helpers.compiled(helpers.mlp(), helpers.kfac(**helpers.ADAPTIVE))
    history = helpers.fit(model, helpers.vectors(6 * helpers.BATCH), epochs=2).history
    for name in ("learning_rate", "momentum", "damping", "reduction_ratio", "step_kl"):
        assert len(history[name]) == 2 and np.isfinite(history[name]).all(), name
    assert history["rejected_steps"] == [0, 0]


BAD_RULES = [
    ({"minimum": 2.0, "maximum": 1.0}, "minimum <= initial <= maximum"),
    ({"initial": 2.0, "maximum": 1.0}, "minimum <= initial <= maximum"),
    ({"initial": -1.0}, "`initial` must be a positive number"),
    ({"decay": 1.0}, r"`decay` must be in \(0, 1\)"),
    ({"decay": 0.0}, r"`decay` must be in \(0, 1\)"),
    ({"period": 0}, "`period` must be a positive int"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_RULES)
def test_bad_damping_rule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message + ".*Received: "):
        LevenbergMarquardt(**arguments)


def test_custom_loop_without_targets_cannot_adapt_the_damping():
    model = helpers.compiled(helpers.mlp(), KFAC())
    with pytest.raises(RuntimeError, match=r"model.compute_loss.* a float as `damping`"):
        helpers.tape_loop(model, helpers.vectors())
    model = helpers.compiled(helpers.mlp(), KFAC(damping=0.1))
    helpers.tape_loop(model, helpers.vectors())
    assert int(model.optimizer.iterations) == 3


def test_callback_is_the_same_step_as_attach():
    weights = []
    for callbacks in ([KFACCallback()], []):
        model = helpers.compiled(helpers.mlp(), helpers.kfac(**helpers.ADAPTIVE))
        model.optimizer.attach(model)
        x, y = helpers.vectors()
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
        weights.append(helpers.weights(model))
    helpers.assert_same(*weights)


def new_variable(*args, dtype="float64", **kwargs):
    return keras.Variable(0.0, dtype=dtype)


class TestTypical:
    """A step is at most four times as long as those before it, on average."""

    def typical(self, *past):
        new = Typical(new_variable, "length")
        for length in past:
            new.remember(tf.constant(length, tf.float64))
        return new

    def cut(self, typical, length):
        length = tf.constant(length, tf.float64)
        return float(length * typical.cut(length))

    def test_long_steps_are_cut_others_are_not(self):
        typical = self.typical(2.0, 2.0)
        assert self.cut(typical, 100.0) == pytest.approx(4 * 2.0)
        assert self.cut(typical, 7.9) == pytest.approx(7.9)

    def test_average_forgets(self):
        mean = (0.8**2 * 1.0 + 0.8 * 2.0 + 3.0) / (0.8**2 + 0.8 + 1)
        assert self.cut(self.typical(1.0, 2.0, 3.0), 1e9) == pytest.approx(4 * mean)

    @pytest.mark.parametrize("past", [(), (0.0,), (np.nan,), (np.inf,), (-1.0,)], ids=str)
    def test_the_first_step_has_no_bound(self, past):
        assert self.cut(self.typical(*past), 1e9) == pytest.approx(1e9)

    @pytest.mark.parametrize("length", [np.nan, 0.0, -1.0])
    def test_what_is_no_length_is_left_alone(self, length):
        assert float(self.typical(1.0).cut(tf.constant(length, tf.float64))) == 1.0

    def fit(self, monkeypatch, growth, **kwargs):
        """The KL divergence of each step; the last batch is a hundred times as large."""
        monkeypatch.setattr(step_rule, "_GROWTH", growth)
        model = helpers.compiled(helpers.mlp(), helpers.kfac(**{**helpers.ADAPTIVE, **kwargs}))
        x, y = helpers.vectors(12 * helpers.BATCH)
        lengths = []
        for i, (inputs, targets) in enumerate(helpers.batches((x, y))):
            helpers.fit(model, (inputs * (100 if i == 11 else 1), targets))
            lengths.append(model.optimizer.last_step()["step_kl"])
        return lengths

    @pytest.mark.parametrize(("slope", "promise"), [(1.0, None), (100.0, 4.0)], ids=str)
    def test_odd_batch_is_not_taken_at_its_word(self, slope, promise):
        """The first step promises 1. The next batch has a steep slope and no more curvature."""
        rule = step_rule.StepRule(new_variable)
        rule.build(lambda name, shape=(), dtype=None: keras.Variable(tf.zeros(shape, dtype)), 2)
        damping, fixed, is_free = tf.constant(0.0, tf.float64), (0.0, 0.0), (True, True)

        def promised(slope):
            metric = tf.constant([[1.0, 0.0], [0.0, 0.0]], tf.float64)
            gradient = tf.constant([-slope, 0.0], tf.float64)
            model = QuadraticModel(metric, metric, gradient)
            coefficients = rule.choose(model, damping, fixed, is_free)
            rule.remember(model, coefficients, tf.constant(True))
            return -float(model.slope(coefficients))

        assert promised(1.0) == pytest.approx(1.0)
        assert promised(slope) == (pytest.approx(promise) if promise else pytest.approx(0.01**0.25))

    def test_bounds_adaptive_steps(self, monkeypatch):
        free = self.fit(monkeypatch, np.inf)
        bounded = self.fit(monkeypatch, 1e-3)
        assert bounded[0] == pytest.approx(free[0], rel=1e-5)
        mean, weight = bounded[0], 1.0
        for kl in bounded[1:]:
            assert kl <= 1e-3 * mean * (1 + 1e-5)
            mean, weight = (0.8 * weight * mean + kl) / (0.8 * weight + 1), 0.8 * weight + 1

    @pytest.mark.parametrize("fixed", [{"learning_rate": 0.01}, {"momentum": 0.5}], ids=str)
    def test_leaves_fixed_values_alone(self, fixed, monkeypatch):
        runs = [self.fit(monkeypatch, growth, **fixed) for growth in (np.inf, 1e-3)]
        np.testing.assert_allclose(*runs)


def overshooting(**kwargs):
    """KFAC whose first step would overshoot: its rate is far too large."""
    rule = LevenbergMarquardt(**kwargs)
    return helpers.kfac(learning_rate=1e4, damping=rule, momentum=0.0, kl_clip=None)


def test_first_steps_look_for_the_scale_of_the_damping_and_undo_what_raises_the_loss():
    model = helpers.compiled(helpers.mlp(), overshooting())
    before = helpers.weights(model)
    first, *others = helpers.batches(helpers.vectors(3 * helpers.BATCH))
    helpers.fit(model, first)
    optimizer = model.optimizer
    start = 10 * float(optimizer._known.curvature.mean_eigenvalue())
    for batch in others:
        helpers.fit(model, batch)
    assert int(optimizer.rejected_steps) == 3
    for old, new in zip(before, helpers.weights(model)):
        np.testing.assert_array_equal(old, new)
    assert float(optimizer.damping) == pytest.approx(start / 0.95 ** (3 * 5))


def test_damping_with_a_given_start_looks_for_nothing():
    model = helpers.compiled(helpers.mlp(), overshooting(initial=8.0))
    helpers.fit(model, helpers.vectors(3 * helpers.BATCH))
    assert float(model.optimizer.damping) == 8.0
    assert int(model.optimizer.rejected_steps) == 0
