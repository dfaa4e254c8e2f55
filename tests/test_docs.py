"""What README and docstrings show runs; what is public is documented."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_kfac
from keras_kfac.curvature import linear_exact
from keras_kfac.introspection.registry import ADAPTERS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_quickstart_runs_as_printed():
    quickstart = re.search(r"## Quickstart\n\n```python\n(.*?)```", README, re.S).group(1)
    assert len([line for line in quickstart.splitlines() if line.strip()]) <= 15
    result = subprocess.run(
        [sys.executable, "-c", quickstart],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert "have a curvature block" in result.stdout


PAGES = {
    "curvature.md": [r"first +Conv2D +80 +ekfac", r"dense +Dense .* kronecker", r"logits .* full"],
    "laplace.md": [
        r"dense +Dense +40 +kronecker",
        r"100.0 % of the trained weights",
        r"^prior: {1.0}$",
        r"^deviation: ",
    ],
    "layers.md": [r"Gate +3 +full", r"Centred +32 +kronecker"],
    "likelihoods.md": [r"^\(8, 8\) \[", r"trace +largest +damping +above the damping$"],
    "residuals.md": [r"^largest error: \de-0[5-9]"],
    "weight-sharing.md": [
        r"first .* reduce: 'average' averages over positions$",
        r"second .* reduce: as set$",
    ],
    "whitening.md": ["^same function: True$", "^loss, whitened and plain: "],
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_run_as_printed(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.S)
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    for pattern in PAGES[name]:
        assert re.search(pattern, result.stdout, re.M), result.stdout
    assert "fallback" not in result.stdout


def test_contributing_prints_the_smallest_structure():
    (printed,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert printed == inspect.getsource(linear_exact.LinearExactBlock)


@pytest.mark.parametrize("name", [name for name in keras_kfac.__all__ if name[0] != "_"])
def test_public_names_are_documented(name):
    thing = getattr(keras_kfac, name)
    assert inspect.getdoc(thing)
    for attribute, member in vars(thing).items():
        if inspect.isfunction(member) and not attribute.startswith("_"):
            assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


@pytest.mark.parametrize("layer", ADAPTERS, ids=lambda layer: layer.__name__)
def test_readme_names_every_supported_layer(layer):
    assert f"`{layer.__name__}`" in README


@pytest.mark.parametrize("name", inspect.signature(keras_kfac.KFAC).parameters)
def test_every_argument_is_documented(name):
    if name != "kwargs":
        assert re.search(rf"^\s+{name}: ", keras_kfac.KFAC.__doc__, re.M)
