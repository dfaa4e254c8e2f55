"""Every adapted layer: its matrices are the layer, and its factors the Fisher matrix."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac.introspection import registry
from keras_kfac.math import factors as kronecker_factors
from tests.cases import LAYERS, LOSS, factors
from tests.reference import assert_close, dense_ggn, kron

RNG = np.random.default_rng(0)


def built(case, **config):
    """A layer of a case, in a model of its own."""
    keras.utils.set_random_seed(0)
    layer = case.make(**config)
    return keras.Sequential([keras.Input(case.input_shape, dtype="float64"), layer]), layer


def adapt(layer, trained=lambda v: True):
    adapter_class, reason = registry.find_adapter(layer)
    assert adapter_class is not None, reason
    return adapter_class(layer, trained)


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
        x = RNG.normal(size=(2, *case.input_shape))
        y = RNG.normal(size=model(x).shape)
        loss = LOSS["mse"].make()
        (a, g), *_ = factors(model, loss, x)
        adapter = adapt(layer, lambda v: v.trainable)
        dense = dense_ggn(model, loss, x, y, adapter.variables, pfor=False)
        entries = places(adapter)
        assert sorted(entries.ravel()) == list(range(len(dense)))
        if adapter.groups is None:
            a, g, entries = a[None], g[None], entries[None]
        for own, input_factor, output_factor in zip(entries, a, g):
            index = own.ravel()
            assert_close(kron(input_factor, output_factor), dense[np.ix_(index, index)])


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
