"""The example of deep linear networks: the rate of theory, and a short run."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import helpers

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("deep_linear")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def double():
    with helpers.precision("float64"):
        yield


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_the_rate_is_that_of_theory(example, condition):
    """In the limit of small steps; layers are wider than inputs and outputs, and singular."""
    rate = 0.01
    of = example.data(condition, seed=0)
    curve = example.excess_losses(example.natural_gradient(rate), of, steps=20, seed=0)
    assert example.ratio(curve) == pytest.approx((1 - rate) ** 2, abs=6e-4)


def test_data_are_conditioned_as_told(example):
    x, y = example.data(1e4, seed=0)
    assert 1e3 < np.linalg.cond(np.cov(x.T)) < 1e5
    assert 0.5 < example.least_loss(x, y) < 1.5


@pytest.mark.slow
def test_prints_a_table_and_draws(example, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "RATES", (0.01,))
    example.main(["--steps", "3", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("natural gradient") == 3 and printed.count("Adam") == 3
    assert (tmp_path / "excess_loss.png").stat().st_size > 1000
