"""Every adapted layer: its matrices are the layer, and its factors the Fisher matrix."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC, RawWeightsAdapter, _keras_internals, register
from keras_kfac.curvature.choice import STRUCTURES
from keras_kfac.curvature.coverage import Coverage
from keras_kfac.introspection import adapters, forward_pass, per_example, registry
from keras_kfac.introspection.affine import DenseAdapter
from keras_kfac.introspection.convolutions import TransposedKernelAdapter
from keras_kfac.math import factors as kronecker_factors
from tests import helpers
from tests.cases import COMPOSED_LAYERS, LAYERS, LOSS, SCALES, factors
from tests.oracle import (
    adapted,
    alone,
    blocks_and_ggn,
    check_equals_ggn,
    check_examples_equal_ggn,
    in_network,
    random_inputs,
)
from tests.reference import assert_close, dense_ggn, kron, relative_difference
from tests.strategies import HAS_GATES

layers = keras.layers
RNG = np.random.default_rng(0)


def for_all_rows(matrix):
    """`[..., d_in, d_out]` to multiply `[..., batch, positions, d_in]`."""
    return matrix if matrix.shape.rank == 2 else matrix[:, tf.newaxis]


# One of each adapter, with a bias: what is trained of a layer is not the adapter's own affair.
SOME = ["dense", "conv2d-valid", "conv2d-grouped", "depthwise2d-valid", "einsum-query"]
SOME_LAYERS = [case for case in LAYERS if case.name in [*SOME, "einsum-grouped"]]


@pytest.mark.parametrize("case", LAYERS, ids=str)
class TestLayer:
    def test_rows_times_matrix_is_the_layer(self, case):
        """Identity 1, with the homogeneous coordinate."""
        model, layer = alone(case)
        adapter, x = adapted(layer), RNG.normal(size=(2, *case.input_shape))
        matrix = adapter.to_matrix({id(v): v.value for v in adapter.variables})
        assert tuple(matrix.shape[-2:]) == adapter.dims
        product = tf.matmul(adapter.input_rows(tf.constant(x)), for_all_rows(matrix))
        assert_close(product, adapter.output_rows(model(x)), 1e-12)

    def test_equals_ggn(self, case):
        """Identity 11a: with a target at each position and squared loss, blocks are exact."""
        model, layer = alone(case)
        check_equals_ggn(model, [layer], random_inputs(model, 2))


@pytest.mark.parametrize("trained", ["kernel", "bias"])
@pytest.mark.parametrize("case", SOME_LAYERS, ids=str)
class TestPartlyFrozenLayer:
    def test_matrix_round_trip(self, case, trained):
        _, layer = alone(case)
        variable = getattr(layer, trained)
        adapter = adapted(layer, lambda v: v is variable)
        gradients = {id(variable): tf.constant(RNG.normal(size=variable.shape))}
        matrix = adapter.to_matrix(gradients)
        assert tuple(matrix.shape[-2:]) == adapter.dims
        (back,) = adapter.from_matrix(matrix).values()
        np.testing.assert_array_equal(back, gradients[id(variable)])

    def test_equals_ggn(self, case, trained):
        """Identity 11a."""
        model, layer = alone(case)
        freeze(layer.bias if trained == "kernel" else layer.kernel)
        check_equals_ggn(model, [layer], random_inputs(model, 2))


@pytest.mark.parametrize("case", COMPOSED_LAYERS, ids=str)
def test_composed_layers_equal_the_ggn(case):
    """But for windows that overlap: the pixels of a transposed convolution then share outputs."""
    model, layer = alone(case)
    for adapter, block, dense in blocks_and_ggn(model, [layer], random_inputs(model, 2)):
        window = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation_rate)]
        overlaps = any(reach >= step for reach, step in zip(window, layer.strides))
        if isinstance(adapter, TransposedKernelAdapter) and overlaps:
            assert relative_difference(block, dense) > 0.01
        else:
            assert_close(block, dense)


def freeze(variable):
    variable.trainable = False


def test_bias_corner_of_the_input_factor_is_one():
    for case in LAYERS:
        _, layer = alone(case)
        adapter = adapted(layer)
        if adapter.bias is not None:
            rows = adapter.input_rows(tf.constant(RNG.normal(size=(2, *case.input_shape))))
            moment, weight = kronecker_factors.input_moment(rows)
            np.testing.assert_allclose((moment / weight)[..., -1, -1], 1.0, rtol=1e-14)


@pytest.mark.parametrize("case", [*LAYERS, *COMPOSED_LAYERS], ids=str)
class TestAnyLayer:
    def test_gradients_are_products_of_rows(self, case):
        """The gradient of a kernel is the sum over positions of input rows times gradients."""
        model, layer = alone(case)
        x = tf.constant(RNG.normal(size=(2, *case.input_shape)))
        adapters = registry.adapt(layer, lambda v: True)
        assert {id(v) for a in adapters for v in a.variables} == {id(v) for v in layer.weights}
        with forward_pass.recording([layer]) as recorded:
            outputs = model(x)
        vector = tf.constant(RNG.normal(size=outputs.shape))
        (call,) = recorded.calls[id(layer)]
        (at_outputs,) = recorded.output_gradients([layer], outputs, vector)[id(layer)]
        for adapter in adapters:
            with tf.GradientTape() as tape:
                value = tf.reduce_sum(model(x) * vector)
            gradients = tape.gradient(value, {id(v): v.value for v in adapter.variables})
            inputs, outputs = adapter.input_rows(call.inputs), adapter.output_rows(at_outputs)
            if adapter.kernel is None:  # One row stands for all of them.
                inputs = tf.ones_like(outputs[..., :1])
            products = tf.einsum("...bpi,...bpo->...io", inputs, outputs)
            assert_close(products, adapter.to_matrix(gradients), 1e-12)

    def test_is_known_before_it_is_built(self, case):
        """Models that build their layers in the first step are recorded in that step."""
        classes, reason = registry.find_adapters(case.make())
        assert reason == ""
        assert classes == registry.find_adapters(alone(case)[1])[0]

    def test_matrices_go_back_to_tensors(self, case):
        _, layer = alone(case)
        for adapter in registry.adapt(layer, lambda v: True):
            values = {id(v): tf.constant(RNG.normal(size=v.shape)) for v in adapter.variables}
            back = adapter.from_matrix(adapter.to_matrix(values))
            assert back.keys() == values.keys()
            for key, value in values.items():
                np.testing.assert_array_equal(back[key], value)

    def test_trains(self, case):
        """A step of the whole optimizer, of all weights of the layer."""
        model, _ = alone(case)
        x = RNG.normal(size=(8, *case.input_shape))
        y = RNG.normal(size=model(x).shape)
        before = model.get_weights()
        model = helpers.compiled(model, KFAC(), keras.losses.MeanSquaredError(), run_eagerly=True)
        helpers.fit(model, (x, y), epochs=2)
        assert [row.block for row in model.optimizer.coverage()] == ["kronecker"]
        for old, new in zip(before, model.get_weights()):
            assert np.isfinite(new).all() and np.abs(new - old).max() > 0


class TestScalesAndOffsets:
    """Identity 11 holds for gradients of single examples, whatever comes after the layer."""

    @pytest.mark.parametrize(
        ("is_full", "frozen"),
        [(True, None), (True, 0), (True, 1), (False, None)],
        ids=["full", "full-without-first", "full-without-second", "diagonal"],
    )
    @pytest.mark.parametrize("case", SCALES, ids=str)
    def test_equal_the_ggn(self, case, is_full, frozen, monkeypatch):
        monkeypatch.setattr(per_example.ExactAdapter, "max_full_block", 256 if is_full else 0)
        model, layer = in_network(case)
        if frozen is not None:
            if len(layer.trainable_weights) < 2:
                pytest.skip("the layer has one weight")
            freeze(layer.trainable_weights[frozen])
        assert adapted(layer).block == ("full" if is_full else "diagonal")
        check_examples_equal_ggn(model, layer, random_inputs(model, 4))

    @pytest.mark.parametrize("case", SCALES, ids=str)
    def test_matrices_go_back_to_tensors(self, case):
        adapter = adapted(in_network(case)[1])
        values = {id(v): tf.constant(RNG.normal(size=v.shape)) for v in adapter.variables}
        matrix = adapter.to_matrix(values)
        assert tuple(matrix.shape[-2:]) == adapter.dims
        back = adapter.from_matrix(matrix)
        assert back.keys() == values.keys()
        for key, value in values.items():
            np.testing.assert_array_equal(back[key], value)

    @pytest.mark.parametrize("is_full", [True, False], ids=["full", "diagonal"])
    @pytest.mark.parametrize("name", ["batch-pixels", "layer-axes", "prelu-shared"])
    def test_trains(self, name, is_full, monkeypatch):
        (case,) = [case for case in SCALES if case.name == name]
        monkeypatch.setattr(per_example.ExactAdapter, "max_full_block", 256 if is_full else 0)
        model, layer = in_network(case)
        x = RNG.normal(size=(8, *case.input_shape))
        y = RNG.normal(size=model(x).shape)
        before = [v.numpy() for v in layer.trainable_weights]
        model = helpers.compiled(model, KFAC(), keras.losses.MeanSquaredError(), run_eagerly=True)
        helpers.fit(model, (x, y), epochs=3)
        (row,) = [r for r in model.optimizer.coverage() if r.layer == layer.path]
        assert row.block == ("full" if is_full else "diagonal")
        for old, new in zip(before, layer.trainable_weights):
            assert np.isfinite(new).all() and np.abs(new - old).max() > 0


def test_normalization_over_the_batch_is_refused():
    adapters, reason = registry.find_adapters(layers.BatchNormalization(axis=0))
    assert not adapters
    assert reason == "it has a weight for each example of the batch"


def test_observing_a_normalization_leaves_its_statistics_alone():
    model, layer = in_network(next(c for c in SCALES if c.name == "batch"))
    x = RNG.normal(size=(4, *model.input_shape[1:]))
    once = layer.moving_mean.numpy() * 0.99
    factors(model, LOSS["mse"].make(), x)
    inner = model.layers[0](x)
    mean = np.mean(inner, axis=tuple(range(inner.ndim - 1)))
    np.testing.assert_allclose(layer.moving_mean, once + 0.01 * mean, rtol=1e-12)


class Rotation(keras.Layer):
    """A layer of a user: weights that are used twice, and not by products alone."""

    def build(self, input_shape):
        self.angle = self.add_weight(shape=input_shape[1:], initializer="random_normal")
        self.shift = self.add_weight(shape=(2,), initializer="random_normal")
        self.activation = keras.activations.get("tanh")

    def call(self, inputs):
        turned = keras.ops.sin(self.angle * inputs) + keras.ops.cos(self.angle) * self.shift[0]
        return self.activation(turned + self.shift[1])


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "ADAPTERS", dict(registry.ADAPTERS))
    register(Rotation, RawWeightsAdapter)


def raw_weights_model(name):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((3, 4), dtype="float64")
    if name == "rotation":
        layer = Rotation(dtype="float64")
        h = layer(x)
    else:
        attention = {"dot": layers.Attention, "additive": layers.AdditiveAttention}[name]
        config = {"score_mode": "concat"} if name == "dot" else {}
        layer = attention(use_scale=True, dtype="float64", **config)
        h = layer([layers.Dense(4, dtype="float64")(x), x])
    y = layers.Dense(2, "tanh", dtype="float64")(h)
    model = keras.Model(inputs, layers.Dense(2, dtype="float64")(y))
    for variable in layer.weights:
        variable.assign(RNG.uniform(0.5, 1.5, variable.shape))
    return model, layer


@pytest.mark.usefixtures("registered")
class TestRawWeights:
    @pytest.mark.parametrize("name", ["rotation", "dot", "additive"])
    def test_equal_the_ggn(self, name):
        model, layer = raw_weights_model(name)
        x, loss = RNG.normal(size=(4, 3, 4)), LOSS["mse"].make()
        y = RNG.normal(size=model(x).shape)
        index = [i for i in model.layers if i.weights].index(layer)
        a, g = factors(model, loss, x)[index]
        assert_close(kron(a, g), dense_ggn(model, loss, x, y, layer.weights, pfor=False))

    @pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_trains(self, jit_compile):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), Rotation(), layers.Dense(1)])
        model = helpers.compiled(
            model, KFAC(), keras.losses.MeanSquaredError(), jit_compile=jit_compile
        )
        x = RNG.normal(size=(64, 4))
        y = x @ [[1.0], [-2.0], [0.5], [1.0]] + 1  # what the model can express
        before = model.layers[0].angle.numpy()
        history = helpers.fit(model, (x, y), epochs=20).history["loss"]
        assert history[-1] < 0.1 * history[0]
        assert np.abs(model.layers[0].angle - before).min() > 0
        assert [row.block for row in model.optimizer.coverage()] == ["full", "kronecker"]

    def test_adapter_of_the_nearest_class_counts(self):
        class Scaled(layers.Dense):
            def call(self, inputs):
                return 2 * super().call(inputs)

        class Further(Scaled):
            pass

        assert registry.find_adapters(Scaled(2))[0] == ()
        register(Scaled, RawWeightsAdapter)
        assert registry.find_adapters(Further(2))[0] == (RawWeightsAdapter,)
        assert registry.find_adapters(layers.Dense(2))[0] == (DenseAdapter,)

    @pytest.mark.parametrize(
        ("layer_class", "adapters", "message"),
        [
            (Rotation(), (RawWeightsAdapter,), "`layer_class` must be a subclass of keras.Layer"),
            (KFAC, (RawWeightsAdapter,), "`layer_class` must be a subclass of keras.Layer"),
            (Rotation, (), r"`adapters` must be one or more .* Received: adapters=\(\)"),
            (Rotation, (Rotation,), "`adapters` must be one or more"),
        ],
    )
    def test_registering_something_else(self, layer_class, adapters, message):
        with pytest.raises(TypeError, match=message):
            register(layer_class, *adapters)


@pytest.mark.parametrize("bias_axes", ["e", "be", "b"])
def test_bias_of_an_einsum_along_other_axes(bias_axes):
    """It is the sum of many gradients: exact for each example, where the kernel is not."""
    keras.utils.set_random_seed(0)
    layer = layers.EinsumDense(
        "abc,cde->abde", (3, 2, 5), bias_axes=bias_axes, activation="tanh", dtype="float64"
    )
    model = keras.Sequential(
        [
            keras.Input((3, 4), dtype="float64"),
            layer,
            layers.Flatten(),
            layers.Dense(2, dtype="float64"),
        ]
    )
    kernel, bias = registry.adapt(layer, lambda v: True)
    assert kernel.variables == [layer.kernel] and bias.variables == [layer.bias]
    assert bias.path == f"{layer.path}/bias"
    x, loss = RNG.normal(size=(4, 3, 4)), LOSS["mse"].make()
    y = RNG.normal(size=model(x).shape)
    _, (a, g), _ = factors(model, loss, x)
    assert_close(kron(a, g), dense_ggn(model, loss, x, y, [layer.bias], pfor=False))


class TestThinning:
    """Estimates take some of the pixels, all else takes all."""

    @pytest.mark.parametrize(
        ("make", "part", "data_format"),
        [
            (layers.Conv2D, 0, "channels_last"),  # The other order does not run on CPUs.
            (layers.SeparableConv2D, 0, "channels_last"),
            (layers.SeparableConv2D, 0, "channels_first"),
            (layers.SeparableConv2D, 1, "channels_first"),
        ],
    )
    def test_takes_every_other_pixel(self, make, part, data_format):
        keras.utils.set_random_seed(0)
        options = {"padding": "same", "data_format": data_format, "dtype": "float64"}
        shape = (16, 18, 2) if data_format == "channels_last" else (2, 16, 18)
        layer = make(3, 3, **options)
        model = keras.Sequential([keras.Input(shape, dtype="float64"), layer])
        x, loss = RNG.normal(size=(4, *shape)), LOSS["mse"].make()
        a, _ = factors(model, loss, x, fisher="forward_only")[part]
        estimate, _ = factors(model, loss, x, fisher="sampled")[part]
        adapter = registry.adapt(layer, lambda v: True)[part]
        rows = np.asarray(adapter.input_rows(tf.constant(x)))
        places = rows.reshape(*rows.shape[:-2], 16, 18, rows.shape[-1])
        for factor, pixels in ((a, places), (estimate, places[..., ::2, ::2, :])):
            pixels = pixels.reshape(*rows.shape[:-3], -1, rows.shape[-1])
            assert_close(factor, np.swapaxes(pixels, -1, -2) @ pixels / pixels.shape[-2], 1e-12)

    @pytest.mark.parametrize("size", [15, None])
    def test_needs_pixels_to_spare(self, size):
        layer = layers.Conv2D(2, 3, padding="same")
        keras.Sequential([keras.Input((size, size, 1)), layer])
        adapter = registry.adapt(layer, lambda v: True)[0]
        x = keras.Input((size, size, 1))
        assert adapter.thinned(x) is adapter
        adapter.reduces = True
        assert adapter.thinned(keras.Input((32, 32, 1))) is adapter


class TestLargeLayers:
    """Factors that are too large are kept in blocks."""

    def test_blocks_are_those_of_the_matrices(self, monkeypatch):
        monkeypatch.setattr(adapters, "MAX_FACTOR_SIZE", 4)
        model, _ = alone(LAYERS[0])
        x, loss = RNG.normal(size=(3, 5)), LOSS["mse"].make()
        weights = np.array([1.0, 0.0, 2.0])
        (coarse,) = factors(model, loss, x, sample_weight=weights)
        monkeypatch.setattr(adapters, "MAX_FACTOR_SIZE", 2)
        (coarser,) = factors(model, loss, x, sample_weight=weights)
        monkeypatch.undo()
        (fine,) = factors(model, loss, x, sample_weight=weights)
        a, g = (np.asarray(factor) for factor in fine)
        assert_close(coarse.input_factor, [a[:3, :3], a[3:, 3:]], 1e-14)
        assert_close(coarse.output_factor, g, 1e-14)
        assert_close(coarser.input_factor, [a[i : i + 2, i : i + 2] for i in (0, 2, 4)], 1e-14)
        assert_close(coarser.output_factor[0], g[:2, :2], 1e-14)
        assert_close(coarser.output_factor[1], np.diag([g[2, 2], 0]), 1e-14)

    def test_trains_and_says_so(self):
        model, _ = alone(LAYERS[0])
        optimizer = KFAC(max_factor_size=4)
        model = helpers.compiled(model, optimizer, keras.losses.MeanSquaredError())
        x = RNG.normal(size=(32, 5))
        history = helpers.fit(model, (x, x[:, :3]), epochs=20).history["loss"]
        assert history[-1] < 0.1 * history[0]
        (row,) = model.optimizer.coverage()
        assert row.block == "kronecker"
        assert row.reason == "6 x 3 is large: input factor in 2 blocks"

    def test_of_a_single_row_are_damped(self):
        """A 1 x 1 factor is not; blocks of one row each are no such factor."""
        model, _ = alone(LAYERS[0])
        optimizer = KFAC(max_factor_size=1, damping=0.1)
        model = helpers.compiled(model, optimizer, keras.losses.MeanSquaredError())
        x = RNG.normal(size=(32, 5)) * [0, 1, 1, 1, 1]
        history = helpers.fit(model, (x, x[:, 1:4]), epochs=20).history["loss"]
        assert history[-1] < 0.1 * history[0]
        assert not optimizer._known.curvature.failed_refreshes()


def kept_bytes(optimizer):
    """What factors and inverses really take."""
    parts = "_factor|_inverse|_basis|_root|eigenvalues|damping|condition_number|inverse"
    names = re.compile(rf"block\.\d+\.\w*({parts})(\.\d+)?")
    variables = optimizer.model_variables.items()
    return sum(np.asarray(v).nbytes for name, v in variables if names.fullmatch(name))


class TestMemory:
    @pytest.mark.parametrize("exact", [False, True], ids=["factored", "exact"])
    @pytest.mark.parametrize("largest", [8192, 3], ids=["whole", "in-blocks"])
    def test_is_known_before_the_first_step(self, exact, largest):
        optimizer = KFAC(exact_damping=exact, max_factor_size=largest)
        model = helpers.mlp_with_batch_normalization()
        helpers.compiled(model, optimizer, run_eagerly=True)
        before = optimizer.attach(model).coverage()
        helpers.fit(model, helpers.vectors())
        assert before.memory == optimizer.coverage().memory == kept_bytes(optimizer)
        assert sorted(row.memory > 0 for row in before) == [False, True, True, True]

    @pytest.mark.parametrize("curvature", [name for name in STRUCTURES if name != "kfac"])
    def test_of_structures_is_known_too(self, curvature):
        optimizer = KFAC(curvature=curvature)
        model = helpers.mlp_with_batch_normalization()
        helpers.compiled(model, optimizer, run_eagerly=True)
        before = optimizer.attach(model).coverage()
        helpers.fit(model, helpers.vectors(helpers.BATCH))
        assert before.memory == kept_bytes(optimizer)

    def test_is_stated(self):
        rows = Coverage()
        rows.memory = 3 * 2**20
        assert str(rows).endswith("Factors and inverses take 3.0 MiB.")

    @pytest.mark.parametrize("unbuilt", [False, True])
    def test_above_the_limit_is_an_error_before_it_is_taken(self, unbuilt):
        optimizer = KFAC()
        model = helpers.compiled(helpers.mlp(), optimizer)
        needed = optimizer.attach(model).coverage().memory
        optimizer = KFAC(memory_limit=needed - 1)
        model = helpers.unbuilt_mlp() if unbuilt else helpers.mlp()
        model = helpers.compiled(model, optimizer)
        message = (
            f"take {needed:,} bytes, [0-9]+ of them for layer 'mlp/hidden'. Lower "
            f"`max_factor_size`, .* Received: memory_limit={needed - 1}"
        )
        with pytest.raises(ValueError, match=message):
            helpers.fit(model, helpers.vectors())
        assert not optimizer.model_variables
        if not unbuilt:  # Keras can't go on with a model that it was building.
            optimizer.memory_limit = needed
            helpers.fit(model, helpers.vectors())
            assert kept_bytes(optimizer) == needed


ATTENTION = {
    "multi-head": lambda: layers.MultiHeadAttention(2, 3, dtype="float64"),
    "value-dim": lambda: layers.MultiHeadAttention(2, 3, value_dim=4, dtype="float64"),
    "output-shape": lambda: layers.MultiHeadAttention(2, 3, output_shape=(5, 2), dtype="float64"),
    "no-bias": lambda: layers.MultiHeadAttention(2, 3, use_bias=False, dtype="float64"),
    "two-axes": lambda: layers.MultiHeadAttention(
        2, 3, attention_axes=(1, 2), bias_initializer="random_normal", dtype="float64"
    ),
    "grouped-query": lambda: layers.GroupQueryAttention(3, 4, 2, dtype="float64"),
    "gated": lambda: layers.MultiHeadAttention(2, 3, use_gate=True, dtype="float64"),
    "gated-grouped": lambda: layers.GroupQueryAttention(3, 4, 2, use_gate=True, dtype="float64"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_projections_of_attention_are_their_matrices(name):
    """Identity 1 for the equations that Keras's attention layers make."""
    if "gated" in name and not HAS_GATES:
        pytest.skip("this Keras has no gates in attention")
    keras.utils.set_random_seed(0)
    attention = ATTENTION[name]()
    shape = (2, 3, 2, 4) if name == "two-axes" else (2, 3, 4)
    x = tf.constant(RNG.normal(size=shape))
    attention(x, x)
    projections = [
        layer for layer in _keras_internals.flatten_layers(attention) if hasattr(layer, "equation")
    ]
    assert len(projections) == 4 + ("gated" in name)
    with forward_pass.recording(projections) as recorded:
        attention(x, x)
    for layer in projections:
        adapter, (call,) = adapted(layer), recorded.calls[id(layer)]
        matrix = adapter.to_matrix({id(v): v.value for v in adapter.variables})
        product = tf.matmul(adapter.input_rows(call.inputs), matrix)
        assert_close(product, adapter.output_rows(call.outputs), 1e-12)


