"""Which examples, positions and outputs count in the factors, and how much, against autodiff.

The networks are linear and the losses squared, so that blocks are exact where they count what the
loss counts.
"""

import warnings

import keras
import numpy as np
import pytest
import scipy
import tensorflow as tf

from keras_kfac import FisherMatrix
from keras_kfac.introspection.batch_part import BatchPart, parts_for_whole, places_of
from tests import helpers
from tests.cases import LOSS, factors, mlp
from tests.reference import assert_close, dense_ggn, kron, layer_block, relative_difference

layers = keras.layers
MSE = LOSS["mse"].make
REDUCTIONS = ("sum_over_batch_size", "sum", "none")


def sequences(outputs=2, seed=0):
    """A linear layer on three sequences of five positions, with targets."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(seed)
    layer = layers.Dense(outputs, dtype="float64")
    model = keras.Sequential([keras.Input((5, 4), dtype="float64"), layer])
    return model, rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, outputs))


def block(model, loss, x, y=None, sample_weight=None):
    ((a, g),) = factors(model, loss, x, y, sample_weight=sample_weight)
    return kron(a, g)


class TestSqueezedTargets:
    """Keras drops the last axis of outputs `[batch, steps, 1]` for targets `[batch, steps]`."""

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_have_the_scale_of_the_loss(self, reduction, weighted):
        model, x, y = sequences(outputs=1)
        weights = np.array([1.0, 2.0, 0.5]) if weighted else None
        arguments = MSE(reduction), x, y[..., 0]
        expected = layer_block(model, *arguments, model.layers[0], sample_weight=weights)
        assert_close(block(model, *arguments, weights), expected)
        own = block(model, MSE(reduction), x, y, None)
        is_other = relative_difference(own, expected) > 0.1
        assert is_other == (weighted or reduction != "sum_over_batch_size")

    def test_in_fisher_matrices(self):
        model, x, y = sequences(outputs=1)
        model.compile("sgd", MSE("sum"))
        expected = layer_block(model, MSE("sum"), x, y[..., 0], model.layers[0])
        assert_close(FisherMatrix(model, x, y[..., 0]).to_dense(), expected)


@pytest.mark.parametrize("shape", [(6,), (6, 1)], ids=str)
def test_losses_that_are_not_reduced(shape):
    """Keras gives values `[batch]` with weights `[batch, 1]` an axis more."""
    model, rng = mlp((4, 2)), np.random.default_rng(0)
    x, y, weights = rng.normal(size=(6, 4)), rng.normal(size=(6, 2)), rng.uniform(size=shape)
    optimizer = helpers.kfac(fisher="exact", learning_rate=0.0)
    model.compile(optimizer.attach(model), MSE("none"), run_eagerly=True)
    expected = layer_block(model, MSE("none"), x, y, model.layers[0], sample_weight=weights)
    model.train_on_batch(x, y, weights)
    own = optimizer._known.curvature.blocks[0]
    assert_close(kron(own.input_factor, own.output_factor), expected)


class TestPositions:
    WEIGHTS = np.array([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    @pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "sum_over_batch_size"])
    def test_of_weight_zero_do_not_count(self, reduction):
        model, x, y = sequences()
        arguments = MSE(reduction), x, y
        options = {"sample_weight": self.WEIGHTS}
        expected = layer_block(model, *arguments, model.layers[0], **options)
        assert_close(block(model, *arguments, self.WEIGHTS), expected)

    @pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "sum_over_batch_size"])
    def test_count_what_their_weights_say(self, reduction):
        model, x, y = sequences()
        weights = np.random.default_rng(1).uniform(size=(3, 5)) * self.WEIGHTS
        arguments = MSE(reduction), x, y
        expected = layer_block(model, *arguments, model.layers[0], sample_weight=weights)
        assert_close(block(model, *arguments, weights), expected)
        alike = np.where(weights > 0, weights.sum(1, keepdims=True), 0)  # not by examples alone
        assert relative_difference(block(model, *arguments, alike), expected) > 0.1

    def test_of_weight_zero_can_hold_anything(self):
        model, x, y = sequences()
        other = np.where(self.WEIGHTS[..., None] > 0, x, 1e3)
        before, after = (block(model, MSE(), inputs, y, self.WEIGHTS) for inputs in (x, other))
        assert_close(after, before, 1e-12)

    def test_of_an_ignored_class_can_hold_anything(self):
        model, x, _ = sequences(outputs=3)
        y = np.where(self.WEIGHTS > 0, np.random.default_rng(1).integers(0, 3, (3, 5)), -1)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=-1, dtype="float64"
        )
        other = np.where(self.WEIGHTS[..., None] > 0, x, 1e3)
        ((before, _),), ((after, _),) = (factors(model, loss, inputs, y) for inputs in (x, other))
        assert_close(after, before, 1e-12)

    def test_that_others_depend_on_count(self):
        """The loss is at the last position alone, the gradient is not."""
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5, 4), dtype="float64")
        first = layers.Dense(2, name="first", dtype="float64")(inputs)
        mixed = layers.Dense(5, dtype="float64")(layers.Permute((2, 1), dtype="float64")(first))
        model = keras.Model(inputs, layers.Permute((2, 1), dtype="float64")(mixed))
        _, x, y = sequences()
        weights = np.zeros((3, 5))
        weights[:, -1] = 1
        ((a, _),) = factors(model, MSE(), x, y, sample_weight=weights, layers=[model.layers[1]])
        rows = np.c_[x.reshape(15, 4), np.ones(15)]
        assert_close(a, rows.T @ rows / 15)


class TestRealWeightsOfPositions:
    """Each row of a layer counts what the positions do that it leads to."""

    WEIGHTS = np.random.default_rng(1).uniform(0.1, 1, size=(3, 5))

    def input_factor(self, *rest, weights=WEIGHTS):
        keras.utils.set_random_seed(0)
        _, x, y = sequences()
        first = layers.Dense(6, dtype="float64")
        model = keras.Sequential([keras.Input((5, 4), dtype="float64"), first, *rest])
        ((a, _),) = factors(model, MSE(), x, y, sample_weight=weights, layers=[first])
        return a

    def expected(self, weights=WEIGHTS):
        _, x, _ = sequences()
        rows = np.concatenate([x, np.ones((3, 5, 1))], axis=-1)
        return np.einsum("nt,nti,ntj->ij", weights / weights.sum(), rows, rows)

    def test_behind_layers_of_single_positions(self):
        rest = [layers.Activation("tanh", dtype="float64"), layers.Dense(2, dtype="float64")]
        assert_close(self.input_factor(*rest), self.expected())

    def test_behind_a_layer_that_turns_their_order(self):
        def turned(x):
            return keras.ops.flip(x, axis=1)

        rest = [layers.Lambda(turned, dtype="float64"), layers.Dense(2, dtype="float64")]
        assert_close(self.input_factor(*rest), self.expected(self.WEIGHTS[:, ::-1]))
        assert relative_difference(self.expected(), self.expected(self.WEIGHTS[:, ::-1])) > 0.05

    def test_behind_a_layer_that_mixes_them(self):
        """Two positions into one: each counts what that does, and those of no position nothing."""
        rest = [
            layers.Conv1D(2, 2, strides=2, dtype="float64"),
            layers.UpSampling1D(2, dtype="float64"),
        ]
        rest.append(layers.ZeroPadding1D((0, 1), dtype="float64"))
        pairs = np.repeat(self.WEIGHTS[:, :2], 2, axis=1)  # Alike where they come from one.
        weights = np.concatenate([pairs, self.WEIGHTS[:, :1]], axis=1)
        # The last row leads to nothing: it counts as the others of its example do on average.
        rows = np.concatenate([pairs, pairs.mean(1, keepdims=True)], axis=1)
        rows *= weights.sum(1, keepdims=True) / rows.sum(1, keepdims=True)
        assert_close(self.input_factor(*rest, weights=weights), self.expected(rows))


class WeightsValues(keras.Model):
    """Weights the values of its loss by itself."""

    total = None

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        targets, weights = y
        return type(self).total(MSE("none")(targets, y_pred), weights)


TOTALS_OF_VALUES = {
    "multiplied": lambda v, w: tf.reduce_sum(v * w) / tf.reduce_sum(w),
    "masked": lambda v, w: tf.reduce_sum(tf.boolean_mask(v * w, w > 0)) / tf.reduce_sum(w),
    "gathered": lambda v, w: tf.reduce_sum(tf.gather(v, [0, 2]) * tf.gather(w, [0, 2])),
}


class TestWeightsOfValues:
    """Those that a `compute_loss` multiplies a loss by that it takes without reduction."""

    def block(self, total, x, y, weights, run_eagerly=True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(x.shape[1:], dtype="float64")
        model = type("Own", (WeightsValues,), {"total": staticmethod(total)})(
            inputs, layers.Dense(2, dtype="float64")(inputs)
        )
        optimizer = helpers.kfac(fisher="exact", learning_rate=0.0)
        model.compile(optimizer.attach(model), run_eagerly=run_eagerly)
        model.train_on_batch(x, (y, weights))
        own = optimizer._known.curvature.blocks[0]
        return kron(own.input_factor, own.output_factor)

    @pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "graph"])
    @pytest.mark.parametrize("shape", [(6,), (3, 5)], ids=["examples", "positions"])
    @pytest.mark.parametrize("name", TOTALS_OF_VALUES)
    def test_count_as_sample_weights(self, name, shape, run_eagerly):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(*shape, 4)), rng.normal(size=(*shape, 2))
        weights = rng.uniform(0.1, 1, size=shape) * (rng.uniform(size=shape) > 0.4)
        counts = weights / weights.sum()
        if name == "gathered":
            counts = weights * np.isin(np.arange(len(x)), [0, 2]).reshape(-1, *[1] * (x.ndim - 2))
        rows = np.concatenate([x, np.ones((*shape, 1))], axis=-1)
        a = np.einsum("n,ni,nj->ij", counts.ravel(), *[rows.reshape(-1, 5)] * 2)
        actual = self.block(TOTALS_OF_VALUES[name], x, y, weights, run_eagerly)
        assert_close(actual, kron(a, np.eye(2)))  # `(2 / features) I` is the Hessian of the loss.
        alike = np.einsum("ni,nj->ij", *[rows.reshape(-1, 5)] * 2) * counts.mean()
        assert relative_difference(alike, a) > 0.1


class TestPositionsOfOtherLayers:
    """Those of weight 0 do not count in convolutions, recurrent layers and calls step by step."""

    WEIGHTS = np.array([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [3, 3, 3, 0, 0]])

    def statistics(self, layer, x, y, weights, **kwargs):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(x.shape[1:], dtype="float64"), layer])
        inner = getattr(layer, "layer", layer)
        inner.set_weights([np.ones(v.shape) for v in inner.weights])
        options = {"sample_weight": weights, "layers": [inner], **kwargs}
        (found,) = factors(model, MSE(), x, y, **options)
        return found

    REAL = WEIGHTS * np.random.default_rng(1).uniform(size=(3, 5))

    @pytest.mark.parametrize(
        "weights", [WEIGHTS, REAL, np.array([[1.0], [0], [2]])], ids=["5", "real", "1"]
    )
    @pytest.mark.parametrize("name", ["conv", "grouped", "steps", "einsum"])
    def test_are_as_those_of_a_dense_layer(self, name, weights):
        """By factors, where the layer is the same map of every position."""
        own = {"dtype": "float64"}
        layer = {
            "conv": lambda: layers.Conv1D(2, 1, **own),
            "grouped": lambda: layers.Conv1D(2, 1, groups=2, use_bias=False, **own),
            "steps": lambda: layers.TimeDistributed(layers.Dense(2, **own), **own),
            "einsum": lambda: layers.EinsumDense("abc,cd->abd", (5, 2), bias_axes="d", **own),
        }[name]()
        _, x, y = sequences()
        found = self.statistics(layer, x, y, weights)
        dense = self.statistics(layers.Dense(2, **own), x, y, weights)
        a, g = dense.input_factor.numpy(), dense.output_factor.numpy()
        if name == "grouped":  # The kernels and inputs of a group, each by itself.
            a = np.stack([a[:2, :2], a[2:4, 2:4]])
            g = np.stack([g[:1, :1], g[1:, 1:]])
        assert_close(found.input_factor, a)
        assert_close(found.output_factor, g)

    @pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "conv-lstm"])
    def test_steps_after_the_last_that_counts_can_hold_anything(self, name):
        own = {"dtype": "float64", "return_sequences": True}
        make = {
            "rnn": lambda: layers.SimpleRNN(2, **own),
            "lstm": lambda: layers.LSTM(2, **own),
            "gru": lambda: layers.GRU(2, reset_after=False, use_bias=False, **own),
            "conv-lstm": lambda: layers.ConvLSTM1D(2, 1, **own),
        }[name]
        _, x, y = sequences()
        if name == "conv-lstm":
            x, y = x[..., np.newaxis, :], y[..., np.newaxis, :]
        weights = self.WEIGHTS if name != "conv-lstm" else self.WEIGHTS[..., np.newaxis]
        counts = np.reshape(self.WEIGHTS, [3, 5, *[1] * (x.ndim - 2)]) > 0
        each = []
        # Not so large that cells saturate: gradients would vanish wherever the loss is.
        for inputs in (x, np.where(counts, x, x + 2), np.where(counts, x + 2, x)):
            model = keras.Sequential([keras.Input(x.shape[1:], dtype="float64"), make()])
            model.layers[0].set_weights([np.full(v.shape, 0.1) for v in model.weights])
            each.append(
                [f.input_factor for f in factors(model, MSE(), inputs, y, sample_weight=weights)]
            )
        for before, after, changed in zip(*each):
            assert_close(after, before, 1e-12)
            assert relative_difference(changed, before) > 0.1

    def test_pixels_of_a_part_of_the_image_count_in_what_is_thinned(self):
        """The sampled Fisher matrix sees a quarter of the pixels of an image."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(4, 16, 16, 2)), rng.normal(size=(4, 16, 16, 1))
        weights = np.zeros((4, 16, 16))
        weights[:, :8] = 1
        other = np.where(weights[..., np.newaxis] > 0, x, 1e3)
        layer = layers.Conv2D(1, 1, dtype="float64")
        found = [self.statistics(layer, i, y, weights, fisher="sampled") for i in (x, other)]
        first, second = (each.input_factor for each in found)
        assert_close(second, first, 1e-12)
        thin = np.c_[x[:, :8:2, ::2].reshape(-1, 2), np.ones(128)]
        assert_close(first, thin.T @ thin / 128)

    @pytest.mark.parametrize("size", [16, 17])
    def test_pixels_between_those_that_are_taken_lend_them_their_weight(self, size):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(4, size, size, 2)), rng.normal(size=(4, size, size, 1))
        weights = np.zeros((4, size, size))
        weights[:, 1::2, 1::2] = 1
        layer = layers.Conv2D(1, 1, dtype="float64")
        found = self.statistics(layer, x, y, weights, fisher="sampled")
        taken = x[:, : size - size % 2 : 2, : size - size % 2 : 2].reshape(-1, 2)
        thin = np.c_[taken, np.ones(len(taken))]
        assert_close(found.input_factor, thin.T @ thin / len(thin))


