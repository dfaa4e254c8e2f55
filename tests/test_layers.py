"""Every adapted layer: its matrices are the layer, and its factors the Fisher matrix."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kfac import KFAC, _keras_internals
from keras_kfac.introspection import forward_pass, registry
from keras_kfac.introspection.convolutions import TransposedKernelAdapter
from keras_kfac.math import factors as kronecker_factors
from tests import helpers
from tests.cases import COMPOSED_LAYERS, LAYERS, LOSS, LayerCase, factors
from tests.reference import assert_close, dense_ggn, kron, relative_difference

layers = keras.layers
RNG = np.random.default_rng(0)


def built(case, **config):
    """A layer of a case, in a model of its own."""
    keras.utils.set_random_seed(0)
    layer = case.make(**config)
    return keras.Sequential([keras.Input(case.input_shape, dtype="float64"), layer]), layer


def adapt(layer, trained=lambda v: True):
    (adapter,) = registry.adapt(layer, trained)
    return adapter


def for_all_rows(matrix):
    """`[..., d_in, d_out]` to multiply `[..., batch, positions, d_in]`."""
    return matrix if matrix.shape.rank == 2 else matrix[:, tf.newaxis]


@pytest.mark.parametrize("case", LAYERS, ids=str)
class TestLayer:
    def test_rows_times_matrix_is_the_layer(self, case):
        """Identity 1, with the homogeneous coordinate."""
        model, layer = built(case)
        adapter, x = adapt(layer), RNG.normal(size=(2, *case.input_shape))
        matrix = adapter.to_matrix({id(v): v.value for v in adapter.variables})
        assert tuple(matrix.shape[-2:]) == adapter.dims
        product = tf.matmul(adapter.input_rows(tf.constant(x)), for_all_rows(matrix))
        assert_close(product, adapter.output_rows(model(x)), 1e-12)

    @pytest.mark.parametrize("trained", ["both", "kernel", "bias"])
    def test_matrix_round_trip(self, case, trained):
        _, layer = built(case)
        chosen = {"both": layer.weights, "kernel": [layer.kernel], "bias": [layer.bias]}[trained]
        if any(v is None for v in chosen):
            pytest.skip("the layer has no bias")
        adapter = adapt(layer, lambda v: any(v is c for c in chosen))
        gradients = {id(v): tf.constant(RNG.normal(size=v.shape)) for v in chosen}
        matrix = adapter.to_matrix(gradients)
        assert tuple(matrix.shape[-2:]) == adapter.dims
        back = adapter.from_matrix(matrix)
        assert back.keys() == gradients.keys()
        for key, value in gradients.items():
            np.testing.assert_array_equal(back[key], value)

    @pytest.mark.parametrize("trained", ["both", "kernel", "bias"])
    def test_equals_ggn(self, case, trained):
        """Identity 11a: with a target at each position and squared loss, blocks are exact."""
        model, layer = built(case)
        if trained == "bias":
            if layer.bias is None:
                pytest.skip("the layer has no bias")
            freeze(layer.kernel)
        elif trained == "kernel" and layer.bias is not None:
            freeze(layer.bias)
        check_equals_ggn(model, layer)


def check_equals_ggn(model, layer):
    """That the blocks of a model of one layer are those of the GGN of a squared loss."""
    for _, block, dense in blocks_and_ggn(model, layer):
        assert_close(block, dense)


def blocks_and_ggn(model, layer):
    """Adapter, block and part of the GGN of a squared loss, for each block of a layer."""
    x = RNG.normal(size=(2, *model.input_shape[1:]))
    y = RNG.normal(size=model(x).shape)
    loss = LOSS["mse"].make()
    adapters = registry.adapt(layer, lambda v: v.trainable)
    for adapter, (a, g) in zip(adapters, factors(model, loss, x)):
        dense = dense_ggn(model, loss, x, y, adapter.variables, pfor=False)
        entries = places(adapter)
        assert sorted(entries.ravel()) == list(range(len(dense)))
        if adapter.groups is None:
            a, g, entries = a[None], g[None], entries[None]
        for own, input_factor, output_factor in zip(entries, a, g):
            index = own.ravel()
            yield adapter, kron(input_factor, output_factor), dense[np.ix_(index, index)]


@pytest.mark.parametrize("case", COMPOSED_LAYERS, ids=str)
def test_composed_layers_equal_the_ggn(case):
    """But for windows that overlap: the pixels of a transposed convolution then share outputs."""
    model, layer = built(case)
    for adapter, block, dense in blocks_and_ggn(model, layer):
        window = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation_rate)]
        overlaps = any(reach >= step for reach, step in zip(window, layer.strides))
        if isinstance(adapter, TransposedKernelAdapter) and overlaps:
            assert relative_difference(block, dense) > 0.01
        else:
            assert_close(block, dense)


def freeze(variable):
    variable.trainable = False


def places(adapter):
    """Where each entry of the matrix is among the flattened variables, one after the other."""
    sizes = [int(np.prod(v.shape)) for v in adapter.variables]
    starts = np.cumsum([0, *sizes[:-1]])
    numbers = {
        id(v): tf.reshape(tf.range(start, start + size), v.shape)
        for v, start, size in zip(adapter.variables, starts, sizes)
    }
    return adapter.to_matrix(numbers).numpy()


def test_bias_corner_of_the_input_factor_is_one():
    for case in LAYERS:
        _, layer = built(case)
        adapter = adapt(layer)
        if adapter.bias is not None:
            rows = adapter.input_rows(tf.constant(RNG.normal(size=(2, *case.input_shape))))
            moment, weight = kronecker_factors.input_moment(rows)
            np.testing.assert_allclose((moment / weight)[..., -1, -1], 1.0, rtol=1e-14)


@pytest.mark.parametrize("case", [*LAYERS, *COMPOSED_LAYERS], ids=str)
class TestAnyLayer:
    def test_gradients_are_products_of_rows(self, case):
        """The gradient of a kernel is the sum over positions of input rows times gradients."""
        model, layer = built(case)
        x = tf.constant(RNG.normal(size=(2, *case.input_shape)))
        adapters = registry.adapt(layer, lambda v: True)
        assert {id(v) for a in adapters for v in a.variables} == {id(v) for v in layer.weights}
        with forward_pass.recording([layer], persistent=True) as recorded:
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
        assert classes == registry.find_adapters(built(case)[1])[0]

    def test_matrices_go_back_to_tensors(self, case):
        _, layer = built(case)
        for adapter in registry.adapt(layer, lambda v: True):
            values = {id(v): tf.constant(RNG.normal(size=v.shape)) for v in adapter.variables}
            back = adapter.from_matrix(adapter.to_matrix(values))
            assert back.keys() == values.keys()
            for key, value in values.items():
                np.testing.assert_array_equal(back[key], value)

    def test_trains(self, case):
        """A step of the whole optimizer, of all weights of the layer."""
        model, _ = built(case)
        x = RNG.normal(size=(8, *case.input_shape))
        y = RNG.normal(size=model(x).shape)
        before = model.get_weights()
        model = helpers.compiled(model, KFAC(), keras.losses.MeanSquaredError(), run_eagerly=True)
        helpers.fit(model, (x, y), epochs=3)
        assert [row.block for row in model.optimizer.coverage()] == ["kronecker"]
        for old, new in zip(before, model.get_weights()):
            assert np.isfinite(new).all() and np.abs(new - old).max() > 0


ATTENTION = {
    "multi-head": lambda: layers.MultiHeadAttention(2, 3, dtype="float64"),
    "value-dim": lambda: layers.MultiHeadAttention(2, 3, value_dim=4, dtype="float64"),
    "output-shape": lambda: layers.MultiHeadAttention(2, 3, output_shape=(5, 2), dtype="float64"),
    "no-bias": lambda: layers.MultiHeadAttention(2, 3, use_bias=False, dtype="float64"),
    "two-axes": lambda: layers.MultiHeadAttention(
        2, 3, attention_axes=(1, 2), bias_initializer="random_normal", dtype="float64"
    ),
    "grouped-query": lambda: layers.GroupQueryAttention(3, 4, 2, dtype="float64"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_projections_of_attention_are_their_matrices(name):
    """Identity 1 for the equations that Keras's attention layers make."""
    keras.utils.set_random_seed(0)
    attention = ATTENTION[name]()
    shape = (2, 3, 2, 4) if name == "two-axes" else (2, 3, 4)
    x = tf.constant(RNG.normal(size=shape))
    attention(x, x)
    projections = [
        layer for layer in _keras_internals.flatten_layers(attention) if hasattr(layer, "equation")
    ]
    assert len(projections) == 4
    with forward_pass.recording(projections, persistent=False) as recorded:
        attention(x, x)
    for layer in projections:
        adapter, (call,) = adapt(layer), recorded.calls[id(layer)]
        matrix = adapter.to_matrix({id(v): v.value for v in adapter.variables})
        product = tf.matmul(adapter.input_rows(call.inputs), matrix)
        assert_close(product, adapter.output_rows(call.pre_activation), 1e-12)


