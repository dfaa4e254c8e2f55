"""The pure mathematics against slow references."""

import fractions
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kfac.introspection.convolutions import ConvAdapter
from keras_kfac.math import (
    factors,
    kronecker,
    linalg,
    patches,
    step_control,
    structure,
    update_times,
)
from keras_kfac.math.inverses import ExactInverse, FactoredInverse, relative_change
from keras_kfac.math.linalg import left_product, right_product
from keras_kfac.math.moving_average import weighted_average
from keras_kfac.math.structure import Structure
from tests.reference import assert_close

RNG = np.random.default_rng(1)

CONVOLUTIONS = [
    {"padding": padding, **options}
    for padding, options in itertools.product(
        ["valid", "same"],
        [
            {"kernel_size": 3},
            {"kernel_size": (2, 3), "strides": 2},
            {"kernel_size": 4, "strides": 3},
            {"kernel_size": 3, "dilation_rate": 2},
            {"kernel_size": (4, 3), "dilation_rate": 3},
            {"kernel_size": 2, "dilation_rate": 2},
            {"kernel_size": 1},
        ],
    )
]


def conv_layer(channels=3, filters=4, **options):
    layer = keras.layers.Conv2D(
        filters, dtype="float64", bias_initializer="random_normal", **options
    )
    layer.build((None, 13, 12, channels))
    return layer


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
class TestPatches:
    def test_input_factor_against_loops(self, options):
        """Identity 2: every location one by one; the corner of the bias is 1."""
        layer, x = conv_layer(**options), RNG.normal(size=(2, 13, 12, 3))
        adapter = ConvAdapter(layer, lambda v: True)
        moment, weight = factors.input_moment(adapter.input_rows(tf.constant(x)))
        expected = explicit_input_factor(x, layer)
        assert_close(moment / weight, expected, 1e-12)
        assert expected[-1, -1] == 1.0


def test_rows_that_lost_their_shape_have_the_same_factor():
    rows = tf.constant(RNG.normal(size=(2, 3, 4)))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None], tf.float64)])
    def without_shape(rows):
        return factors.output_factor(rows)

    assert_close(without_shape(rows), factors.output_factor(rows), 1e-12)