def test_rows_of_all_calls_count_alike():
    """As those of one call of all of them: an example of few rows in one, and many in another."""
    keras.utils.set_random_seed(0)
    short, long = (keras.Input((steps, 4), dtype="float64") for steps in (2, 5))
    layer = layers.Dense(2, dtype="float64")
    each = layers.Concatenate(axis=1, dtype="float64")([layer(short), layer(long)])
    twice = keras.Model([short, long], each)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 7, 4)), rng.normal(size=(3, 7, 2))
    weights = np.array([[1.0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0], [0, 0, 3, 3, 3, 0, 0]])
    parts = [x[:, :2], x[:, 2:]]
    ((a, g),) = factors(twice, MSE(), parts, y, sample_weight=weights, layers=[layer])
    once = keras.Sequential([keras.Input((7, 4), dtype="float64"), layer])
    ((expected, whole),) = factors(once, MSE(), x, y, sample_weight=weights, layers=[layer])
    assert_close(a, expected)
    assert_close(g, whole)


def test_examples_of_weight_zero_do_not_count_where_they_are_folded():
    """Into an axis with something else: their rows are known by their gradients."""
    keras.utils.set_random_seed(0)
    layer = layers.Dense(3, dtype="float64")
    inputs = keras.Input((5, 4), dtype="float64")
    folded = layer(keras.ops.reshape(inputs, (-1, 4)))
    outputs = layers.Dense(2, dtype="float64")(keras.ops.reshape(folded, (-1, 5, 3)))
    model, rng = keras.Model(inputs, outputs), np.random.default_rng(0)
    x, y = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 2))
    weights = np.array([[1.0], [0.0], [1.0]])
    other = np.where(weights[..., None] > 0, x, 1e3)
    each = [
        factors(model, MSE(), inputs, y, sample_weight=weights, layers=[layer])[0].input_factor
        for inputs in (x, other)
    ]
    assert_close(each[1], each[0], 1e-12)
    rows = np.c_[x[[0, 2]].reshape(10, 4), np.ones(10)]
    assert_close(each[0], rows.T @ rows / 10)


