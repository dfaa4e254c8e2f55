"""Structures of curvature: each against the dense Fisher matrix, and how they are chosen."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, laplace
from keras_kfac.curvature.choice import STRUCTURES
from keras_kfac.curvature.eigenbasis import _of_regular_vectors
from keras_kfac.introspection import example_gradients as introspection
from keras_kfac.introspection import registry
from keras_kfac.introspection.statistics import BatchWeights, LayerStatistics
from keras_kfac.math import example_gradients
from keras_kfac.math.inverses import ExactInverse, FactoredInverse, relative_change
from keras_kfac.math.structure import Structure
from tests import helpers, test_recurrent
from tests.cases import COMPOSED_LAYERS, LAYERS, LOSS, SCALES, collected, mlp
from tests.oracle import in_network, places, random_inputs
from tests.reference import assert_close, dense_ggn, kron, layer_block

layers = keras.layers
MSE = LOSS["mse"].make
BASES = ("input_basis", "output_basis")


# ---- Statistics, against the dense Fisher matrix ------------------------------------------------


def adapters_with_pairs(layer):
    found = registry.adapt(layer, lambda v: v.trainable)
    return [adapter for adapter in found if adapter.has_row_pairs]


def orthonormal(rng, shape):
    """Random bases, or the diagonal of the identity."""
    if len(shape) == 1:
        return tf.ones(shape, tf.float64)
    return tf.constant(np.linalg.qr(rng.normal(size=shape))[0])


def dense_block(model, x, adapter):
    """The Fisher matrix of the weights of an adapter, in the order of its matrix, row by row."""
    y = np.zeros(model(x).shape)
    dense = dense_ggn(model, MSE(), x, y, adapter.variables, pfor=False)
    index = places(adapter).ravel()
    return dense[np.ix_(index, index)]


def check_statistics(model, layer, x):
    """That full, diagonal and rotated second moments are those of the Fisher matrix."""
    rng = np.random.default_rng(3)
    for base in adapters_with_pairs(layer):
        bases = [orthonormal(rng, shape) for shape in base.factor_shapes]
        each = [
            introspection.ExampleGradientsAdapter(base, np.inf),
            introspection.ExampleGradientsAdapter(base, 0),
            introspection.RotatedSquaresAdapter(base, bases),
        ]
        full, diagonal, squares = (s.output_factor for s in collected(model, MSE(), x, each))
        expected = dense_block(model, x, base)
        assert_close(full, expected)
        assert_close(diagonal, np.diag(expected))
        rotation = rotation_of(base, bases)
        assert_close(squares, np.diag(rotation.T @ expected @ rotation))


def rotation_of(adapter, bases):
    """Products of eigenvectors in the columns of a matrix, in groups one after the other."""
    a, g = (np.diag(b) if b.shape.rank == 1 else b.numpy() for b in bases)
    if adapter.groups is None:
        a, g = a[None], g[None]
    blocks = [kron(own_a, own_g) for own_a, own_g in zip(a, g, strict=True)]
    size = len(blocks[0])
    result = np.zeros((len(blocks) * size, len(blocks) * size))
    for i, block in enumerate(blocks):
        result[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return result


def slow_unless(value, names):
    """A parameter that only the slow tests take, unless it is among these."""
    return pytest.param(value, marks=[] if str(value) in names else [pytest.mark.slow])


# The reference takes a pass backwards for each output: of the others, one of a kind is enough.
COMPOSED = [slow_unless(c, ("separable1d-valid", "transposed1d-valid")) for c in COMPOSED_LAYERS]


@pytest.mark.parametrize("case", [*LAYERS, *COMPOSED], ids=str)
def test_statistics_are_those_of_the_fisher_matrix(case):
    """Of layers in a network that is not linear: nothing is approximated within a layer."""
    model, layer = in_network(case)
    check_statistics(model, layer, random_inputs(model, 3))


@pytest.mark.parametrize(
    "name",
    [
        slow_unless(name, ("gru-reset-before",))
        for name in ("lstm", "gru", "gru-reset-before", "conv-lstm", "stacked")
    ],
)
def test_statistics_of_recurrent_layers(name):
    keras.utils.set_random_seed(0)
    layer = test_recurrent.LAYERS[name](return_sequences=True)
    x = test_recurrent.inputs_for(name, 3)
    model = keras.Sequential(
        [keras.Input(x.shape[1:], dtype="float64"), layer, layers.Dense(2, dtype="float64")]
    )
    check_statistics(model, layer, x)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_statistics_of_embeddings(shape):
    """Indices occur several times in an example: their gradients add up before they are squared."""
    keras.utils.set_random_seed(0)
    embedding = layers.Embedding(4, 3, dtype="float64")
    after = [layers.Activation("tanh", dtype="float64"), layers.Dense(2, dtype="float64")]
    model = keras.Sequential([keras.Input(shape, dtype="int32"), embedding, *after])
    check_statistics(model, embedding, np.random.default_rng(0).integers(0, 4, size=(6, *shape)))


def test_squares_in_a_basis_are_products_of_pairs_of_positions():
    """Identity 14: by gradients of examples or by Gram matrices of their positions."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(d, d)))[0] for d in (4, 5)]
    inputs, outputs = (rng.normal(size=(2, 3, len(basis))) @ basis for basis in bases)
    pairs = np.einsum("nsi,nti,nso,nto->io", inputs, inputs, outputs, outputs)
    actual = example_gradients.squared_gradients(tf.constant(inputs), tf.constant(outputs))
    assert_close(actual, pairs, 1e-13)


