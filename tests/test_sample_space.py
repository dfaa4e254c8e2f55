"""The Fisher matrix of all weights by the samples of each batch: no matrix of the weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, KFACCallback, LevenbergMarquardt, laplace
from keras_kfac.curvature import dense, model_curvature
from keras_kfac.introspection.backward_passes import Fisher, backward_passes
from keras_kfac.math.sample_space import AwaitedInverse, RowsInverse, damped_direction
from tests import helpers
from tests import test_joint_curvature as joint
from tests.cases import LOSS, mlp
from tests.reference import assert_close, dense_ggn, relative_difference

layers = keras.layers
MSE = LOSS["mse"].make
DAMPING = joint.DAMPING
FIXED = {"momentum": 0.0, "learning_rate": 1.0, "damping": DAMPING, "kl_clip": None}


@pytest.fixture
def by_samples(monkeypatch):
    """No model is small enough for a matrix."""
    monkeypatch.setattr(dense.DenseBlock, "max_kept", 0)


def solution(fisher, gradient, damping=DAMPING):
    return np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)


# ---- The direction ------------------------------------------------------------------------------


def spread(count, weights, decades=3):
    """Rows whose squared singular values spread over twice so many decades."""
    rng = np.random.default_rng(0)
    size = min(count, weights)
    u, v = (np.linalg.qr(rng.normal(size=(n, size)))[0] for n in (count, weights))
    return u * np.geomspace(1, 10.0**-decades, size) @ v.T


class TestDirection:
    @pytest.mark.parametrize("count", [1, 8, 20, 30])
    @pytest.mark.parametrize("is_known", [True, False])
    def test_is_that_of_the_matrix(self, count, is_known):
        rows, gradient = spread(count, 20), np.random.default_rng(1).normal(size=20)
        spec = tf.TensorSpec([count if is_known else None, 20], tf.float64)
        function = tf.function(damped_direction, input_signature=[spec, *_vector_and_number(20)])
        found = function(rows, gradient, tf.constant(1e-2, tf.float64))
        assert_close(found, solution(rows.T @ rows, gradient, 1e-2), 1e-12)

    def test_gradients_of_the_samples_keep_their_digits(self):
        """Where a difference over the damping loses them: `λ` is 1e-12 of the curvature."""
        rows, coefficients = spread(8, 20, decades=1), np.random.default_rng(1).normal(size=8)
        found = damped_direction(
            tf.constant(rows), tf.constant(rows.T @ coefficients), 1e-12
        ).numpy()
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
        along = s / (s**2 + 1e-12) * (u.T @ coefficients)
        assert_close(vt @ found, along, 1e-12)
        naive = rows.T @ coefficients
        naive -= rows.T @ np.linalg.solve(rows @ rows.T + 1e-12 * np.eye(8), rows @ naive)
        assert not relative_difference(vt @ naive / 1e-12, along) < 1e-6

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("shape", [(40, 900), (900, 40)])
    def test_repeated_samples_without_damping(self, shape, dtype):
        """Singular matrices of both spaces are damped as far as rounding asks for.

        What the samples say nothing of is rounding then, of some percent of the direction.
        """
        rng = np.random.default_rng(0)
        half = rng.normal(size=(shape[0] // 2, shape[1]))
        rows = np.concatenate([half, half]).astype(dtype)
        if shape[0] > shape[1]:
            rows[:, 20:] = rows[:, :20]
        coefficients = rng.normal(size=shape[0])
        gradient = tf.constant(rows.T @ coefficients, dtype)
        found = damped_direction(tf.constant(rows), gradient, 0.0).numpy()
        expected = np.linalg.pinv(rows.astype("float64"), 1e-5) @ coefficients
        assert_close(rows @ found, rows @ expected, 1e-3)
        assert relative_difference(found, expected) < 0.1

    def test_nothing_at_all_is_not_finite(self):
        zero = tf.zeros([2, 5])
        assert not np.isfinite(damped_direction(zero, tf.ones([5]), 0.0)).any()
        assert_close(damped_direction(zero, tf.ones([5]), 0.5), 2 * np.ones(5), 1e-6)

    def test_condition_number_is_a_bound(self):
        rows = spread(8, 20)
        fisher = rows.T @ rows
        for damping in (0.0, 1e-4, 10.0):
            trace = tf.constant(np.trace(fisher))
            bound = AwaitedInverse.of(trace, tf.constant(damping, tf.float64)).condition_number
            if damping:
                assert np.linalg.cond(fisher + damping * np.eye(20)) <= bound
            assert np.isfinite(bound)
        dead = AwaitedInverse.of(tf.constant(0.0), tf.constant(0.0))
        assert float(dead.condition_number) == 1

    def test_in_the_precision_of_the_rows(self):
        """Gradients of another one come as they are: nothing is factorised in bfloat16."""
        rows = tf.constant(spread(4, 9, decades=0), tf.float32)
        gradient = tf.cast(tf.reduce_sum(rows, axis=0)[tf.newaxis], tf.bfloat16)
        found = RowsInverse(rows, tf.constant(0.5, tf.bfloat16)).precondition(gradient)
        assert found.dtype == tf.float32
        expected = damped_direction(rows, tf.cast(gradient, tf.float32)[0], 0.5)
        assert_close(found[0], expected, 1e-6)


def _vector_and_number(size):
    return tf.TensorSpec([size], tf.float64), tf.TensorSpec([], tf.float64)


# ---- Steps --------------------------------------------------------------------------------------


def step_of(model, x, y, sample_weight=None, **options):
    """The step of all weights as a vector, and the gradient."""
    optimizer = helpers.kfac(**(FIXED | {"curvature": "dense", "fisher": "exact"} | options))
    model.compile(optimizer.attach(model), MSE())
    before = model.get_weights()
    with tf.GradientTape() as tape:
        loss = MSE()(y, model(x), sample_weight=sample_weight)
    gradient = tape.gradient(loss, [v.value for v in model.trainable_variables])
    model.train_on_batch(x, y, sample_weight)
    step = [after - b for after, b in zip(model.get_weights(), before)]
    return joint.flat(step), joint.flat(gradient)


FISHERS = [("exact", 1), ("empirical", 1), ("curvature_propagation", 1), ("sampled", 1)]


@pytest.mark.usefixtures("by_samples")
class TestSteps:
    @pytest.mark.parametrize("width", [4, 2], ids=["fewer samples", "fewer weights"])
    def test_is_that_of_the_fisher_matrix(self, width):
        """27 samples (3 outputs of 9 examples), and 39 weights or 21."""
        model, (x, y) = mlp((5, width, 3)), joint.data()
        fisher = dense_ggn(model, MSE(), x, y, model.trainable_variables)
        step, gradient = step_of(model, x, y)
        assert_close(step, -solution(fisher, gradient))

    def test_layers_of_several_kinds(self):
        """Convolution, normalisation, and a layer that is called twice."""
        model, rng = joint.branched(), np.random.default_rng(0)
        x, y = rng.normal(size=(3, 4, 4, 1)), rng.normal(size=(3, 2))
        fisher = dense_ggn(model, MSE(), x, y, model.trainable_variables, pfor=False)
        step, gradient = step_of(model, x, y)
        assert_close(step, -solution(fisher, gradient))

    def test_positions(self):
        """A row for each output at each position, of which there are no cross terms."""
        keras.utils.set_random_seed(0)
        model, rng = mlp((5, 4, 2)), np.random.default_rng(0)
        model = keras.Sequential([keras.Input((3, 5), dtype="float64"), *model.layers])
        x, y = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 2))
        fisher = dense_ggn(model, MSE(), x, y, model.trainable_variables)
        step, gradient = step_of(model, x, y)
        assert_close(step, -solution(fisher, gradient))

    @pytest.mark.parametrize("fisher", ["exact", "sampled"])
    def test_sample_weights(self, fisher):
        """What counts nothing has rows of zeros, and what counts twice is as if it came twice."""
        model, (x, y) = mlp((5, 4, 1)), joint.data(outputs=1)
        weight = np.array([2.0, 0, 1, 1, 0, 0.5, 1, 3, 1])
        options = {"fisher": fisher}
        if fisher == "exact":
            variables = model.trainable_variables
            matrix = dense_ggn(model, MSE(), x, y, variables, sample_weight=weight)
            step, gradient = step_of(model, x, y, weight, **options)
            assert_close(step, -solution(matrix, gradient))
            return
        step, _ = step_of(model, x, y, weight, **options)
        other, (own_x, own_y) = mlp((5, 4, 1)), (x.copy(), y.copy())
        own_x[[1, 4]] = 7.0
        own_y[[1, 4]] = -7.0
        assert_close(step, step_of(other, own_x, own_y, weight, **options)[0])

    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
    def test_empirical(self, reduction):
        """Rows are gradients of single examples, over the root of `w = 2/3` of `-w log r`."""
        model, (x, y) = mlp((5, 4, 3)), joint.data()
        loss = MSE(reduction)
        rows = []
        for i in range(len(x)):
            with tf.GradientTape() as tape:
                value = MSE()(y[i : i + 1], model(x[i : i + 1]))
            gradient = tape.gradient(value, [v.value for v in model.trainable_variables])
            rows.append(joint.flat(gradient) * np.sqrt(3 / 2))
        rows = np.stack(rows)
        share = 1 / len(x) if reduction == "sum_over_batch_size" else 1.0
        optimizer = helpers.kfac(**FIXED, curvature="dense", fisher="empirical")
        model.compile(optimizer.attach(model), loss)
        before = model.get_weights()
        model.train_on_batch(x, y)
        step = joint.flat([a - b for a, b in zip(model.get_weights(), before)])
        gradient = share * np.sqrt(2 / 3) * rows.sum(0)
        assert_close(step, -solution(share * rows.T @ rows, gradient))

    @pytest.mark.parametrize(("fisher", "samples"), [*FISHERS, ("sampled", 3)])
    def test_is_the_one_that_the_matrix_makes(self, fisher, samples, monkeypatch):
        """With the same draws: of so small a batch the matrix, too, knows all."""
        options = {"fisher": fisher, "fisher_samples": samples}
        found, _ = step_of(mlp((5, 4, 3)), *joint.data(), **options)
        monkeypatch.setattr(dense.DenseBlock, "max_kept", 4096)
        expected, _ = step_of(mlp((5, 4, 3)), *joint.data(), **options)
        assert_close(found, expected)

    @pytest.mark.parametrize("fisher", ["exact", "empirical"])
    def test_several_outputs(self, fisher, monkeypatch):
        """Rows of both, and signs between them where the Fisher matrix is the empirical one."""

        def step(limit):
            monkeypatch.setattr(dense.DenseBlock, "max_kept", limit)
            keras.utils.set_random_seed(0)
            inputs = keras.Input((5,), dtype="float64")
            trunk = layers.Dense(4, "tanh", dtype="float64")(inputs)
            heads = [layers.Dense(n, dtype="float64")(trunk) for n in (3, 2)]
            model = keras.Model(inputs, heads)
            optimizer = helpers.kfac(**FIXED, curvature="dense", fisher=fisher)
            model.compile(optimizer.attach(model), [MSE(), MSE()], loss_weights=[1.0, 2.0])
            before = model.get_weights()
            x, y = joint.data()
            model.train_on_batch(x, [y, y[:, :2]])
            return joint.flat([a - b for a, b in zip(model.get_weights(), before)])

        assert_close(step(0), step(4096))

    def test_factors_of_before_do_not_count(self):
        """The matrix is that of the step's own batch, whatever was averaged."""
        model, (x, y) = mlp((5, 4, 3)), joint.data(18)
        options = {"factor_ema_decay": 0.99, "factor_update_period": 5}
        step_of(model, x[:9], y[:9], **options, inverse_update_period=5)
        before = model.get_weights()
        fisher = dense_ggn(model, MSE(), x[9:], y[9:], model.trainable_variables)
        with tf.GradientTape() as tape:
            loss = MSE()(y[9:], model(x[9:]))
        gradient = tape.gradient(loss, [v.value for v in model.trainable_variables])
        model.train_on_batch(x[9:], y[9:])
        step = joint.flat([a - b for a, b in zip(model.get_weights(), before)])
        assert_close(step, -solution(fisher, joint.flat(gradient)))

    def test_l2_regularisers_are_damping(self):
        with helpers.precision("float64"):
            kernel = keras.regularizers.L2(0.125)
            layer = layers.Dense(3, use_bias=False, kernel_regularizer=kernel)
            model = keras.Sequential([keras.Input((5,)), layer])
            x, y = joint.data()
            fisher = dense_ggn(model, MSE(), x, y, model.trainable_variables)
            weights = np.ravel(layer.kernel.numpy())
            step, gradient = step_of(model, x, y)
        expected = -solution(fisher, gradient + 0.25 * weights, DAMPING + 0.25)
        assert_close(step, expected)


