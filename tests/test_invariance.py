"""What natural gradient promises: paths that do not depend on how the network is written down.

Martens & Grosse (2015), section 10, Theorem 1: replace activations by affine maps of theirs and
pre-activations by linear maps, and the weights accordingly. Undamped K-FAC then moves through the
same functions. The head is normal (squared loss): a softmax has a singular output factor.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC
from keras_kfac.curvature import dense
from tests.reference import assert_close, dense_ggn, relative_difference

WIDTHS = (5, 7, 6, 4)
STEPS = 8


def invertible(rng, size, kind):
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    if kind == "orthogonal":
        return q
    scales = np.diag(rng.uniform(0.5, 2.0, size))
    if kind == "scales":
        return scales
    return q @ scales @ np.linalg.qr(rng.normal(size=(size, size)))[0]


def maps(kind, seed=0, widths=WIDTHS):
    """Ω for the inputs and each hidden layer (homogeneous), Φ for each pre-activation.

    Args:
        kind: "affine", "orthogonal" or "scales"; or "inputs" or "outputs" for affine maps of these
            alone.
    """
    rng = np.random.default_rng(seed)
    omegas = []
    for width in widths[:-1]:
        omega = np.eye(width + 1)
        omega[:-1, :-1] = invertible(rng, width, kind)
        if kind in ("affine", "inputs"):
            omega[:-1, -1] = rng.normal(size=width)
        omegas.append(omega if kind != "outputs" else np.eye(width + 1))
    phis = [invertible(rng, width, kind) for width in widths[1:]]
    return omegas, [np.eye(len(phi)) if kind == "inputs" else phi for phi in phis]


def affine(omega, a):
    return tf.matmul(a, omega[:-1, :-1].T) + omega[:-1, -1]


def network(weights, omegas=None, phis=None):
    """A tanh network, or its reparametrisation; `weights` are `[kernel; bias]` of the former."""
    dense = []
    for index, matrix in enumerate(weights):
        hidden = index < len(weights) - 1
        activation = keras.activations.tanh if hidden else keras.activations.linear
        if omegas is not None:
            matrix = np.linalg.inv(omegas[index]).T @ matrix @ np.linalg.inv(phis[index]).T
            after = omegas[index + 1] if hidden else np.eye(WIDTHS[-1] + 1)
            activation = transformed(activation, phis[index], after)
        layer = keras.layers.Dense(matrix.shape[1], activation, dtype="float64")
        layer.build((None, matrix.shape[0] - 1))
        layer.set_weights([matrix[:-1], matrix[-1]])
        dense.append(layer)
    return keras.Sequential([keras.Input((WIDTHS[0],), dtype="float64"), *dense])


def transformed(activation, phi, omega):
    return lambda s: affine(omega, activation(tf.matmul(s, phi.T)))


def outputs_after_training(make_optimizer, kind="affine", steps=STEPS, examples=300):
    """Outputs of both networks, and how far the first one moved."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(examples, WIDTHS[0])), rng.normal(size=(examples, WIDTHS[-1]))
    weights = [0.7 * rng.normal(size=(m + 1, n)) for m, n in itertools.pairwise(WIDTHS)]
    omegas, phis = maps(kind)
    start = network(weights)(x).numpy()
    results = []
    for model, inputs in [
        (network(weights), x),
        (network(weights, omegas, phis), affine(omegas[0], x).numpy()),
    ]:
        np.testing.assert_allclose(model(inputs), start, atol=1e-10)
        optimizer = make_optimizer()
        if isinstance(optimizer, KFAC):
            optimizer.attach(model)
        model.compile(optimizer=optimizer, loss=keras.losses.MeanSquaredError(dtype="float64"))
        for _ in range(steps):
            model.train_on_batch(inputs, y)
        results.append(model(inputs).numpy())
    assert relative_difference(results[0], start) > 0.01, "nothing was learned"
    return results


def assert_differ(rewritten, original):
    """By more than what rounding could do; NaN is no other path."""
    difference = relative_difference(rewritten, original)
    assert np.isfinite(difference) and difference > 1e-2


def kfac(**options):
    return lambda: KFAC(
        **{
            "learning_rate": 0.3,
            "damping": 0.0,
            "momentum": 0.0,
            "fisher": "exact",
            "kl_clip": None,
            "factor_ema_decay": 0.9,
            "factor_update_period": 1,
            "inverse_update_period": 1,
            **options,
        }
    )


