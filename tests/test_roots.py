"""Roots of damped inverses: exact moving averages without a factorisation, in few digits too."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_kfac.math import roots
from keras_kfac.math.inverses import FactoredInverse, RootInverse
from keras_kfac.math.kronecker import mean_eigenvalue
from keras_kfac.math.linalg import spd_inverse
from keras_kfac.math.roots import DampedRoot, whitened
from keras_kfac.math.structure import Structure
from tests.reference import assert_close, relative_difference

SHAPES = {
    "whole": ((6, 6), (4, 4)),
    "diagonal": ((6,), (4, 4)),
    "numbers": ((1, 1), (4, 4)),
    "groups": ((3, 5, 5), (3, 2, 2)),
    "blocks": ((2, 1, 3, 3), (1, 2, 4, 4)),
}


def random_factor(rng, shape, scale=1.0):
    """Of a few examples only: singular."""
    if len(shape) == 1:
        return tf.constant(scale * rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.7))
    rows = rng.normal(size=(*shape[:-2], shape[-1] - 1 or 1, shape[-1]))
    return tf.constant(scale * np.swapaxes(rows, -1, -2) @ rows)


def spectrum(size, power=2.0, seed=0):
    """Eigenvalues that fall as a power, and random eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return np.arange(1.0, size + 1) ** -power, basis


def dense(values, basis):
    return basis * values @ basis.T


def batches(values, basis, count, rows=32):
    rng = np.random.default_rng(1)
    for _ in range(count):
        x = rng.normal(size=(rows, len(values))) * np.sqrt(values) @ basis.T
        yield x.T @ x / rows


def squares(root):
    """`K Kᵀ`."""
    root = np.asarray(root, np.float64)
    return root**2 if root.ndim == 1 else root @ np.swapaxes(root, -1, -2)


def condition(root):
    """That of `K Kᵀ`, `[...]`."""
    root = np.asarray(root)
    return np.linalg.cond(np.diag(root) if root.ndim == 1 else root) ** 2


class TestRootInverse:
    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    def test_is_the_damped_inverse_of_moving_averages(self, shapes):
        """At every step, whatever becomes of the damping, and of the scale of the statistics."""
        rng = np.random.default_rng(0)
        start = RootInverse.start(*shapes)
        actual = RootInverse(*(initial(shape, tf.float64) for shape, initial in start))
        averages = [tf.zeros(shape, tf.float64) for shape in shapes]
        for index, damping in enumerate((1.0, 1e-3, 1e-2, 1e2, 1e-1)):
            share, scale = tf.constant(0.3 if index else 1.0, tf.float64), 10.0 ** (index - 2)
            factors = [random_factor(rng, shape, scale) for shape in shapes]
            averages = [(1 - share) * a + share * f for a, f in zip(averages, factors)]
            actual = actual.including(factors, [share] * 2, is_first=index == 0)
            actual = actual.damped([mean_eigenvalue(a) for a in averages], damping)
            expected = FactoredInverse.of(*averages, tf.constant(damping, tf.float64))
            assert_close(squares(actual.input_root), expected.input_inverse, 1e-9)
            assert_close(squares(actual.output_root), expected.output_inverse, 1e-9)

    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    def test_works_as_the_inverse_does(self, shapes):
        rng = np.random.default_rng(0)
        factors, others = ([random_factor(rng, shape) for shape in shapes] for _ in range(2))
        pairs = [
            [kind.of(*f, tf.constant(0.1, tf.float64)) for f in (factors, others)]
            for kind in (RootInverse, FactoredInverse)
        ]
        (root, other_root), (plain, other_plain) = pairs
        leading = tuple(map(max, zip(shapes[0][:-2], shapes[1][:-2])))
        gradient = tf.constant(rng.normal(size=(*leading, shapes[0][-1], shapes[1][-1])))
        assert_close(root.precondition(gradient), plain.precondition(gradient), 1e-9)
        product = root.inner_product(other_root)
        assert_close(product, plain.inner_product(other_plain), 1e-9)
        true = np.max(condition(root.input_root) * condition(root.output_root))
        assert true <= float(root.condition_number) < 30 * true

    def test_a_dead_layer_stays_finite_and_comes_to_life(self):
        rng = np.random.default_rng(0)
        a, g, zero = (
            random_factor(rng, (3, 3)),
            random_factor(rng, (2, 2)),
            tf.zeros([2, 2], tf.float64),
        )
        start = RootInverse(
            *(f(shape, tf.float64) for shape, f in RootInverse.start((3, 3), (2, 2)))
        )
        inverse = start.including([a, zero], [tf.constant(1.0)] * 2, is_first=True)
        inverse = inverse.damped([mean_eigenvalue(f) for f in (a, zero)], 0.25)
        assert_close(squares(inverse.output_root), 2 * np.eye(2))
        inverse = inverse.including([a, g], [tf.constant(0.5, tf.float64)] * 2, is_first=False)
        inverse = inverse.damped([mean_eigenvalue(f) for f in (a, 0.5 * g)], 0.25)
        expected = FactoredInverse.of(a, 0.5 * g, tf.constant(0.25, tf.float64))
        assert_close(squares(inverse.output_root), expected.output_inverse, 1e-9)


