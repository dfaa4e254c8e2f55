"""Where theory says K-FAC equals the dense Fisher matrix, it does; where not, it does not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac.introspection import batch_part, scored_pass, statistics
from keras_kfac.introspection.batch_part import WHOLE, BatchPart
from keras_kfac.math.likelihood import Likelihood
from keras_kfac.math.moving_average import weighted_average
from tests.cases import (
    BCE,
    CCE,
    LOSS,
    LOSSES,
    MSE,
    factors,
    first_places,
    mlp,
    one_hot,
    real,
    without_head_activation,
)
from tests.reference import assert_close, kron, layer_block, relative_difference

layers = keras.layers
RNG = np.random.default_rng(0)


def logits_of(case):
    return without_head_activation if case.activation else None


def blocks(model, loss, x, y, case=None, **kwargs):
    return [
        layer_block(model, loss, x, y, layer, logits_of=case and logits_of(case), **kwargs)
        for layer in model.layers
        if layer.weights
    ]


class TestDeepLinear:
    """Identity 3: for deep linear networks with squared loss, A ⊗ G is the GGN block."""

    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "sum", "none"])
    @pytest.mark.parametrize("use_bias", [True, False])
    @pytest.mark.parametrize("widths", [(4, 3, 5, 2), (6, 3, 1)])
    def test_equals_ggn(self, widths, use_bias, reduction):
        model = mlp(widths, activation=None, use_bias=use_bias)
        loss = LOSS["mse"].make(reduction)
        x, y = RNG.normal(size=(6, widths[0])), RNG.normal(size=(6, widths[-1]))
        statistics = factors(model, loss, x)
        for (a, g), block in zip(statistics, blocks(model, loss, x, y)):
            assert_close(kron(a, g), block)

    def test_equals_hessian(self):
        """The GGN of a linear network with squared loss is its Hessian, block by block."""
        model = mlp((4, 3, 5, 2), activation=None)
        x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 2))
        loss = LOSS["mse"].make()
        for (a, g), layer in zip(factors(model, loss, x), model.layers):
            weights = tf.concat([layer.kernel.value, layer.bias.value[None]], axis=0)
            with tf.GradientTape() as outer:
                outer.watch(weights)
                with tf.GradientTape() as inner:
                    inner.watch(weights)
                    h = tf.convert_to_tensor(x)
                    for each in model.layers:
                        kernel, bias = each.kernel.value, each.bias.value
                        if each is layer:
                            kernel, bias = weights[:-1], weights[-1]
                        h = tf.matmul(h, kernel) + bias
                    value = loss(y, h)
                gradient = inner.gradient(value, weights)
            hessian = outer.jacobian(gradient, weights)
            size = int(tf.size(weights))
            assert_close(kron(a, g), np.reshape(hessian, [size, size]))

    def test_empirical_differs(self):
        model = mlp((4, 3, 5, 2), activation=None)
        x, y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 2))
        loss = LOSS["mse"].make()
        (a, g), *_ = factors(model, loss, x, y, fisher="empirical")
        assert relative_difference(kron(a, g), blocks(model, loss, x, y)[0]) > 0.1

    def test_nonlinear_differs(self):
        model = mlp((4, 3, 5, 2), activation="tanh")
        x, y = 3 * RNG.normal(size=(6, 4)), RNG.normal(size=(6, 2))
        loss = LOSS["mse"].make()
        (a, g), *_ = factors(model, loss, x)
        assert relative_difference(kron(a, g), blocks(model, loss, x, y)[0]) > 0.01


class TestOneExample:
    """Identity 5: for a batch of one, K-FAC is exact whatever the nonlinearity and the loss."""

    @pytest.mark.parametrize("case", LOSSES, ids=str)
    @pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
    def test_equals_ggn(self, case, activation):
        model = mlp((5, 4, 4, 3), activation, case)
        loss = case.make()
        x, y = RNG.normal(size=(1, 5)), case.targets(RNG, (1, 3))
        alive = 0
        for (a, g), block in zip(factors(model, loss, x), blocks(model, loss, x, y, case)):
            if np.abs(block).max() > 0:  # A relu layer can be dead for one example.
                assert_close(kron(a, g), block)
                alive += 1
        assert alive >= 1

    @pytest.mark.parametrize("case", LOSSES, ids=str)
    def test_empirical_is_outer_product_of_loss_gradients(self, case):
        model = mlp((5, 4, 4, 3), "tanh", case)
        loss = case.make()
        x, y = RNG.normal(size=(1, 5)), case.targets(RNG, (1, 3))
        likelihood_weight = {"bce": 1 / 3, "mse": 2 / 3}.get(case.name[:3], 1.0)
        with tf.GradientTape() as tape:
            value = loss(y, model(x))
        gradients = tape.gradient(value, [[d.kernel.value, d.bias.value] for d in dense(model)])
        statistics = factors(model, loss, x, y, fisher="empirical")
        for (a, g), (kernel, bias) in zip(statistics, gradients):
            flat = np.concatenate([kernel, bias[None]]).ravel()
            assert_close(kron(a, g), np.outer(flat, flat) / likelihood_weight)

    def test_several_examples_differ(self):
        model = mlp((5, 4, 3), "tanh")
        x, y = 2 * RNG.normal(size=(3, 5)), RNG.normal(size=(3, 3))
        loss = LOSS["mse"].make()
        (a, g), *_ = factors(model, loss, x)
        assert relative_difference(kron(a, g), blocks(model, loss, x, y)[0]) > 0.01


def dense(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Dense)]


class TestSampled:
    """Identity 4: the sampled Fisher converges to the exact one as 1 / sqrt(samples)."""

    SAMPLES = 3000

    @pytest.mark.parametrize("case", LOSSES, ids=str)
    def test_converges(self, case):
        model = mlp((4, 3, 2), "tanh", case)
        x = RNG.normal(size=(5, 4))
        errors = self.errors(model, case.make(), x)
        few, many = errors[: self.SAMPLES // 10], errors
        for layer in range(len(errors[0])):
            error = np.abs(np.mean([e[layer] for e in many], axis=0)).max()
            assert error < 0.1
            coarse = np.abs(np.mean([e[layer] for e in few], axis=0)).max()
            assert 0.08 < error / coarse < 1.0 or error < 0.02

    def errors(self, model, loss, x):
        """For each draw and layer: sampled minus exact G, relative to the largest exact entry."""
        exact = [g.numpy() for _, g in factors(model, loss, x)]

        @tf.function
        def draw(index):
            seed = tf.stack([7, index])
            return [g for _, g in factors(model, loss, x, fisher="sampled", seed=seed)]

        draws = [draw(tf.constant(index)) for index in range(self.SAMPLES)]
        return [[(g.numpy() - e) / np.abs(e).max() for g, e in zip(each, exact)] for each in draws]

    def test_same_seed_same_factors(self):
        model, loss = mlp((4, 3, 2)), LOSS["mse"].make()
        x = RNG.normal(size=(5, 4))
        first, again, other = (
            factors(model, loss, x, fisher="sampled", seed=seed)[0][1]
            for seed in [(1, 2), (1, 2), (1, 3)]
        )
        np.testing.assert_array_equal(first, again)
        assert relative_difference(first, other) > 1e-3


class TestScale:
    """Factors follow the scale of the loss that is minimised."""

    @pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
    @pytest.mark.parametrize("name", ["cce-logits", "bce-logits", "mse"])
    def test_duplication(self, name, fisher):
        """Identity 6: a batch repeated 7 times has the same factors under a mean loss."""
        case = LOSS[name]
        model, loss = mlp((4, 3, 2)), case.make()
        x, y = RNG.normal(size=(5, 4)), case.targets(RNG, (5, 2))
        once = factors(model, loss, x, y, fisher)
        repeated = factors(model, loss, np.tile(x, (7, 1)), np.tile(y, (7, 1)), fisher)
        for (a, g), (a7, g7) in zip(once, repeated):
            assert_close(a7, a)
            if fisher == "sampled":  # other draws: the same only in expectation
                assert 0.3 < np.trace(g7) / np.trace(g) < 3
            else:
                assert_close(g7, g)

    @pytest.mark.parametrize("name", ["cce-logits", "bce-logits", "mse"])
    @pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
    def test_sum_against_mean(self, name, fisher):
        """Identity 9, with layers of different resolution: G_mean = G_sum / (N R)."""
        case, examples, output_positions = LOSS[name], 3, 16
        model = unet_like()
        x, y = RNG.normal(size=(examples, 4, 4, 2)), case.targets(RNG, (examples, 4, 4, 2))
        mean = factors(model, case.make("mean"), x, y, fisher)
        total = factors(model, case.make("sum"), x, y, fisher)
        for (a, g), (a_sum, g_sum) in zip(mean, total):
            assert_close(a, a_sum)
            assert_close(g, g_sum / (examples * output_positions))

    @pytest.mark.parametrize("sizes", [[1] * 13, [8, 5], [4, 4, 4, 1]], ids=str)
    def test_batch_partition(self, sizes):
        """Identity 7: averaged by their counts, parts of a batch give the factors of the whole."""
        model, case = mlp((4, 3, 2)), LOSS["cce-logits"]
        x, loss = RNG.normal(size=(13, 4)), case.make()
        for layer, whole in enumerate(factors(model, loss, x)):
            means, total = [tf.zeros((), tf.float64)] * 2, tf.zeros((), tf.float64)
            for part in np.split(x, np.cumsum(sizes)[:-1]):
                count = tf.constant(len(part), tf.float64)
                parts = factors(model, loss, part)[layer]
                updates = [weighted_average(m, total, p, count, 1.0) for m, p in zip(means, parts)]
                means, total = [mean for mean, _ in updates], updates[0][1]
            for mean, expected in zip(means, whole):
                assert_close(mean, expected)

    @pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
    def test_loss_weight(self, fisher):
        model, case = mlp((4, 3, 2)), LOSS["mse"]
        x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 2))
        plain = factors(model, case.make(), x, y, fisher)
        weighted = factors(model, case.make(), x, y, fisher, loss_weight=3.0)
        for (a, g), (a3, g3) in zip(plain, weighted):
            assert_close(a3, a)
            assert_close(g3, 3 * g)

    def test_mse_is_not_summed_over_outputs(self):
        """The peers' error: Keras's MSE averages over outputs, so G is (2/C) I and not 2 I."""
        model = mlp((4, 5), None)
        _, g = factors(model, LOSS["mse"].make(), RNG.normal(size=(6, 4)))[0]
        assert_close(g, 2 / 5 * np.eye(5))

    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
    def test_sample_weights_are_counts(self, reduction):
        """An example of weight 2 counts as two, one of weight 0 not at all."""
        model, case = mlp((4, 3, 2)), LOSS["cce-logits"]
        loss = case.make(reduction)
        x, y = RNG.normal(size=(4, 4)), case.targets(RNG, (4, 2))
        weights = np.array([1.0, 2.0, 0.0, 1.0])
        counted = np.array([0, 1, 1, 3])
        weighted = factors(model, loss, x, y, sample_weight=weights)
        copies = factors(model, loss, x[counted], y[counted])
        for (a, g), (a_copies, g_copies) in zip(weighted, copies):
            assert_close(a, a_copies)
            assert_close(g, g_copies)

    def test_ignored_example_may_hold_anything(self):
        model, loss = mlp((4, 3, 2)), LOSS["cce-logits"].make()
        x = RNG.normal(size=(4, 4))
        x[2] = 1e300
        (a, g), *_ = factors(model, loss, x, sample_weight=np.array([1.0, 1, 0, 1]))
        assert np.isfinite(a).all() and np.isfinite(g).all()


def unet_like():
    """Convolutions at two resolutions, linear; every layer has its own number of positions."""
    keras.utils.set_random_seed(3)
    options = {"padding": "same", "dtype": "float64", "bias_initializer": "random_normal"}
    return keras.Sequential(
        [
            keras.Input((4, 4, 2), dtype="float64"),
            layers.Conv2D(3, 3, **options),
            layers.Conv2D(3, 3, strides=2, **options),
            layers.UpSampling2D(2, dtype="float64"),
            layers.Conv2D(2, 1, **options),
        ]
    )


class TestPositions:
    """Weight sharing: outputs and layers with several positions."""

    @pytest.mark.parametrize("fisher", list(statistics.Fisher))
    @pytest.mark.parametrize("name", ["cce-logits", "bce-logits", "mse"])
    def test_outputs_of_higher_rank(self, name, fisher):
        """Identity 10: outputs (N, 7, 5, 3) are N * 35 rows of 3, with the same draws and signs."""
        case = LOSS[name]
        keras.utils.set_random_seed(0)
        shared = [
            layers.Dense(4, "tanh", dtype="float64"),
            layers.Dense(3, dtype="float64"),
        ]
        ranked = keras.Sequential([keras.Input((7, 5, 2), dtype="float64"), *shared])
        flat = keras.Sequential([keras.Input((2,), dtype="float64"), *shared])
        x, y = RNG.normal(size=(2, 7, 5, 2)), case.targets(RNG, (2, 7, 5, 3))
        loss = case.make()
        high = factors(ranked, loss, x, y, fisher)
        low = factors(flat, loss, x.reshape(70, 2), y.reshape(70, *y.shape[3:]), fisher)
        for (a, g), (a_flat, g_flat) in zip(high, low):
            assert_close(a, a_flat)
            assert_close(g, g_flat)

    @pytest.mark.parametrize("name", ["mse", "bce-logits"])
    def test_exact_has_no_cross_terms_between_positions(self, name):
        """One example, outputs at several positions of which each depends on all inputs."""
        case = LOSS[name]
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,), dtype="float64"),
                layers.Dense(8, "tanh", dtype="float64", bias_initializer="random_normal"),
                layers.Reshape((4, 2), dtype="float64"),
            ]
        )
        x, y = RNG.normal(size=(1, 3)), case.targets(RNG, (1, 4, 2))
        loss = case.make()
        (a, g), *_ = factors(model, loss, x)
        assert_close(kron(a, g), layer_block(model, loss, x, y, model.layers[0]))

    def test_expand_is_wrong_where_the_loss_pools(self):
        """The negative half of 11a: before pooling, "expand" is another matrix."""
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((8, 5), dtype="float64"),
                layers.Dense(3, dtype="float64"),
                layers.GlobalAveragePooling1D(dtype="float64"),
            ]
        )
        x, y = RNG.normal(size=(4, 8, 5)), RNG.normal(size=(4, 3))
        loss = LOSS["mse"].make()
        (a, g), *_ = factors(model, loss, x)
        block = layer_block(model, loss, x, y, model.layers[0])
        assert relative_difference(kron(a, g), block) > 0.1


class TestProbabilityOutputs:
    """Outputs that are probabilities without logits that Keras knows of."""

    @pytest.mark.parametrize(
        "link, loss_class, targets",
        [
            (lambda z: tf.exp(z) / tf.reduce_sum(tf.exp(z), -1, keepdims=True), CCE, one_hot),
            (lambda z: 1 / (1 + tf.exp(-z)), BCE, lambda rng, shape: rng.random(shape).round()),
        ],
        ids=["softmax", "sigmoid"],
    )
    def test_equals_ggn_of_logits(self, link, loss_class, targets):
        keras.utils.set_random_seed(0)
        model = mlp((3, 4))
        loss = loss_class(dtype="float64")
        x, y = RNG.normal(size=(1, 3)), targets(RNG, (1, 4))
        block = layer_block(
            model, loss, x, y, model.layers[0], logits_of=lambda m: lambda x, training: m(x)
        )
        probabilities = keras.Sequential(
            [
                keras.Input((3,), dtype="float64"),
                *model.layers,
                layers.Lambda(link, dtype="float64"),
            ]
        )
        (a, g), *_ = factors(probabilities, loss, x)
        assert_close(kron(a, g), block)

    def test_from_logits_on_softmax_outputs_follows_keras(self):
        """Keras goes back to the logits and warns; so does the Fisher matrix."""
        case = LOSS["cce-softmax"]
        model = mlp((3, 4), None, case)
        loss = CCE(from_logits=True, dtype="float64")
        x = RNG.normal(size=(2, 3))
        expected = factors(model, case.make(), x)[0]
        actual = factors(model, loss, x)[0]
        assert_close(actual[1], expected[1])


def test_squared_loss_ignores_the_activation():
    """MSE on sigmoid outputs is a normal distribution of the outputs, not of their logits."""
    case = LOSS["bce-sigmoid"]
    model = mlp((3, 2), None, case)
    x, y = RNG.normal(size=(1, 3)), real(RNG, (1, 2))
    loss = MSE(dtype="float64")
    (a, g), *_ = factors(model, loss, x)
    assert_close(kron(a, g), layer_block(model, loss, x, y, model.layers[0]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
def test_sampled_factors_of_a_part_stand_for_the_whole_batch(reduction, weighted, monkeypatch):
    """On a batch that repeats its first quarter, with the draws replaced by what does not vary."""
    monkeypatch.setattr(Likelihood, "sampled_vector", lambda self, f, seed: self.root_column(f, 0))
    monkeypatch.setattr(scored_pass, "places_of", first_places)
    rng = np.random.default_rng(2)
    model, loss = mlp((4, 5, 3)), keras.losses.MeanSquaredError(reduction, dtype="float64")
    x, weights = np.tile(rng.normal(size=(3, 4)), (4, 1)), np.tile(rng.uniform(1, 2, 3), 4)
    results = []
    for part in (
        BatchPart(0.25),
        BatchPart(0.25, min_rows=6),
        BatchPart(0.25, min_examples=6),
        WHOLE,
    ):
        monkeypatch.setattr(statistics, "SAMPLED_PART", part)
        sample_weight = weights if weighted else None
        results.append(factors(model, loss, x, fisher="sampled", sample_weight=sample_weight))
    for layer in zip(*results):
        for part in layer[:3]:
            assert_close(part.input_factor, layer[3].input_factor)
            assert_close(part.output_factor, layer[3].output_factor)
    monkeypatch.setattr(statistics, "SAMPLED_PART", BatchPart(0.25))
    other = factors(model, loss, np.r_[2 * x[:3], x[3:]], fisher="sampled")
    assert relative_difference(other[0].input_factor, results[3][0].input_factor) > 0.1


@pytest.mark.parametrize("part", [BatchPart(0.5), BatchPart(0.1, min_rows=7), BatchPart(0.1)])
def test_parts_are_drawn_at_random(part):
    """Without repetition, others for another seed, and each example as often in the long run."""
    coefficients = [tf.ones([10], tf.float64)]
    draws = [batch_part.places_of(part, coefficients, (0, i)).numpy() for i in range(400)]
    (count,) = {len(places) for places in draws}
    assert count == int(part.examples(tf.constant([10])))
    assert all(len(set(places)) == count for places in draws)
    shares = np.bincount(np.concatenate(draws), minlength=10) / 400
    np.testing.assert_allclose(shares, count / 10, atol=0.1)  # Four standard deviations.


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 64), 8), ((32, 2), 16), ((32,), 32), ((128, 64), 32), ((6, 64), 6)],
)
def test_rows_of_a_part_are_examples_times_positions(shape, expected):
    part = BatchPart(0.25, min_rows=32, min_examples=8)
    assert int(part.examples(tf.constant(shape))) == expected