class TestReparametrisation:
    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    @pytest.mark.parametrize("kind", ["affine", "orthogonal"])
    def test_undamped_kfac_is_invariant(self, kind, momentum):
        original, rewritten = outputs_after_training(kfac(momentum=momentum), kind)
        assert relative_difference(rewritten, original) < 1e-10

    def test_kl_clip_is_invariant(self):
        original, rewritten = outputs_after_training(kfac(kl_clip=1e-2))
        assert relative_difference(rewritten, original) < 1e-10

    def test_damped_kfac_is_invariant_to_orthogonal_maps(self):
        original, rewritten = outputs_after_training(kfac(damping=1e-3), "orthogonal")
        assert relative_difference(rewritten, original) < 1e-10

    @pytest.mark.parametrize(
        "optimizer",
        [
            kfac(damping=1e-3),
            lambda: keras.optimizers.SGD(0.02),
            lambda: keras.optimizers.Adam(0.01),
        ],
        ids=["damped K-FAC", "SGD", "Adam"],
    )
    def test_others_are_not(self, optimizer):
        assert_differ(*outputs_after_training(optimizer))

    def test_sgd_is_invariant_to_orthogonal_maps_and_adam_is_not(self):
        sgd = outputs_after_training(lambda: keras.optimizers.SGD(0.02), "orthogonal")
        adam = outputs_after_training(lambda: keras.optimizers.Adam(0.01), "orthogonal")
        assert relative_difference(*sgd) < 1e-10
        assert relative_difference(*adam) > 1e-2


def structure(curvature, **options):
    return kfac(curvature=curvature, learning_rate=0.05, **options)


class TestStructures:
    """What the path does not depend on, for each structure of the curvature, and on what it does.

    The promise of K-FAC, to be independent of all these maps, is tested above.
    """

    @pytest.mark.parametrize(
        ("curvature", "kind", "damping"),
        [
            ("ekfac", "orthogonal", 0.0),
            ("ekfac", "orthogonal", 1e-3),
            ("input", "inputs", 0.0),
            ("input", "orthogonal", 1e-3),
            ("diagonal", "scales", 0.0),
            ("inverse_free", "affine", 0.0),
            pytest.param("inverse_free", "orthogonal", 1e-3, marks=pytest.mark.slow),
            ("linear_exact", "affine", 0.0),
            ("full", "affine", 0.0),
            ("full", "orthogonal", 1e-3),
            ("dense", "affine", 0.0),
            ("dense", "orthogonal", 1e-3),
            ("tridiagonal", "affine", 0.0),
            ("tridiagonal", "orthogonal", 1e-3),
        ],
    )
    def test_is_invariant(self, curvature, kind, damping):
        optimizer = structure(curvature, damping=damping)
        original, rewritten = outputs_after_training(optimizer, kind)
        assert relative_difference(rewritten, original) < 1e-9

    @pytest.mark.parametrize(
        ("kind", "damping", "examples"),
        [("affine", 0.0, 300), ("orthogonal", 1e-3, 300), ("orthogonal", 1e-3, 20)],
    )
    def test_dense_by_samples_is_invariant(self, kind, damping, examples, monkeypatch):
        """As with the matrix, of more samples than the 118 weights and of less (4 of each example).

        Undamped that takes more: what fewer samples say nothing of stays as it is in the weights.
        """
        monkeypatch.setattr(dense.DenseBlock, "max_kept", 0)
        optimizer = structure("dense", damping=damping)
        original, rewritten = outputs_after_training(optimizer, kind, examples=examples)
        assert relative_difference(rewritten, original) < 1e-9

    def test_dense_by_few_samples_is_not_invariant_to_affine_maps(self, monkeypatch):
        monkeypatch.setattr(dense.DenseBlock, "max_kept", 0)
        optimizer = structure("dense", damping=1e-3)
        assert_differ(*outputs_after_training(optimizer, "affine", examples=20))

    @pytest.mark.parametrize(
        ("curvature", "kind", "damping"),
        [
            ("ekfac", "scales", 0.0),
            ("input", "outputs", 0.0),
            ("input", "inputs", 1e-1),
            pytest.param("inverse_free", "affine", 1e-1, marks=pytest.mark.slow),
            ("diagonal", "orthogonal", 0.0),
            ("diagonal", "scales", 1e-1),
            ("full", "affine", 1e-1),
            ("dense", "affine", 1e-1),
            ("tridiagonal", "affine", 1e-1),
        ],
    )
    def test_is_not_invariant(self, curvature, kind, damping):
        optimizer = structure(curvature, damping=damping)
        assert_differ(*outputs_after_training(optimizer, kind))


def rewritten(kernel, bias, omega, phi):
    """Matrices `[..., in, out]` of all places of the inputs, and the bias, in other coordinates."""
    back, forth = np.linalg.inv(omega), np.linalg.inv(phi).T
    moved = np.einsum("...io,ij->...jo", kernel, back[:-1, :-1])
    summed = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)
    return moved @ forth, (bias + back[:-1, -1] @ summed) @ forth


