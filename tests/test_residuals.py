"""Exact natural gradients of sums of squares that are no Keras loss."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfac import natural_gradient
from keras_kfac.math.least_squares import natural_direction
from tests.reference import assert_close

RNG = np.random.default_rng(0)


def network(width=5):
    """A float64 network of a point in the plane."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(width, "tanh", dtype="float64")
    return keras.Sequential(
        [keras.Input((2,), dtype="float64"), hidden, keras.layers.Dense(1, dtype="float64")]
    )


def laplace(model):
    """Residuals of Laplace's equation at points, and of a boundary condition."""

    def inside(points):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(points)
            with tf.GradientTape() as inner:
                inner.watch(points)
                u = model(points)
            first = tf.unstack(inner.gradient(u, points), axis=1)
        second = [outer.gradient(f, points)[:, i] for i, f in enumerate(first)]
        return tf.add_n(second)

    return {"inside": inside, "boundary": lambda points: model(points) - 1.0}


def laplace_residuals(model, points):
    functions = laplace(model)
    where = {"inside": points, "boundary": points[:3]}
    return lambda: {name: function(where[name]) for name, function in functions.items()}


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


@pytest.mark.parametrize("count", [6, 40], ids=["fewer residuals than weights", "more"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_solves_the_damped_normal_equations(count, damping):
    """With a Jacobian of one derivative at a time, of a residual with second derivatives in it."""
    model, points = network(), tf.constant(RNG.normal(size=(count, 2)))
    residuals = laplace_residuals(model, points)
    found = natural_gradient(residuals, model.trainable_variables, damping)
    with tf.GradientTape(persistent=True) as tape:
        parts = [tf.reshape(part, [-1]) for part in tf.nest.flatten(residuals())]
        r = tf.concat(parts, axis=0)
    sources = [v.value for v in model.trainable_variables]
    each = tape.jacobian(
        r, sources, experimental_use_pfor=False, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    r = r.numpy()
    j = np.concatenate([np.reshape(part, [len(r), -1]) for part in each], axis=1)
    assert_close(found.loss, 0.5 * np.sum(np.square(r)))
    assert_close(flat(found.gradients), j.T @ r)
    if damping:
        matrix = j.T @ j + damping * np.eye(j.shape[1])
        assert_close(flat(found.directions), np.linalg.solve(matrix, j.T @ r), 1e-8)
    else:  # The same residuals change, by as much as weights can change them.
        assert_close(j @ flat(found.directions), j @ np.linalg.pinv(j) @ r, 1e-5)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_direction_is_that_of_the_pseudo_inverse(shape):
    j, r = RNG.normal(size=shape), RNG.normal(size=shape[0])
    j[:, 0] = j[:, 1]  # Two weights that do the same.
    expected = np.linalg.pinv(j) @ r
    assert_close(natural_direction(tf.constant(j), tf.constant(r)), expected)


def ill_conditioned(shape):
    """A matrix with singular values from 1 to 1e-11."""
    left, right = (np.linalg.qr(RNG.normal(size=(n, 12)))[0] for n in shape)
    return left * 10.0 ** -np.arange(12) @ right.T


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
class TestCutoff:
    @pytest.mark.parametrize("cutoff", [3e-3, 3e-10])
    def test_leaves_out_smaller_singular_values(self, shape, cutoff):
        j, r = ill_conditioned(shape), RNG.normal(size=shape[0])
        found = natural_direction(tf.constant(j), tf.constant(r), cutoff=cutoff)
        # The smallest singular value that is kept is known to eps / cutoff.
        assert_close(found, np.linalg.pinv(j, rcond=cutoff) @ r, 1e-15 / cutoff * 10)

    def test_without_one_keeps_what_products_resolve(self, shape):
        j, r = ill_conditioned(shape), RNG.normal(size=shape[0])
        found = natural_direction(tf.constant(j), tf.constant(r))
        resolved = (12 * np.finfo("float64").eps) ** 0.5
        assert_close(found, np.linalg.pinv(j, rcond=resolved) @ r, 0.1)

    def test_small_ones_are_damped_exactly(self, shape):
        j, r, damping = ill_conditioned(shape), RNG.normal(size=shape[0]), 1e-18
        found = natural_direction(tf.constant(j), tf.constant(r), damping, cutoff=0.0)
        u, s, vt = np.linalg.svd(j, full_matrices=False)
        expected = vt.T @ (s / (s**2 + damping) * (u.T @ r))
        assert_close(found, expected, 1e-4)


def test_one_step_solves_a_linear_problem():
    x, y = RNG.normal(size=(20, 3)), RNG.normal(size=20)
    w = tf.Variable(np.zeros(3))
    found = natural_gradient(lambda: tf.linalg.matvec(x, w) - y, [w])
    w.assign_sub(found.directions[0])
    assert_close(w, np.linalg.lstsq(x, y, rcond=None)[0])


@pytest.mark.parametrize("jit_compile", [pytest.param(False, marks=pytest.mark.slow), True])
def test_works_in_graphs_and_by_points(jit_compile):
    """One pass for all points finds what one for each residual does."""
    model, points = network(), tf.constant(RNG.normal(size=(12, 2)))
    residuals = laplace_residuals(model, points)
    variables = model.trainable_variables

    @tf.function(jit_compile=jit_compile)
    def compiled():
        where = {"inside": points, "boundary": points[:3]}
        return (
            natural_gradient(residuals, variables, 0.1),
            natural_gradient(laplace(model), variables, 0.1, points=where),
        )

    whole, by_points = compiled()
    # Structures are flattened by the order of their keys, here as there.
    assert_close(by_points.loss, whole.loss, 1e-12)
    assert_close(flat(by_points.gradients), flat(whole.gradients), 1e-12)
    assert_close(flat(by_points.directions), flat(whole.directions), 1e-10)
    eager = natural_gradient(residuals, variables, 0.1)
    # XLA's eigenvectors give the matrix back to eight digits.
    assert_close(flat(whole.directions), flat(eager.directions), 1e-5 if jit_compile else 1e-10)


def test_a_point_may_have_several_parts_and_residuals():
    """Also where the number of points is not known when the graph is made."""
    w, idle, v = (tf.Variable(RNG.normal(size=n)) for n in (3, 2, 4))
    x, y = tf.constant(RNG.normal(size=(9, 3))), tf.constant(RNG.normal(size=(9, 1, 4)))

    def fn(where):
        x, y = where
        across = tf.linalg.matvec(y, v)
        return across * tf.tanh(x @ w[:, None]), [across[:, 0] ** 2]

    whole = natural_gradient(lambda: fn((x, y)), [w, idle, v], 0.1)

    @tf.function(input_signature=[tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in (x, y)])
    def by_points_of(x, y):
        return natural_gradient(fn, [w, idle, v], 0.1, points=(x, y))

    by_points = by_points_of(x, y)
    assert_close(by_points.loss, whole.loss, 1e-12)
    assert_close(flat(by_points.gradients), flat(whole.gradients), 1e-12)
    assert_close(flat(by_points.directions), flat(whole.directions), 1e-10)
    np.testing.assert_allclose(by_points.directions[1], np.zeros(2), atol=1e-11)


def test_does_not_depend_on_how_the_network_is_written_down():
    """Invariance: weights `w = M v` of any invertible `M` move the same way; gradients do not."""
    m, x = RNG.normal(size=(3, 3)), RNG.normal(size=(8, 3))
    v = tf.Variable(RNG.normal(size=3))
    w = tf.Variable(m @ v.numpy())

    def residuals(weights):
        return tf.tanh(tf.linalg.matvec(x, weights)) - 0.5

    ours = natural_gradient(lambda: residuals(w), [w])
    theirs = natural_gradient(lambda: residuals(tf.linalg.matvec(m, v)), [v])
    assert_close(m @ theirs.directions[0].numpy(), ours.directions[0], 1e-9)
    assert np.abs(m @ theirs.gradients[0].numpy() - ours.gradients[0]).max() > 1e-2


def test_variables_that_residuals_do_not_depend_on_stay():
    w, idle = tf.Variable([1.0, 2.0]), tf.Variable([[3.0]])
    found = natural_gradient(lambda: w - 1.0, [w, idle])
    np.testing.assert_array_equal(found.directions[1], [[0.0]])
    np.testing.assert_allclose(found.directions[0], [0.0, 1.0], atol=1e-6)


def test_wrong_uses_are_refused():
    w = tf.Variable([1.0])
    with pytest.raises(ValueError, match=r"`variables` must not be empty. Received"):
        natural_gradient(lambda: w, [])
    two = [w, keras.Variable([1.0], dtype="float64")]
    with pytest.raises(ValueError, match=r"of one dtype: .*Received: .*'float32', 'float64'"):
        natural_gradient(lambda: w, two)
    with pytest.raises(ValueError, match=r"`damping` must be at least 0. Received: damping=-1"):
        natural_gradient(lambda: w, [w], damping=-1)
    for negative in (tf.constant(-1.0), tf.Variable(-1.0)):
        with pytest.raises(ValueError, match=r"`damping` must be at least 0. Received: .*-1.0"):
            natural_gradient(lambda: w, [w], damping=negative)
    with pytest.raises(ValueError, match=r"`cutoff` must be at least 0. Received: cutoff=-1"):
        natural_gradient(lambda: w, [w], cutoff=-1)
    with pytest.raises(ValueError, match=r"(?s)must have a part for each function of .* Received"):
        natural_gradient([lambda x: x, lambda x: x], [w], points=[tf.ones([3, 1])])
    with pytest.raises(TypeError, match=r"must be a function; .*Received: \[.*, points=None"):
        natural_gradient([lambda: w, lambda: w], [w])
    with pytest.raises(TypeError, match=r"must be a function; .*Received: 3, points=some"):
        natural_gradient([lambda x: x, 3], [w], points=[w, w])
    with pytest.raises(ValueError, match=r"must return residuals: .*Received: None"):
        natural_gradient(lambda: None, [w])
    with pytest.raises(ValueError, match=r"must return residuals: .*Received: \[.*None\]"):
        natural_gradient(lambda x: [x * w, None], [w], points=tf.ones([3, 1]))
    none = r"(?s)depend on none of the variables. `residual_fn` has to compute .* Received: "
    with pytest.raises(ValueError, match=none):
        natural_gradient(lambda: tf.constant([1.0]), [w])
    with pytest.raises(ValueError, match=none):
        natural_gradient(lambda x: x, [w], points=tf.ones([3, 1]))


def test_residuals_of_another_dtype_or_none_are_refused():
    w, other = tf.Variable([1.0]), tf.ones([3, 1], "float64")
    message = r"of the variables' dtype: .* Received: residuals of float64 for variables of float32"
    with pytest.raises(ValueError, match=message):
        natural_gradient(lambda: [w, tf.cast(w, "float64")], [w])
    with pytest.raises(ValueError, match=message):
        natural_gradient(lambda x: x * tf.cast(w, "float64"), [w], points=other)
    none = r"must return residuals. Received: tensors of shapes \[\(0,\), \(2, 0\)\]"
    with pytest.raises(ValueError, match=none):
        natural_gradient(lambda: [w[:0], tf.zeros([2, 0])], [w])
    with pytest.raises(ValueError, match=r"at least one point. Received: .* \[\(0, 1\)\]"):
        natural_gradient(lambda x: x * w, [w], points=tf.ones([0, 1]))
    some = natural_gradient([lambda x: x * w] * 2, [w], points=[tf.ones([0, 1]), tf.ones([2, 1])])
    np.testing.assert_allclose(some.loss, 1.0)


def test_loops_have_no_points():
    """Those of the function itself fail as they are; without `points` loops are as good as any."""
    w, x = tf.Variable([2.0]), tf.ones([3, 1])

    def cube(x):
        return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * w), (0, x))[1]

    message = r"Leave `points` out.* Received: residuals for which it fails with TypeError: `dtype`"
    with pytest.raises(ValueError, match=message):
        natural_gradient(cube, [w], points=x)
    np.testing.assert_allclose(natural_gradient(lambda: cube(x), [w]).gradients[0], [3 * 8 * 12])

    def broken(x):
        raise TypeError("of the function")

    with pytest.raises(TypeError, match="of the function"):
        natural_gradient(broken, [w], points=x)