def test_layers_that_know_the_size_of_the_batch():
    """Behind a stateful layer it is known, in graphs for batches of any size."""
    rng, found = np.random.default_rng(0), []
    x, y = rng.normal(size=(320, 4, 3)), rng.normal(size=(320, 4, 2))
    weights = np.tile([[1.0], [0.0]], (160, 1))
    for inputs in (x, np.where(weights[..., None] > 0, x, x + 2)):
        keras.utils.set_random_seed(0)
        body = [layers.LSTM(3, stateful=True, return_sequences=True), layers.Dense(2)]
        model = keras.Sequential([keras.Input((4, 3), batch_size=160), *body])
        optimizer = helpers.kfac(learning_rate=0.0)
        helpers.compiled(model, optimizer, keras.losses.MeanSquaredError())
        helpers.fit(model, (inputs, y), batch_size=160, sample_weight=weights)
        found.append(helpers.factors(optimizer))
    for name, factor in found[0].items():
        assert_close(found[1][name], factor, 1e-5)


class TestRowsWithoutGradient:
    """Whether a row counts is not for a relu or a pooling layer to say."""

    def image_factor(self, weights):
        keras.utils.set_random_seed(0)
        own = {"dtype": "float64"}
        first = layers.Conv2D(2, 3, padding="same", activation="relu", **own)
        rest = [layers.MaxPooling2D(**own), layers.UpSampling2D(**own), layers.Conv2D(1, 1, **own)]
        model = keras.Sequential([keras.Input((8, 8, 1), dtype="float64"), first, *rest])
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(4, 8, 8, 1)), rng.normal(size=(4, 8, 8, 1))
        (found,) = factors(model, MSE(), x, y, sample_weight=weights, layers=[first])
        return found.input_factor

    def test_one_pixel_of_weight_zero_changes_little(self):
        weights = np.ones((4, 8, 8))
        whole = self.image_factor(weights)
        weights[:, 0, 0] = 0
        assert relative_difference(self.image_factor(weights), whole) < 0.03

    def test_reduce_leaves_out_positions_of_weight_zero(self):
        model, x, y = sequences()
        weights = TestPositions.WEIGHTS
        other = np.where(weights[..., None] > 0, x, 1e3)
        each = [
            factors(model, MSE(), inputs, y, sample_weight=weights, reduce=True)[0].input_factor
            for inputs in (x, other)
        ]
        assert_close(each[1], each[0], 1e-12)
        rows = np.concatenate([x, np.ones((3, 5, 1))], axis=-1) * weights[..., None]
        means = rows.sum(1) / weights.sum(1, keepdims=True)
        share = weights.sum(1) / weights.sum()
        assert_close(each[0], (means * share[:, None]).T @ means)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_weights_may_be_booleans(run_eagerly):
    found = []
    for dtype in (bool, float):
        model, rng = mlp((4, 2)), np.random.default_rng(0)
        optimizer = helpers.kfac(fisher="exact")
        model.compile(optimizer.attach(model), MSE(), run_eagerly=run_eagerly)
        weights = np.array([1, 0, 1, 1, 0, 1]).astype(dtype)
        model.train_on_batch(rng.normal(size=(6, 4)), rng.normal(size=(6, 2)), weights)
        found.append(model.get_weights())
    helpers.assert_same(*found)