class TestConvolutions:
    """Maps of channels that all places share, with no zeros around the image (KFC, Theorem 3)."""

    WIDTHS = (2, 3, 2)

    def networks(self, kind):
        """A convolution with a dense layer behind it, and its reparametrisation, with inputs."""
        rng = np.random.default_rng(0)
        omegas, phis = maps(kind, widths=self.WIDTHS)
        x, shapes = rng.normal(size=(60, 4, 4, 2)), [(3, 3, 2, 3), (4, 3, 2)]
        pairs = [(0.5 * rng.normal(size=s), 0.1 * rng.normal(size=s[-1])) for s in shapes]
        yield self.network(pairs, keras.activations.tanh, keras.activations.linear), x
        pairs = [rewritten(*pair, *own) for pair, *own in zip(pairs, omegas, phis)]
        hidden = transformed(keras.activations.tanh, phis[0], omegas[1])
        last = transformed(keras.activations.linear, phis[1], np.eye(3))
        yield self.network(pairs, hidden, last), affine(omegas[0], x).numpy()

    def network(self, pairs, hidden, last):
        own = {"dtype": "float64"}
        conv = keras.layers.Conv2D(3, 3, activation=hidden, **own)
        body = [conv, keras.layers.Flatten(**own), keras.layers.Dense(2, last, **own)]
        model = keras.Sequential([keras.Input((4, 4, 2), **own), *body])
        (kernel, bias), (matrices, last_bias) = pairs
        model.set_weights([kernel, bias, matrices.reshape(-1, 2), last_bias])
        return model

    def outputs(self, curvature, kind, damping):
        """Those of both after two steps."""
        y, results = np.random.default_rng(1).normal(size=(60, 2)), []
        for model, x in self.networks(kind):
            start = model(x).numpy()
            optimizer = structure(curvature, damping=damping)().attach(model)
            loss = keras.losses.MeanSquaredError(dtype="float64")
            model.compile(optimizer, loss, run_eagerly=True)
            for _ in range(2):
                model.train_on_batch(x, y)
            results.append(model(x).numpy())
            assert relative_difference(results[-1], start) > 1e-3, "nothing was learned"
        return results

    @pytest.mark.parametrize(
        ("curvature", "kind", "damping"),
        [
            ("kfac", "affine", 0.0),
            ("ekfac", "orthogonal", 0.0),
            ("input", "inputs", 0.0),
            ("inverse_free", "affine", 0.0),
            ("linear_exact", "affine", 0.0),
            ("linear_exact", "orthogonal", 1e-1),
            ("diagonal", "scales", 0.0),
            ("full", "affine", 0.0),
            ("dense", "affine", 0.0),
            ("tridiagonal", "affine", 0.0),
        ],
    )
    def test_is_invariant(self, curvature, kind, damping):
        original, other = self.outputs(curvature, kind, damping)
        assert relative_difference(other, original) < 1e-9

    @pytest.mark.parametrize(
        ("curvature", "kind", "damping"),
        [
            ("kfac", "affine", 1e-1),
            ("ekfac", "scales", 0.0),
            ("input", "outputs", 0.0),
            ("inverse_free", "affine", 1e-1),
            ("linear_exact", "affine", 1e-1),
            ("diagonal", "orthogonal", 0.0),
            ("full", "affine", 1e-1),
            ("dense", "affine", 1e-1),
            ("tridiagonal", "affine", 1e-1),
        ],
    )
    def test_is_not_invariant(self, curvature, kind, damping):
        assert_differ(*self.outputs(curvature, kind, damping))


def test_one_step_to_the_least_squares_solution():
    """Identity 30: a single layer, squared loss, undamped, learning rate 1, full batch."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(50, 3))
    layer = keras.layers.Dense(3, dtype="float64")
    model = keras.Sequential([keras.Input((6,), dtype="float64"), layer])
    loss = keras.losses.MeanSquaredError("sum", dtype="float64")
    model.compile(kfac(learning_rate=1.0)().attach(model), loss)
    model.train_on_batch(x, y)
    homogeneous = np.c_[x, np.ones(50)]
    solution = np.linalg.lstsq(homogeneous, y, rcond=None)[0]
    assert_close(np.vstack(model.get_weights()), solution, 1e-10)


def test_kl_clip_acts_before_momentum():
    """Identity 22: `(η ν)² uᵀ∇ = κ` for the new part of the step, whatever momentum adds."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=(50, 2))
    layer = keras.layers.Dense(2, dtype="float64")
    model = keras.Sequential([keras.Input((4,), dtype="float64"), layer])
    loss = keras.losses.MeanSquaredError(dtype="float64")
    learning_rate, kl_clip = 0.25, 1e-3
    optimizer = kfac(learning_rate=learning_rate, kl_clip=kl_clip, momentum=0.5)()
    model.compile(optimizer.attach(model), loss)
    steps = []
    for _ in range(3):
        with tf.GradientTape() as tape:
            value = loss(y, model(x))
        gradient = tape.gradient(value, [v.value for v in model.trainable_variables])
        before = model.get_weights()
        model.train_on_batch(x, y)
        steps.append([after - b for after, b in zip(model.get_weights(), before)])
        last = steps[-2] if len(steps) > 1 else [0.0, 0.0]
        new_part = [step - 0.5 * old for step, old in zip(steps[-1], last)]
        product = -sum(np.sum(part * g) for part, g in zip(new_part, gradient))
        scale = float(optimizer.kl_clip_scale.numpy())
        assert scale < 1
        assert learning_rate * scale * product == pytest.approx(kl_clip, rel=1e-6)


