"""How much of a natural gradient step different approximations of the Fisher matrix keep.

    python benchmarks/kronecker_products.py [--seeds 1 2 3]

Small networks learn handwritten digits of 8 x 8 pixels (scikit-learn's) by Adam. Before, during and
after, the dense Fisher matrix of 500 images is formed in double precision, and of each layer's
block three Kronecker products: K-FAC's; that of the partial traces, which TNT (Ren & Goldfarb 2021,
"Tensor normal training for deep learning models") takes; and the nearest one in the Frobenius norm
(Van Loan & Pitsianis 1993). Beside them EKFAC's, in K-FAC's eigenbases, and the blocks as they are.

For each: the distance from the blocks, relative to their norm, and the share of the decrease of the
quadratic model `g·d + ½ dᵀ (F + λ I) d` that the best multiple of the damped direction reaches of
that of the exact one. Written to a JSON file with the environment; `--report` prints the table in
docs/curvature.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import keras
import numpy as np
import sklearn.datasets
from defaults import ROOT
from environment import environment

from keras_kfac import KFAC, FisherMatrix, KFACCallback

layers = keras.layers
PATH = ROOT / "benchmarks" / "results" / "kronecker_products.json"
EXAMPLES = 500
STEPS = (0, 100, 1000)  # of Adam
DAMPING = (1e-3, 1e-1, 10.0)  # Relative to the mean eigenvalue.
NETWORKS: dict[str, Callable[[], list[keras.Layer]]] = {
    "64-16-12-10 tanh": lambda: [
        layers.Flatten(),
        *(layers.Dense(width, "tanh") for width in (16, 12)),
        layers.Dense(10),
    ],
    "convolutions of 4 and 6 channels, relu": lambda: [
        layers.Conv2D(4, 3, strides=2, activation="relu"),
        layers.Conv2D(6, 2, activation="relu"),
        layers.Flatten(),
        layers.Dense(10),
    ],
}

Blocks = list[np.ndarray]


def nearest(block: np.ndarray, d_in: int, d_out: int) -> np.ndarray:
    """The Kronecker product that is nearest to a matrix."""
    rearranged = block.reshape(d_in, d_out, d_in, d_out).transpose(0, 2, 1, 3)
    left, values, right = np.linalg.svd(rearranged.reshape(d_in**2, d_out**2))
    a, g = left[:, 0].reshape(d_in, d_in), right[0].reshape(d_out, d_out)
    return np.kron(a, values[0] * g)


def of_partial_traces(block: np.ndarray, d_in: int, d_out: int) -> np.ndarray:
    """The Kronecker product that has the partial traces of a matrix."""
    parts = block.reshape(d_in, d_out, d_in, d_out)
    a, g = np.einsum("ikjk->ij", parts), np.einsum("kikj->ij", parts)
    return np.kron(a, g) / np.trace(block)


def diagonal_in_eigenbases(block: np.ndarray, a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """EKFAC: the diagonal that a matrix has in the eigenbases of the factors."""
    basis = np.kron(*(np.linalg.eigh(factor)[1] for factor in (a, g)))
    return (basis * np.einsum("ij,ik,kj->j", basis, block, basis)) @ basis.T


def approximations(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, Blocks]:
    """The blocks of all layers, by each approximation."""
    options = {"factor_update_period": 1, "inverse_update_period": 1, "damping": 1.0}
    optimizer = KFAC(
        0.0, momentum=0.0, fisher="exact", weight_sharing="expand", max_factor_size=10**6, **options
    )
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.compile(optimizer, model.loss)
    other.fit(x, y, len(x), verbose=0, callbacks=[KFACCallback()])
    state = optimizer.model_variables
    whole = FisherMatrix(model, x).to_dense().numpy()
    found: dict[str, Blocks] = {}
    start = 0
    trained = [layer for layer in model.layers if layer.weights]
    for index, layer in enumerate(trained):
        a, g = (state[f"block.{index}.{side}_factor"].numpy() for side in ("input", "output"))
        own = slice(start, start + layer.count_params())
        start, block = own.stop, whole[own, own]
        sizes = len(a), len(g)
        each = {
            "K-FAC": np.kron(a, g),
            "partial traces (TNT)": of_partial_traces(block, *sizes),
            "nearest Kronecker product": nearest(block, *sizes),
            "EKFAC": diagonal_in_eigenbases(block, a, g),
            "blocks of layers": block,
        }
        for name, matrix in each.items():
            found.setdefault(name, []).append(matrix)
    return {**found, "whole matrix": [whole]}


def block_diagonal(blocks: Blocks) -> np.ndarray:
    size = sum(map(len, blocks))
    matrix, start = np.zeros((size, size)), 0
    for block in blocks:
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix


def measured(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, dict]:
    """Distances and shares of each approximation."""
    found = approximations(model, x, y)
    (whole,), exact = found["whole matrix"], block_diagonal(found["blocks of layers"])
    gradient = gradient_of(model, x, y)
    result = {}
    for name, blocks in found.items():
        matrix = block_diagonal(blocks)
        shares = []
        for relative in DAMPING:
            damping = relative * np.trace(whole) / len(whole) * np.eye(len(whole))
            best = gradient @ np.linalg.solve(whole + damping, gradient)
            direction = np.linalg.solve(matrix + damping, gradient)
            curvature = direction @ (whole + damping) @ direction
            shares.append((gradient @ direction) ** 2 / curvature / best)
        distance = np.linalg.norm(matrix - exact) / np.linalg.norm(exact)
        result[name] = {"distance": distance, "shares": shares}
    return result


def gradient_of(model: keras.Model, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """By a step of gradient descent."""
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.compile(keras.optimizers.SGD(1.0), model.loss)
    other.fit(x, y, len(x), verbose=0)
    each = zip(model.trainable_variables, other.trainable_variables)
    return np.concatenate([np.ravel(old.numpy() - new.numpy()) for old, new in each])


def run(name: str, seed: int) -> list[dict]:
    """One network, at several points of its training."""
    keras.utils.set_random_seed(seed)
    images, y = sklearn.datasets.load_digits(return_X_y=True)
    x, y = images[:EXAMPLES].reshape(-1, 8, 8, 1) / 16, y[:EXAMPLES]
    model = keras.Sequential([keras.Input((8, 8, 1)), *NETWORKS[name]()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    found, done = [], 0
    for steps in STEPS:
        for _ in range(done, steps):
            model.train_on_batch(x, y)
        done = steps
        value = float(model.evaluate(x, y, verbose=0))
        results = measured(model, x, y)
        found.append({"network": name, "seed": seed, "steps": steps, "loss": value, **results})
        print(name, seed, steps, value, results, flush=True)
    return found


def report(result: dict) -> str:
    """Medians over seeds."""
    heads = [f"share, λ = {d:g} means" for d in DAMPING]
    lines = [
        f"| network | steps | loss | matrix | distance | {' | '.join(heads)} |",
        "|---|---|---|---|---|" + "---|" * len(heads),
    ]
    for name in NETWORKS:
        for steps in STEPS:
            runs = [r for r in result["runs"] if (r["network"], r["steps"]) == (name, steps)]
            loss = statistics.median(r["loss"] for r in runs)
            for kind in [key for key in runs[0] if isinstance(runs[0][key], dict)]:
                own = [r[kind] for r in runs]
                shares = [statistics.median(o["shares"][i] for o in own) for i in range(len(heads))]
                distance = statistics.median(o["distance"] for o in own)
                cells = [f"{value:.3f}" for value in (distance, *shares)]
                lines.append(f"| {name} | {steps} | {loss:.3f} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", action="store_true", help="print what was measured before")
    args = parser.parse_args()
    if not args.report:
        keras.config.set_floatx("float64")
        runs = [own for name in NETWORKS for seed in args.seeds for own in run(name, seed)]
        result = {"environment": environment(), "runs": runs}
        PATH.write_text(json.dumps(result, indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