@st.composite
def convolutions(draw):
    """A convolution of any kind that TensorFlow runs, small."""
    rank = draw(st.integers(1, 3))
    largest = {1: 4, 2: 3, 3: 2}[rank]
    each = st.lists(st.integers(1, largest), min_size=rank, max_size=rank)
    window, steps = draw(each), draw(each)
    config = {"kernel_size": window, "use_bias": draw(st.booleans())}
    # TensorFlow strides or dilates, not both.
    config[draw(st.sampled_from(["strides", "dilation_rate"]))] = steps
    config["padding"] = draw(st.sampled_from(["same", "valid"] + ["causal"] * (rank == 1)))
    reach = [(size - 1) * step + 1 for size, step in zip(window, steps)]
    sizes = [draw(st.integers(r, r + 2)) for r in reach]
    channels = draw(st.integers(1, 3))
    if rank < 3 and config["padding"] != "causal" and draw(st.booleans()):
        config["depth_multiplier"] = draw(st.integers(1, 2))
        config = {k: v if k != "strides" else [v[0]] * rank for k, v in config.items()}
        layer_class = getattr(layers, f"DepthwiseConv{rank}D")
    else:
        groups = draw(st.integers(1, 2))
        channels *= groups
        config |= {"filters": groups * draw(st.integers(1, 2)), "groups": groups}
        layer_class = getattr(layers, f"Conv{rank}D")
    return LayerCase("drawn", layer_class, config, (*sizes, channels))