def test_parts_take_examples_that_count():
    """As long as there are any: those without a label tell nothing of the loss."""
    counts = tf.constant([0.0] * 90 + [1.0] * 10)
    other = tf.constant([[0.0, 0.0]] * 89 + [[0.0, 2.0]] + [[0.0, 0.0]] * 10)
    part = BatchPart(0.1)
    for seed in range(5):
        places = places_of(part, [counts], [0, seed]).numpy()
        assert set(places) == set(range(90, 100))
        assert set(places_of(part, [counts, other], [0, seed]).numpy()) < set(range(89, 100))
    assert set(places_of(part, [1 - counts], [0, 0]).numpy()) < set(range(90))


@pytest.mark.parametrize("labelled", [1, 3, 20])
def test_parts_are_fair_to_outputs_of_few_examples(labelled):
    """Their mean over draws is the whole, though many draws have none of these examples."""
    rng = np.random.default_rng(0)
    common = tf.constant(rng.uniform(1, 2, size=(20,)))
    rare = tf.constant(np.repeat([[1.0, 0.0]], [labelled, 20 - labelled], axis=1)[0])
    of_examples = rng.normal(size=20) + 3
    part = BatchPart(0.25)

    @tf.function
    def drawn(seed):
        places = places_of(part, [common, rare], tf.stack([0, seed]))
        scaled = parts_for_whole([common, rare], places)
        return tf.stack([tf.reduce_sum(tf.gather(c * of_examples, places)) for c in scaled])

    found = [drawn(seed).numpy() for seed in tf.range(600)]
    error = np.std(found, axis=0) / np.sqrt(600)
    whole = [np.sum(common * of_examples), np.sum(rare * of_examples)]
    np.testing.assert_array_less(np.abs(np.mean(found, axis=0) - whole), 4 * error)
    missed = np.mean(np.array(found)[:, 1] == 0)
    assert missed == pytest.approx(scipy.special.comb(20 - labelled, 5) / 15504, abs=0.1)