def test_draws_differ_and_are_the_same_again(by_samples, monkeypatch):
    """From step to step; with the same seed they come again, with another one not."""
    real = model_curvature.fisher_rows

    def rows_of(seed):
        seen = []

        def spy(*arguments):
            found = real(*arguments)
            seen.extend(rows.numpy() for rows in found.values())
            return found

        monkeypatch.setattr(model_curvature, "fisher_rows", spy)
        model = mlp((5, 4, 3))
        options = FIXED | {"learning_rate": 0.0, "fisher": "sampled", "seed": seed}
        model.compile(KFAC(curvature="dense", **options).attach(model), MSE(), run_eagerly=True)
        for _ in range(2):
            model.train_on_batch(*joint.data())
        return seen

    first, again, other = rows_of(0), rows_of(0), rows_of(1)
    assert [rows.shape for rows in first] == [(9, 39)] * 2
    helpers.assert_same(first, again)
    assert not np.allclose(np.abs(first[0]), np.abs(first[1]))
    assert not np.allclose(np.abs(first[0]), np.abs(other[0]))


def test_rows_are_made_where_they_are_needed_only(by_samples, monkeypatch):
    """Once for all directions of a step."""
    calls = []
    real = model_curvature.fisher_rows
    monkeypatch.setattr(
        model_curvature, "fisher_rows", lambda *args: calls.append(args) or real(*args)
    )
    rule = LevenbergMarquardt("calibrated", adapt_preconditioner=True)
    tries_dampings = helpers.ADAPTIVE | {"damping": rule}
    for curvature, options, expected in (("kfac", {}, 0), ("dense", tries_dampings, 1)):
        model = helpers.compiled(helpers.mlp(), helpers.kfac(curvature=curvature, **options))
        helpers.fit(model, helpers.vectors())
        assert len(calls) == expected
        helpers.assert_all_finite(model)