def explicit_input_factor(x, layer):
    """Double loop over output locations, padding as TensorFlow documents it."""
    out_height, out_width = layer.compute_output_shape(x.shape)[1:3]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.strides, layer.dilation_rate
    if layer.padding == "same":
        pads = []
        for size, out, k, s, d in [
            (x.shape[1], out_height, kh, sh, dh),
            (x.shape[2], out_width, kw, sw, dw),
        ]:
            total = max((out - 1) * s + (k - 1) * d + 1 - size, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
    total = 0
    for image, i, j in itertools.product(x, range(out_height), range(out_width)):
        taps = [
            image[i * sh + a * dh, j * sw + b * dw]
            for a, b in itertools.product(range(kh), range(kw))
        ]
        row = np.append(np.concatenate(taps), 1.0)
        total = total + np.outer(row, row)
    return total / (len(x) * out_height * out_width)


@pytest.mark.parametrize("groups", [1, 3])
def test_channels_first_gives_the_same_rows(groups):
    """Without running the convolution, which not every build of TensorFlow can on a CPU."""
    options = {"kernel_size": (2, 3), "strides": (1, 2), "groups": groups, "padding": "same"}
    last, first = (
        keras.layers.Conv2D(6, data_format=data_format, dtype="float64", **options)
        for data_format in ("channels_last", "channels_first")
    )
    last.build((None, 5, 7, 3))
    first.build((None, 3, 5, 7))
    x, y = RNG.normal(size=(2, 5, 7, 3)), RNG.normal(size=(2, 5, 4, 6))
    adapters = [ConvAdapter(layer, lambda v: True) for layer in (last, first)]
    for method, tensor in [("input_rows", x), ("output_rows", y)]:
        transposed = np.transpose(tensor, [0, 3, 1, 2])
        rows = [
            getattr(adapter, method)(tf.constant(value))
            for adapter, value in zip(adapters, (tensor, transposed))
        ]
        np.testing.assert_array_equal(*rows)


def spd(size, rng=RNG, rank=None):
    root = rng.normal(size=(size, rank or 2 * size))
    return root @ root.T / root.shape[1]


class TestFactoredDamping:
    """Identity 16."""

    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 5), st.integers(2, 5), st.floats(1e-6, 1e3), st.floats(1e-3, 1e3))
    def test_excess_over_tikhonov(self, d_in, d_out, damping, scale):
        rng = np.random.default_rng(d_in + 10 * d_out)
        a, g = spd(d_in, rng), spd(d_out, rng)
        damped_a, damped_g = kronecker.factored_damping(
            tf.constant(a), tf.constant(g), tf.constant(damping, tf.float64)
        )
        pi = np.sqrt((np.trace(a) / d_in) / (np.trace(g) / d_out))
        root = np.sqrt(damping)
        excess = np.kron(damped_a, damped_g) - np.kron(a, g) - damping * np.eye(d_in * d_out)
        expected = pi * root * np.kron(np.eye(d_in), g) + root / pi * np.kron(a, np.eye(d_out))
        assert_close(excess, expected, 1e-10)
        assert np.linalg.eigvalsh(excess).min() > -1e-12 * np.abs(excess).max()
        moved_a, moved_g = kronecker.factored_damping(
            tf.constant(scale * a), tf.constant(g / scale), tf.constant(damping, tf.float64)
        )
        assert_close(np.kron(moved_a, moved_g), np.kron(damped_a, damped_g))

    def test_identity_factors_are_not_tikhonov(self):
        a, g = kronecker.factored_damping(
            4 * tf.eye(2, dtype=tf.float64), 9 * tf.eye(3, dtype=tf.float64), 0.25
        )
        assert_close(np.kron(a, g), (6 + 0.5) ** 2 * np.eye(6))

    @pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 1)])
    def test_scalar_factor_leaves_tikhonov(self, shape):
        a, g = spd(shape[0]), spd(shape[1])
        damped = kronecker.factored_damping(tf.constant(a), tf.constant(g), 0.3)
        assert_close(np.kron(*damped), np.kron(a, g) + 0.3 * np.eye(max(shape)))

    @pytest.mark.parametrize("zero", ["input", "output", "both"])
    @pytest.mark.parametrize("size", [1, 3])
    def test_dead_layer_is_tikhonov_alone(self, zero, size):
        a = np.zeros((size, size)) if zero != "output" else spd(size)
        g = np.zeros((2, 2)) if zero != "input" else spd(2)
        damped = kronecker.factored_damping(tf.constant(a), tf.constant(g), 0.3)
        assert_close(np.kron(*damped), 0.3 * np.eye(2 * size))

    def test_groups_are_damped_one_by_one(self):
        a, g = np.stack([spd(3), 100 * spd(3)]), np.stack([spd(2), np.zeros((2, 2))])
        together = kronecker.factored_damping(tf.constant(a), tf.constant(g), 0.1)
        for group in range(2):
            alone = kronecker.factored_damping(tf.constant(a[group]), tf.constant(g[group]), 0.1)
            for both, one in zip(together, alone):
                np.testing.assert_array_equal(both[group], one)


