"""Small networks around one layer, and its blocks beside the dense GGN of a squared loss."""

import keras
import numpy as np
import tensorflow as tf

from keras_kfac.introspection import registry
from tests.cases import LOSS, factors
from tests.reference import assert_close, dense_ggn, kron

layers = keras.layers


def adapted(layer, trained=lambda v: v.trainable):
    """The one adapter of a layer."""
    (adapter,) = registry.adapt(layer, trained)
    return adapter


def alone(case, **config):
    """A layer of a case, in a model of its own."""
    keras.utils.set_random_seed(0)
    layer = case.make(**config)
    return keras.Sequential([keras.Input(case.input_shape, dtype="float64"), layer]), layer


def in_network(case):
    """A layer of few weights in the midst of a network that is not linear."""
    keras.utils.set_random_seed(0)
    layer = case.make()
    model = keras.Sequential(
        [
            keras.Input(case.input_shape, dtype="float64"),
            layers.Dense(case.input_shape[-1], "tanh", dtype="float64"),
            layer,
            layers.Dense(3, "tanh", dtype="float64"),
            layers.Dense(2, dtype="float64"),
        ]
    )
    rng = np.random.default_rng(0)
    for variable in layer.trainable_weights:  # Neither 0 nor 1.
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model, layer


def random_inputs(model, examples):
    """Inputs for a model of one, `[examples, ...]`."""
    return np.random.default_rng(1).normal(size=(examples, *model.input_shape[1:]))


def places(adapter):
    """Where each entry of the matrix is among the flattened variables, one after the other."""
    sizes = [int(np.prod(v.shape)) for v in adapter.variables]
    starts = np.cumsum([0, *sizes[:-1]])
    numbers = {
        id(v): tf.reshape(tf.range(start, start + size), v.shape)
        for v, start, size in zip(adapter.variables, starts, sizes)
    }
    return adapter.to_matrix(numbers).numpy()


def blocks_and_ggn(model, of_layers, x):
    """Adapter, block and part of the GGN, for each block of some layers of a model."""
    loss, y = LOSS["mse"].make(), np.zeros(model(x).shape)  # Its GGN is that of any targets.
    adapters = [a for layer in of_layers for a in registry.adapt(layer, lambda v: v.trainable)]
    found = factors(model, loss, x, layers=of_layers)
    for adapter, (a, g) in zip(adapters, found, strict=True):
        dense = dense_ggn(model, loss, x, y, adapter.variables, pfor=False)
        entries = places(adapter)
        assert sorted(entries.ravel()) == list(range(len(dense)))
        if adapter.structures[0].is_diagonal:
            a = np.diag(a)
        if adapter.groups is None:
            a, g, entries = a[None], g[None], entries[None]
        for own, input_factor, output_factor in zip(entries, a, g, strict=True):
            index = own.ravel()
            yield adapter, kron(input_factor, output_factor), dense[np.ix_(index, index)]


def check_equals_ggn(model, of_layers, x):
    """That the blocks of some layers are those of the GGN."""
    for _, block, dense in blocks_and_ggn(model, of_layers, x):
        assert_close(block, dense)


def check_examples_equal_ggn(model, layer, x):
    """That a block of gradients example by example is that of the GGN, or its diagonal."""
    before = model.get_weights()
    (statistics,) = factors(model, LOSS["mse"].make(), x, layers=[layer])
    model.set_weights(before)  # Renormalisation depends on moving statistics.
    adapter, y = adapted(layer), np.zeros(model(x).shape)
    dense = dense_ggn(model, LOSS["mse"].make(), x, y, adapter.variables, pfor=False)
    a, g = map(np.asarray, statistics)
    np.testing.assert_array_equal(a, np.ones_like(a))
    if adapter.block == "full":
        assert_close(g, dense)
    else:
        assert_close(np.ravel(g), np.diag(dense))