# ---- Training -----------------------------------------------------------------------------------


def after_fit(data, batch_size, static, jit_compile=False, widths=(2, 1, 3)):
    """Weights after an epoch in batches, the last of them smaller; the shapes known or not."""
    options = FIXED | {"learning_rate": 0.3, "fisher": "exact"}
    with helpers.precision("float64"):  # In which `fit` hands over the data.
        model = mlp(widths)
        optimizer = helpers.kfac(curvature="dense", **options)
        model.compile(optimizer.attach(model), MSE(), jit_compile=jit_compile)
        if static:
            helpers.train_on_batches(model, data, size=batch_size)
        else:
            helpers.fit(model, data, batch_size=batch_size)
    return joint.flat(model.get_weights())


@pytest.mark.usefixtures("by_samples")
class TestTraining:
    def test_batches_of_unknown_size(self):
        """Of 9 weights: batches of 4 examples have 12 samples, the last one has 3."""
        data = joint.data(9, inputs=2)
        assert_close(after_fit(data, 4, static=False), after_fit(data, 4, static=True))

    def test_compiled_by_xla(self):
        data = joint.data(9, inputs=2)
        compiled = after_fit(data, 4, static=False, jit_compile=True)
        assert_close(compiled, after_fit(data, 4, static=False), 1e-9)

    @pytest.mark.parametrize(
        ("fisher", "policy"),
        [
            ("sampled", "float32"),
            pytest.param("exact", "mixed_float16", marks=pytest.mark.slow),
            ("empirical", "mixed_bfloat16"),
        ],
    )
    def test_learns(self, fisher, policy):
        optimizer = helpers.kfac(curvature="dense", fisher=fisher, **helpers.ADAPTIVE)
        with helpers.precision(policy):
            model = helpers.mlp_with_batch_normalization()
            helpers.compiled(model, optimizer)
            history = helpers.fit(model, helpers.vectors(), epochs=10).history["loss"]
        assert history[-1] < 0.7 * history[0]
        helpers.assert_all_finite(model)
        assert not optimizer._built.curvature.failed_refreshes()
        assert optimizer.last_step()["condition_number"] > 1
        assert set(optimizer.staleness().values()) == {0.0}
        assert optimizer.curvature_summary() == []

    def test_resumed_training_is_the_same_bit_for_bit(self, tmp_path):
        def make(steps):
            model = helpers.compiled(helpers.mlp(), helpers.kfac(curvature="dense"))
            helpers.fit_steps(model, 0, steps, helpers.vectors)
            return model

        model = make(3)
        model.save(tmp_path / "model.keras")
        restored = keras.saving.load_model(tmp_path / "model.keras")
        for continued in (model, restored):
            helpers.fit_steps(continued, 3, 6, helpers.vectors)
        helpers.assert_same(helpers.weights(restored), helpers.weights(model))
        helpers.assert_same(
            helpers.state(helpers.inner(restored)), helpers.state(helpers.inner(model))
        )

    def test_accumulated_gradients_meet_the_last_micro_batch(self):
        """The Fisher matrix is that of the second half, the gradient that of both."""
        model, (x, y) = mlp((5, 4, 3)), joint.data(18)
        variables = model.trainable_variables
        fisher = dense_ggn(model, MSE(), x[9:], y[9:], variables)
        with tf.GradientTape() as tape:
            loss = MSE()(y, model(x))
        gradient = joint.flat(tape.gradient(loss, [v.value for v in variables]))
        options = FIXED | {"fisher": "exact", "gradient_accumulation_steps": 2}
        optimizer = helpers.kfac(curvature="dense", **options)
        model.compile(optimizer.attach(model), MSE())
        before = model.get_weights()
        for half in (slice(0, 9), slice(9, 18)):
            model.train_on_batch(x[half], y[half])
        step = joint.flat([a - b for a, b in zip(model.get_weights(), before)])
        assert_close(step, -solution(fisher, gradient))

    def test_batches_that_tell_nothing_are_reported(self):
        """Undamped: the gradient, which is zero, is passed on."""
        model, (x, y) = mlp((5, 4, 3)), joint.data()
        optimizer = helpers.kfac(**FIXED | {"damping": 0.0}, curvature="dense", fisher="exact")
        model.compile(optimizer, MSE())
        before = model.get_weights()
        with pytest.warns(UserWarning, match=r"could not be inverted.*: 1"):
            model.fit(x, y, sample_weight=np.zeros(9), verbose=0, callbacks=[KFACCallback()])
        helpers.assert_same(model.get_weights(), before)

    def test_a_refused_direction_is_the_gradient(self):
        model, (x, y) = mlp((5, 4, 3)), joint.data()
        step_of(model, x, y)
        curvature = model.optimizer._known.curvature
        (block,) = curvature.blocks
        gradients = {id(v): tf.ones(v.shape, v.dtype) for v in model.trainable_variables}
        rows = {id(block.adapter): tf.fill([2, 39], tf.constant(np.inf, tf.float64))}
        ((directions, _),) = curvature.precondition(gradients, fisher_rows=rows)
        for key, direction in directions.items():
            np.testing.assert_array_equal(direction, gradients[key])
        assert list(curvature.failed_refreshes().values()) == [1]


