"""Layers with settings drawn at random equal the dense GGN, where theory says that they do."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kfac import _keras_internals
from keras_kfac.introspection import per_example
from tests import oracle, strategies

layers = keras.layers
RNG = np.random.default_rng(0)
AFFINE = st.one_of(
    strategies.dense(),
    strategies.convolutions(),
    strategies.depthwise_convolutions(),
    strategies.depthwise_convolutions(is_separable=True),
    strategies.transposed_convolutions(),
    strategies.einsums(),
)


def drawn(examples, **strategy):
    """A test of so many examples, always the same."""
    limits = settings(max_examples=examples, deadline=None, derandomize=True)
    return lambda test: limits(given(**strategy)(test))


@drawn(30, case=AFFINE)
def test_affine_layers(case):
    """Identity 11a: a target at each position, squared loss."""
    model, layer = oracle.alone(case)
    oracle.check_equals_ggn(model, [layer], oracle.random_inputs(model, 2))


@drawn(
    10,
    table=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    positions=st.lists(st.integers(1, 3), max_size=2),
)
def test_embeddings(table, positions):
    """Identity 11a, one-hot rows."""
    layer = layers.Embedding(*table, dtype="float64")
    model = keras.Sequential([keras.Input(positions, dtype="int32"), layer])
    oracle.check_equals_ggn(model, [layer], RNG.integers(0, table[0], (3, *positions)))


@drawn(15, case=strategies.normalizations(), largest=st.sampled_from([0, 256]))
def test_normalizations(case, largest):
    """Exact in any network, in full or on the diagonal."""
    model, layer = oracle.in_network(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_example.ExactAdapter, "max_full_block", largest)
        oracle.check_examples_equal_ggn(model, layer, oracle.random_inputs(model, 4))


@drawn(15, make=strategies.recurrent())
def test_recurrent_layers(make):
    """Identity 5: one step of one example."""
    keras.utils.set_random_seed(0)
    layer = make()
    x = RNG.normal(size=(1, 1, 3))
    layer(x)
    states = layer.get_initial_state(1)
    inputs = [keras.Input((1, 3), dtype="float64")]
    inputs += [keras.Input(s.shape[1:], dtype="float64") for s in keras.tree.flatten(states)]
    outputs = layer(inputs[0], initial_state=keras.tree.pack_sequence_as(states, inputs[1:]))
    model = keras.Model(inputs, layers.Dense(2, dtype="float64")(layers.Flatten()(outputs)))
    data = [x, *(RNG.normal(size=(1, *i.shape[1:])) for i in inputs[1:])]
    oracle.check_equals_ggn(model, [layer], data)


@drawn(15, make=strategies.attentions(), values=st.integers(2, 3))
def test_attention_of_one_query(make, values):
    """Identity 5, for what has one position: keys and values have more, or no gradient."""
    keras.utils.set_random_seed(0)
    attention = make()
    inputs = [keras.Input((steps, 4), dtype="float64") for steps in (1, values)]
    attended = layers.Flatten(dtype="float64")(attention(*inputs))
    model = keras.Model(inputs, layers.Dense(2, dtype="float64")(attended))
    projections = [
        layer
        for layer in _keras_internals.flatten_layers(attention)
        if hasattr(layer, "equation") and layer.name not in ("key", "value")
    ]
    assert {layer.name for layer in projections} - {"gate"} == {"query", "attention_output"}
    data = [RNG.normal(size=(1, *i.shape[1:])) for i in inputs]
    oracle.check_equals_ggn(model, projections, data)
