"""The example of Laplace's approximation: its measures, and a short run."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("laplace")
    finally:
        sys.path.remove(str(EXAMPLES))


def test_measures(example):
    """Two examples: one is right by 0.9, one is wrong by 0.6."""
    probabilities, labels = np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0])
    nll = -(np.log(0.9) + np.log(0.4)) / 2
    assert np.isclose(example.negative_log_likelihood(probabilities, labels), nll)
    assert np.isclose(example.calibration_error(probabilities, labels), (0.1 + 0.6) / 2)
    certain = np.array([[1.0, 0.0]])
    assert example.calibration_error(certain, labels[:1]) == 0
    assert np.isfinite(example.negative_log_likelihood(certain, labels[:1] + 1))


def test_images_are_used_once(example):
    parts = example.digits(1000, seed=0)
    assert [len(x) for x, _ in parts] == [1000, 200, 597]
    rows = {x.tobytes() for data in parts for x in data[0]}
    assert len(rows) > 1790  # Few images are equal.


@pytest.mark.slow
def test_prints_a_table(example, capsys):
    example.main(["--examples", "100", "--epochs", "1", "--draws", "2"])
    printed = capsys.readouterr().out
    assert "of 6310 weights determined" in printed
    for images in ("held out", "with noise", "rotated"):
        assert printed.count(images) == 7
