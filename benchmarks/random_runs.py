"""`KFAC()` on random networks: does any run fail to end finite and below its initial loss?

    python benchmarks/random_runs.py [--runs 100] [--jobs 2]

Architecture, activations, initial weights, loss, batch size and data scale are drawn for each run.
The loss is that of all training examples in inference mode, before and after the steps. Every run
is written to a JSON file with the environment; `--report` prints the summary.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import keras  # noqa: E402
import numpy as np  # noqa: E402
from environment import environment  # noqa: E402

from keras_kfac import KFAC, KFACCallback  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "random_runs.json"
EXAMPLES = 2000
STEPS = 200
ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid", "elu", "linear")
INITIALIZERS = ("glorot_uniform", "he_normal", "lecun_normal", "orthogonal")
LOSSES = {
    "classification": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "multi-label": lambda: keras.losses.BinaryCrossentropy(from_logits=True),
    "regression": lambda: keras.losses.MeanSquaredError(),
}
layers = keras.layers


def draw(seed: int) -> dict:
    """The description of a run."""
    rng = np.random.default_rng(seed)
    is_conv = bool(rng.random() < 0.4)
    depth = int(rng.integers(1, 4 if is_conv else 9))
    largest = 32 if is_conv else 256
    return {
        "seed": seed,
        "kind": "conv" if is_conv else "dense",
        "loss": str(rng.choice(list(LOSSES))),
        "widths": [int(2 ** rng.uniform(2, np.log2(largest))) for _ in range(depth)],
        "activation": str(rng.choice(ACTIVATIONS)),
        "initializer": str(rng.choice(INITIALIZERS)),
        "batch_normalization": bool(rng.random() < 0.25),
        "dropout": float(rng.choice([0.0, 0.0, 0.0, 0.2, 0.5])),
        "strides": int(rng.integers(1, 3)),
        "l2": float(rng.choice([0.0, 0.0, 1e-4, 1e-2])),
        "outputs": int(rng.integers(2, 20)),
        "batch_size": int(2 ** rng.uniform(2, 10)),
        "input_scale": float(10 ** rng.uniform(-1.5, 1.5)),
        "target_noise": float(rng.choice([0.0, 0.3, 1.0])),
    }


def data(run: dict) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs, and targets that a random network of tanh gives, with noise."""
    rng = np.random.default_rng(1000 + run["seed"])
    shape = (12, 12, 2) if run["kind"] == "conv" else (40,)
    size = int(np.prod(shape))
    x = rng.normal(size=(EXAMPLES, size // 2)) @ rng.normal(size=(size // 2, size)) / size**0.5
    hidden = np.tanh(x @ rng.normal(size=(size, 30)) / size**0.5)
    scores = hidden @ rng.normal(size=(30, run["outputs"]))
    scores += run["target_noise"] * rng.normal(size=scores.shape) * scores.std()
    y = {
        "classification": scores.argmax(1),
        "multi-label": (scores > 0).astype("float32"),
        "regression": (scores * run["input_scale"]).astype("float32"),
    }[run["loss"]]
    return (x * run["input_scale"]).astype("float32").reshape(EXAMPLES, *shape), y


def network(run: dict, shape: tuple[int, ...]) -> keras.Model:
    """The network of a run."""
    keras.utils.set_random_seed(run["seed"])
    regularizer = keras.regularizers.L2(run["l2"]) if run["l2"] else None
    common = {"kernel_initializer": run["initializer"], "kernel_regularizer": regularizer}
    body: list[keras.Layer] = []
    for width in run["widths"]:
        body.append(
            layers.Conv2D(width, 3, run["strides"], padding="same", **common)
            if run["kind"] == "conv"
            else layers.Dense(width, **common)
        )
        if run["batch_normalization"]:
            body.append(layers.BatchNormalization())
        body.append(layers.Activation(run["activation"]))
        if run["dropout"]:
            body.append(layers.Dropout(run["dropout"]))
    head = [layers.Flatten(), layers.Dense(run["outputs"], **common)]
    return keras.Sequential([keras.Input(shape), *body, *head])


def train(run: dict) -> dict:
    """Losses before and after training, and how long it took."""
    keras.utils.clear_session()
    x, y = data(run)
    model = network(run, x.shape[1:])
    model.compile(KFAC(), LOSSES[run["loss"]]())
    began = time.perf_counter()
    before = float(model.evaluate(x, y, batch_size=500, verbose=0))
    steps = -(-EXAMPLES // run["batch_size"])
    epochs = max(3, -(-STEPS // steps))
    model.fit(x, y, run["batch_size"], epochs, verbose=0, callbacks=[KFACCallback()])
    after = float(model.evaluate(x, y, batch_size=500, verbose=0))
    rest = {"steps": steps * epochs, "seconds": time.perf_counter() - began}
    return run | {"before": before, "after": after} | rest


def failed(run: dict) -> bool:
    """Whether the run ended at no finite loss below the initial one."""
    return not run["after"] < run["before"]


def report(result: dict) -> str:
    """The number of failures, and each of them."""
    runs = result["runs"]
    failures = [run for run in runs if failed(run)]
    ratio = np.median(np.nan_to_num([run["after"] / run["before"] for run in runs], nan=np.inf))
    lines = [
        f"{len(runs)} runs, {len(failures)} failures; median of loss over initial loss: {ratio:.3f}"
    ]
    return "\n".join(lines + [json.dumps(run) for run in failures])


def main() -> None:
    """Trains, or reports what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="processes; most nets use one core")
    parser.add_argument("--report", action="store_true", help="only print the summary")
    args = parser.parse_args()
    if not args.report:
        runs = []
        context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork.
        with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
            for run in pool.map(train, map(draw, range(args.runs))):
                runs.append(run)
                result = {"environment": environment(), "runs": runs}
                RESULTS.write_text(json.dumps(result, indent=1))
                print(run["seed"], run["before"], run["after"], flush=True)
    print(report(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
