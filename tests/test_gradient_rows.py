"""Gradients of wide dense layers, preconditioned as the rows that they are made of."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC
from keras_kfac.curvature.block import KroneckerBlock
from keras_kfac.introspection import gradient_rows
from keras_kfac.introspection.forward_pass import recording
from keras_kfac.introspection.gradient_rows import GradientRows
from keras_kfac.introspection.registry import adapt
from keras_kfac.math.linalg import RowPairs
from tests import helpers
from tests.reference import assert_close

layers = keras.layers
RNG = np.random.default_rng(5)
FLOAT = {"dtype": "float64"}
STEPS = 3


def network(**options):
    """A convolution, below which rows are not looked for, and two dense layers above."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4, 4, 1), **FLOAT),
            layers.Conv2D(3, 2, activation="tanh", **FLOAT),
            layers.Flatten(),
            layers.Dense(12, "tanh", bias_initializer="random_normal", **FLOAT, **options),
            layers.Dropout(0.2, seed=1, **FLOAT),
            layers.Dense(10, "tanh", use_bias=False, **FLOAT),
            layers.LayerNormalization(**FLOAT),
            layers.Dense(3, **FLOAT),
        ]
    )


def data(examples=4):
    return RNG.normal(size=(examples * STEPS, 4, 4, 1)), RNG.integers(0, 3, examples * STEPS)


@pytest.fixture
def use_of_rows(monkeypatch):
    """Notes for each block that is preconditioned whether that was by rows."""
    notes = []
    precondition = KroneckerBlock.precondition

    def noted(self, gradients, inverse, pairs=None):
        notes.append(pairs is not None)
        return precondition(self, gradients, inverse, pairs)

    monkeypatch.setattr(KroneckerBlock, "precondition", noted)
    return notes


@pytest.fixture
def looked_for(monkeypatch):
    """Notes for each step that asks for rows whether any were made."""
    notes = []
    of = GradientRows.of

    def noted(passes, adapters):
        rows = of(passes, adapters)
        notes.append(rows is not None)
        return rows

    monkeypatch.setattr(GradientRows, "of", noted)
    return notes


def weights_after(monkeypatch, model, batches, smallest, **kwargs):
    """What a few steps make of the weights, with rows for all blocks that are not too small."""
    monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", smallest)
    with helpers.precision("float64"):
        # An adaptive damping may undo all of so few steps, and what stays put proves nothing.
        helpers.compiled(model, KFAC(damping=0.1, **kwargs), run_eagerly=True)
        helpers.train_on_batches(model, batches, size=len(batches[0]) // STEPS)
    return model.get_weights()


class TestRows:
    @pytest.mark.parametrize("exact", [False, True], ids=["factored", "exact"])
    @pytest.mark.parametrize("largest", [8192, 6], ids=["whole", "in-blocks"])
    def test_make_the_same_steps(self, monkeypatch, use_of_rows, exact, largest):
        options = {"exact_damping": exact, "max_factor_size": largest}
        batches = data(examples=2)
        expected = weights_after(monkeypatch, network(), batches, 2**60, **options)
        assert not any(use_of_rows)
        use_of_rows.clear()
        actual = weights_after(monkeypatch, network(), batches, 1, **options)
        # Three dense layers; neither the convolution nor the normalisation.
        assert sum(use_of_rows) >= 3 * STEPS
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, 1e-9)

    @pytest.mark.parametrize(
        "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["graph", "xla"]
    )
    def test_in_graphs(self, monkeypatch, jit_compile):
        x, y = helpers.vectors(48)

        def train(smallest):
            monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", smallest)
            model = helpers.compiled(helpers.mlp(), KFAC(), jit_compile=jit_compile)
            helpers.fit(model, (x, y), batch_size=2)
            return model.get_weights()

        for a, b in zip(train(1), train(2**60), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)

    def test_in_reduced_precision(self, monkeypatch, use_of_rows):
        batches = data(examples=2)
        expected = weights_after(monkeypatch, network(), batches, 2**60)
        actual = weights_after(monkeypatch, network(), batches, 1, product_dtype="float32")
        assert any(use_of_rows)
        errors = [np.abs(a - b).max() for a, b in zip(actual, expected, strict=True)]
        assert 1e-10 < max(errors) < 1e-5

    @pytest.mark.parametrize("examples", [4, 64])
    def test_are_not_looked_for_of_large_batches(self, monkeypatch, looked_for, examples):
        weights_after(monkeypatch, network(), data(examples), 1)
        assert looked_for == [examples == 4] * STEPS

    @pytest.mark.parametrize(
        "options",
        [
            {"kernel_regularizer": keras.regularizers.L2(0.1)},
            {"kernel_regularizer": keras.regularizers.L1(0.1)},
            {"activity_regularizer": keras.regularizers.L2(0.1)},
        ],
        ids=["l2", "l1", "activity"],
    )
    def test_of_other_gradients_than_those_of_the_loss(self, monkeypatch, options):
        batches = data()
        expected = weights_after(monkeypatch, network(**options), batches, 2**60)
        actual = weights_after(monkeypatch, network(**options), batches, 1)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, 1e-9)

    @pytest.mark.parametrize(
        "options",
        [{"clipnorm": 0.01}, {"gradient_accumulation_steps": 3}, {"loss_scale_factor": 8.0}],
    )
    def test_are_not_looked_for_where_gradients_are_changed(self, monkeypatch, looked_for, options):
        weights_after(monkeypatch, network(), data(), 1, **options)
        assert looked_for == []

    def test_are_not_looked_for_where_the_loss_is_scaled(self, monkeypatch, looked_for):
        monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", 1)
        inner, (x, y) = helpers.kfac(), data()
        scaling = keras.optimizers.LossScaleOptimizer(inner)
        model = helpers.compiled(network(), scaling, run_eagerly=True)
        inner.attach(model)
        model.train_on_batch(x[:4], y[:4])
        assert int(inner.iterations) == 1
        assert looked_for == []

    @pytest.mark.parametrize("change", [2.0, 1 + 1e-8])
    def test_custom_loops_can_change_gradients(self, monkeypatch, use_of_rows, change):
        """Rows that do not make up the gradient are noticed."""
        monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", 1)
        x, y = data()

        def step_of(factor):
            model = helpers.compiled(network(), helpers.kfac(kl_clip=None))
            optimizer = model.optimizer.attach(model)
            before = model.get_weights()
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x[:4], y[:4], model(x[:4], training=True))
            gradients = tape.gradient(loss, model.trainable_weights)
            changed = [factor * gradient for gradient in gradients]
            optimizer.apply_gradients(zip(changed, model.trainable_weights))
            return [after - old for after, old in zip(model.get_weights(), before)]

        once = step_of(1.0)
        assert any(use_of_rows)
        use_of_rows.clear()
        for a, b in zip(step_of(change), once):
            assert_close(a, change * b, 1e-10)
        assert not any(use_of_rows)

    def test_are_not_looked_for_where_the_total_is_not_known(self, monkeypatch, looked_for):
        """Of a loss that is computed in parts, only the loop knows what it makes of them."""
        monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", 1)
        x, y = data()
        model = helpers.compiled(network(), helpers.kfac(kl_clip=None))
        optimizer = model.optimizer.attach(model)
        with tf.GradientTape() as tape:
            outputs = model(x[:4], training=True)
            loss = model.compute_loss(x[:4], y[:4], outputs)
            loss += model.compute_loss(x[:4], y[:4], outputs)
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply_gradients(zip(gradients, model.trainable_weights))
        assert looked_for == [False]