def test_squares_of_positions_are_something_else():
    """The mean of squares over positions, in place of the square of the sum."""
    rng = np.random.default_rng(0)
    inputs, outputs = (tf.constant(rng.normal(size=(3, 4, d))) for d in (2, 5))
    right = example_gradients.squared_gradients(inputs, outputs)
    wrong = tf.einsum("npi,npo->io", tf.square(inputs), tf.square(outputs))
    assert np.abs(right - wrong).max() > 0.1 * np.abs(right).max()


def test_examples_in_chunks_add_up(monkeypatch):
    rng = np.random.default_rng(0)
    inputs, outputs = (tf.constant(rng.normal(size=(2, 7, 4, d))) for d in (3, 5))
    whole = example_gradients.squared_gradients(inputs, outputs)
    monkeypatch.setattr(example_gradients, "_CHUNK", 2 * 3 * 5)
    assert_close(example_gradients.squared_gradients(inputs, outputs), whole, 1e-13)


def test_rows_that_do_not_count_can_hold_anything():
    rng = np.random.default_rng(0)
    inputs, outputs = (rng.normal(size=(3, 2, d)) for d in (2, 4))
    outputs[1, 1] = 0
    expected = example_gradients.squared_gradients(tf.constant(inputs), tf.constant(outputs))
    inputs[1, 1] = np.inf
    actual = example_gradients.squared_gradients(tf.constant(inputs), tf.constant(outputs))
    np.testing.assert_array_equal(actual, expected)


class TestEigenbasis:
    """Identity 13: of all that are diagonal in the bases, EKFAC is nearest to the Fisher matrix."""

    def blocks(self):
        """Fisher matrix, K-FAC's and EKFAC's, for each layer of a network."""
        model, case = mlp((6, 5, 4, 3)), LOSS["cce-logits"]
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(7, 6)), case.targets(rng, (7, 3))
        for layer in model.layers:
            (base,) = registry.adapt(layer, lambda v: True)
            (plain,) = collected(model, case.make(), x, [base])
            inverse = ExactInverse.of(*plain, 0.0)
            observer = introspection.RotatedSquaresAdapter(base, inverse[:2])
            (squares,) = collected(model, case.make(), x, [observer])
            rotation = kron(*inverse[:2])
            fisher = layer_block(model, case.make(), x, y, layer)
            yield fisher, kron(*plain), rotation @ np.diag(squares.output_factor) @ rotation.T

    def test_has_the_trace_of_the_fisher_matrix(self):
        for fisher, _, ekfac in self.blocks():
            assert np.trace(ekfac) == pytest.approx(np.trace(fisher), rel=1e-12)

    def test_is_nearer_to_the_fisher_matrix_than_kfac(self):
        norm = np.linalg.norm
        for fisher, kfac, ekfac in self.blocks():
            assert 0 < norm(ekfac - fisher) < 0.995 * norm(kfac - fisher)


# ---- Steps --------------------------------------------------------------------------------------


def one_step(curvature, batches=1, examples=9, **options):
    """A float64 network before and after the last of some steps, its optimizer and last batch."""
    fixed = {"momentum": 0.0, "learning_rate": 1.0, "damping": 0.3, "kl_clip": None}
    model = mlp((5, 4, 3))
    optimizer = helpers.kfac(curvature=curvature, **(fixed | {"fisher": "exact"} | options))
    model.compile(optimizer.attach(model), MSE())
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(batches, examples, d)) for d in (5, 3))
    for own in range(batches):
        before = model.get_weights()
        with tf.GradientTape() as tape:
            loss = MSE()(y[own], model(x[own]))
        gradient = tape.gradient(loss, [v.value for v in model.trainable_variables])
        fisher = [layer_block(model, MSE(), x[own], y[own], layer) for layer in model.layers]
        model.train_on_batch(x[own], y[own])
    steps = [after - b for after, b in zip(model.get_weights(), before)]
    return optimizer, by_layer(steps), by_layer(gradient), fisher


