"""Structures whose blocks several layers have in common, against the dense Fisher matrix."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC
from keras_kfac.curvature import dense
from keras_kfac.introspection import composite, registry
from keras_kfac.introspection import example_gradients as introspection
from tests import helpers
from tests.cases import LOSS, collected, mlp
from tests.reference import assert_close, dense_ggn

layers = keras.layers
MSE = LOSS["mse"].make
DAMPING = 0.3


def data(examples=9, inputs=5, outputs=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(examples, inputs)), rng.normal(size=(examples, outputs))


def one_step(model, curvature, **options):
    """Optimizer, step and gradient of all weights, each as one vector, and the Fisher matrix."""
    fixed = {"momentum": 0.0, "learning_rate": 1.0, "damping": DAMPING, "kl_clip": None}
    optimizer = helpers.kfac(curvature=curvature, **(fixed | {"fisher": "exact"} | options))
    model.compile(optimizer.attach(model), MSE())
    x, y = data()
    before = model.get_weights()
    with tf.GradientTape() as tape:
        loss = MSE()(y, model(x))
    gradient = tape.gradient(loss, [v.value for v in model.trainable_variables])
    fisher = dense_ggn(model, MSE(), x, y, model.trainable_variables)
    model.train_on_batch(x, y)
    step = [after - b for after, b in zip(model.get_weights(), before)]
    return optimizer, flat(step), flat(gradient), fisher


# Of five inputs, four units and three outputs, the same in all types.
WEIGHTS = [
    np.round(np.random.default_rng(1).normal(size=shape) * 8) / 16
    for shape in ((5, 4), (4,), (4, 3), (3,))
]


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


# ---- Dense --------------------------------------------------------------------------------------


def branched():
    """Layers of several kinds, one of them called twice."""
    keras.utils.set_random_seed(0)
    inputs, own = keras.Input((4, 4, 1), dtype="float64"), {"dtype": "float64"}
    x = layers.Conv2D(2, 3, activation="tanh", **own)(inputs)
    x = layers.LayerNormalization(**own)(x)
    x = layers.Flatten(**own)(x)
    twice = layers.Dense(8, "tanh", **own)
    return keras.Model(inputs, layers.Dense(2, **own)(twice(twice(x))))


def test_statistics_of_all_layers_together():
    """The whole Fisher matrix: what lies between layers, and between calls, included."""
    model, rng = branched(), np.random.default_rng(0)
    parts = [a for layer in model.layers for a in registry.adapt(layer, lambda v: True)]
    exact = [
        introspection.ExampleGradientsAdapter(a, np.inf) if a.has_row_pairs else a for a in parts
    ]
    adapter = composite.JointWeightsAdapter(exact)
    x = rng.normal(size=(3, 4, 4, 1))
    (found,) = collected(model, MSE(), x, [adapter])
    expected = dense_ggn(model, MSE(), x, np.zeros((3, 2)), model.trainable_variables, pfor=False)
    assert [id(v) for v in adapter.variables] == [id(v) for v in model.trainable_variables]
    assert_close(found.output_factor, expected)


@pytest.fixture(params=[dense.DenseBlock.max_kept, 0], ids=["kept", "by samples"])
def either_way(request, monkeypatch):
    """With the matrix of all weights, and without: the step is the same."""
    monkeypatch.setattr(dense.DenseBlock, "max_kept", request.param)


class TestDense:
    @pytest.mark.usefixtures("either_way")
    def test_step(self):
        _, step, gradient, fisher = one_step(mlp((5, 4, 3)), "dense")
        assert_close(step, -np.linalg.solve(fisher + DAMPING * np.eye(len(fisher)), gradient))

    def test_layers_apart_make_another_step(self):
        _, step, _, _ = one_step(mlp((5, 4, 3)), "dense")
        _, apart, _, _ = one_step(mlp((5, 4, 3)), "full")
        assert np.abs(step - apart).max() > 0.01 * np.abs(step).max()

    @pytest.mark.usefixtures("either_way")
    def test_of_some_layers(self):
        """One block for these, whatever lies between."""
        model = mlp((5, 4, 4, 3))
        first, middle, last = (layer.name for layer in model.layers)
        choice = {first: "dense", middle: "full", last: "dense"}
        optimizer, step, gradient, fisher = one_step(model, choice)
        sizes = [24, 20, 15]
        is_middle = np.repeat([False, True, False], sizes)
        together = is_middle[:, None] == is_middle[None, :]
        block = np.where(together, fisher, 0) + DAMPING * np.eye(sum(sizes))
        assert_close(step, -np.linalg.solve(block, gradient))
        first, middle, last = (row.block for row in optimizer.coverage())
        joint = "dense" if dense.DenseBlock.max_kept else "sample_space"
        assert (first, middle, last) == (joint, "full", joint)

    @pytest.mark.usefixtures("either_way")
    @pytest.mark.parametrize("dtypes", [("float32", "float64"), ("bfloat16", "float32")])
    def test_layers_of_several_types(self, dtypes):
        """One matrix in the wider one, whichever comes first."""
        steps = []
        for first, last in (("float64", "float64"), dtypes, dtypes[::-1]):
            body = [layers.Dense(4, "tanh", dtype=first), layers.Dense(3, dtype=last)]
            model = keras.Sequential([keras.Input((5,), dtype=first), *body])
            model.set_weights([w.astype(v.dtype) for w, v in zip(WEIGHTS, model.weights)])
            optimizer = helpers.kfac(curvature="dense", fisher="exact", kl_clip=None)
            model.compile(optimizer.attach(model), MSE(), run_eagerly=True)
            model.train_on_batch(*data())
            assert [v.dtype for v in model.weights] == [first, first, last, last]
            steps.append(
                flat([np.asarray(w, float) - b for w, b in zip(model.get_weights(), WEIGHTS)])
            )
        exact, *others = steps
        for step in others:
            allowed = 1e-5 if "float64" in dtypes else 0.1
            assert np.linalg.norm(step - exact) < allowed * np.linalg.norm(exact)

    @pytest.mark.usefixtures("either_way")
    def test_layers_on_other_things_than_examples_are_refused(self):
        body = [keras.Input((4, 3)), helpers.Places(4, 3), keras.layers.Dense(2)]
        model = keras.Sequential(body)
        model.compile(KFAC(curvature="dense"), "mse")
        received = r"layer '.*table' with outputs of shape \(4, 3\), in a model of outputs of shape"
        match = rf"first axis is not the batch.*Received: {received} \(8, 4, 2\)"
        with pytest.raises(ValueError, match=match):
            helpers.fit(model, (np.ones((8, 4, 3)), np.ones((8, 4, 2))))

    @pytest.mark.usefixtures("either_way")
    def test_outputs_that_are_no_rows_have_no_part(self):
        found = []
        for others in (lambda x: {"cache": None, "mean": tf.reduce_mean(x)}, lambda x: {}):
            keras.utils.set_random_seed(0)
            model = helpers.WithOthers(others)
            model.compile(KFAC(curvature="dense").attach(model), {"y": "mse"}, run_eagerly=True)
            x, y = data()
            model.train_on_batch(x, {"y": y})
            found.append(model.get_weights())
        helpers.assert_same(found[0], found[1])

    def test_memory_is_that_of_one_matrix(self):
        """Layers have their shares of it."""
        optimizer, *_ = one_step(mlp((5, 4, 3)), "dense")
        coverage = optimizer.coverage()
        factors = [v for name, v in optimizer.model_variables.items() if name.endswith("_factor")]
        assert sum(v.value.numpy().nbytes for v in factors) == 8 * (39**2 + 1)
        assert coverage.memory == 8 * 2 * (39**2 + 1) + 8
        assert sum(row.memory for row in coverage) == pytest.approx(coverage.memory, abs=1)

    @pytest.mark.usefixtures("either_way")
    def test_passes_need_not_use_all_layers(self):
        """The loss is a sum over two passes, of which each uses a head of its own."""
        model = TwoHeads()
        x, y = data()
        _ = model(x)
        variables = model.trainable_variables
        each = [dense_ggn(model.with_head(head), MSE(), x, y, variables) for head in (0, 1)]
        options = {"momentum": 0.0, "learning_rate": 1.0, "damping": DAMPING, "kl_clip": None}
        optimizer = helpers.kfac(curvature="dense", fisher="exact", **options)
        optimizer.attach(model, MSE())
        with tf.GradientTape() as tape:
            loss = MSE()(y, model(x, head=0, training=True))
            loss += MSE()(y, model(x, head=1, training=True))
        gradient = tape.gradient(loss, [v.value for v in variables])
        before = model.get_weights()
        optimizer.apply(gradient, variables)
        step = flat([after - b for after, b in zip(model.get_weights(), before)])
        damped = sum(each) + DAMPING * np.eye(len(each[0]))
        assert_close(step, -np.linalg.solve(damped, flat(gradient)))

    @pytest.mark.filterwarnings("ignore:Gradients do not exist")  # So says Keras.
    @pytest.mark.usefixtures("either_way")
    def test_layers_without_gradients_stay(self):
        """Those of an output without a loss, whatever they did before."""
        model, twin, (x, y) = TwoHeads(), TwoHeads(), data()
        _ = model(x), twin(x)
        options = {"momentum": 0.5, "learning_rate": 1.0, "damping": DAMPING, "kl_clip": None}
        options |= {"curvature": "dense", "fisher": "exact", "factor_ema_decay": 0.0}
        optimizer = helpers.kfac(**options).attach(model, MSE())
        weights = [model.get_weights()]
        for heads in ((0, 1), (0,)):
            with tf.GradientTape() as tape:
                loss = tf.add_n([MSE()(y, model(x, head=h, training=True)) for h in heads])
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            optimizer.apply(gradients, model.trainable_variables)
            weights.append(model.get_weights())
        first, second = (
            [b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(weights)
        )
        assert gradients[-2:] == [None, None] and np.abs(flat(first[-2:])).min() > 0
        assert not np.any(flat(second[-2:]))
        twin.set_weights(weights[1])
        fisher = dense_ggn(twin.with_head(0), MSE(), x, y, twin.trainable_variables[:-2])
        damped = fisher + DAMPING * np.eye(len(fisher))
        expected = 0.5 * flat(first[:-2]) - np.linalg.solve(damped, flat(gradients[:-2]))
        assert_close(flat(second[:-2]), expected)

    @pytest.mark.filterwarnings("ignore:Gradients do not exist")  # So says Keras.
    def test_layer_without_a_part_of_its_gradients_is_an_error(self):
        model, (x, y) = mlp((5, 4, 3)), data()
        optimizer = helpers.kfac(curvature="dense").attach(model, MSE())
        *others, bias = model.trainable_variables
        with tf.GradientTape() as tape:
            loss = MSE()(y, model(x, training=True))
        gradients = tape.gradient(loss, [v.value for v in (*others, bias)])
        with pytest.raises(ValueError, match=r"changed after .* without gradients for .*bias'\]"):
            optimizer.apply([*gradients[:-1], None], [*others, bias])


class TwoHeads(keras.Model):
    """A trunk, and one of two layers on it at a time."""

    def __init__(self):
        keras.utils.set_random_seed(0)
        super().__init__(dtype="float64")
        self.trunk = layers.Dense(4, "tanh", dtype="float64")
        self.heads = [layers.Dense(3, dtype="float64") for _ in range(2)]

    def build(self, _):
        self.trunk.build((None, 5))
        for head in self.heads:
            head.build((None, 4))

    def call(self, x, head=0):
        return self.heads[head](self.trunk(x))

    def with_head(self, head):
        return lambda x, training: self.call(x, head) + 0 * self.call(x, 1 - head)


# ---- Regularisers -------------------------------------------------------------------------------


class TestRegularisers:
    """Each weight is damped by its own regulariser, or each layer of a chain by its kernel's."""

    KERNELS = (0.5, 0.125)  # η is twice that.

    def step(self, curvature, **options):
        with helpers.precision("float64"):
            model = mlp((5, 4, 3))
            for layer, l2 in zip(model.layers, self.KERNELS):
                layer.kernel.regularizer = keras.regularizers.L2(l2)
            moments = chain_moments(model, data()[0])
            kernels = [2 * l2 * np.ravel(k.kernel) for l2, k in zip(self.KERNELS, model.layers)]
            optimizer, step, gradient, fisher = one_step(model, curvature, **options)
        for place, own in zip((slice(0, 20), slice(24, 36)), kernels):
            gradient[place] += own
        return optimizer, step, gradient, fisher, moments

    @pytest.mark.parametrize("curvature", ["dense", "by samples", "full", "diagonal"])
    def test_of_each_weight(self, curvature, monkeypatch):
        if curvature == "by samples":
            monkeypatch.setattr(dense.DenseBlock, "max_kept", 0)
        name = "dense" if curvature == "by samples" else curvature
        _, step, gradient, fisher, _ = self.step(name)
        own = np.repeat([2 * self.KERNELS[0], 0, 2 * self.KERNELS[1], 0], [20, 4, 12, 3])
        layer = np.repeat([0, 1], [24, 15])
        if curvature == "full":
            fisher = np.where(layer[:, None] == layer, fisher, 0)
        elif curvature == "diagonal":
            fisher = np.diag(np.diag(fisher))
        assert_close(step, -np.linalg.solve(fisher + np.diag(DAMPING + own), gradient))

    def test_of_each_layer_of_a_chain(self):
        optimizer, step, gradient, _, moments = self.step("tridiagonal")
        dampings = [DAMPING + 2 * l2 for l2 in self.KERNELS]
        assert_close(step, -dense_chain_inverse(moments, dampings) @ gradient)
        assert [row.damping for row in optimizer.curvature_summary()] == pytest.approx(dampings)

    def test_have_no_part_in_the_fisher_matrix(self):
        """As posteriors know it, though the kept eigenbasis is that of both."""
        optimizer, _, _, fisher, _ = self.step("full", exact_damping=True, learning_rate=0.0)
        blocks = optimizer._known.curvature.blocks
        for block, own in zip(blocks, (fisher[:24, :24], fisher[24:, 24:])):
            basis = block.eigenbasis()
            rotation = basis.output_basis.numpy()
            assert_close(rotation * basis.eigenvalues.numpy() @ rotation.T, own)