@pytest.mark.parametrize("examples", [4, 64, None])
def test_batches_known_to_be_large_have_none_in_graphs(monkeypatch, examples):
    monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", 1)
    model, known = network(), []
    found = [a for layer in model.layers for a in adapt(layer, lambda v: True)]

    @tf.function(input_signature=[tf.TensorSpec([examples, 4, 4, 1], "float64")])
    def record(x):
        with recording(model.layers) as recorded:
            recorded.outputs = model(x)
            recorded.totals.append(tf.reduce_sum(recorded.outputs))
        rows = GradientRows.of([recorded], found)
        known.append(False if rows is None else tf.get_static_value(rows.is_cheaper))
        return recorded.outputs

    record.get_concrete_function()
    assert known == [{4: True, 64: False, None: None}[examples]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("left", [1.0, 1e-3], ids=["random", "cancelling"])
def test_rounding_of_sums_is_told_from_other_gradients(dtype, left):
    """By the rows: near a minimum the gradient is small, and what rounding leaves of it is not."""
    dense = layers.Dense(30, use_bias=False, dtype=dtype)
    dense.build((None, 50))
    (adapter,) = adapt(dense, lambda variable: True)
    inputs, outputs = RNG.normal(size=(1000, 50)), RNG.normal(size=(1000, 30))
    outputs -= (1 - left) * inputs @ np.linalg.lstsq(inputs, outputs)[0]
    pairs = RowPairs(tf.constant(inputs, dtype), tf.constant(outputs, dtype))
    exact = inputs.T @ outputs
    assert (np.linalg.norm(exact) < 10) == (left < 1)

    def agrees(gradient):
        gradients = {id(dense.kernel): tf.constant(gradient, dtype)}
        return bool(
            KroneckerBlock.is_made_of(types.SimpleNamespace(adapter=adapter), pairs, gradients)
        )

    assert agrees(pairs.sum().numpy())
    rows = np.linalg.norm(inputs) * np.linalg.norm(outputs) / np.sqrt(len(inputs))
    penalty = 1000 * np.finfo(dtype).eps * rows * np.ones_like(exact) / np.sqrt(exact.size)
    assert not agrees(exact + penalty)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_are_not_looked_for_in_half_precision(monkeypatch, dtype):
    """Its rounding would hide what else there is in a gradient."""
    monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", 1)
    for own, suits in ((dtype, False), ("float32", True)):
        layer = layers.Dense(4, dtype=own)
        layer.build((None, 8))
        (adapter,) = adapt(layer, lambda v: True)
        assert gradient_rows._suits(adapter, tf.as_dtype(own)) == suits


def test_rows_add_up_to_the_gradients(monkeypatch):
    monkeypatch.setattr(gradient_rows, "MIN_PRODUCTS", 1)
    model, (x, y) = network(), data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weight = RNG.uniform(0.5, 2, size=len(x))
    found = [a for layer in model.layers for a in adapt(layer, lambda v: True)]
    with tf.GradientTape() as tape, recording(model.layers) as recorded:
        recorded.outputs = model(x, training=True)
        total = loss(y, recorded.outputs, weight)
    recorded.totals.append(total)
    gradients = tape.gradient(total, model.trainable_weights)
    by_variable = {id(v): g for v, g in zip(model.trainable_weights, gradients)}
    monkeypatch.setattr(gradient_rows, "_are_cheaper", lambda *_: tf.constant(True))
    rows = GradientRows.of([recorded], found)
    named = {adapter.layer.name: adapter for adapter in found if id(adapter) in rows.pairs}
    assert list(named) == [model.layers[i].name for i in (2, 4, 6)]
    for adapter in named.values():
        assert_close(rows.pairs[id(adapter)].sum(), adapter.to_matrix(by_variable), 1e-12)