def by_layer(weights):
    """Kernel and bias of each layer, as one vector."""
    pairs = zip(weights[::2], weights[1::2])
    return [np.ravel(np.concatenate([kernel, np.asarray(bias)[None]])) for kernel, bias in pairs]


class TestSteps:
    def test_full(self):
        _, steps, gradients, fisher = one_step("full")
        for step, gradient, own in zip(steps, gradients, fisher):
            assert_close(step, -np.linalg.solve(own + 0.3 * np.eye(len(own)), gradient))

    def test_diagonal(self):
        _, steps, gradients, fisher = one_step("diagonal")
        for step, gradient, own in zip(steps, gradients, fisher):
            assert_close(step, -gradient / (np.diag(own) + 0.3))

    def test_diagonal_of_the_empirical_fisher_matrix(self):
        """Squares of the gradients of single examples, over `w = 2/3` of `-w log r`."""
        _, steps, gradients, _ = one_step("diagonal", fisher="empirical")
        model, rng = mlp((5, 4, 3)), np.random.default_rng(0)
        x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 3))
        squares = 0
        for i in range(9):
            with tf.GradientTape() as tape:
                loss = MSE()(y[i : i + 1], model(x[i : i + 1]))
            found = by_layer(tape.gradient(loss, [v.value for v in model.trainable_variables]))
            squares += np.square(np.concatenate(found)) * 3 / 2 / 9
        step, gradient = map(np.concatenate, (steps, gradients))
        assert_close(step, -gradient / (squares + 0.3))

    def test_of_one_datum_are_the_same(self):
        """Identity 5: then a layer's Fisher matrix is a Kronecker product."""
        full, *others = (
            np.concatenate(one_step(curvature, examples=1, exact_damping=True)[1])
            for curvature in ("full", "kfac", "ekfac")
        )
        for other in others:
            assert_close(other, full, 1e-10)

    @pytest.mark.parametrize("exact_damping", [False, True])
    def test_input(self, exact_damping):
        """By the mean eigenvalue of the output factor, and damped exactly in either case."""
        _, steps, gradients, _ = one_step("input", exact_damping=exact_damping)
        model, rng = mlp((5, 4, 3)), np.random.default_rng(0)
        x = rng.normal(size=(9, 5))
        for step, gradient, layer in zip(steps, gradients, model.layers):
            (base,) = registry.adapt(layer, lambda v: True)
            ((a, g),) = collected(model, MSE(), x, [base])
            own = kron(a, np.trace(g) / len(g) * np.eye(len(g)))
            assert_close(step, -np.linalg.solve(own + 0.3 * np.eye(len(own)), gradient))

    def test_ekfac_is_kfac_until_it_sees_a_batch_in_its_bases(self):
        for batches in (1, 2):
            steps = [
                one_step(curvature, batches, exact_damping=True)[1]
                for curvature in ("ekfac", "kfac")
            ]
            difference = max(np.abs(a - b).max() for a, b in zip(*steps))
            largest = max(np.abs(step).max() for step in steps[1])
            assert difference < 1e-12 * largest if batches == 1 else difference > 1e-3 * largest

    def test_ekfac(self):
        """Squares in the bases of the first batch, and then in new ones; no weight moves."""
        options = {"fisher": "exact", "learning_rate": 0.0, "momentum": 0.0, "damping": 0.3}
        model, rng = mlp((5, 4, 3)), np.random.default_rng(0)
        optimizer = helpers.kfac(curvature="ekfac", factor_ema_decay=0.0, **options)
        model.compile(optimizer.attach(model), MSE())
        x = rng.normal(size=(2, 9, 5))
        model.train_on_batch(x[0], np.zeros((9, 3)))
        blocks = optimizer._known.curvature.blocks
        old = [ExactInverse(*map(tf.identity, block.inverse)) for block in blocks]
        model.train_on_batch(x[1], np.zeros((9, 3)))
        for layer, block, before in zip(model.layers, blocks, old):
            (base,) = registry.adapt(layer, lambda v: True)
            observer = introspection.RotatedSquaresAdapter(base, before[:2])
            (squares,) = collected(model, MSE(), x[1], [observer])
            values = tf.reshape(squares.output_factor, base.dims)
            after = block.inverse
            assert_close(after.eigenvalues, before.diagonal_in(after, values))
            product = ExactInverse.of(block.input_factor, block.output_factor, 0.3).eigenvalues
            assert np.abs(after.eigenvalues - product).max() > 1e-3 * np.abs(product).max()

    def test_condition_number_of_ekfac_is_that_of_what_it_divides_by(self):
        optimizer, *_ = one_step("ekfac", 2, damping=1e-3, learning_rate=0.1)
        for block in optimizer._known.curvature.blocks:
            damped = block.inverse.eigenvalues + block.inverse.damping
            ratio = np.max(damped) / np.min(damped)
            assert_close(block.inverse.condition_number, ratio)
            plain = ExactInverse.of(block.input_factor, block.output_factor, 1e-3)
            assert abs(plain.condition_number / ratio - 1) > 0.1

    @pytest.mark.parametrize("turned", [False, True], ids=["zeros", "rounding"])
    def test_ekfac_without_damping_is_the_pseudo_inverse(self, turned):
        """Each input leads to one output: two thirds of `S` are zero, though no factor is singular.

        What counts are the weights of each with its own; their steps are Newton's.
        """
        turn = (
            np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0] if turned else np.eye(3)
        )
        x = np.vstack([np.diag([1.0, 2.0, 3.0])] * 2)
        y = np.vstack([np.diag([2.0, 6.0, 6.0]), np.diag([1.0, 1.0, 2.0])])
        own = {"use_bias": False, "activation": "relu", "dtype": "float64"}
        layer = layers.Dense(3, **own)
        model = keras.Sequential([keras.Input((3,), dtype="float64"), layer])
        layer.set_weights([turn.T])
        options = {"momentum": 0.0, "damping": 0.0, "kl_clip": None, "learning_rate": 0.125}
        options |= {"curvature": "ekfac", "fisher": "exact", "factor_ema_decay": 0.0}
        optimizer = helpers.kfac(**options).attach(model)
        model.compile(optimizer, MSE(), run_eagerly=True)
        for step in range(4):
            before = turn @ layer.kernel.numpy()
            model.train_on_batch(x @ turn, y)
            if step:  # The first one knows K-FAC's product alone.
                expected = 0.875 * np.diag(before) + 0.125 * np.array([1.5, 1.75, 4 / 3])
                assert_close(turn @ layer.kernel.numpy(), np.diag(expected), 1e-12)
        assert max(optimizer.condition_numbers().values()) == pytest.approx(9.0)
        assert not optimizer._known.curvature.failed_refreshes()

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_ekfac_without_damping_stays_in_the_span_of_the_inputs(self, dtype):
        """Though bases are rounded; the first step takes K-FAC's product, the last one old bases.

        In these the squares of the batch are new.
        """
        rng = np.random.default_rng(0)
        span = np.linalg.qr(rng.normal(size=(300, 50)))[0]
        layer = layers.Dense(3, use_bias=False, dtype=dtype)
        model = keras.Sequential([keras.Input((300,), dtype=dtype), layer])
        options = {"momentum": 0.0, "damping": 0.0, "kl_clip": None, "curvature": "ekfac"}
        options |= {"inverse_update_period": 20, "fisher": "exact"}
        optimizer = helpers.kfac(**options).attach(model)
        model.compile(optimizer, keras.losses.MeanSquaredError(dtype=dtype), run_eagerly=True)
        outside = np.eye(300) - span @ span.T
        for _ in range(8):
            before = layer.kernel.numpy()
            x = rng.normal(size=(256, 50)) * np.geomspace(1, 1e-2, 50) @ span.T
            model.train_on_batch(x, rng.normal(size=(256, 3)))
            step = layer.kernel.numpy() - before
            limit = 1e-3 if dtype == "float32" else 1e-11
            assert np.linalg.norm(outside @ step) < limit * np.linalg.norm(step)
            assert np.linalg.norm(step) > 1e-3
        assert int(optimizer.findings.curvature.blocks[0].refreshes.numpy()) == 7

    def test_ekfac_with_damping_cuts_nothing(self):
        """An input so small that its curvature may be rounding: it may be curvature, too."""
        x, found = np.diag([1.0, 3e-4]), []
        options = {"momentum": 0.0, "damping": 1e-9, "kl_clip": None, "learning_rate": 1.0}
        for curvature in ("ekfac", "kfac"):
            layer = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
            model = keras.Sequential([keras.Input((2,)), layer])
            own = {"curvature": curvature, "exact_damping": True, "fisher": "exact"}
            optimizer = helpers.kfac(**options, **own).attach(model)
            model.compile(optimizer, "mse", run_eagerly=True)
            model.train_on_batch(x, np.ones((2, 1)))
            found.append(layer.kernel.numpy())
        assert_close(found[0], found[1], 1e-6)
        assert_close(found[0], [[1], [1 / 3e-4]], 0.05)

    def test_what_is_rounding_in_a_factor_is_exact_in_a_diagonal(self):
        products = tf.constant([[1.0, 1e-6], [1e-6, 1e-12]])
        dense, diagonal = Structure(2), Structure(2, is_diagonal=True)
        cut = [_of_regular_vectors(products, (own, dense)).numpy() for own in (dense, diagonal)]
        np.testing.assert_array_equal(cut[0] > 0, [[True, True], [True, True]])
        tiny = products * tf.constant([[1.0], [1e-4]])
        cut = [_of_regular_vectors(tiny, (own, dense)).numpy() for own in (dense, diagonal)]
        np.testing.assert_array_equal(cut[0] > 0, [[True, True], [False, False]])
        np.testing.assert_array_equal(cut[1], tiny)

    def test_ekfac_keeps_what_it_knows_when_bases_change(self):
        """The diagonal of the old approximation in the new bases, computed densely."""
        rng = np.random.default_rng(0)
        bases = [[orthonormal(rng, (d, d)) for d in (3, 2)] for _ in range(2)]
        values = tf.constant(rng.uniform(size=(3, 2)))
        old, new = (ExactInverse(*pair, values, 0.0, 1.0) for pair in bases)
        dense = kron(*bases[0]) @ np.diag(np.ravel(values)) @ kron(*bases[0]).T
        expected = np.diag(kron(*bases[1]).T @ dense @ kron(*bases[1]))
        actual = old.diagonal_in(new, values)
        assert_close(np.ravel(actual), expected)
        assert np.sum(actual) == pytest.approx(np.sum(values), rel=1e-13)


