"""Exact blocks of layers that are called several times: the calls of an example add up first."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac.introspection import registry
from keras_kfac.introspection.example_gradients import (
    ExampleGradientsAdapter,
    RotatedSquaresAdapter,
)
from tests.cases import LOSS, collected
from tests.oracle import places
from tests.reference import assert_close, dense_ggn
from tests.test_curvature import orthonormal, rotation_of

layers = keras.layers
MSE = LOSS["mse"].make
FLOAT = {"dtype": "float64"}


def exact_adapters(layer, trained=lambda _: True):
    """Those of a full block, of the diagonal, and of squares in some bases."""
    (base,) = registry.adapt(layer, trained)
    if not base.has_row_pairs:
        return [base]
    rng = np.random.default_rng(0)
    bases = [orthonormal(rng, shape) for shape in base.factor_shapes]
    each = [ExampleGradientsAdapter(base, largest) for largest in (np.inf, 0)]
    return [*each, RotatedSquaresAdapter(base, bases)]


def shared_layers():
    return {
        "steps": layers.Dense(3, "tanh", **FLOAT),
        "norm": layers.LayerNormalization(**FLOAT),
        "slopes": layers.PReLU("random_normal", **FLOAT),
        "table": layers.Embedding(5, 4, **FLOAT),
        "dense": layers.Dense(4, "tanh", **FLOAT),
        "grouped": layers.Conv1D(4, 2, groups=2, **FLOAT),
    }


def network(own):
    """Calls see different numbers of positions, and each other's outputs."""
    x = keras.Input((2, 4), **FLOAT)
    few, many = (keras.Input((count,), dtype="int32") for count in (2, 3))
    steps = layers.TimeDistributed(own["steps"], **FLOAT)(x)
    h = own["norm"](keras.ops.concatenate([steps, steps[..., :1]], axis=-1))
    h = keras.ops.concatenate([h, own["table"](few), own["table"](many)], axis=1)
    h = own["grouped"](keras.ops.tanh(own["grouped"](own["norm"](h))))
    h = own["dense"](keras.ops.mean(own["dense"](h), axis=1))
    h = own["slopes"](own["slopes"](h))
    return keras.Model([x, few, many], layers.Dense(2, **FLOAT)(h))


@pytest.fixture(scope="module")
def statistics():
    """By name of the layer: adapters, what they keep, and the Fisher matrix of its weights."""
    keras.utils.set_random_seed(0)
    own = shared_layers()
    model, rng = network(own), np.random.default_rng(1)
    indices = [rng.integers(0, 5, size=(3, count)) for count in (2, 3)]
    x = [rng.normal(size=(3, 2, 4)), *indices]
    adapters = {name: exact_adapters(layer) for name, layer in own.items()}
    adapters["bias"] = exact_adapters(own["dense"], lambda v: v is own["dense"].bias)
    every = [adapter for each in adapters.values() for adapter in each]
    kept = iter(collected(model, MSE(), x, every))
    variables = [v for layer in own.values() for v in layer.trainable_variables]
    ggn = dense_ggn(model, MSE(), x, np.zeros((3, 2)), variables, pfor=False)
    ends = np.cumsum([v.value.shape.num_elements() for v in variables])
    numbers = dict(zip(map(id, variables), np.split(np.arange(len(ggn)), ends[:-1])))
    found = {}
    for name, each in adapters.items():
        index = np.concatenate([numbers[id(v)] for v in each[0].variables])
        index = index[places(each[0]).ravel()]
        found[name] = each, [next(kept).output_factor for _ in each], ggn[np.ix_(index, index)]
    return found


@pytest.mark.parametrize("name", ["steps", "table", "dense", "grouped", "bias"])
def test_statistics_are_those_of_the_fisher_matrix(name, statistics):
    """In full, on the diagonal, and in other bases; also where one row stands for all positions."""
    (_, _, rotated), (full, diagonal, squares), expected = statistics[name]
    assert_close(full, expected)
    assert_close(diagonal, np.diag(expected))
    rotation = rotation_of(rotated._base, rotated._bases)
    assert_close(squares, np.diag(rotation.T @ expected @ rotation))


@pytest.mark.parametrize("name", ["norm", "slopes"])
def test_exact_blocks_are_those_of_the_fisher_matrix(name, statistics):
    _, (full,), expected = statistics[name]
    assert_close(full, expected)


def in_graph(model, adapters, x, **options):
    """Output factors, in a graph for any number of examples."""

    @tf.function(input_signature=[tf.TensorSpec([None, *x.shape[1:]], x.dtype)], autograph=False)
    def found(x):
        return [s.output_factor for s in collected(model, MSE(), x, adapters, **options)]

    return found(x)


def test_steps_one_by_one_are_those_of_a_sequence():
    """Of a part of the batch, weighted, whose size the graph does not know."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(150, 2, 3)), rng.uniform(size=150)
    weights[:70] = 0
    found = []
    for wrap in (lambda layer: layers.TimeDistributed(layer, **FLOAT), lambda layer: layer):
        keras.utils.set_random_seed(0)
        own = [layers.Dense(3, "tanh", **FLOAT), layers.LayerNormalization(**FLOAT)]
        after = [layers.GlobalAveragePooling1D(**FLOAT), layers.Dense(1, **FLOAT)]
        model = keras.Sequential([keras.Input((2, 3), **FLOAT), *map(wrap, own), *after])
        adapters = [adapter for layer in own for adapter in exact_adapters(layer)]
        options = {"fisher": "sampled", "sample_weight": weights}
        found.append(in_graph(model, adapters, x, **options))
    for steps, sequence in zip(*found, strict=True):
        assert_close(steps, sequence, 1e-12)


class Positions(keras.Layer):
    """What a layer makes of positions that all examples share, beside what it makes of these."""

    def __init__(self, of_examples, of_positions):
        super().__init__(**FLOAT)
        self.of_examples, self.of_positions = of_examples, of_positions

    def call(self, x):
        places = tf.cast(tf.range(15), "float64")
        shared = self.of_positions(tf.sin(tf.reshape(places, [5, 3])))
        return keras.ops.tanh(self.of_examples(self.of_examples(x)) + shared)


@pytest.mark.parametrize(("name", "any_batch"), [("dense", True), ("norm", False)])
def test_what_is_no_example_has_a_moment_of_its_own(name, any_batch):
    """A layer for examples and for something else is as one for each."""
    x = np.random.default_rng(0).normal(size=(4, 5, 3))
    both, one, other = (
        layers.Dense(3, **FLOAT) if name == "dense" else layers.LayerNormalization(**FLOAT)
        for _ in range(3)
    )
    found = []
    for own in ([both], [one, other]):
        keras.utils.set_random_seed(0)
        body = Positions(own[0], own[-1])
        model = keras.Sequential([keras.Input((5, 3), **FLOAT), body, layers.Dense(1, **FLOAT)])
        for layer in own:
            layer.set_weights(both.get_weights())
        every = [adapter for layer in own for adapter in exact_adapters(layer)]
        if any_batch:
            factors = in_graph(model, every, x)
        else:
            factors = [s.output_factor for s in collected(model, MSE(), x, every)]
        kinds = len(every) // len(own)
        found.append([sum(factors[kind::kinds]) for kind in range(kinds)])
    for shared, apart in zip(*found, strict=True):
        assert_close(shared, apart, 1e-12)