class TestStep:
    """The step of Lin et al. is the first of the iteration."""

    def setup_method(self):
        values, basis = spectrum(12)
        self.damping = tf.constant(0.05, tf.float64)
        self.root = tf.constant(dense((values + 0.05) ** -0.5, basis))
        (new,) = batches(values, basis, 1)
        self.factor = tf.constant(new)

    def gram(self, factor):
        damped = factor + self.damping * tf.eye(12, dtype=tf.float64)
        return tf.transpose(self.root) @ damped @ self.root

    def published(self, share, factor):
        """`K (I - w/2 (Kᵀ (Â + δ I) K - I))`."""
        rest = self.gram(factor) - tf.eye(12, dtype=tf.float64)
        return self.root @ (tf.eye(12, dtype=tf.float64) - share / 2 * rest)

    def test_differs_from_the_published_one_by_the_second_order(self):
        differences = []
        for share in (0.02, 0.01):
            exact = DampedRoot(self.root, self.damping).including(self.factor, share)
            published = squares(self.published(share, self.factor))
            differences.append(relative_difference(published, squares(exact.root)))
        assert 0 < differences[1] < differences[0] < 0.05
        assert differences[0] / differences[1] == pytest.approx(4, rel=0.1)

    def test_does_not_diverge_where_the_published_one_does(self):
        """A batch of activities a hundred times as large."""
        factor, share = 1e4 * self.factor, 0.5
        published = self.published(share, factor)
        error = tf.transpose(published) @ (factor * share) @ published
        assert np.linalg.norm(error, 2) > 1e6
        root = DampedRoot(self.root, self.damping)
        expected = spd_inverse(
            (1 - share) * spd_inverse(tf.constant(squares(self.root)))
            + share * (factor + self.damping * tf.eye(12, dtype=tf.float64))
        )
        assert_close(squares(root.including(factor, share).root), expected, 1e-9)


class TestWhitened:
    def test_comes_nearer_with_every_step(self, monkeypatch):
        values, basis = spectrum(20)
        gram = dense(values + 1e-4, basis)
        monkeypatch.setattr(roots, "_FAILED", np.inf)
        errors = []
        for steps in range(12):
            monkeypatch.setattr(roots, "_MAX_STEPS", steps)
            root = roots._iterated(
                tf.eye(20, batch_shape=[1], dtype=tf.float64), tf.constant(gram[None])
            )
            errors.append(np.linalg.norm(root[0].numpy().T @ gram @ root[0] - np.eye(20), 2))
        assert all(after < before for before, after in itertools.pairwise(errors))
        assert errors[-1] < 1e-12

    @pytest.mark.parametrize("power", [1.0, 2.0])
    @pytest.mark.parametrize("damping", [1e-1, 1e-3])
    def test_few_steps_do(self, monkeypatch, power, damping):
        """Eight for the first batch; four where it counts for a twentieth, in float32."""
        values, basis = spectrum(60, power)
        damping = damping * values.mean()
        (factor,) = batches(values, basis, 1, rows=64)
        known = dense((values + damping) ** -0.5, basis)
        share = 0.05
        update = (1 - share) * np.eye(60) + share * known @ (factor + damping * np.eye(60)) @ known
        first = factor + np.trace(factor) / 60 * np.eye(60)
        for gram, steps in ((first, 8), (update, 4)):
            monkeypatch.setattr(roots, "_MAX_STEPS", steps)
            one = tf.eye(60, batch_shape=[1])
            root = roots._iterated(one, tf.constant(gram[None], tf.float32))[0].numpy()
            assert np.linalg.norm(root.T @ gram @ root - np.eye(60), 2) < 1e-4

    @pytest.mark.parametrize("smallest", [0.0, -1e-3, np.nan])
    def test_what_is_not_positive_definite_fails(self, smallest):
        values, basis = spectrum(5)
        values[-1] = smallest
        assert np.isnan(
            whitened(tf.eye(5, dtype=tf.float64), tf.constant(dense(values, basis)))
        ).all()