class TestInverseFree:
    """The same steps as K-FAC's, from roots that stand for the factors."""

    def trained(self, curvature, **options):
        """After several batches, refreshed with each."""
        model = mlp((5, 4, 3))
        options = {"fisher": "exact", "damping": 0.3, "kl_clip": None, **options}
        optimizer = helpers.kfac(curvature=curvature, **options)
        model.compile(optimizer.attach(model), MSE(), run_eagerly=True)
        rng = np.random.default_rng(0)
        for _ in range(4):
            model.train_on_batch(rng.normal(size=(9, 5)), rng.normal(size=(9, 3)))
        return model.get_weights(), optimizer

    @pytest.mark.parametrize("largest", [8192, 3], ids=["whole", "in-blocks"])
    def test_steps_are_those_of_kfac(self, largest):
        """No approximation, and with half of the memory."""
        (weights, mine), (expected, plain) = (
            self.trained(name, max_factor_size=largest) for name in ("inverse_free", "kfac")
        )
        for weight, other in zip(weights, expected):
            assert_close(weight, other, 1e-10)
        assert_close(mine._known.curvature._traces(), plain._known.curvature._traces(), 1e-12)
        for actual, other in zip(mine.curvature_summary(), plain.curvature_summary()):
            assert_close(actual.input_eigenvalues, other.input_eigenvalues, 1e-9)
            assert_close(actual.output_eigenvalues, other.output_eigenvalues, 1e-9)
        assert 0.5 < mine.coverage().memory / plain.coverage().memory < 0.6
        assert not mine._known.curvature.failed_refreshes()

    def block(self):
        """A block by itself, after two updates and a refresh."""

        def variable(name, shape, dtype, initializer="zeros"):
            return keras.Variable(initializer, shape, dtype)

        (adapter,) = registry.adapt(mlp((5, 4)).layers[0], lambda v: True)
        plan = STRUCTURES["inverse_free"].plan(adapter, FactoredInverse)
        block = plan.build(variable, None)
        kept = *block._inverse, block.input_factor, block.output_factor
        assert plan.memory == sum(v.numpy().nbytes for v in kept)
        rng = np.random.default_rng(0)
        self.update(block, *(rng.normal(size=(d, d - 1)) for d in (6, 4)))
        self.update(block, np.eye(6), np.eye(4))
        block.keep(block.invert(0.3))
        return block

    def update(self, block, *roots):
        factors = [tf.constant(root @ root.T) for root in roots]
        weights = BatchWeights(tf.constant(9), tf.constant(9))
        block.update([LayerStatistics(*factors)], weights, tf.constant(0.9))

    def test_staleness_is_of_updates_too(self):
        """A refresh by itself changes the damping alone."""
        block = self.block()
        states = [block.inverse]
        self.update(block, 2 * np.eye(6), np.eye(4))
        states.append(block.inverse)
        block.keep(block.invert(0.3))
        states.append(block.inverse)
        changes = [relative_change(*pair) for pair in itertools.pairwise(states)]
        assert min(map(float, changes)) > 1e-3
        assert_close(block.staleness, sum(changes))
        block.keep(block.invert(0.3))
        assert float(block.staleness) < 1e-6

    def test_what_is_not_finite_changes_nothing(self):
        block = self.block()
        variables = *block._inverse, block.input_factor, block.output_factor, block.weight
        kept = [v.numpy() for v in variables]
        self.update(block, np.nan * np.eye(6), np.eye(4))
        for variable, before in zip(variables, kept):
            np.testing.assert_array_equal(variable, before)
        self.update(block, np.eye(6), np.eye(4))
        for index in (0, 2):  # The roots: statistics that are finite do change them.
            assert np.any(variables[index].numpy() != kept[index])

    def test_singular_factors_without_damping_are_reported(self):
        """As with K-FAC: the inverse of before stays."""
        block = self.block()
        for weight in block._weights:
            weight.assign(0)
        self.update(block, np.eye(6)[:, :5], np.eye(4))
        for _ in range(4):
            block.keep(block.invert(0.0))
        assert int(block.failed_refreshes.numpy()) > 0
        assert all(np.isfinite(v.numpy()).all() for v in block._inverse)


