"""Summaries of the curvature of layers."""

import keras
import numpy as np
import pytest

from keras_kfac import KFAC
from keras_kfac.curvature.spectrum import CurvatureSummary, LayerSpectrum
from tests import helpers
from tests.reference import kron

layers = keras.layers
RNG = np.random.default_rng(0)


def trained(model, **kwargs):
    helpers.compiled(model, KFAC(**kwargs))
    helpers.fit(model, helpers.vectors(4 * helpers.BATCH))
    return model


def products(row):
    a, g = row.input_eigenvalues, row.output_eigenvalues
    return np.sort((a[..., :, None] * g[..., None, :]).ravel())[::-1]


@pytest.mark.parametrize("max_factor_size", [2304, 3])
def test_eigenvalues_are_those_of_the_block(max_factor_size):
    with helpers.precision("float64"):
        optimizer = trained(helpers.mlp(), max_factor_size=max_factor_size, damping=0.1).optimizer
        summary = optimizer.curvature_summary()
        assert [row.layer for row in summary] == [row.layer for row in optimizer.coverage()]
        for index, row in enumerate(summary):
            parts = [
                optimizer.model_variables[f"block.{index}.{side}_factor"].numpy()
                for side in ("input", "output")
            ]
            a, g = (f if f.ndim == 3 else f[np.newaxis] for f in parts)
            dense = [np.linalg.eigvalsh(kron(b, c)) for b in a for c in g]
            expected = np.sort(np.concatenate(dense))[::-1]
            np.testing.assert_allclose(products(row), expected, atol=1e-12 * expected[0])
            assert row.trace == pytest.approx(expected.sum())
            assert row.largest == pytest.approx(expected[0])
            assert row.damping == pytest.approx(0.1)
            assert row.effective_dimension == pytest.approx((expected / (expected + 0.1)).sum())


def test_regularisers_join_the_damping():
    body = [layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.25)), layers.Dense(3)]
    model = trained(keras.Sequential([keras.Input((helpers.FEATURES,)), *body]), damping=0.1)
    first, second = model.optimizer.curvature_summary()
    assert (first.damping, second.damping) == pytest.approx((0.6, 0.1))


def test_weak_layers_have_less_adaptive_damping():
    optimizer = trained(helpers.mlp()).optimizer
    dampings = [row.damping for row in optimizer.curvature_summary()]
    assert min(dampings) < max(dampings) <= float(optimizer.damping) * (1 + 1e-6)


def test_table_and_plot():
    plt = pytest.importorskip("matplotlib.pyplot")
    row = LayerSpectrum("model/dense", np.array([0.0, 1.0, 4.0]), np.array([0.5, 2.0]), 0.5)
    summary = CurvatureSummary([row])
    header, line = str(summary).splitlines()
    assert header.split() == ["layer", "trace", "largest", "damping", "above", "the", "damping"]
    # 0.5 / 1 + 2 / 2.5 + 2 / 2.5 + 8 / 8.5
    assert line.split() == ["model/dense", "12.5", "8", "0.5", "3.04"]
    axes = summary.plot()
    curve, dotted = axes.lines
    np.testing.assert_allclose(curve.get_ydata(), [8, 2, 2, 0.5])
    assert dotted.get_ydata()[0] == 0.5
    assert summary.plot(axes) is axes and len(axes.lines) == 4
    plt.close(axes.figure)


def test_quantiles_of_many_keep_the_extremes():
    values = RNG.uniform(size=5000)
    row = LayerSpectrum("a", values, np.array([1.0, 2.0]), 0.0)
    share, quantiles = row.quantiles(100)
    assert quantiles[0] == pytest.approx(2 * values.max())
    assert quantiles[-1] == pytest.approx(values.min())
    assert (np.diff(quantiles) <= 0).all() and len(share) == 100


def test_empty_before_the_first_step():
    assert KFAC().curvature_summary() == []