class Positions(layers.Layer):
    """Adds a vector for each position: `[steps, width]`, of no example."""

    def __init__(self, steps, width, lookup):
        super().__init__(dtype="float64")
        self.steps, self.lookup = steps, lookup
        make = layers.Embedding if lookup else layers.Dense
        self.table = make(*([steps, width] if lookup else [width]), dtype="float64")

    def build(self, input_shape):
        self.table.build((self.steps,) if self.lookup else (self.steps, 3))

    def call(self, x):
        places = tf.range(self.steps)
        if not self.lookup:
            places = tf.cast(tf.stack([places, places**2, -places], axis=-1), "float64")
        return x + self.table(places)


@pytest.mark.parametrize(
    ("lookup", "run_eagerly", "batch"),
    [(True, False, 5), (True, True, 6), (False, False, 6)],
    ids=["embedding", "eager", "dense"],
)
def test_rows_that_all_examples_share_count_alike(lookup, run_eagerly, batch):
    """Of positions, for example: even as many as examples, where the graph is for any batch."""
    keras.utils.set_random_seed(0)
    shared = Positions(5, 4, lookup)
    last = layers.Dense(2, dtype="float64")
    model = keras.Sequential([keras.Input((5, 4), dtype="float64"), shared, last])
    rng = np.random.default_rng(0)
    size = 2 * batch + 1  # The last batch is another.
    x, y = rng.normal(size=(size, 5, 4)), rng.normal(size=(size, 5, 2))
    weights = rng.uniform(size=(size, 1))
    optimizer = helpers.kfac(fisher="exact", learning_rate=0.0)
    helpers.compiled(model, optimizer, MSE(), run_eagerly=run_eagerly)
    helpers.fit(model, (x, y), batch_size=batch, sample_weight=weights)
    block, _ = optimizer._known.curvature.blocks
    if lookup:
        assert_close(block.input_factor, np.full(5, 0.2))
    else:
        rows = np.stack([np.arange(5), np.arange(5) ** 2, -np.arange(5), np.ones(5)], axis=-1)
        assert_close(block.input_factor, rows.T @ rows / 5)
    assert np.linalg.eigvalsh(block.output_factor.value.numpy())[-1] > 0