@st.composite
def einsums(draw):
    """An einsum of axes in any order, the batch first in inputs and outputs."""
    counts = [draw(st.integers(low, 2)) for low in (0, 0, 0, 0)]
    letters = iter("bcdefghij")
    groups, features, units, positions = (
        "".join(next(letters) for _ in range(count)) for count in counts
    )
    features = features or ("" if groups else next(letters))
    units = units or ("" if groups + positions else next(letters))
    sizes = {letter: draw(st.integers(1, 3)) for letter in groups + features + units + positions}

    def mixed(axes):
        return "".join(draw(st.permutations(axes)))

    inputs, kernel = mixed(groups + features + positions), mixed(groups + features + units)
    outputs = mixed(groups + units + positions)
    has_bias = bool(groups + units) and draw(st.booleans())
    config = {
        "equation": f"a{inputs},{kernel}->a{outputs}",
        "output_shape": [sizes[letter] for letter in outputs],
        "bias_axes": mixed(groups + units) if has_bias else None,
    }
    shape = tuple(sizes[letter] for letter in inputs)
    return LayerCase("drawn", layers.EinsumDense, config, shape)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=st.one_of(convolutions(), einsums()))
def test_drawn_layers_equal_the_ggn(case):
    check_equals_ggn(*built(case))


class TestRefused:
    """What has no block says why."""

    def test_bias_of_an_einsum_along_other_axes(self):
        layer = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e")
        layer.build((None, 3, 4))
        adapters, reason = registry.find_adapters(layer)
        assert not adapters
        assert reason == (
            "the bias has the axes 'e' in 'abc,cde->abde', and not those that kernel and outputs "
            "share: 'de'"
        )

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
    def test_attention_is_covered(self):
        model = helpers.compiled(transformer(), KFAC())
        helpers.fit(model, sequences(16))
        blocks = {row.layer: row.block for row in model.optimizer.coverage()}
        projections = [name for name in blocks if name.startswith("multi_head_attention")]
        assert len(projections) == 4
        assert {blocks[name] for name in projections} == {"kronecker"}
        assert 0.8 < model.optimizer.coverage().fraction < 1

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_learns(self, jit_compile):
        model = helpers.compiled(transformer(), KFAC(), jit_compile=jit_compile)
        history = helpers.fit(model, sequences(128), epochs=4).history["loss"]
        # The next token is one of two.
        assert history[-1] < 1.0 < history[0]

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