# ---- Where it is, and where it can't be ---------------------------------------------------------


def scientific(width=64):
    keras.utils.set_random_seed(0)
    own = {"dtype": "float64"}
    hidden = [layers.Dense(width, "tanh", **own) for _ in range(2)]
    return keras.Sequential([keras.Input((1,), **own), *hidden, layers.Dense(1, **own)])


def test_large_models_keep_no_matrix():
    """4,353 weights; 4,096 and less have one."""
    model = scientific()
    model.compile(KFAC(curvature="dense").attach(model), "mse")
    coverage = model.optimizer.coverage()
    assert [row.block for row in coverage] == ["sample_space"] * 3
    reason = "4,353 weights, by the samples of each batch: no matrix is kept"
    assert {row.reason for row in coverage} == {reason}
    assert coverage.memory == 4 * 8
    small = scientific(62)
    small.compile(KFAC(curvature="dense").attach(small), "mse")
    assert small.count_params() == 62 * 62 + 62 * 4 + 1 == 4093
    assert small.optimizer.coverage().memory > 2 * 8 * 4093**2
    assert {row.reason for row in small.optimizer.coverage()} == {""}


def test_small_models_keep_no_matrix_where_the_user_says_so():
    """The same step as that of the matrix of the batch."""
    (x, y), found = helpers.vectors(), []
    options = FIXED | {"damping": 1e-3, "factor_ema_decay": 0.0, "fisher": "exact"}
    for curvature, kept in (("sample_space", 4 * 8), ("dense", 4 * (3 * 39 * 39))):
        keras.utils.set_random_seed(0)
        model = helpers.compiled(helpers.mlp(), helpers.kfac(curvature=curvature, **options))
        optimizer = helpers.inner(model).attach(model)
        assert {row.block for row in optimizer.coverage()} == {curvature}
        assert optimizer.coverage().memory < kept
        model.train_on_batch(x, y)
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    assert_close(found[0], found[1], 1e-4)


