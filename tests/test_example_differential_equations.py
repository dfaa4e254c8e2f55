"""The example of differential equations: its problems are right, and it leaves what it says."""

import csv
import importlib
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
    edge = example.edge_points(equation, 4)
    assert all((edge[4 * i : 4 * i + 4, a] == at).all() for i, (a, at) in enumerate(equation.edges))


def test_natural_gradient_gets_far_in_a_few_steps(example):
    task = example.Task(example.EQUATIONS["poisson"], seed=0, size=10)
    rounds = example.by_natural_gradient(task)
    errors = [float(task.error()) for _ in range(30) if next(rounds)]
    assert errors[-1] < 1e-3 < errors[0]


def test_it_leaves_curves_and_a_picture(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "LBFGS_ROUND", 2)
    results = example.main(["heat", "--seconds", "0.01", "--output", str(tmp_path / "deep")])
    assert set(results["heat"]) == set(example.OPTIMIZERS)
    with (tmp_path / "deep" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["optimizer"] for row in rows} == set(example.OPTIMIZERS)
    assert all(np.isfinite(float(row["relative L2 error"])) for row in rows)
    assert (tmp_path / "deep" / "error.png").stat().st_size > 1000
    for curve in results["heat"].values():
        assert len(curve) >= 3 and curve[-1][0] >= 0.01


def test_unknown_equations_are_named(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["navier"])
    assert "no equations called ['navier']" in capsys.readouterr().err