def test_squares_lie_as_eigenvalues_of_factors_in_blocks():
    """The last block is filled up: what belongs to no weight has no square."""
    model = mlp((5, 4, 3))
    optimizer = helpers.kfac(fisher="exact", curvature="ekfac", max_factor_size=4)
    model.compile(optimizer.attach(model), MSE())
    rng = np.random.default_rng(0)
    model.train_on_batch(rng.normal(size=(9, 5)), rng.normal(size=(9, 3)))
    block = optimizer._known.curvature.blocks[1]  # 5 x 3: two blocks of three rows, the last full
    inverse, x = block.inverse, tf.constant(rng.normal(size=(9, 5)))
    assert inverse.eigenvalues.shape == (2, 1, 3, 3)
    statistics = collected(model, MSE(), x, block.observers)
    dense = np.zeros((18, 18))
    dense[:15, :15] = layer_block(model, MSE(), x, np.zeros((9, 3)), model.layers[1])
    bases = np.zeros((6, 6))
    bases[:3, :3], bases[3:, 3:] = inverse.input_basis[:, 0]
    rotation = kron(bases, inverse.output_basis[0, 0])
    squares = block._as_eigenvalues(statistics[1].output_factor)
    actual = np.transpose(squares, [0, 2, 1, 3]).ravel()
    assert_close(actual, np.diag(rotation.T @ dense @ rotation))


