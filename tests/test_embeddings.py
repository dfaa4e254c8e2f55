"""Embeddings: tables with a diagonal input factor, and how their gradients stay sparse."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import KFAC
from keras_kfac.introspection.affine import DenseAdapter
from keras_kfac.math import linalg
from keras_kfac.math.inverses import ExactInverse, FactoredInverse, relative_change
from tests import helpers
from tests.cases import LAYERS, LOSS, factors
from tests.reference import assert_close, dense_ggn, kron

layers = keras.layers
RNG = np.random.default_rng(0)


EMBEDDINGS = {
    "one": lambda: [layers.Embedding(4, 3, dtype="float64")],
    "then-dense": lambda: [
        layers.Embedding(4, 3, dtype="float64"),
        layers.Dense(2, dtype="float64"),
    ],
    "vocabulary-not-seen": lambda: [layers.Embedding(9, 2, dtype="float64")],
}


class TestEmbedding:
    """A dense layer on one-hot rows, whose second moment is diagonal."""

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
    @pytest.mark.parametrize("name", EMBEDDINGS)
    def test_equals_the_ggn(self, name, shape):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(shape, dtype="int32"), *EMBEDDINGS[name]()])
        x = RNG.integers(0, 4, size=(3, *shape))
        y, loss = RNG.normal(size=model(x).shape), LOSS["mse"].make()
        embedding = model.layers[0]
        a, g = factors(model, loss, x)[0]
        np.testing.assert_allclose(
            a, np.bincount(x.ravel(), minlength=embedding.input_dim) / x.size, rtol=1e-14
        )
        dense = dense_ggn(model, loss, x, y, [embedding.embeddings], pfor=False)
        assert_close(kron(np.diag(a), g), dense)

    def test_counts_as_a_dense_layer_on_one_hot_rows_with_weights(self):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,), dtype="int32"), *EMBEDDINGS["one"]()])
        x, weights = RNG.integers(0, 4, size=(3, 2)), np.array([0.0, 1.0, 3.0])
        a, _ = factors(model, LOSS["mse"].make(), x, sample_weight=weights[:, None])[0]
        layer = LAYERS[0].make()
        layer.build((None, 5))
        dense = DenseAdapter(layer, lambda v: True)
        moment, total = dense.input_moment(tf.one_hot(x, 5), tf.constant(weights), tf.float64)
        assert_close(a, np.diag(moment / total)[:4])

    @pytest.mark.parametrize("exact", [False, True])
    def test_sparse_gradients_are_preconditioned_as_dense_ones(self, exact):
        rng = np.random.default_rng(3)
        a, g = tf.constant(rng.uniform(0.1, 1, 6)), tf.constant(np.cov(rng.normal(size=(3, 9))))
        inverse = (ExactInverse if exact else FactoredInverse).of(a, g, tf.constant(0.1))
        slices = tf.IndexedSlices(
            tf.constant(rng.normal(size=(4, 3))), tf.constant([5, 0, 5, 2]), tf.constant([6, 3])
        )
        sparse = inverse.precondition(slices)
        assert isinstance(sparse, tf.IndexedSlices) and sparse.values.shape == (4, 3)
        dense = inverse.precondition(tf.convert_to_tensor(slices))
        assert_close(tf.convert_to_tensor(sparse), dense, 1e-14)
        direction = tf.convert_to_tensor(sparse)
        product = tf.reduce_sum(tf.convert_to_tensor(slices) * direction)
        assert_close(linalg.inner_product(slices, direction), product, 1e-14)

    @pytest.mark.parametrize("exact", [False, True])
    def test_diagonal_factors_are_inverted_as_matrices(self, exact):
        rng = np.random.default_rng(4)
        kind = ExactInverse if exact else FactoredInverse
        a, g = rng.uniform(0.1, 1, 4), rng.uniform(0.1, 1, 3)
        gradient = tf.constant(rng.normal(size=(4, 3)))
        matrices = kind.of(tf.constant(np.diag(a)), tf.constant(np.diag(g)), tf.constant(0.3))
        expected = matrices.precondition(gradient)
        for one, other in ((a, np.diag(g)), (np.diag(a), g), (a, g)):
            inverse = kind.of(tf.constant(one), tf.constant(other), tf.constant(0.3))
            assert_close(inverse.precondition(gradient), expected, 1e-13)
            assert_close(inverse.condition_number, matrices.condition_number, 1e-13)
            start = [f(shape, tf.float64) for shape, f in kind.start(one.shape, other.shape)]
            np.testing.assert_array_equal(kind(*start).precondition(gradient), gradient)
            undamped = kind.of(tf.constant(one), tf.constant(other), tf.constant(0.0))
            dense = kind.of(tf.constant(np.diag(a)), tf.constant(np.diag(g)), tf.constant(0.0))
            expected_change = relative_change(matrices, dense)
            assert_close(relative_change(inverse, undamped), expected_change, 1e-12)

    @pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_learns(self, jit_compile):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                layers.Embedding(50, 8),
                layers.Flatten(),
                layers.Dense(5),
            ]
        )
        x = RNG.integers(0, 50, size=(256, 4))
        model = helpers.compiled(model, KFAC(), jit_compile=jit_compile)
        history = helpers.fit(model, (x, x[:, 0] % 5), epochs=10).history["loss"]
        assert history[-1] < 0.1 * history[0]
        assert model.optimizer.coverage().fraction == 1


def reversible_model(tie_weights, back=True, steps=5, **config):
    """Looks up vectors, turns them, and projects back (or does only the latter)."""
    keras.utils.set_random_seed(0)
    embedding = layers.ReversibleEmbedding(
        4,
        3,
        tie_weights=tie_weights,
        embeddings_initializer="random_normal",
        dtype="float64",
        **config,
    )
    turn = layers.Dense(3, "tanh", dtype="float64")
    if back:
        x = keras.Input((steps,), dtype="int32")
        h = turn(embedding(x))
    else:
        x = keras.Input((steps, 3), dtype="float64")
        embedding.build()
        h = turn(x)
    return keras.Model(x, embedding(h, reverse=True)), embedding


@pytest.mark.skipif(
    not hasattr(layers, "ReversibleEmbedding"), reason="this Keras has no ReversibleEmbedding"
)
class TestReversibleEmbedding:
    @pytest.mark.parametrize("tie_weights", [False, True])
    def test_projection_alone_equals_the_ggn(self, tie_weights):
        """Identity 11a; it is the table where that is tied."""
        model, layer = reversible_model(tie_weights, back=False)
        x, y = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(2, 5, 4))
        loss = LOSS["mse"].make()
        ((a, g),) = factors(model, loss, x, layers=[layer])
        matrix = layer.embeddings if tie_weights else layer.reverse_embeddings
        block = kron(np.diag(a), g) if tie_weights else kron(a, g)
        assert_close(block, dense_ggn(model, loss, x, y, [matrix]))

    def test_capped_projection_of_one_vector_equals_the_ggn(self):
        """Identity 5."""
        model, layer = reversible_model(False, back=False, steps=1, logit_soft_cap=0.5)
        x, y = RNG.normal(size=(1, 1, 3)), RNG.normal(size=(1, 1, 4))
        loss = LOSS["mse"].make()
        ((a, g),) = factors(model, loss, x, layers=[layer])
        assert_close(kron(a, g), dense_ggn(model, loss, x, y, [layer.reverse_embeddings]))

    def test_tied_block_has_the_partial_traces_of_both_uses(self):
        loss, x = LOSS["cce-logits"].make(), RNG.integers(0, 4, size=(3, 5))
        tied, layer = reversible_model(True)
        ((a, g),) = factors(tied, loss, x, layers=[layer])
        apart, other = reversible_model(False)
        for variable, value in [
            (other.embeddings, layer.embeddings),
            (other.reverse_embeddings, tf.transpose(layer.embeddings)),
            *zip(apart.layers[2].weights, tied.layers[2].weights),
        ]:
            variable.assign(value)
        (counts, vectors), (inputs, logits) = factors(apart, loss, x, layers=[other])
        both = kron(np.diag(counts), vectors) + kron(np.diag(np.diag(logits)), inputs)
        both = both.reshape(4, 3, 4, 3)
        block = kron(np.diag(a), g).reshape(4, 3, 4, 3)
        assert_close(np.einsum("abcb->ac", block), np.einsum("abcb->ac", both), 1e-12)
        assert_close(np.einsum("abad->bd", block), np.einsum("abad->bd", both), 1e-12)

    @pytest.mark.parametrize("tie_weights", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_learns(self, tie_weights):
        keras.utils.set_random_seed(0)
        embedding = layers.ReversibleEmbedding(7, 8, tie_weights=tie_weights)
        x = keras.Input((6,), dtype="int32")
        h = layers.Dense(8)(layers.Dense(16, "tanh")(embedding(x)))
        model = helpers.compiled(keras.Model(x, embedding(h, reverse=True)), KFAC())
        tokens = RNG.integers(0, 7, size=(256, 6))
        history = helpers.fit(model, (tokens, (3 * tokens + 1) % 7), epochs=10).history["loss"]
        assert history[-1] < 0.1 * history[0]
        coverage = model.optimizer.coverage()
        assert coverage.fraction == 1 and {row.block for row in coverage} == {"kronecker"}
