"""Whitening as a reparametrisation: the function stays, and which preconditioner it amounts to."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, Whitening, WhiteningCallback, rewhiten
from keras_kfac._keras_internals import mask_of
from keras_kfac.whitening import MODES
from tests import helpers
from tests.reference import assert_close, relative_difference

layers = keras.layers
EPSILON = 1e-2
LEARNING_RATE = 0.1


@pytest.fixture(autouse=True)
def _in_float64():
    with helpers.precision("float64"):
        keras.utils.set_random_seed(0)
        yield


def correlated(*shape, seed=0):
    """Inputs far from their origin, of different scales, and correlated: `[..., 4]`."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(4, 4)) * np.array([3.0, 1.0, 0.5, 0.2])
    return rng.normal(size=(*shape, 4)) @ mixing + np.array([2.0, -1.0, 0.5, 3.0])


def targets(examples, units=3):
    return np.random.default_rng(1).normal(size=(examples, units))


def gradients(model, x, y, training=False):
    """Of the mean squared error, by the trained weights."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=training) - y))
    return tape.gradient(loss, [v.value for v in model.trainable_variables])


def descend(model, x, y, learning_rate=LEARNING_RATE):
    """A step of gradient descent."""
    for v, gradient in zip(model.trainable_variables, gradients(model, x, y)):
        v.assign_sub(learning_rate * gradient)


def network(*make_before, widths=(5, 4, 3)):
    """A tanh network; what is made goes before each of its dense layers."""
    body = []
    for width in widths:
        activation = "linear" if width == widths[-1] else "tanh"
        body += [*(make() for make in make_before), layers.Dense(width, activation)]
    model = keras.Sequential([keras.Input((4,)), *body])
    rng = np.random.default_rng(2)
    for layer in dense_layers(model):
        layer.set_weights([rng.normal(size=v.shape) / 2 for v in layer.weights])
    return model


def dense_layers(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Dense)]


def weights_below(whitening, dense):
    """`[W; b]` in plain coordinates, of what is a dense layer in those of the layer before."""
    kernel, bias = dense.get_weights()
    mean = whitening.mean.numpy()
    matrix = np.eye(len(mean)) if whitening.matrix is None else whitening.matrix.numpy()
    kernel = (matrix if matrix.ndim == 2 else np.diag(matrix)) @ kernel
    return np.vstack([kernel, bias - mean @ kernel])


def plain_weights(model):
    """`[W; b]` of all dense layers of a network with or without whitening."""
    found = []
    for before, layer in zip([None, *model.layers], model.layers):
        if isinstance(layer, layers.Dense):
            is_white = isinstance(before, Whitening)
            found.append(
                weights_below(before, layer) if is_white else np.vstack(layer.get_weights())
            )
    return found


READERS = {
    "dense": ((4,), lambda: [layers.Dense(3, "tanh")]),
    "dense on a sequence": ((5, 4), lambda: [layers.Dense(3, "tanh")]),
    "two readers": ((4,), lambda: [layers.Dense(3), layers.Dense(3, "tanh")]),
    "heads": ((5, 4), lambda: [layers.EinsumDense("btd,dhk->bthk", (5, 2, 3), bias_axes="hk")]),
    "groups": ((5, 4), lambda: [layers.EinsumDense("bgd,gdk->bgk", (5, 3), bias_axes="gk")]),
    "1x1": ((5, 6, 4), lambda: [layers.Conv2D(3, 1, strides=2, padding="same")]),
    "3x2": ((5, 6, 4), lambda: [layers.Conv2D(3, (3, 2), dilation_rate=2, activation="tanh")]),
    "conv1d": ((6, 4), lambda: [layers.Conv1D(3, 2)]),
}


class TestFunction:
    """It stays, whatever the layer is."""

    @pytest.mark.parametrize(
        ("case", "mode"),
        [*((case, "full") for case in READERS), ("3x2", "diagonal"), ("3x2", "centring")],
    )
    def test_stays_and_inputs_become_white(self, case, mode):
        shape, make = READERS[case]
        readers = make()
        start = keras.Input(shape)
        whitening = Whitening(mode, epsilon=0.0)
        white = whitening(start)
        model = keras.Model(start, [reader(white) for reader in readers])
        for reader in readers:
            reader.set_weights(
                [np.random.default_rng(3).normal(size=v.shape) for v in reader.weights]
            )
        x, other = correlated(30, *shape[:-1]), correlated(7, *shape[:-1], seed=5)
        before = model(other)
        for part in (x, x[:20] ** 2):  # From coordinates that are not the plain ones, too.
            rewhiten(model, part)
            for after, expected in zip(tf.nest.flatten(model(other)), tf.nest.flatten(before)):
                assert_close(after, expected)
            z = np.reshape(whitening(part), (-1, 4))
            np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)
            covariance = z.T @ z / len(z)
            wanted = {"full": np.eye(4), "diagonal": np.ones(4)}.get(mode, covariance)
            found = np.diag(covariance) if mode == "diagonal" else covariance
            np.testing.assert_allclose(found, wanted, atol=1e-10)
        assert relative_difference(whitening(x), x) > 0.1

    def test_masked_positions_do_not_count(self):
        x = correlated(20, 5)
        padded = np.concatenate([x, np.full((20, 3, 4), -7.0)], axis=1)
        found = []
        for inputs, make_before in ((x, []), (padded, [layers.Masking(-7.0)])):
            whitening = Whitening()
            model = keras.Sequential(
                [keras.Input((None, 4)), *make_before, whitening, layers.Dense(2)]
            )
            rewhiten(model, inputs)
            found.append(whitening.get_weights())
        assert_close(found[1][0], found[0][0])
        assert_close(found[1][1], found[0][1])
        masked = model.layers[0](padded)
        assert mask_of(whitening(masked)) is mask_of(masked) is not None

    def test_of_a_nested_model(self):
        inner = network(Whitening, widths=(3,))
        model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])
        x = correlated(20)
        before = model(x)
        rewhiten(model, x)
        assert_close(model(x), before)
        np.testing.assert_allclose(inner.layers[0].mean, x.mean(0))


def second_moment(x, mode, epsilon):
    """`[[S + ε I + c cᵀ, c], [cᵀ, 1]]`, where `S` is what a mode takes for the covariance."""
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    kept = {
        "full": covariance + epsilon * np.eye(len(mean)),
        "diagonal": np.diag(np.diag(covariance) + epsilon),
        "centring": np.eye(len(mean)),
    }
    matrix = np.empty((len(mean) + 1,) * 2)
    matrix[:-1, :-1] = kept[mode] + np.outer(mean, mean)
    matrix[:-1, -1] = matrix[-1, :-1] = mean
    matrix[-1, -1] = 1
    return matrix


class TestStep:
    """A step of gradient descent in new coordinates is a preconditioned one in the old."""

    def steps(self, mode):
        """The step of `[W; b]`, the gradient by these, and the inputs."""
        x, y = correlated(40), targets(40)
        model, plain = network(lambda: Whitening(mode, EPSILON), widths=(3,)), network(widths=(3,))
        rewhiten(model, x)
        assert_close(plain_weights(model)[0], plain_weights(plain)[0])
        gradient = np.vstack([np.atleast_2d(g) for g in gradients(plain, x, y)])
        before = plain_weights(model)[0]
        descend(model, x, y)
        return plain_weights(model)[0] - before, gradient, x

    @pytest.mark.parametrize("mode", MODES)
    def test_is_preconditioned_by_the_second_moment(self, mode):
        step, gradient, x = self.steps(mode)
        for other in MODES:
            matrix = second_moment(x, other, EPSILON)
            expected = -LEARNING_RATE * np.linalg.solve(matrix, gradient)
            if other == mode:
                assert_close(step, expected)
            else:
                assert relative_difference(step, expected) > 0.1

    def test_full_is_the_damped_input_factor_where_the_bias_is_not_damped(self):
        step, gradient, x = self.steps("full")
        homogeneous = np.c_[x, np.ones(len(x))]
        factor = homogeneous.T @ homogeneous / len(x)
        damped = factor + EPSILON * np.diag([1, 1, 1, 1, 0])
        assert_close(step, -LEARNING_RATE * np.linalg.solve(damped, gradient))
        damped[-1, -1] += EPSILON
        other = -LEARNING_RATE * np.linalg.solve(damped, gradient)
        assert relative_difference(step, other) > 1e-3

    def test_without_centring_it_is_another_step(self):
        """`(Σ + c cᵀ)⁻¹` for the kernel and 1 for the bias."""
        step, gradient, x = self.steps("full")
        moment = x.T @ x / len(x) + EPSILON * np.eye(4)
        uncentred = np.vstack([np.linalg.solve(moment, gradient[:-1]), gradient[-1:]])
        assert relative_difference(step, -LEARNING_RATE * uncentred) > 0.1


def kfac(**options):
    settings = {"damping": 0.0, "momentum": 0.0, "kl_clip": None, "fisher": "exact"}
    periods = {"factor_update_period": 1, "inverse_update_period": 1}
    return KFAC(**{"learning_rate": LEARNING_RATE, **settings, **periods, **options})


def kfac_steps(model, x, y, **options):
    """The steps of `[W; b]` of all layers, and the optimizer."""
    model.compile(kfac(**options).attach(model, "mse"), "mse", run_eagerly=True)
    before = plain_weights(model)
    model.train_on_batch(x, y)
    return [a - b for a, b in zip(plain_weights(model), before)], model.optimizer


class TestStructure:
    """Beside `KFAC(curvature="input")`, whose block is `A ⊗ g I`."""

    def test_whitened_descent_is_the_undamped_structure(self):
        """But for the mean eigenvalue `g` of the output factor, a learning rate of each layer."""
        x, y = correlated(60), targets(60)
        model = network(lambda: Whitening(epsilon=0.0))
        steps, optimizer = kfac_steps(network(), x, y, curvature="input")
        rewhiten(model, x)
        before = plain_weights(model)
        descend(model, x, y)
        scales = [g.item() for g in helpers.named(optimizer, "output_factor").values()]
        assert len(scales) == 3
        for step, scale, after, start in zip(steps, scales, plain_weights(model), before):
            assert_close(scale * step, after - start, 1e-9)

    @pytest.mark.parametrize(
        ("curvature", "is_equal"), [("kfac", True), ("input", True), ("diagonal", False)]
    )
    def test_of_the_whitened_network_makes_the_same_step(self, curvature, is_equal):
        """K-FAC whitens already. Its block of each layer is there, whatever lies between."""
        x, y = correlated(60), targets(60)
        model = network(lambda: Whitening(epsilon=0.0))
        rewhiten(model, x)
        expected, _ = kfac_steps(network(), x, y, curvature=curvature)
        steps, optimizer = kfac_steps(model, x, y, curvature=curvature)
        covered = {(row.layer_type, row.block) for row in optimizer.coverage()}
        kind = "kronecker" if curvature == "kfac" else curvature
        assert covered == {("Whitening", "frozen"), ("Dense", kind)}
        for step, other in zip(steps, expected):
            if is_equal:
                assert_close(step, other, 1e-9)
            else:
                assert relative_difference(step, other) > 0.1


MAPS = {
    "rotations": (np.linalg.qr(np.random.default_rng(8).normal(size=(4, 4)))[0], np.zeros(4)),
    "shifts": (np.eye(4), np.array([5.0, -2.0, 1.0, 3.0])),
    "scales": (np.diag([3.0, 0.2, 1.0, 7.0]), np.array([5.0, -2.0, 1.0, 3.0])),
    "affine": (np.random.default_rng(9).normal(size=(4, 4)), np.array([5.0, -2.0, 1.0, 3.0])),
}


class TestInvariance:
    """Paths of functions where inputs are given in other units."""

    @pytest.mark.parametrize(
        ("mode", "kind", "is_invariant"),
        [
            (None, "rotations", True),
            (None, "shifts", False),
            ("centring", "rotations", True),
            ("centring", "shifts", True),
            ("centring", "scales", False),
            ("diagonal", "scales", True),
            ("diagonal", "rotations", False),
            ("full", "affine", True),
        ],
    )
    def test_is_as_the_mode_promises(self, mode, kind, is_invariant):
        matrix, shift = MAPS[kind]
        x, y = correlated(60), targets(60)
        paths = []
        for inputs, change in ((x, False), (x @ matrix + shift, True)):
            model = network(*[lambda: Whitening(mode, epsilon=0.0)] * (mode is not None))
            first = dense_layers(model)[0]
            if change:  # The same function of the other inputs.
                kernel, bias = first.get_weights()
                kernel = np.linalg.solve(matrix, kernel)
                first.set_weights([kernel, bias - shift @ kernel])
            for _ in range(3):
                if mode is not None:
                    rewhiten(model, inputs)
                descend(model, inputs, y, 0.3)
            paths.append(model(inputs).numpy())
        assert relative_difference(paths[0], network()(x)) > 0.01
        if is_invariant:
            assert_close(paths[1], paths[0], 1e-9)
        else:
            assert relative_difference(paths[1], paths[0]) > 1e-2


def normalised(x, **options):
    """Batch normalisation with the statistics of a batch as its moving ones."""
    norm = layers.BatchNormalization(epsilon=EPSILON, **options)
    norm.build(x.shape)
    norm.moving_mean.assign(x.mean(0))
    norm.moving_variance.assign(x.var(0))
    return norm


class TestBatchNormalization:
    """Where it stands beside whitening, and what of it has no place there."""

    def steps(self, norm):
        """Of a dense layer after batch normalisation and after whitening; outputs of both."""
        x, y = correlated(40), targets(40)
        white = network(lambda: Whitening("diagonal", EPSILON), widths=(3,))
        model = network(lambda: norm(x), widths=(3,))
        rewhiten(white, x)
        model.layers[1].set_weights(white.layers[1].get_weights())
        assert_close(model(x), white(x))
        found = []
        for each in (model, white):
            before = np.vstack(each.layers[1].get_weights())
            descend(each, x, y)
            found.append(np.vstack(each.layers[1].get_weights()) - before)
        return *found, model(x), white(x)

    def test_with_fixed_statistics_is_the_diagonal_mode(self):
        step, expected, outputs, white_outputs = self.steps(
            lambda x: normalised(x, center=False, scale=False)
        )
        assert_close(step, expected)
        assert_close(outputs, white_outputs)

    def test_scale_and_offset_make_a_longer_step_of_the_function(self):
        """They are a second set of coordinates for what the dense layer can do as well."""
        step, expected, outputs, white_outputs = self.steps(normalised)
        assert_close(step, expected)
        assert relative_difference(outputs, white_outputs) > 1e-2

    def test_statistics_of_the_batch_project_the_gradient(self):
        """Of each unit, on what neither shifts nor stretches it."""
        x, y = correlated(40), targets(40, 4)
        norm = normalised(x, center=False, scale=False)
        norm.epsilon = 0.0
        found = []
        for training in (False, True):
            inputs = tf.constant(x)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                z = norm(inputs, training=training)
                loss = tf.reduce_sum(z * y)
            found.append(tape.gradient(loss, inputs).numpy())
        fixed, through_statistics = found
        for unit in range(4):
            directions = np.c_[np.ones(40), z[:, unit]]
            projection = np.eye(40) - directions @ np.linalg.pinv(directions)
            assert_close(through_statistics[:, unit], projection @ fixed[:, unit], 1e-9)
            assert relative_difference(through_statistics[:, unit], fixed[:, unit]) > 0.05

    def test_statistics_of_the_batch_take_the_length_out_of_weights(self):
        """Gradients are orthogonal to weights, and as short as these are long."""
        x, y = correlated(40), targets(40)
        found = []
        for scale in (1.0, 2.0):
            norm = layers.BatchNormalization(epsilon=0.0)
            first = layers.Dense(5)
            model = keras.Sequential(
                [keras.Input((4,)), first, norm, layers.Activation("tanh"), layers.Dense(3)]
            )
            rng = np.random.default_rng(2)
            for layer in dense_layers(model):
                layer.set_weights([rng.normal(size=v.shape) for v in layer.weights])
            first.kernel.assign(scale * first.kernel)
            kernel, bias = gradients(model, x, y, training=True)[:2]
            np.testing.assert_allclose(tf.reduce_sum(kernel * first.kernel, 0), 0, atol=1e-12)
            np.testing.assert_allclose(bias, 0, atol=1e-12)
            found.append(kernel)
        assert_close(2 * found[1], found[0])


class TestLifeCycle:
    def test_is_saved_with_its_statistics(self, tmp_path):
        model = network(lambda: Whitening("diagonal", 0.5))
        x = correlated(20)
        rewhiten(model, x)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert_close(loaded(x), model(x))
        assert (loaded.layers[2].mode, loaded.layers[2].epsilon) == ("diagonal", 0.5)
        np.testing.assert_array_equal(loaded.layers[2].matrix, model.layers[2].matrix)

    def test_callback_whitens_every_few_batches(self):
        """A model that is not built before `fit` takes the path of a loop."""
        x, y = correlated(24), targets(24)
        expected = network(Whitening, widths=(3,))
        model = keras.Sequential([Whitening(), layers.Dense(3)])
        model.layers[1].build((None, 4))
        model.layers[1].set_weights(expected.layers[1].get_weights())
        model.compile("sgd", keras.losses.MeanSquaredError(dtype="float64"))
        callback = WhiteningCallback(x, period=2)
        model.fit(x, y, 8, epochs=2, verbose=0, shuffle=False, callbacks=[callback])
        for step in range(6):
            if step % 2 == 0:
                rewhiten(expected, x)
            part = slice(8 * (step % 3), 8 * (step % 3) + 8)
            descend(expected, x[part], y[part], 0.01)
        rewhiten(expected, x)
        assert_close(
            np.vstack(model.layers[1].get_weights()), np.vstack(expected.layers[1].get_weights())
        )

    def test_of_mixed_precision_keeps_its_statistics_in_single(self):
        with helpers.precision("mixed_bfloat16"):
            model = network(Whitening, widths=(3,))
            rewhiten(model, correlated(20).astype("float32"))
        assert model.layers[0](np.ones((1, 4))).dtype == "bfloat16"
        np.testing.assert_allclose(model.layers[0].mean, correlated(20).mean(0), rtol=1e-2)


def after_whitening(*body, shape=(4,)):
    return lambda: keras.Sequential([keras.Input(shape), Whitening(), *(make() for make in body)])


def with_a_residual():
    start = keras.Input((4,))
    white = Whitening()(start)
    return keras.Model(start, layers.Dense(4)(white) + white)


def with_a_reader_of_other_things():
    start, dense = keras.Input((4,)), layers.Dense(4)
    return keras.Model(start, dense(Whitening()(start)) + dense(start))


def called_twice():
    start, whitening = keras.Input((4,)), Whitening()
    both = [layers.Dense(3)(whitening(each)) for each in (start, layers.Dense(4)(start))]
    return keras.Model(start, both)


def in_a_model_called_twice():
    start, inner = keras.Input((4,)), network(Whitening, widths=(4,))
    return keras.Model(start, inner(inner(start)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.whitening, self.dense = Whitening(), layers.Dense(3)

    def call(self, inputs):
        return self.dense(self.whitening(inputs))


def with_lora():
    model = network(Whitening, widths=(3,))
    model.layers[1].enable_lora(1)
    return model


def einsum(equation, *shape, **options):
    return lambda: layers.EinsumDense(equation, shape, **options)


FAILURES = {
    "activation": (
        after_whitening(lambda: layers.Activation("relu"), lambda: layers.Dense(3)),
        "without an activation.*Received: .*, a Activation layer",
    ),
    "nothing after it": (after_whitening(), "Received: an output of a model"),
    "residual": (with_a_residual, "Received: .*, a Add layer"),
    "no bias": (
        after_whitening(lambda: layers.Dense(3, use_bias=False)),
        "a Dense layer without a bias for each of its units",
    ),
    "bias of some axes": (
        after_whitening(einsum("bd,dhk->bhk", 2, 3, bias_axes="k")),
        "a EinsumDense layer without a bias for each of its units",
    ),
    "other axes": (
        after_whitening(einsum("btd,tdk->bk", 3, bias_axes="k"), shape=(5, 4)),
        "sums over other axes than the last",
    ),
    "padding": (
        after_whitening(lambda: layers.Conv1D(3, 3, padding="same"), shape=(5, 4)),
        "pads its inputs",
    ),
    "groups": (
        after_whitening(lambda: layers.Conv1D(4, 1, groups=2), shape=(5, 4)),
        "of several groups",
    ),
    "LoRA": (with_lora, "a Dense layer: LoRA is enabled"),
    "other inputs": (with_a_reader_of_other_things, "a Dense layer that is called several times"),
    "two calls": (called_twice, "called once in the graph.*Received: 2 calls"),
    "two calls of its model": (in_a_model_called_twice, "in a pass.*Received: 2 calls"),
    "no graph": (Subclassed, "functional or sequential model.*Received: 0 calls"),
    "no whitening": (network, "without a `Whitening` layer"),
}


class TestFailures:
    @pytest.mark.parametrize("case", FAILURES)
    def test_what_follows_must_be_affine(self, case):
        make, message = FAILURES[case]
        model = make()
        x = correlated(20, *model.input_shape[1:-1]) if model.built else correlated(20)
        with pytest.raises(ValueError, match=message):
            rewhiten(model, x)

    def test_nothing_has_changed_if_a_covariance_is_singular(self):
        model = network(lambda: Whitening(epsilon=0.0))
        model.layers[1].set_weights([np.zeros((4, 5)), np.zeros(5)])
        before = model.get_weights()
        with pytest.raises(ValueError, match=r"without an inverse root.*Received: 20 examples"):
            rewhiten(model, correlated(20))
        helpers.assert_same(model.get_weights(), before)

    def test_inputs_must_be_finite(self):
        model = network(Whitening)
        with pytest.raises(ValueError, match=r"must be finite.*Received: others at .*whitening"):
            rewhiten(model, np.full((5, 4), np.nan))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "zca"}, "Received: mode='zca'"),
            ({"epsilon": -1.0}, "Received: epsilon=-1.0"),
            ({"epsilon": "a"}, "Received: epsilon='a'"),
        ],
    )
    def test_arguments_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            Whitening(**options)

    def test_datasets_are_no_inputs(self):
        data = tf.data.Dataset.from_tensor_slices(correlated(20)).batch(5)
        with pytest.raises(ValueError, match=r"of a dataset, those of a large batch.*Received: x="):
            rewhiten(network(Whitening), data)

    def test_period_is_a_number_of_batches(self):
        with pytest.raises(ValueError, match="Received: period=0"):
            WhiteningCallback(correlated(2), period=0)