# ---- Choice -------------------------------------------------------------------------------------


def blocks_of(curvature, model=None):
    model = model or helpers.mlp_with_batch_normalization()
    optimizer = KFAC(curvature=curvature).attach(helpers.compiled(model))
    return {row.layer.rpartition("/")[2]: row.block for row in optimizer.coverage()}


class TestChoice:
    @pytest.mark.parametrize("name", STRUCTURES)
    def test_for_all(self, name):
        expected = "kronecker" if name == "kfac" else name
        scales = name if name in ("diagonal", "dense", "sample_space") else "full"
        blocks = {"hidden": expected, "norm": scales, "unknown": "fallback", "logits": expected}
        assert blocks_of(name) == blocks

    @pytest.mark.parametrize(
        "curvature",
        [
            {"hidden": "ekfac", "logits": "diagonal"},
            {"mlp/hidden": "ekfac", "Dense": "diagonal"},
            {layers.Dense: "diagonal", "hidden": "ekfac"},
            lambda layer: {"hidden": "ekfac", "logits": "diagonal"}.get(layer.name),
        ],
        ids=["names", "path and class name", "class and name", "function"],
    )
    def test_for_some(self, curvature):
        blocks = blocks_of(curvature)
        assert (blocks["hidden"], blocks["logits"]) == ("ekfac", "diagonal")
        assert blocks["norm"] == "full"  # As it is without a choice.

    def test_subclasses_are_meant_too(self):
        class Own(layers.Dense):
            pass

        model = keras.Sequential([keras.Input((3,)), Own(2, name="own"), layers.Dense(1, name="d")])
        assert blocks_of({layers.Dense: "input"}, model) == {"own": "input", "d": "input"}
        assert blocks_of({"Own": "input"}, model) == {"own": "input", "d": "kronecker"}

    def tied(self):
        table = layers.ReversibleEmbedding(6, 3, tie_weights=True, name="table")
        inputs = keras.Input((4,), dtype="int32")
        return keras.Model(inputs, table(layers.Dense(3)(table(inputs)), reverse=True))

    @pytest.mark.parametrize("name", ["ekfac", "input", "diagonal", "full", "dense"])
    def test_layer_that_cannot_have_it_has_kfac_and_says_so(self, name):
        optimizer = KFAC(curvature=name).attach(helpers.compiled(self.tied()))
        (row,) = [r for r in optimizer.coverage() if r.layer.endswith("table")]
        assert row.block == "kronecker" and f"not {name!r}: " in row.reason

    @pytest.mark.parametrize("name", ["inverse_free", "linear_exact"])
    def test_tied_table_can_have_others(self, name):
        assert blocks_of(name, self.tied())["table"] == name

    @pytest.mark.parametrize("name", ["ekfac", slow_unless("inverse_free", ())])
    def test_tied_table_trains(self, name):
        """That can't have the one, and is diagonal on one side in the other."""
        model = helpers.compiled(self.tied(), helpers.kfac(curvature=name))
        x = np.random.default_rng(0).integers(0, 6, size=(8, 4))
        history = helpers.fit(model, (x, x), epochs=5).history["loss"]
        assert history[-1] < history[0]
        helpers.assert_all_finite(model)

    def test_layer_that_cannot_have_it_is_refused_by_name(self):
        optimizer = KFAC(curvature={"table": "ekfac"}).attach(helpers.compiled(self.tied()))
        with pytest.raises(ValueError, match=r"can't be 'ekfac' for a ReversibleEmb.*Received"):
            optimizer.coverage()

    def of_all_kinds(self):
        norm = layers.LayerNormalization(name="norm")
        return helpers.mlp(norm, helpers.Unknown(name="unknown"), layers.Dropout(0.5, name="drop"))

    @pytest.mark.parametrize(
        ("layer", "name", "reason"),
        [
            ("norm", "ekfac", r"an exact block, for which there are \['diagonal', 'full', 'dense'"),
            ("norm", "tridiagonal", "it has an exact block"),
            ("unknown", "ekfac", "no curvature block for Unknown"),
            ("unknown", "kfac", "no curvature block for Unknown"),
            ("drop", "dense", "it has no weights"),
            ("mlp/norm", "input", "it has an exact block"),
            ("mlp", "input", "name the layers in it"),
        ],
    )
    def test_layer_without_such_a_block_is_refused_by_name(self, layer, name, reason):
        with pytest.raises(ValueError, match=f"can't be {name!r}.*: .*{reason}.*Received"):
            blocks_of({layer: name}, self.of_all_kinds())

    def test_layer_without_such_a_block_is_left_out_otherwise(self):
        model = self.of_all_kinds()
        expected = {"hidden": "ekfac", "norm": "full", "unknown": "fallback", "logits": "ekfac"}
        for curvature in ("ekfac", lambda layer: "ekfac", {"Layer": "ekfac", "norm": "kfac"}):
            assert blocks_of(curvature, model) == expected
        model.layers[0].trainable = False
        model.get_layer("unknown").trainable = False
        frozen = blocks_of({"hidden": "ekfac", "unknown": "ekfac"}, model)
        assert frozen["hidden"] == frozen["unknown"] == "frozen"

    def test_cells_are_refused_with_the_name_of_their_layer(self):
        """Coverage has their paths, for the weights are theirs."""
        lstm = layers.LSTM(2, name="lstm")
        model = keras.Sequential([keras.Input((3, 4)), lstm, layers.Dense(3)], name="m")
        for key in ("lstm_cell", "m/lstm/lstm_cell"):
            with pytest.raises(ValueError, match=r"name 'm/lstm', in whose block.*Received"):
                blocks_of({key: "full"}, model)
        assert blocks_of({"m/lstm": "full"}, model)["lstm_cell"] == "full"
        lstm.trainable = False
        assert blocks_of({"lstm_cell": "full"}, model)["lstm_cell"] == "frozen"

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            (layers.MultiHeadAttention, r"in them, \['EinsumDense'\]"),
            ("Bidirectional", r"in them, \['GRU'\]"),
            (layers.GRUCell, "of a cell, choose its recurrent layer"),
            (layers.Dropout, "keras_kfac.register"),
        ],
    )
    def test_classes_without_blocks_are_refused(self, key, hint):
        inputs = keras.Input((3, 4))
        attended = layers.MultiHeadAttention(1, 2, dropout=0.1)(inputs, inputs)
        outputs = layers.Bidirectional(layers.GRU(2))(layers.Dropout(0.1)(attended))
        model = keras.Model(inputs, outputs)
        with pytest.raises(ValueError, match=f"of layers that have no.*{hint}.*Received: .*{key}"):
            blocks_of({key: "full"}, model)
        model.layers[1].trainable = False  # Layers in it could have blocks all the same.
        assert "frozen" in blocks_of({"EinsumDense": "full", layers.GRU: "full"}, model).values()

    def test_unknown_layers_are_refused(self):
        with pytest.raises(ValueError, match=r"`curvature` names layers.*Received: \['absent'\]"):
            blocks_of({"absent": "ekfac", "hidden": "input"})

    @pytest.mark.parametrize("wrong", ["shampoo", {"hidden": "adam"}, {3: "kfac"}, None, 1])
    def test_unknown_structures_are_refused(self, wrong):
        with pytest.raises(ValueError, match=r"`curvature` must be one of .*'ekfac'.*Received"):
            KFAC(curvature=wrong)

    def test_functions_that_return_something_else_are_refused(self):
        with pytest.raises(ValueError, match=r"must return one of .*Received: 'adam' for layer"):
            blocks_of(lambda layer: "adam")

    @pytest.mark.parametrize("name", ["ekfac", "diagonal", "full", "dense", {"hidden": "ekfac"}])
    def test_without_gradients_there_are_no_squares(self, name):
        with pytest.raises(ValueError, match=r"forward_only' has no gradients.*Received"):
            KFAC(curvature=name, fisher="forward_only")
        with pytest.raises(ValueError, match=r"can't be a function: .*beforehand.*Received"):
            KFAC(curvature=lambda layer: name, fisher="forward_only")
        KFAC(curvature="input", fisher="forward_only")
        KFAC(curvature="inverse_free", fisher="forward_only")
        KFAC(curvature={"hidden": "input"}, fisher="forward_only")