# ---- Tridiagonal --------------------------------------------------------------------------------


def chain_moments(model, x):
    """`A` and `G` of the layers and between all pairs of them, by autodiff: `[i][j]`."""
    inputs, outputs = [x], []
    with tf.GradientTape(persistent=True) as tape:
        for layer in model.layers:
            s = inputs[-1] @ layer.kernel.value + layer.bias.value
            tape.watch(s)
            outputs.append(s)
            inputs.append(layer.activation(s))
        last = tf.unstack(outputs[-1], axis=1)
    # The Hessian of the mean squared error is a multiple of the identity.
    root = np.sqrt(2 / np.size(outputs[-1]))
    rows = [np.c_[a, np.ones(len(x))] for a in inputs[:-1]]
    columns = [tape.gradient(column, outputs) for column in last]
    g = [root * np.concatenate(of_layer) for of_layer in zip(*columns)]
    layers_ = range(len(g))
    return [[(rows[i].T @ rows[j] / len(x), g[i].T @ g[j]) for j in layers_] for i in layers_]


def damped(a, g, damping):
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    return a + pi * np.sqrt(damping) * np.eye(len(a)), g + np.sqrt(damping) / pi * np.eye(len(g))


def chain_matrix(moments, dampings):
    """Damped blocks of the layers, and those of neighbours, as one matrix; zeros elsewhere."""
    layers_ = range(len(moments))
    dampings = np.broadcast_to(dampings, len(moments))
    blocks = [
        [
            np.kron(*(damped(*moments[i][i], dampings[i]) if i == j else moments[i][j]))
            * (abs(i - j) <= 1)
            for j in layers_
        ]
        for i in layers_
    ]
    return np.block(blocks), np.cumsum([0, *(len(blocks[i][i]) for i in layers_)])