class TestRefused:
    """What has no block says why."""

    def test_einsum_over_the_batch(self):
        layer = layers.EinsumDense("ab,ac->bc", (3,))
        layer.build((2, 2))
        adapters, reason = registry.find_adapters(layer)
        assert not adapters
        assert reason == "the first axis in 'ab,ac->bc' is no batch of independent examples"

    def test_overridden_call(self):
        class Scaled(layers.Conv1D):
            def call(self, inputs):
                return 2 * super().call(inputs)

        adapters, reason = registry.find_adapters(Scaled(2, 3))
        assert not adapters
        assert reason == "Scaled overrides `Conv1D.call`"


def transformer(dropout=0.1):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(7, 8)(tokens)
    h = layers.LayerNormalization()(x)
    x += layers.MultiHeadAttention(2, 4, dropout=dropout)(h, h, use_causal_mask=True)
    h = layers.LayerNormalization()(x)
    x += layers.Dense(8)(layers.Dense(16, "gelu")(h))
    return keras.Model(tokens, layers.Dense(7)(x))


def sequences(examples):
    steps = np.random.default_rng(0).integers(1, 3, (examples, 7))
    both = np.cumsum(steps, axis=1) % 7
    return both[:, :-1], both[:, 1:]


class TestTransformer:
    @pytest.mark.parametrize(
        "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["graph", "xla"]
    )
    def test_learns(self, jit_compile):
        model = helpers.compiled(transformer(), KFAC(), jit_compile=jit_compile)
        history = helpers.fit(model, sequences(128), epochs=4).history["loss"]
        # The next token is one of two.
        assert history[-1] < 1.0 < history[0]
        blocks = {row.layer: row.block for row in model.optimizer.coverage()}
        projections = [name for name in blocks if name.startswith("multi_head_attention")]
        assert len(projections) == 4
        assert {blocks[name] for name in projections} == {"kronecker"}
        assert model.optimizer.coverage().fraction == 1

    @pytest.mark.slow
    def test_resumes_from_a_file(self, tmp_path):
        data, more = sequences(32), sequences(64)
        more = tuple(part[32:] for part in more)
        # Keras does not save the state of the attention's dropout.
        model = helpers.compiled(transformer(dropout=0.0), KFAC())
        helpers.fit(model, data)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for each in (model, loaded):
            helpers.fit(each, more)
        for a, b in zip(model.get_weights(), loaded.get_weights()):
            np.testing.assert_array_equal(a, b)