class TestPreconditioning:
    def test_is_the_inverse_of_the_kronecker_product(self):
        a, g, gradient = spd(4), spd(3), RNG.normal(size=(4, 3))
        inverses = linalg.spd_inverse(tf.constant(a)), linalg.spd_inverse(tf.constant(g))
        direction = kronecker.precondition(tf.constant(gradient), *inverses)
        expected = np.linalg.solve(np.kron(a, g), gradient.ravel())
        assert_close(np.ravel(direction), expected, 1e-10)
        # The other order of the factors is the wrong matrix for row-major weights.
        wrong = np.linalg.solve(np.kron(g, a), gradient.ravel())
        assert np.abs(np.ravel(direction) - wrong).max() > 1e-2 * np.abs(wrong).max()

    @pytest.mark.parametrize("size", [257, 600])
    def test_inverse_by_blocks(self, size):
        root = np.random.default_rng(1).normal(size=(2, size, size + 50))
        matrix = root @ np.swapaxes(root, 1, 2) + np.eye(size)
        inverse = linalg.spd_inverse(tf.constant(matrix)).numpy()
        assert_close(inverse, np.linalg.inv(matrix))
        assert_close(inverse, np.swapaxes(inverse, 1, 2))
        matrix[1, -1, -1] = -1.0  # Not positive definite, in the last block only.
        inverse = linalg.spd_inverse(tf.constant(matrix)).numpy()
        assert np.isfinite(inverse[0]).all() and np.isnan(inverse[1]).all()

    def test_inverse_is_symmetric_and_exact(self):
        matrix = np.stack([spd(20), spd(20)])
        inverse = linalg.spd_inverse(tf.constant(matrix)).numpy()
        assert_close(inverse, np.swapaxes(inverse, -1, -2))
        assert_close(inverse @ matrix, np.stack([np.eye(20)] * 2), 1e-10)

    def test_inverse_fails_by_nan_for_the_failing_matrix_only(self):
        matrix = np.stack([spd(3), -np.eye(3), np.zeros((3, 3)), np.full((3, 3), np.nan)])
        inverse = linalg.spd_inverse(tf.constant(matrix)).numpy()
        assert np.isfinite(inverse[0]).all()
        assert np.isnan(inverse[1:]).all()


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (3, 600), (2, 2, 600)])
def test_inner_products(shape):
    first, second = (tf.constant(RNG.normal(size=shape)) for _ in range(2))
    assert_close(linalg.inner_product(first, second), np.sum(first * second), 1e-14)
    assert_close(linalg.inner_product(first, first), np.sum(np.square(first)), 1e-14)


