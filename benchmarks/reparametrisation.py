"""Condition of the Fisher matrix in the coordinates that centring, whitening and others make.

    python benchmarks/reparametrisation.py [--mnist mnist.npz] [--seeds 1]

A tanh network of 16-12-8-10 units learns to mark the digit in MNIST images of 4 x 4 pixels, by
squared error, so that no direction of its weights is without effect. The dense Fisher matrix on
500 images is formed in double precision, with random weights and after some training: for the same
function in all coordinates (statistics of the batch apart, which make another function), and for
the plain network in the coordinates in which the blocks of a preconditioner are the identity. A
seed takes a minute. Eigenvalues are written to a JSON file with the environment; `--report` prints
the table in docs/whitening.md.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
from defaults import ROOT
from environment import environment

from keras_kfac import KFAC, FisherMatrix, Whitening, rewhiten

layers = keras.layers
PATH = ROOT / "benchmarks" / "results" / "reparametrisation.json"
WIDTHS = (16, 12, 8, 10)
EXAMPLES = 500
STEPS = 500  # of Adam, on all examples
NULL = 1e-12  # Eigenvalues below this part of the largest are of directions without effect.

Make = Callable[[], keras.Layer]
Data = tuple[np.ndarray, np.ndarray]
Weights = list[np.ndarray]


def load(path: Path | None) -> Data:
    """Images of 4 x 4 pixels in [0, 1], `[examples, 16]`, and a 1 for the digit."""
    if path is None:
        (images, digits), _ = keras.datasets.mnist.load_data()
    else:
        with np.load(path) as file:
            images, digits = file["x_train"], file["y_train"]
    x = (images[:EXAMPLES] / 255).reshape(EXAMPLES, 4, 7, 4, 7).mean((2, 4))
    return x.reshape(EXAMPLES, 16), np.eye(10)[digits[:EXAMPLES]]


def network(before: Make | None = None, after: Make | None = None) -> keras.Sequential:
    """The network, with what is made before each dense layer, or after each but the last."""
    body: list[keras.Layer] = []
    for width in WIDTHS[1:]:
        is_last = width == WIDTHS[-1]
        body += [before()] if before else []
        body.append(layers.Dense(width))
        body += [after()] if after and not is_last else []
        body += [] if is_last else [layers.Activation("tanh")]
    model = keras.Sequential([keras.Input((WIDTHS[0],)), *body])
    model.compile("adam", "mse")
    return model


def set_dense_weights(model: keras.Model, weights: Weights) -> None:
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    for index, layer in enumerate(dense):
        layer.set_weights(weights[2 * index : 2 * index + 2])


def whitened(mode: str, weights: Weights, x: np.ndarray) -> keras.Sequential:
    """The network that is the same function as the plain one of these weights."""
    model = network(lambda: Whitening(mode, epsilon=0.0))
    set_dense_weights(model, weights)
    rewhiten(model, x)
    return model


def normalisation() -> keras.Layer:
    return layers.BatchNormalization(center=False, scale=False, epsilon=0.0, momentum=0.0)


def normalised(weights: Weights, x: np.ndarray) -> keras.Sequential:
    """The same by batch normalisation, with the statistics of `x` for good."""
    model = network(normalisation)
    model(x, training=True)
    set_dense_weights(model, whitened("diagonal", weights, x).trainable_weights)
    model(x, training=True)  # Each layer has the statistics of its inputs now.
    return model


def fisher(model: keras.Model, x: np.ndarray, training: bool = False) -> np.ndarray:
    return FisherMatrix(model, x, training=training).to_dense().numpy()


def blocks(model: keras.Model, data: Data, curvature: str) -> list[np.ndarray]:
    """A structure's block of each dense layer, for `[kernel; bias]` row by row."""
    off = {"damping": 0.0, "momentum": 0.0, "kl_clip": None}
    optimizer = KFAC(0.0, curvature=curvature, fisher="exact", **off).attach(model, "mse")
    model.compile(optimizer, "mse", run_eagerly=True)
    model.train_on_batch(*data)
    optimizer.detach()
    state: dict[str, np.ndarray] = {}
    optimizer.save_own_variables(state)
    inputs, outputs = (
        [np.asarray(value) for name, value in state.items() if name.endswith(ending)]
        for ending in ("input_factor", "output_factor")
    )
    products = map(np.kron, inputs, outputs)  # A number stands for a multiple of the identity.
    sizes = [(m + 1) * n for m, n in itertools.pairwise(WIDTHS)]
    return [np.kron(b, np.eye(size // len(b))) for b, size in zip(products, sizes)]


def preconditioned(matrix: np.ndarray, by: list[np.ndarray]) -> np.ndarray:
    """`L⁻¹ F L⁻ᵀ` for the Cholesky factors `L` of diagonal blocks."""
    root, start = np.zeros_like(matrix), 0
    for block in by:
        part = slice(start, start + len(block))
        root[part, part] = np.linalg.cholesky(block)
        start = part.stop
    return np.linalg.solve(root, np.linalg.solve(root, matrix).T)


def matrices(weights: Weights, data: Data) -> Iterator[tuple[str, np.ndarray]]:
    """The Fisher matrix in all coordinates."""
    x, _ = data
    plain = network()
    set_dense_weights(plain, weights)
    matrix = fisher(plain, x)
    yield "plain", matrix
    for mode in ("centring", "diagonal", "full"):
        yield f"whitening, {mode}", fisher(whitened(mode, weights, x), x)
    yield "batch normalisation, fixed", fisher(normalised(weights, x), x)
    model = network(after=normalisation)
    set_dense_weights(model, weights)
    yield "batch normalisation, training", fisher(model, x, training=True)
    for curvature in ("input", "kfac", "full"):
        by = blocks(plain, data, curvature)
        yield f"preconditioned, {curvature}", preconditioned(matrix, by)


def run(data: Data, seed: int) -> Iterator[dict]:
    """All eigenvalues, falling."""
    keras.utils.set_random_seed(seed)
    model = network()
    for steps in (0, STEPS):
        model.fit(*data, EXAMPLES, steps, verbose=0)
        for name, matrix in matrices(model.get_weights(), data):
            eigenvalues = [float(f"{e:.5g}") for e in np.linalg.eigvalsh(matrix)[::-1]]
            yield {"coordinates": name, "seed": seed, "steps": steps, "eigenvalues": eigenvalues}
            print(name, seed, steps, *figures(eigenvalues), flush=True)


def figures(eigenvalues: list[float]) -> tuple[float, float, int]:
    """Largest over smallest and over mean of those that are not 0, and how many are."""
    kept = np.array([e for e in eigenvalues if e > NULL * eigenvalues[0]])
    return kept[0] / kept[-1], kept[0] / kept.mean(), len(eigenvalues) - len(kept)


def report(result: dict) -> str:
    """Medians over seeds, as a table."""
    lines = [
        "| coordinates | largest / smallest, random weights | trained "
        "| largest / mean, random weights | trained | without effect |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["coordinates"] for r in result["runs"]):
        found = {
            steps: [
                figures(r["eigenvalues"])
                for r in result["runs"]
                if (r["coordinates"], r["steps"]) == (name, steps)
            ]
            for steps in (0, STEPS)
        }
        cells = [
            f"{statistics.median(f[index] for f in found[steps]):.2g}"
            for index in (0, 1)
            for steps in (0, STEPS)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {max(f[2] for f in found[0])} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help=".npz file in place of the download")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.report:
        keras.config.set_floatx("float64")
        data = load(args.mnist)
        runs = [each for seed in args.seeds for each in run(data, seed)]
        PATH.write_text(json.dumps({"environment": environment(), "runs": runs}))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
