"""What products in bfloat16 do to the preconditioned gradient.

    python benchmarks/reduced_precision.py [--steps 40] [--mnist mnist.npz] [--fashion ...]

Each network of `problems.py` trains for some steps with `KFAC()`. Then the gradient of one more
batch is multiplied by the inverses in both ways. For every block the relative error in the
Frobenius norm and the cosine are written to a JSON file; what they do to training can be told from
`KFAC(product_dtype="bfloat16")` alone.
"""

import argparse
import json
import statistics
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from defaults import ROOT
from environment import environment
from problems import PROBLEMS, load

from keras_kfac import KFAC, KFACCallback

PATH = ROOT / "benchmarks" / "results" / "reduced_precision.json"


def directions(optimizer: KFAC, gradients: dict[int, tf.Tensor], dtype: str | None) -> list:
    """The preconditioned gradient of each block as a vector."""
    curvature = optimizer._known.curvature
    for block in curvature.blocks:
        block._product_dtype = dtype
    results = [parts for parts, _ in curvature.precondition(gradients)]
    return [np.concatenate([np.ravel(part) for part in parts.values()]) for parts in results]


def run(name: str, data: dict, steps: int) -> dict:
    """One network."""
    problem = PROBLEMS[name]
    x, y = data[problem.data]
    size = problem.batch_size
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(x.shape[1:]), *problem.network()])
    model.compile(KFAC(), problem.loss())
    part = slice(0, size * steps)
    model.fit(x[part], y[part], size, verbose=0, callbacks=[KFACCallback()])
    model.optimizer.detach()
    variables = model.optimizer._known.covered.values()
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x[:size], y[:size], model(x[:size], training=True))
    sources = [v.value for v in variables]
    gradients = {id(v): g for v, g in zip(variables, tape.gradient(loss, sources))}
    pairs = zip(*(directions(model.optimizer, gradients, t) for t in ("bfloat16", None)))
    norm = np.linalg.norm
    blocks = [(norm(a - b) / norm(b), float(a @ b / norm(a) / norm(b))) for a, b in pairs]
    return {"errors": [float(e) for e, _ in blocks], "cosines": [c for _, c in blocks]}


def main() -> None:
    """Measures all networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help=".npz file in place of the download")
    parser.add_argument("--fashion", type=Path, help=".npz file in place of the download")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    data = load(args)
    result: dict = {"environment": environment(), "steps": args.steps, "networks": {}}
    for name in PROBLEMS:
        found = result["networks"][name] = run(name, data, args.steps)
        worst = max(found["errors"]), min(found["cosines"])
        print(name, "median error", statistics.median(found["errors"]), "worst", *worst, flush=True)
        PATH.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