def test_scalars_beside_outputs_tell_nothing_of_the_batch():
    """A graph for any batch tells a table of as many rows as there are examples from these."""
    shared, inputs = Positions(5, 4, True), keras.Input((5, 4), dtype="float64")
    outputs = layers.Dense(2, dtype="float64")(shared(inputs))
    model = keras.Model(inputs, {"mean": keras.ops.mean(outputs), "y": outputs})
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=(6, 5, 4)), rng.normal(size=(6, 5, 2)), np.eye(6)[:, :1]
    optimizer = helpers.kfac(fisher="exact", learning_rate=0.0)
    helpers.compiled(model, optimizer, {"y": MSE()})
    helpers.fit(model, (x, {"y": y}), batch_size=5, sample_weight={"y": weights})
    assert_close(optimizer._known.curvature.blocks[0].input_factor, np.full(5, 0.2))


def test_weights_of_one_number_for_each_example():
    """Keras makes one value of them, for outputs `[batch]`: all weights count for it alike."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="float64")
    layer = layers.Dense(1, dtype="float64")
    model = keras.Model(inputs, keras.ops.squeeze(layer(inputs), axis=-1))
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=(6, 4)), rng.normal(size=6), rng.uniform(size=6)
    expected = layer_block(model, MSE(), x, y, layer, sample_weight=weights)
    ((a, g),) = factors(model, MSE(), x, y, sample_weight=weights, layers=[layer])
    assert_close(kron(a, g), expected)


def heads():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="float64")
    each = [layers.Dense(d, name=name, dtype="float64") for d, name in ((2, "a"), (3, "b"))]
    return keras.Model(inputs, [layer(inputs) for layer in each])


@pytest.mark.parametrize("loss_weights", [None, [1.0, 10.0]])
@pytest.mark.parametrize(
    "weights",
    [([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]), ([1, 2, 0, 3, 0, 0], [1, 1, 1, 1, 1, 0.5])],
    ids=["disjoint", "overlapping"],
)
def test_heads_count_the_examples_of_their_own_loss(weights, loss_weights):
    model, rng = heads(), np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), [rng.normal(size=(6, d)) for d in (2, 3)]
    weights = [np.array(w, "float64") for w in weights]
    optimizer = helpers.kfac(fisher="exact", learning_rate=0.0)
    losses = {"loss": [MSE(), MSE()], "loss_weights": loss_weights}
    model.compile(optimizer.attach(model), **losses, run_eagerly=True)
    model.train_on_batch(x, y, weights)
    for index, own in enumerate(optimizer._known.curvature.blocks):
        layer = own.adapter.layer
        expected = dense_ggn(layer_alone(layer), MSE(), x, y[index], layer.weights, weights[index])
        scale = 1.0 if loss_weights is None else loss_weights[index]
        assert_close(kron(own.input_factor, own.output_factor), scale * expected)


def test_heads_without_a_pass_backwards_have_the_scale_of_their_own_loss():
    model, rng = heads(), np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), [rng.normal(size=(6, d)) for d in (2, 3)]
    optimizer = helpers.kfac(fisher="forward_only", learning_rate=0.0)
    losses = {"loss": [MSE(), MSE()], "loss_weights": [1.0, 10.0]}
    model.compile(optimizer.attach(model), **losses, run_eagerly=True)
    model.train_on_batch(x, y)
    for own, scale in zip(optimizer._known.curvature.blocks, (2 / 2, 10 * 2 / 3)):
        assert_close(own.output_factor, scale * np.eye(own.adapter.dims[1]), 1e-7)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_losses_without_likelihood_add_up(fisher):
    """By random signs, whatever else is drawn: for one example, there are two cases."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="float64")
    trunk = layers.Dense(3, dtype="float64")
    inner = trunk(inputs)
    each = [layers.Dense(2, dtype="float64")(inner) for _ in range(2)]
    model, rng = keras.Model(inputs, each), np.random.default_rng(0)
    loss = keras.losses.CosineSimilarity(dtype="float64")
    x, y = rng.normal(size=(1, 4)), [rng.normal(size=(1, 2)) for _ in range(2)]

    def factor(loss_weights, seed=0):
        optimizer = helpers.kfac(fisher=fisher, learning_rate=0.0, seed=seed)
        losses = {"loss": [loss, loss], "loss_weights": loss_weights}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.compile(optimizer.attach(model), **losses, run_eagerly=True)
            model.train_on_batch(x, y)
        (own,) = [b for b in optimizer._known.curvature.blocks if b.adapter.layer is trunk]
        return own.output_factor.value.numpy()

    found = [factor([1.0, 1.0], seed) for seed in range(8)]
    apart = factor([1.0, 0.0]) + factor([0.0, 1.0])
    others = [f for f in found if relative_difference(f, found[0]) > 1e-6]
    assert 0 < len(others) < 8
    assert_close((found[0] + others[0]) / 2, apart, 1e-6)