def dense_chain_inverse(moments, damping):
    """By the formulas, on matrices of all weights: regressions of a layer on the next."""
    matrix, ends = chain_matrix(moments, damping)
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    xi, rest = np.eye(len(matrix)), np.zeros_like(matrix)
    for own, following in itertools.pairwise(parts):
        psi = matrix[own, following] @ np.linalg.inv(matrix[following, following])
        xi[own, following] = -psi
        rest[own, own] = matrix[own, own] - psi @ matrix[following, own]
    rest[parts[-1], parts[-1]] = matrix[parts[-1], parts[-1]]
    return xi.T @ np.linalg.inv(rest) @ xi


class TestTridiagonal:
    @pytest.mark.parametrize("widths", [(5, 4, 6, 3), (5, 3)], ids=["chain", "alone"])
    def test_step(self, widths):
        model = mlp(widths)
        moments = chain_moments(model, data()[0])
        _, step, gradient, _ = one_step(model, "tridiagonal")
        assert_close(step, -dense_chain_inverse(moments, DAMPING) @ gradient)

    def test_agrees_with_the_moments_of_neighbours(self):
        """Of all matrices with a tridiagonal inverse it is the one with these blocks."""
        model = mlp((5, 4, 6, 3))
        moments = chain_moments(model, data()[0])
        expected, ends = chain_matrix(moments, DAMPING)
        inverse = dense_chain_inverse(moments, DAMPING)
        assert np.linalg.eigvalsh(inverse).min() > 0
        assert np.abs(inverse[: ends[1], ends[2] :]).max() < 1e-12 * np.abs(inverse).max()
        actual = np.linalg.inv(inverse)
        is_near = expected != 0
        assert_close(actual[is_near], expected[is_near])
        assert np.abs(actual[: ends[1], ends[2] :]).max() > 1e-6  # Implied, not zero.

    def test_layers_apart_make_another_step(self):
        _, step, _, _ = one_step(mlp((5, 4, 3)), "tridiagonal")
        _, apart, _, _ = one_step(mlp((5, 4, 3)), "kfac")
        assert np.abs(step - apart).max() > 0.01 * np.abs(step).max()

    def test_is_nearer_to_the_fisher_matrix_between_neighbours(self):
        model = mlp((5, 4, 3))
        x, y = data()
        moments = chain_moments(model, x)
        fisher = dense_ggn(model, MSE(), x, y, model.trainable_variables)
        own = np.kron(*moments[0][1])
        off = fisher[: len(own), len(own) :]
        assert np.linalg.norm(off - own) < 0.5 * np.linalg.norm(off)

    def test_masks_and_weights(self):
        """Positions that do not count leave the moments of neighbours as they are without them."""
        rng = np.random.default_rng(0)
        x, mask = rng.normal(size=(4, 3, 5)), np.array([3, 1, 2, 3])[:, None] > np.arange(3)
        weights = tf.constant([1.0, 0.5, 0.0, 2.0], tf.float64)
        model = mlp((5, 4, 3))
        first, second = (
            adapter for layer in model.layers for adapter in registry.adapt(layer, lambda v: True)
        )
        cross = composite.CrossAdapter([first, second])
        kernel, bias = model.layers[0].get_weights()
        inner = np.tanh(x @ kernel + bias)
        one = np.ones((4, 3, 1))
        w = np.where(mask, weights.numpy()[:, None] * 3 / mask.sum(1, keepdims=True), 0)
        a, b = np.concatenate([x, one], -1), np.concatenate([inner, one], -1)
        expected = np.einsum("nt,nti,ntj->ij", w, a, b), w.sum()
        masks = [[(tf.constant(mask, tf.float64),)]] * 2
        inputs = [[tf.constant(np.where(mask[..., None], x, np.inf))], [tf.constant(inner)]]
        actual = cross.input_moment(inputs, weights, tf.float64, *masks)
        assert_close(actual[0], expected[0])
        assert float(actual[1]) == pytest.approx(expected[1])

    @pytest.mark.parametrize(
        ("policy", "jit_compile"),
        [
            ("float32", False),
            pytest.param("mixed_float16", False, marks=pytest.mark.slow),
            pytest.param("float32", True, marks=pytest.mark.slow),
        ],
    )
    def test_trains(self, policy, jit_compile):
        """What adapts itself, too, on a network with other layers in between."""
        optimizer = helpers.kfac(curvature="tridiagonal", **helpers.ADAPTIVE)
        with helpers.precision(policy):
            model = helpers.mlp_with_batch_normalization()
            helpers.compiled(model, optimizer, jit_compile=jit_compile)
            history = helpers.fit(model, helpers.vectors(), epochs=10).history["loss"]
        assert history[-1] < 0.7 * history[0]
        helpers.assert_all_finite(model)
        (chain,) = (path for path in optimizer.staleness() if "hidden" in path)
        assert chain.endswith("logits") and 0 < optimizer.staleness()[chain] < 10
        spectra = {row.layer.rpartition("/")[2] for row in optimizer.curvature_summary()}
        assert spectra == {"hidden", "norm", "logits"}

    def test_products_in_bfloat16_are_near_those_in_float32(self):
        steps = [
            one_step(mlp((5, 4, 3)), "tridiagonal", product_dtype=dtype)[1]
            for dtype in (None, "bfloat16")
        ]
        assert 1e-5 < np.abs(steps[1] - steps[0]).max() / np.abs(steps[0]).max() < 0.03

    def test_frozen_kernels_say_that_they_cannot(self):
        """Biases alone have one input for all positions: no neighbour has as many."""
        body = [layers.Dense(3, "tanh", name=name) for name in "abc"]
        model = keras.Sequential([keras.Input((4, 5)), *body])
        body[0].kernel.trainable = False
        model.compile(KFAC(curvature="tridiagonal"), "mse")
        model.optimizer.attach(model)
        rows = model.optimizer.coverage()
        assert [row.block for row in rows] == ["kronecker", "tridiagonal", "tridiagonal"]
        assert "its kernel is frozen" in rows[0].reason

    def test_other_layers_say_that_they_cannot(self):
        optimizer = KFAC(curvature="tridiagonal").attach(helpers.compiled(helpers.cnn()))
        conv, logits = optimizer.coverage()
        assert (conv.block, logits.block) == ("kronecker", "tridiagonal")
        assert conv.reason == "not 'tridiagonal': it is for chains of Dense layers"

    @pytest.mark.filterwarnings("ignore:Gradients do not exist")  # So says Keras.
    def test_layers_without_gradients_stay(self):
        """Of a chain in which they are stopped, and then all others step as without them."""
        model, (x, y) = mlp((5, 4, 3)), data()
        first, last = model.layers
        stop = layers.Lambda(tf.stop_gradient, dtype="float64")
        model = keras.Sequential([keras.Input((5,), dtype="float64"), first, stop, last])
        steps = []
        for curvature in ("kfac", "tridiagonal"):
            model.set_weights(mlp((5, 4, 3)).get_weights())
            before = model.get_weights()
            options = {"fisher": "exact", "momentum": 0.0, "kl_clip": None}
            optimizer = helpers.kfac(curvature=curvature, **options).attach(model)
            model.compile(optimizer, MSE(), run_eagerly=True)
            model.train_on_batch(x, y)
            steps.append([b - a for a, b in zip(before, model.get_weights())])
        assert not np.any(flat(steps[1][:2]))
        assert_close(flat(steps[1]), flat(steps[0]))

    def test_without_damping_one_layer_may_tell_all_of_another(self):
        """Of a linear network all gradients are linear maps of those of the last layer."""
        keras.utils.set_random_seed(0)
        wide = [layers.Dense(3, use_bias=False, dtype="float64") for _ in range(2)]
        model = keras.Sequential([keras.Input((3,), dtype="float64"), *wide])
        optimizer = helpers.kfac(curvature="tridiagonal", fisher="exact", damping=0.0)
        model.compile(optimizer.attach(model), MSE())
        x, y = data(inputs=3)
        with pytest.warns(UserWarning, match="could not be inverted"):
            model.fit(x, y, verbose=0)
        helpers.assert_all_finite(model)