class TestPrecision:
    """Where TensorFlow factorises no matrix, blocks that need it are refused when planned."""

    def plan(self, policy, curvature, *between):
        with helpers.precision(policy):
            return blocks_of(curvature, helpers.mlp(*between))

    possible = ("inverse_free", "diagonal", "sample_space")

    @pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - set(possible)))
    def test_weights_in_bfloat16_are_refused(self, name):
        with pytest.raises(
            ValueError, match=r"matrix in bfloat16.*'inverse_free'.*'mixed_bfloat16'.*: layer 'mlp/"
        ):
            self.plan("bfloat16", name)
        assert self.plan("mixed_bfloat16", name)["hidden"] != "fallback"

    @pytest.mark.parametrize("name", ["diagonal", "sample_space"])
    def test_what_has_no_matrices_trains(self, name):
        with helpers.precision("bfloat16"):
            model = helpers.compiled(helpers.mlp(), helpers.kfac(curvature=name, damping=0.1))
            before = helpers.weights(model)
            helpers.fit(model, helpers.vectors())
        after = helpers.weights(model)
        assert all(np.all(np.isfinite(w.astype(float))) for w in after)
        assert all(np.any(w != b) for w, b in zip(after, before))
        assert bool(model.optimizer.curvature_summary()) == (name == "diagonal")

    def test_what_has_no_matrices_is_not(self):
        for name in self.possible:
            assert self.plan("bfloat16", name) == {"hidden": name, "logits": name}
            assert self.plan("float16", name) == {"hidden": name, "logits": name}

    def test_exact_blocks_can_be_diagonal(self):
        choice = {"Layer": "inverse_free"}
        with helpers.precision("bfloat16"):
            norm = layers.LayerNormalization(name="norm")
        with pytest.raises(
            ValueError, match=r"'diagonal' if its block is exact.*: layer 'mlp/norm'"
        ):
            self.plan("bfloat16", choice, norm)
        assert self.plan("bfloat16", choice | {"norm": "diagonal"}, norm)["norm"] == "diagonal"

    def test_laplace(self):
        with helpers.precision("bfloat16"):
            model = helpers.compiled(helpers.mlp())
            x, y = helpers.vectors(8)
            with pytest.raises(ValueError, match="TensorFlow factorises no matrix in bfloat16"):
                laplace(model, x, y, prior_precision=1.0)
            assert laplace(model, x, y, prior_precision=1.0, curvature="diagonal")