@pytest.mark.parametrize("blocks", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("transpose", [False, True])
def test_products_of_blocks(blocks, transpose):
    """In float32, which has kernels of its own: one of them writes where it should not."""
    k, m = blocks
    gradient = RNG.normal(size=(k, m, 40, 20)).astype("float32")
    left, right = (
        RNG.normal(size=shape).astype("float32") for shape in ((k, 1, 40, 40), (1, m, 20, 20))
    )
    first, second = (np.swapaxes(x, -1, -2) if transpose else x for x in (left, right))
    for _ in range(5):
        ours = left_product(tf.constant(left), tf.constant(gradient), transpose)
        assert_close(ours, first @ gradient, 1e-5)
        ours = right_product(tf.constant(gradient), tf.constant(right), transpose)
        assert_close(ours, gradient @ second, 1e-5)


@pytest.mark.parametrize("blocks", [(2, 1), (1, 2), (2, 2)])
def test_rows_of_blocks_are_added_up(blocks):
    """In a graph and in float32, as above: TensorFlow leaves out transpositions."""
    shapes = [(blocks[0], 1, 393, 128), (1, blocks[1], 128, 256)]
    columns, rows = (RNG.normal(size=shape).astype("float32") for shape in shapes)

    @tf.function
    def added_up(columns, rows):
        return linalg.RowPairs(tf.linalg.matrix_transpose(columns), rows).sum()

    for _ in range(5):
        assert_close(added_up(tf.constant(columns), tf.constant(rows)), columns @ rows, 1e-5)


class TestBlocks:
    """Factors in blocks are matrices that are zero outside of these."""

    @pytest.mark.parametrize(
        ("kind", "sizes"),
        [(kind, sizes) for kind in (FactoredInverse, ExactInverse) for sizes in ((6, 9), (5, 7))],
    )
    @pytest.mark.parametrize("blocks", [(2, 1), (1, 3), (2, 3)])
    def test_are_inverted_as_matrices(self, kind, sizes, blocks):
        structures = tuple(Structure(d, k) for d, k in zip(sizes, blocks))
        rows = [tf.constant(RNG.normal(size=(20, 1, d))) for d in sizes]
        parts = [factors.output_factor(r, s) for r, s in zip(rows, structures)]
        assert [part.shape for part in parts] == [s.shape for s in structures]
        matrices = [
            factors.output_factor(r) * np.equal.outer(*[np.arange(s.size) // s.block_size] * 2)
            for r, s in zip(rows, structures)
        ]
        gradient = tf.constant(RNG.normal(size=sizes))

        def preconditioned(inverse):
            result = inverse.precondition(structure.to_blocks(gradient, structures))
            return structure.from_blocks(result, structures)

        filled = [s.filled(part) for s, part in zip(structures, parts)]
        inverses = [
            (kind.of(*structure.aligned(filled, structures), damping), kind.of(*matrices, damping))
            for damping in (0.3, 0.0)
        ]
        for inverse, expected in inverses:
            assert_close(preconditioned(inverse), expected.precondition(gradient), 1e-12)
        pairs = linalg.RowPairs(*(tf.squeeze(r, axis=1) for r in rows))
        inverse, expected = inverses[0]
        result = inverse.precondition(structure.to_blocks(pairs, structures))
        result = structure.from_blocks(result, structures)
        if isinstance(result, linalg.RowPairs):
            result = result.sum()
        assert_close(result, expected.precondition(pairs.sum()), 1e-12)
        changes = [relative_change(*pair) for pair in zip(*inverses)]
        if all(s.size == s.blocks * s.block_size for s in structures):
            assert_close(*changes, 1e-10)
        shapes = structure.aligned_shapes([tuple(part.shape) for part in parts], structures)
        start = [f(shape, tf.float64) for shape, f in kind.start(*shapes)]
        np.testing.assert_array_equal(preconditioned(kind(*start)), gradient)


class TestMovingAverage:
    """Identity 23."""

    def run(self, values, weights, decay):
        mean, weight = tf.constant(0.0, tf.float64), tf.constant(0.0, tf.float64)
        for value, new_weight in zip(values, weights):
            mean, weight = weighted_average(
                mean, weight, *(tf.constant(v, tf.float64) for v in (value, new_weight)), decay
            )
            yield float(mean)

    def test_constant_stream_is_a_fixed_point_from_the_first_value(self):
        values = np.full(20, 3.7)
        np.testing.assert_allclose(list(self.run(values, np.ones(20), 0.9)), 3.7, rtol=1e-14)

    def test_closed_form(self):
        values, weights, decay = RNG.normal(size=12), RNG.uniform(1, 5, size=12), 0.8
        powers = decay ** np.arange(11, -1, -1)
        expected = (powers * weights * values).sum() / (powers * weights).sum()
        assert next(iter(self.run(values, weights, decay))) == pytest.approx(values[0], rel=1e-14)
        assert list(self.run(values, weights, decay))[-1] == pytest.approx(expected, rel=1e-12)

    def test_without_decay_it_is_the_plain_mean(self):
        values = RNG.normal(size=9)
        *_, last = self.run(values, np.ones(9), 1.0)
        assert last == pytest.approx(values.mean(), rel=1e-12)

    def test_weight_zero_changes_nothing(self):
        results = list(self.run([1.0, 5.0], [2.0, 0.0], 0.9))
        assert results[0] == results[1]
        assert next(iter(self.run([5.0], [0.0], 0.9))) == 0.0

    @pytest.mark.parametrize("sizes", [[1] * 13, [8, 5], [6, 7]])
    def test_partition_of_a_batch(self, sizes):
        """Identity 7: weighted by their counts, parts give the factor of the whole."""
        rows = RNG.normal(size=(13, 2, 4))
        moment, weight = factors.input_moment(tf.constant(rows))
        mean = total = tf.constant(0.0, tf.float64)
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            part_moment, part_weight = factors.input_moment(tf.constant(part))
            count = tf.constant(len(part), tf.float64)
            mean, total = weighted_average(mean, total, part_moment / part_weight, count, 1.0)
        assert_close(mean, moment / weight, 1e-12)


def interval(step):
    """`k` with `1.25ᵏ <= step < 1.25ᵏ⁺¹`, in exact arithmetic."""
    ratio, k = fractions.Fraction(5, 4), 0
    while ratio ** (k + 1) <= step:
        k += 1
    return k


class TestUpdateTimes:
    def due(self, period, steps=700, turn=0.0):
        return [s for s in range(steps) if bool(update_times.is_due(tf.constant(s), period, turn))]

    @pytest.mark.parametrize("period", [1, 2, 5, 20, 100])
    def test_are_the_first_of_growing_intervals_then_multiples_of_the_period(self, period):
        early = [s for s in range(2, 4 * period) if interval(s) != interval(s - 1)]
        early = [s for s in (0, 1) if s < 4 * period] + early
        late = [s for s in range(4 * period, 700) if s % period == 0]
        assert self.due(period) == early + late

    @pytest.mark.parametrize("period", [1, 3, 20, 100])
    def test_gaps_are_at_most_a_quarter_of_the_steps_and_the_period(self, period):
        due = self.due(period)
        gaps = np.diff(due)
        assert np.all(gaps <= np.maximum(1, np.ceil(np.array(due[1:]) / 4)))
        assert np.all(gaps <= period)

    @pytest.mark.parametrize(("turn", "offset"), [(0.0, 0), (0.25, 5), (0.5, 10), (0.99, 19)])
    def test_turns_share_a_period_and_not_its_beginnings(self, turn, offset):
        due = self.due(20, turn=turn)
        assert [s for s in due if s < 80] == [s for s in self.due(20) if s < 80]
        assert [s for s in due if s >= 80] == list(range(80 + offset, 700, 20))
        assert np.diff(due).max() <= 29  # of them up to 9 because the first period is not begun

    def test_every_task_has_one_turn_and_no_turn_costs_much(self):
        costs = [int(cost) for cost in RNG.integers(1, 100, 30)]
        turns = update_times.in_turns(costs, 4)
        assert sorted(i for turn in turns for i in turn) == list(range(30))
        sums = [sum(costs[i] for i in turn) for turn in turns]
        assert max(sums) < 1.05 * sum(costs) / 4
        assert update_times.in_turns([1, 0], 4) == [[0], [1]]

    def test_gap_is_that_between_due_steps(self):
        due = np.array(self.due(20))
        gaps = np.array([float(update_times.gap(step, 20)) for step in due[:-1]])
        is_cut_short = due[1:] == 80  # There the multiples of the period begin.
        np.testing.assert_array_less(np.abs(np.diff(due) - gaps)[~is_cut_short], 1)

    def test_decay_makes_each_update_count_as_the_cube_of_its_step(self):
        mean, weight = tf.zeros(200, tf.float64), tf.zeros((), tf.float64)
        for step in range(200):
            decay = update_times.growing_decay(tf.constant(step, tf.int64), 1)
            new = tf.one_hot(step, 200, dtype=tf.float64)
            mean, weight = weighted_average(mean, weight, new, tf.ones_like(weight), decay)
        cubes = np.arange(1.0, 201) ** 3
        assert_close(mean, cubes / cubes.sum(), 1e-12)
        assert float(weight) == pytest.approx(200 / 4, rel=0.02)


class TestKLClip:
    """Identity 22."""

    @settings(max_examples=50, deadline=None)
    @given(st.floats(0, 1e6), st.floats(1e-6, 10), st.floats(1e-8, 1e3))
    def test_bounds_the_step(self, product, learning_rate, bound):
        scale = float(
            step_control.kl_clip_scale(tf.constant(product, tf.float64), learning_rate, bound)
        )
        before = learning_rate**2 * product
        after = before * scale**2
        if before > bound * (1 + 1e-9):
            assert after == pytest.approx(bound, rel=1e-9)
        elif before < bound * (1 - 1e-9):
            assert scale == 1.0

    @pytest.mark.parametrize("product", [0.0, -1e-12])
    def test_no_step_is_left_alone(self, product):
        assert float(step_control.kl_clip_scale(tf.constant(product), 0.1, 1e-3)) == 1.0


def test_python_floats_keep_their_digits():
    assert float(linalg.scalar(0.1, "float64")) == 0.1
    assert linalg.scalar(tf.constant(0.5), "float64").dtype == tf.float64


def test_patches_shape_is_static():
    rows = patches.extract(tf.zeros([2, 5, 5, 3]), (2, 2), (1, 1), "valid", (1, 1))
    assert rows.shape == (2, 16, 12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "padding"),
    [((9,), "causal"), *itertools.product([(9,), (7, 8), (5, 6, 7)], ["valid", "same"])],
)
def test_skipped_patches_leave_every_other_position(sizes, padding, stride):
    images = tf.constant(RNG.normal(size=(2, *sizes, 3)))
    each = [[number] * len(sizes) for number in (3, stride, 1)]
    reach = 2 if padding == "valid" else 0
    places = [-(-(size - reach) // stride) for size in sizes]
    window, strides, dilation = each
    rows = patches.extract(images, window, strides, padding, dilation)
    expected = np.reshape(rows, [2, *places, -1])[:, *[slice(None, None, 2)] * len(sizes)]
    actual = patches.extract(images, window, strides, padding, dilation, skip=2)
    np.testing.assert_array_equal(actual, expected.reshape(2, -1, rows.shape[-1]))