@pytest.mark.slow
def test_reaches_what_first_order_methods_do_not():
    """A function of one variable at 64 points, 4,353 weights: 60 steps to 1e-10, and to 0.16."""
    x = np.linspace(-1, 1, 64)[:, np.newaxis]
    y = np.sin(3 * x)

    def loss_of(optimizer):
        with helpers.precision("float64"):
            model = scientific()
            model.compile(optimizer, MSE())
            callbacks = [KFACCallback()] if isinstance(optimizer, KFAC) else []
            model.fit(x, y, 64, epochs=60, shuffle=False, verbose=0, callbacks=callbacks)
        return float(MSE()(y, model(x)))

    assert loss_of(KFAC(curvature="dense", fisher="exact", damping=1e-6)) < 1e-7
    assert min(loss_of(keras.optimizers.Adam(rate)) for rate in (1e-3, 1e-2)) > 0.1


@pytest.mark.usefixtures("by_samples")
class TestRefusals:
    def test_without_gradients_there_are_no_rows(self):
        """`KFAC` says so when it is made."""
        with pytest.raises(ValueError, match=r"no gradients.*Received: curvature='dense'"):
            KFAC(curvature="dense", fisher="forward_only")
        with pytest.raises(ValueError, match=r"no gradients.*Received: fisher='forward_only'"):
            backward_passes(None, Fisher.FORWARD_ONLY, 1, None)

    def test_posteriors_need_the_matrix(self):
        model = helpers.compiled(helpers.mlp())
        with pytest.raises(ValueError, match=r"keeps none.*Received: 39 weights of '.*hidden"):
            laplace(model, helpers.vectors()[0], curvature="dense")