def layer_alone(layer):
    return lambda x, training: layer(x)


class TestParts:
    """The sampled Fisher matrix takes a part of the batch."""

    def trace_ratios(self, order):
        """Of the output factors of two heads, each for one half of the examples: to exact ones."""
        rng, size = np.random.default_rng(0), 1024
        x, y = rng.normal(size=(size, 4))[order], [rng.normal(size=(size, d)) for d in (2, 3)]
        has_label = np.arange(size)[order] < size // 2
        weights = [has_label.astype("float64"), 1.0 - has_label]
        traces = []
        for fisher in ("sampled", "exact"):
            model = heads()
            optimizer = helpers.kfac(fisher=fisher, learning_rate=0.0)
            model.compile(optimizer.attach(model), [MSE(), MSE()], run_eagerly=True)
            model.train_on_batch(x, y, weights)
            blocks = optimizer._known.curvature.blocks
            traces.append([float(tf.linalg.trace(b.output_factor.value)) for b in blocks])
        return np.divide(*traces)

    @pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["a b", "b a"])
    def test_of_batches_in_some_order_are_fair(self, order):
        """256 examples of 2 or 3 squares: 10 % are two standard deviations, or more."""
        np.testing.assert_allclose(self.trace_ratios(order), 1, atol=0.15)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1, 0, 0, 0], [1, 2, 3, 4, 0.1, 0.2, 0.3, 0.4]])
