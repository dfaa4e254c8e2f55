"""Imports go downwards only: mathematics, introspection, curvature, optimizer, callback."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "keras_kfac"
LAYERS = [
    ["_version"],
    ["math"],
    ["_keras_internals"],
    ["introspection"],
    ["curvature", "curvature_matrix", "residuals"],
    ["fisher_matrix"],
    ["validation", "attachment", "restorable", "problem_report", "settings", "step_rule"],
    ["damping", "step", "whole_data", "predictions", "block_normal", "posterior", "laplace"],
    ["hyperparameters"],
    ["attachable"],
    ["stepping"],
    ["optimizer"],
    ["staleness"],
    ["callbacks", "batches", "whitening"],
    ["plateau", "weight_noise"],
    ["__init__"],
]
PRIVATE = {("_keras_internals", "tensorflow.python.eager.record")}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit(path):
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ([f"{node.module}.{name.name}" for name in node.names])
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
class TestModule:
    def test_imports_downwards(self, path):
        for module in imported_modules(path):
            if module.startswith("keras_kfac."):
                imported = module.split(".")[1]
                assert LEVEL[imported] <= LEVEL[unit(path)], f"{path.name} imports {module}"

    def test_uses_public_names_only(self, path):
        for module in imported_modules(path):
            if (unit(path), module) not in PRIVATE:
                assert not module.startswith(("keras.src", "tensorflow.python"))

    def test_mathematics_knows_no_keras(self, path):
        if unit(path) == "math":
            assert not any(module.split(".")[0] == "keras" for module in imported_modules(path))

    def test_is_short(self, path):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(code) <= 400

    def test_library_code_does_not_assert(self, path):
        assert not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(path.read_text())))


def test_every_part_has_its_place():
    assert {unit(path) for path in MODULES} == set(LEVEL)