def test_structures_say_what_they_need(monkeypatch):
    """A new one is its class and its entry."""

    class Own(STRUCTURES["kfac"]):
        kind = "own"

    monkeypatch.setitem(STRUCTURES, "own", Own)
    KFAC(curvature="own", fisher="forward_only")
    Own.needs_gradients = True
    with pytest.raises(ValueError, match=r"forward_only' has no gradients.*'own'"):
        KFAC(curvature="own", fisher="forward_only")


def test_input_alone_is_kfac_without_output_factors():
    """Forward-only K-FAC (FOOF) has multiples of the identity for output factors by itself."""
    steps = [
        one_step(curvature, fisher="forward_only", exact_damping=True)[1]
        for curvature in ("input", "kfac")
    ]
    for a, b in zip(*steps):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("case", SCALES[:1], ids=str)
@pytest.mark.parametrize("curvature", ["diagonal", "full"])
def test_scales_have_the_chosen_block(case, curvature):
    model, _ = in_network(case)
    optimizer = helpers.kfac(curvature=curvature, fisher="exact")
    model.compile(optimizer.attach(model), MSE())
    x = random_inputs(model, 6)
    model.train_on_batch(x, np.zeros((6, 2)))
    (row,) = [r for r in optimizer.coverage() if r.layer_type == case.layer_class.__name__]
    assert row.block == curvature
    helpers.assert_all_finite(model)