def chained(case):
    """Models whose Dense layers are no chain."""
    inputs = keras.Input((4,))
    a, b = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    outputs = {
        "branch": lambda: layers.add([b(a(inputs)), a.output]),
        "parallel": lambda: layers.add([a(inputs), b(inputs)]),
        "twice": lambda: b(a(a(inputs))),
        "inside": lambda: b(keras.Sequential([keras.Input((4,)), a])(inputs)),
        "output": lambda: [a(inputs), b(a.output)],
        "joined": lambda: b(layers.concatenate([a(inputs), inputs])),
    }
    return keras.Model(inputs, outputs[case]())


class TestNoChain:
    @pytest.mark.parametrize(
        ("case", "reason"),
        [
            ("parallel", "'a' does not lead to 'b' alone: there is a branch or an end behind 'a'"),
            ("output", "'a' does not lead to 'b' alone: what 'a' puts out is an output of the mod"),
            ("twice", "'a' is called more than once"),
            ("inside", "a' is inside another layer"),
            ("joined", "'a' does not lead to 'b' alone: there is a branch or an end behind 'a'"),
        ],
    )
    def test_is_an_error_that_says_why(self, case, reason):
        model = helpers.compiled(chained(case))
        with pytest.raises(ValueError, match=f"one chain of Dense layers.*Received.*{reason}"):
            KFAC(curvature="tridiagonal").attach(model).coverage()

    @pytest.mark.parametrize(
        "between",
        [
            layers.GlobalAveragePooling1D(),
            layers.Permute((2, 1)),
            layers.Conv1D(4, 3, padding="same"),
            layers.Lambda(lambda x: x[:, ::-1]),
            layers.Flatten(),
        ],
        ids=lambda layer: type(layer).__name__,
    )
    def test_positions_that_change_are_an_error(self, between):
        kind = type(between).__name__
        with pytest.raises(ValueError, match=f"'a' does not .* position by position.*, a {kind}"):
            self.coverage(between)

    def coverage(self, *between, shape=(4, 4)):
        """Of two Dense layers, with something in between."""
        inputs = keras.Input(shape)
        x = layers.Dense(4, name="a")(inputs)
        for own in between:
            x = own(x)
        model = helpers.compiled(keras.Model(inputs, layers.Dense(2, name="b")(x)))
        return KFAC(curvature="tridiagonal").attach(model).coverage()

    def test_positions_that_are_added_are_an_error(self):
        with pytest.raises(ValueError, match=r"position by position: 'add.*', a Add"):
            self.coverage(lambda x: x + np.ones((4, 1), "float32"), shape=(1, 4))

    def test_what_keeps_positions_may_lie_in_between(self):
        norm, dropout = layers.LayerNormalization(), layers.Dropout(0.5)
        between = [keras.activations.gelu, lambda x: x / 2 + 1.0, norm, dropout, layers.Masking()]
        blocks = [row.block for row in self.coverage(*between)]
        assert blocks == ["tridiagonal", "full", "tridiagonal"]

    def test_between_vectors_anything_may_lie(self):
        blocks = [
            row.block for row in self.coverage(layers.Lambda(lambda x: x[:, ::-1]), shape=(4,))
        ]
        assert blocks == ["tridiagonal", "tridiagonal"]

    def test_subclassed_models_do_not_tell(self):
        model = helpers.compiled(TwoHeads())
        _ = model(data()[0])
        with pytest.raises(ValueError, match="only functional and sequential models tell"):
            KFAC(curvature="tridiagonal").attach(model).coverage()

    def test_branches_elsewhere_do_not_matter(self):
        model = helpers.compiled(chained("branch"))
        with pytest.raises(ValueError, match="'a' does not lead to 'b' alone"):
            KFAC(curvature="tridiagonal").attach(model).coverage()
        KFAC(curvature={"b": "tridiagonal"}).attach(model).coverage()

    @pytest.mark.parametrize("curvature", ["tridiagonal", "inverse_free"])
    def test_exact_damping_is_refused(self, curvature):
        optimizer = KFAC(curvature=curvature, exact_damping=True)
        with pytest.raises(
            ValueError, match=r"factor by factor, .*exact_damping=True.*Received: layer"
        ):
            optimizer.attach(helpers.compiled(helpers.mlp())).coverage()