class TestPrecision:
    """What float32 and bfloat16 make of many updates; the reference is in float64."""

    DAMPING, SIZE, SHARE = 1e-4, 32, 0.05

    def run(self, dtype, count):
        """The root after so many updates, kept in a type, and the exact average."""
        values, basis = spectrum(self.SIZE, power=3.0)
        state = DampedRoot(tf.eye(self.SIZE, dtype=dtype), tf.ones((), dtype))
        average = np.zeros([self.SIZE, self.SIZE])
        for index, factor in enumerate(batches(values, basis, count)):
            share = max(self.SHARE, 1 / (index + 1))
            average += share * (factor - average)
            new = tf.constant(factor, tf.float32)
            state = state.including(new, tf.constant(share), is_first=index == 0)
            state = state.damped(tf.constant(self.DAMPING))
        return state, average + float(state.damping) * np.eye(self.SIZE)

    @pytest.mark.parametrize(("dtype", "margin"), [(tf.float32, 1e-4), (tf.bfloat16, 0.15)])
    def test_many_updates(self, dtype, margin):
        """Errors don't add up; bfloat16 has 8 bits. In the Frobenius norm; seeds are fixed."""
        for count in (5, 100):
            state, expected = self.run(dtype, count)
            assert state.root.dtype == dtype and float(state.damping) < 2 * self.DAMPING
            assert np.isfinite(np.asarray(state.root, np.float64)).all()
            difference = relative_difference(squares(state.root), np.linalg.inv(expected))
            assert difference < margin

    def test_the_factor_in_bfloat16_has_no_inverse(self):
        """Rounded once, with all that follows in float32, it is no longer positive definite."""
        _, exact = self.run(tf.float32, 100)
        assert np.isfinite(spd_inverse(tf.constant(exact, tf.float32))).all()
        rounded = tf.cast(tf.cast(tf.constant(exact, tf.float32), tf.bfloat16), tf.float32)
        assert np.linalg.eigvalsh(rounded).min() < 0
        assert np.isnan(spd_inverse(rounded)).all()

    def test_tensorflow_factorises_nothing_in_bfloat16(self):
        one = tf.eye(2, dtype=tf.bfloat16)
        with pytest.raises(tf.errors.InvalidArgumentError, match="bfloat16 is not in the list"):
            FactoredInverse.of(one, one, tf.constant(0.1))
        half = RootInverse.of(one, one, tf.constant(0.25))
        assert_close(np.float64(half.input_root), np.eye(2) / np.sqrt(1.5), 1e-2)

    def test_the_damping_falls_no_further_than_digits_go(self):
        values, basis = spectrum(self.SIZE)
        state = DampedRoot(tf.eye(self.SIZE), tf.constant(1.0))
        state = state.including(tf.constant(dense(values, basis), tf.float32), 1.0, is_first=True)
        falling = [float(state.damping)]
        for _ in range(3):
            state = state.damped(tf.constant(0.0))
            falling.append(float(state.damping))
            assert np.isfinite(state.root).all()
        ratios = [after / before for before, after in itertools.pairwise(falling)]
        np.testing.assert_allclose(ratios, 16 * 2.0**-23, rtol=1e-6)


def test_factors_are_found_again():
    """For reports; what the last block has too much is not of the factor."""
    rng, structure = np.random.default_rng(0), Structure(5, blocks=2)
    factor = structure.filled(random_factor(rng, (2, 3, 3)))
    factor = structure.filled(structure.emptied(factor * structure._belongs(tf.float64)[:, None]))
    root = DampedRoot(tf.eye(3, batch_shape=[2, 1], dtype=tf.float64), tf.ones([1, 1], tf.float64))
    root = root.including(tf.reshape(factor, [2, 1, 3, 3]), 1.0, is_first=True)
    assert_close(root.inverted()[:, 0], factor, 1e-9)
    assert_close(structure.emptied(root.inverted()), structure.emptied(factor), 1e-9)