def test_weighted_micro_batches_are_the_large_batch(weights):
    """Identity 8, with weights."""
    rng, weights = np.random.default_rng(0), np.array(weights, "float64")
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 2))
    found = []
    for steps in (None, 2):
        model = mlp((4, 3, 2))
        options = {"gradient_accumulation_steps": steps, "fisher": "exact", "learning_rate": 0.0}
        optimizer = helpers.kfac(**options)
        model.compile(optimizer.attach(model), MSE(), run_eagerly=True)
        for part in np.split(np.arange(8), steps or 1):
            model.train_on_batch(x[part], y[part], weights[part])
        blocks = optimizer._known.curvature.blocks
        found.append([f.numpy() for b in blocks for f in (b.input_factor, b.output_factor)])
    for whole, accumulated in zip(*found):
        assert_close(accumulated, whole)


def small_models():
    """Layers whose rows are positions or not, with what stops gradients at some of them."""
    return {
        "relu": ((4,), [layers.Dense(2, "relu"), layers.Dense(2)]),
        "positions": ((5, 4), [layers.Dense(3, "relu"), layers.Flatten(), layers.Dense(2)]),
        "conv": (
            (16, 16, 1),
            [layers.Conv2D(2, 1, activation="relu"), layers.Flatten(), layers.Dense(2)],
        ),
        "pool": (
            (8, 8, 1),
            [layers.Conv2D(2, 3), layers.MaxPooling2D(), layers.Flatten(), layers.Dense(2)],
        ),
        "lstm": ((5, 4), [layers.LSTM(3), layers.Dense(2)]),
        "conv-lstm": ((3, 4, 2), [layers.ConvLSTM1D(2, 2), layers.Flatten(), layers.Dense(2)]),
        "einsum": (
            (5, 4),
            [layers.EinsumDense("abc,cd->abd", (5, 3)), layers.Flatten(), layers.Dense(2)],
        ),
        "embedding": ((5,), [layers.Embedding(7, 3), layers.Flatten(), layers.Dense(2)]),
    }


@pytest.mark.parametrize(
    ("name", "fisher"),
    [
        *((name, "sampled") for name in small_models() if name != "conv-lstm"),
        pytest.param("conv-lstm", "sampled", marks=pytest.mark.slow),
        pytest.param("lstm", "exact", marks=pytest.mark.slow),
        pytest.param("conv", "exact", marks=pytest.mark.slow),
    ],
)
def test_weights_of_one_are_none(name, fisher):
    """In graphs whose batch has no static size, as `fit` has them."""
    shape, rng = small_models()[name][0], np.random.default_rng(0)
    x, y = rng.normal(size=(20, *shape)), rng.normal(size=(20, 2))
    if name == "embedding":
        x = rng.integers(0, 7, size=x.shape)
    found = []
    for weights in (None, np.ones(20)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(shape), *small_models()[name][1]])
        optimizer = helpers.kfac(fisher=fisher, learning_rate=0.0, momentum=0.0, damping=0.1)
        helpers.compiled(model, optimizer, keras.losses.MeanSquaredError())
        helpers.fit(model, (x, y), batch_size=8, sample_weight=weights)
        found.append(helpers.factors(optimizer))
    for key, factor in found[0].items():
        assert_close(found[1][key], factor, 2e-5)
