"""The example of differential equations: its problems are right, and it gets as far as it says."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("differential_equations")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("name", ["poisson", "heat"])
def test_solutions_solve_their_equations(example, name):
    equation = example.EQUATIONS[name]
    points = tf.constant(example.grid(5))
    left = equation.left(points, *example.derivatives(equation.solution, points))
    np.testing.assert_allclose(left, np.zeros(25), atol=1e-12)


def test_edges_are_those_with_a_condition(example):
    """Zero on all four of them; the heat at the end of the time is for the network to find."""
    edges = example.edge_points(example.EQUATIONS["poisson"], 4)
    np.testing.assert_allclose(example.waves(tf.constant(edges)), np.zeros(16), atol=1e-15)
    assert len(np.unique(edges, axis=0)) == 12  # the corners twice
    edges = example.edge_points(example.EQUATIONS["heat"], 4)
    assert len(edges) == 12 and sum(edges[:, 0] == 1.0) == 2


LBFGS = pytest.param("L-BFGS", marks=pytest.mark.slow)  # XLA takes long to compile it


@pytest.mark.parametrize("name", ["natural gradient", LBFGS, "Adam"])
def test_optimizers_lower_the_loss(example, name, monkeypatch):
    monkeypatch.setattr(example, "ROUND", 3)
    task = example.Task(example.EQUATIONS["heat"], seed=0, size=6, width=6)
    before = float(task.loss())
    train_round = example.OPTIMIZERS[name](task)
    steps = [train_round(0.5) for _ in range(2)]
    assert steps == ([1, 1] if name == "natural gradient" else [3, 3])
    assert float(task.loss()) < before


def test_it_leaves_curves_and_a_picture(example, tmp_path, monkeypatch):
    def rounds(task):
        return lambda over: 2

    monkeypatch.setattr(example, "OPTIMIZERS", {"nothing": rounds, "as little": rounds})
    example.main(["heat", "--seconds", "0.01", "--output-dir", str(tmp_path / "deep")])
    curves = json.loads((tmp_path / "deep" / "curves.json").read_text())["heat"]
    assert set(curves) == {"nothing", "as little"}
    for curve in curves.values():
        assert curve[0][:2] == [0.0, 0] and curve[-1][0] >= 0.01
        assert 4 <= len(curve) <= example.RECORDS + 2
        assert {error for _, _, error in curve} == {curve[0][2]}
    assert (tmp_path / "deep" / "error.png").stat().st_size > 1000


def test_unknown_equations_are_named(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["navier"])
    assert "no equations called ['navier']" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["poisson", "heat"])
def test_natural_gradient_gets_to_six_digits(example, name, seed):
    """In 18 to 35 steps on the seeds tried; errors then fall to about 1e-7."""
    task = example.Task(example.EQUATIONS[name], seed)
    step = example.by_natural_gradient(task)
    for _ in range(50):
        step(0.0)
    assert float(task.error()) < 1e-6