def linear_network(widths, seed=0, use_bias=False):
    keras.utils.set_random_seed(seed)
    options = {"kernel_initializer": "orthogonal", "dtype": "float64"}
    return keras.Sequential(
        [keras.Input((widths[0],), dtype="float64")]
        + [keras.layers.Dense(w, use_bias=use_bias, **options) for w in widths[1:]]
    )


class TestDeepLinear:
    """Bernacchia, Lengyel & Hennequin (2018): K-FAC / depth is an exact natural gradient."""

    def step(self, widths, curvature="kfac", use_bias=False, **options):
        """Fisher matrix, gradient and direction of all weights, each flattened."""
        rng = np.random.default_rng(1)
        model = linear_network(widths, use_bias=use_bias)
        x, y = rng.normal(size=(200, widths[0])), rng.normal(size=(200, widths[-1]))
        loss = keras.losses.MeanSquaredError(dtype="float64")
        variables = model.trainable_variables
        fisher = dense_ggn(model, loss, x, y, variables)
        with tf.GradientTape() as tape:
            value = loss(y, model(x))
        gradient = tape.gradient(value, [v.value for v in variables])
        before = model.get_weights()
        optimizer = kfac(learning_rate=1.0, curvature=curvature, **options)()
        model.compile(optimizer.attach(model), loss)
        model.train_on_batch(x, y)
        direction = [b - a for b, a in zip(before, model.get_weights())]
        return fisher, *(np.concatenate([np.ravel(t) for t in ts]) for ts in (gradient, direction))

    def test_is_an_exact_natural_gradient(self):
        fisher, gradient, direction = self.step((6, 6, 6, 6), "linear_exact")
        assert np.linalg.matrix_rank(fisher, tol=1e-10) == 36  # of 108: gauge freedom
        assert_close(fisher @ direction, gradient, 1e-10)

    def test_is_one_with_biases(self):
        fisher, gradient, direction = self.step((6, 6, 6, 6), "linear_exact", use_bias=True)
        assert_close(fisher @ direction, gradient, 1e-10)

    def test_is_one_by_pseudo_inverses_of_singular_factors(self):
        """Layers wider than inputs and outputs; their widest gradients have the rank of these."""
        fisher, gradient, direction = self.step((6, 9, 8, 5), "linear_exact", exact_damping=True)
        assert_close(fisher @ direction, gradient, 1e-10)

    def test_without_the_depth_it_is_too_long(self):
        fisher, gradient, direction = self.step((6, 6, 6, 6))
        assert_close(fisher @ direction, 3 * gradient, 1e-10)

    def test_bottleneck_breaks_it(self):
        fisher, gradient, direction = self.step((6, 4, 5, 6), "linear_exact")
        assert relative_difference(fisher @ direction, gradient) > 0.01

    @pytest.mark.parametrize("smallest", [1.0, 0.1, 0.01])
    def test_contracts_at_the_rate_of_theory(self, smallest):
        """Excess loss falls by (1 - α)² per step, however badly the data are conditioned."""
        rng, alpha, steps = np.random.default_rng(3), 0.1, 60
        scales = np.geomspace(1, smallest, 6)
        x = rng.normal(size=(400, 6)) * scales @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
        target = rng.normal(size=(6, 6))
        y = x @ target
        model = linear_network((6, 6, 6, 6), seed=4)
        loss = keras.losses.MeanSquaredError(dtype="float64")
        optimizer = kfac(learning_rate=alpha, curvature="linear_exact", factor_ema_decay=0.0)()
        model.compile(optimizer.attach(model), loss, jit_compile=False)
        losses = []
        for _ in range(steps):
            losses.append(float(loss(y, model(x))))
            model.train_on_batch(x, y)
        # The first steps are long ones, and the network is not linear in its weights.
        rate = (losses[-1] / losses[steps // 2]) ** (1 / (steps - 1 - steps // 2))
        assert rate == pytest.approx((1 - alpha) ** 2, abs=5e-4)
