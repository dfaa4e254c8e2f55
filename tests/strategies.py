"""Layers with settings drawn at random: all that Keras and TensorFlow run, but small."""

import functools
import inspect

import keras
from hypothesis import strategies as st

from tests.cases import LayerCase

layers = keras.layers
HAS_GATES = "use_gate" in inspect.signature(layers.MultiHeadAttention).parameters

_few = st.integers(1, 3)


def _case(layer_class, config, shape):
    return LayerCase("drawn", layer_class, config, tuple(shape))


@st.composite
def dense(draw):
    """On inputs of up to three axes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return _case(layers.Dense, {"units": draw(_few), "use_bias": draw(st.booleans())}, shape)


def _windows(draw, rank):
    """The part of a configuration that says where windows are, and sizes of inputs."""
    largest = {1: 4, 2: 3, 3: 2}[rank]
    each = st.lists(st.integers(1, largest), min_size=rank, max_size=rank)
    window, steps = draw(each), draw(each)
    config = {"kernel_size": window, "use_bias": draw(st.booleans())}
    # TensorFlow strides or dilates, not both.
    config[draw(st.sampled_from(["strides", "dilation_rate"]))] = steps
    config["padding"] = draw(st.sampled_from(["same", "valid"] + ["causal"] * (rank == 1)))
    reach = [(size - 1) * step + 1 for size, step in zip(window, steps)]
    return config, [draw(st.integers(r, r + 2)) for r in reach]


@st.composite
def convolutions(draw):
    """Of any rank, in groups or not."""
    rank = draw(_few)
    config, sizes = _windows(draw, rank)
    groups = draw(st.integers(1, 2))
    config |= {"filters": groups * draw(st.integers(1, 2)), "groups": groups}
    return _case(getattr(layers, f"Conv{rank}D"), config, (*sizes, groups * draw(_few)))


@st.composite
def depthwise_convolutions(draw, is_separable=False):
    """Each channel by itself, and for separable ones all of them at each pixel."""
    rank = draw(st.integers(1, 2))
    config, sizes = _windows(draw, rank)
    config["depth_multiplier"] = draw(st.integers(1, 2))
    if "strides" in config:  # The same along all axes.
        config["strides"] = config["strides"][:1] * rank
    if config["padding"] == "causal":
        config["padding"] = "valid"
    if is_separable:
        config["filters"] = draw(_few)
    name = f"SeparableConv{rank}D" if is_separable else f"DepthwiseConv{rank}D"
    return _case(getattr(layers, name), config, (*sizes, draw(_few)))


@st.composite
def transposed_convolutions(draw):
    """Whose windows do not overlap."""
    rank = draw(_few)
    window = [draw(st.integers(1, 2)) for _ in range(rank)]
    config = {
        "filters": draw(st.integers(1, 2)),
        "kernel_size": window,
        "strides": [draw(st.integers(size, 3)) for size in window],
        "padding": draw(st.sampled_from(["same", "valid"])),
        "use_bias": draw(st.booleans()),
    }
    sizes = [draw(st.integers(1, 2)) for _ in range(rank)]
    return _case(getattr(layers, f"Conv{rank}DTranspose"), config, (*sizes, draw(_few)))


@st.composite
def einsums(draw):
    """An einsum of axes in any order, the batch first in inputs and outputs."""
    counts = [draw(st.integers(0, 2)) for _ in range(4)]
    letters = iter("bcdefghij")
    groups, features, units, positions = (
        "".join(next(letters) for _ in range(count)) for count in counts
    )
    features = features or ("" if groups else next(letters))
    units = units or ("" if groups + positions else next(letters))
    sizes = {letter: draw(_few) for letter in groups + features + units + positions}

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
    return _case(layers.EinsumDense, config, (sizes[letter] for letter in inputs))


@st.composite
def normalizations(draw):
    """Whatever scales or shifts."""
    shape = draw(st.lists(st.integers(2, 3), min_size=2, max_size=3))
    axes = range(1, len(shape) + 1)
    axis = draw(st.sampled_from(axes))
    some = st.lists(st.sampled_from(axes), min_size=1, unique=True)
    shown = draw(st.sampled_from([{}, {"center": False}, {"scale": False}]))
    kind = draw(st.sampled_from(["Batch", "Layer", "Group", "RMS", "PReLU"]))
    if kind == "PReLU":
        return _case(layers.PReLU, {"shared_axes": draw(st.none() | some)}, shape)
    config = {
        "Batch": {"axis": axis, "renorm": draw(st.booleans()), **shown},
        "Layer": {"axis": draw(some), **shown},
        "Group": {"axis": axis, "groups": draw(st.sampled_from([1, shape[axis - 1]])), **shown},
        # Keras scales along the last axis in any case, and fails if that is of another size.
        "RMS": {"axis": axis} if shape[axis - 1] == shape[-1] else {},
    }
    return _case(getattr(layers, f"{kind}Normalization"), config[kind], shape)


_COMMON = {"dtype": "float64", "bias_initializer": "random_normal"}


@st.composite
def recurrent(draw):
    """What makes a layer of one cell or of two, for sequences `[batch, steps, 3]`.

    (Layers draw numbers of their own, which strategies must not.)
    """

    def config(kind):
        result = {
            "units": draw(_few),
            "use_bias": draw(st.booleans()),
            "activation": draw(st.sampled_from(["tanh", "sigmoid", "softplus"])),
        }
        if kind == "LSTM":
            result["unit_forget_bias"] = draw(st.booleans())
        if kind == "GRU":
            result["reset_after"] = draw(st.booleans())
        if kind != "SimpleRNN":
            result["recurrent_activation"] = draw(st.sampled_from(["sigmoid", "tanh"]))
        return result | _COMMON

    kinds = st.sampled_from(["SimpleRNN", "LSTM", "GRU"])
    names = "return_sequences", "go_backwards", "unroll"
    options = {name: draw(st.booleans()) for name in names}
    kind = draw(kinds)
    if draw(st.booleans()):
        return functools.partial(getattr(layers, kind), **config(kind), **options)
    cells = [(getattr(layers, f"{k}Cell"), config(k)) for k in (kind, draw(kinds))]

    def stacked():
        made = [cell_class(**own) for cell_class, own in cells]
        cell = layers.StackedRNNCells(made, dtype="float64")
        return layers.RNN(cell, dtype="float64", **options)

    return stacked


@st.composite
def attentions(draw):
    """What makes a layer of several heads, for queries and values of any length."""
    config = {"use_bias": draw(st.booleans()), **_COMMON}
    if HAS_GATES:
        config["use_gate"] = draw(st.booleans())
    if draw(st.booleans()):
        groups = draw(st.integers(1, 2))
        heads = groups * draw(st.integers(1, 2))
        return functools.partial(layers.GroupQueryAttention, draw(_few), heads, groups, **config)
    config["output_shape"] = draw(st.none() | st.tuples(_few) | st.tuples(_few, _few))
    config["value_dim"] = draw(st.none() | _few)
    return functools.partial(layers.MultiHeadAttention, draw(_few), draw(_few), **config)
