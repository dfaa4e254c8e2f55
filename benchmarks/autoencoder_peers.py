"""Seconds until a deep autoencoder's test error falls to 5.0: `KFAC()` against its rivals.

    python benchmarks/autoencoder_peers.py [--mnist mnist.npz] [--jax-python jax/bin/python]

784-1000-500-250-30 and back, tanh, Glorot-uniform, batch 1000, cross-entropy summed over pixels;
the error is the squared error of a test image. Every optimizer starts from the same weights and
sees the same batches. On the first seed each rival runs with each setting of its grid; the setting
that is first at the target (or ends lowest) runs on all seeds; one that is not at the target in the
time in which another of its grid was is stopped. Only training steps are timed; what
the first steps take for tracing and compiling is counted apart.

For kfac-jax give a Python that has it: `pip install jax==0.9.0.1 jaxlib==0.9.0.1 kfac-jax==0.0.8`.
Every curve is written to a JSON file with the environments; `--report` prints the README's table.
`--optimizer` repeats the runs of some and keeps those of the others.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import keras  # noqa: E402
import numpy as np  # noqa: E402
from environment import environment  # noqa: E402
from stopwatch import train  # noqa: E402

from keras_kfac import KFAC  # noqa: E402

TARGET = 5.0
WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
RESULTS = ROOT / "benchmarks" / "results" / "autoencoder_peers.json"
KERAS_COPY = Path.home() / ".keras" / "datasets" / "mnist.npz"
KFAC_JAX = "kfac-jax, initial damping"

Factory = Callable[[float], keras.optimizers.Optimizer]
optimizers = keras.optimizers
RIVALS: dict[str, tuple[Factory, tuple[float, ...]]] = {
    "Adam": (optimizers.Adam, (1e-3, 3e-4, 5e-4, 2e-3, 3e-3)),
    "Muon": (optimizers.Muon, (5e-3, 1e-3, 2e-3, 3e-3, 1e-2, 2e-2)),
    "SGD, Nesterov momentum 0.9,": (
        lambda rate: optimizers.SGD(rate, 0.9, nesterov=True),
        (3e-3, 3e-4, 1e-3, 1e-2, 3e-2),
    ),
}
JAX_DAMPINGS = (0.03, 0.003, 0.01, 0.1, 0.3, 1.0, 3.0)


def new_model(seed: int) -> keras.Model:
    """The autoencoder; its outputs are the logits of the pixels."""
    keras.utils.set_random_seed(seed)
    linear = (len(WIDTHS) // 2, len(WIDTHS) - 1)
    layers = [
        keras.layers.Dense(width, None if i in linear else "tanh")
        for i, width in enumerate(WIDTHS[1:], start=1)
    ]
    return keras.Sequential([keras.Input((WIDTHS[0],)), *layers])


def run_keras(optimizer: keras.optimizers.Optimizer, images: Path, seconds: float, seed: int):
    """Trains with a Keras optimizer."""
    model = new_model(seed)
    # The loss weight sums over pixels what Keras averages; a loss of known form can be modelled.
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer, loss, loss_weights=[float(WIDTHS[0])])
    if isinstance(optimizer, KFAC):
        optimizer.attach(model)

    def reconstruct(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-model.predict_on_batch(x)))

    return train(model.train_on_batch, reconstruct, images, seconds, TARGET, seed)


def run_kfac_jax(python: str, damping: float, images: Path, seconds: float, seed: int) -> dict:
    """Trains with kfac-jax from the same weights, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        np.savez(weights, *new_model(seed).get_weights())
        script = ROOT / "benchmarks" / "kfac_jax_autoencoder.py"
        command = [python, script, images, weights, damping, seconds, TARGET, seed]
        output = subprocess.run(
            [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True
        )
    return json.loads(output.stdout)


def all_runs(args: argparse.Namespace) -> Iterator[dict]:
    """Every run; first the grids."""
    first, *others = args.seeds

    def result(name: str, setting: float | None, seed: int, seconds: float) -> dict:
        if name == "KFAC()":
            run = run_keras(KFAC(), args.mnist, seconds, seed)
        elif name == KFAC_JAX:
            run = run_kfac_jax(args.jax_python, setting, args.mnist, seconds, seed)
        else:
            run = run_keras(RIVALS[name][0](setting), args.mnist, seconds, seed)
        return {"optimizer": name, "setting": setting, "seed": seed} | run

    grids = {name: grid for name, (_, grid) in RIVALS.items()}
    if args.jax_python:
        grids[KFAC_JAX] = JAX_DAMPINGS
    best: dict[str, float | None] = {}
    if args.optimizer in "KFAC()":
        best["KFAC()"] = None
        yield result("KFAC()", None, first, args.seconds)
    for name, grid in grids.items():
        if args.optimizer not in name:
            continue
        runs: list[dict] = []
        for setting in grid:
            limit = min([args.seconds, *map(time_to_target, runs)])
            runs.append(result(name, setting, first, limit))
            yield runs[-1]
        best[name] = min(runs, key=standing)["setting"]
    for seed, (name, setting) in itertools.product(others, best.items()):
        yield result(name, setting, seed, args.seconds)


def standing(run: dict) -> tuple[float, float]:
    """What runs are ranked by: the time to the target, then the last error."""
    error = run["curve"][-1][2]
    return time_to_target(run), error if np.isfinite(error) else np.inf


def time_to_target(run: dict) -> float:
    """Seconds of training steps until the error first is at the target, or infinity."""
    return next((seconds for seconds, _, error in run["curve"] if error <= TARGET), np.inf)


def report(result: dict) -> str:
    """Medians over the seeds, as a table."""
    runs = result["runs"]
    seeds = {run["seed"] for run in runs}
    rows = {}
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        settings = dict.fromkeys(r["setting"] for r in runs if r["optimizer"] == name)
        of = {s: [r for r in runs if (r["optimizer"], r["setting"]) == (name, s)] for s in settings}
        (setting,) = (s for s in settings if {r["seed"] for r in of[s]} == seeds)
        label = name if setting is None else f"{name} {setting:g} (best of {len(settings)})"
        rows[label] = of[setting]

    def median(runs: list[dict], value: Callable[[dict], float]) -> float:
        return statistics.median(value(run) for run in runs)

    own = median(rows["KFAC()"], time_to_target)
    lines = [
        f"| | seconds to error {TARGET:g} | `KFAC()` takes | with compiling (s) | steps "
        "| ms per step |",
        "|---|---|---|---|---|---|",
    ]
    for label, runs in rows.items():
        seconds = median(runs, time_to_target)
        whole = median(runs, lambda r: time_to_target(r) + r["compile_seconds"])
        steps = median(runs, lambda r: r["curve"][-1][1])
        cost = median(runs, lambda r: 1000 * r["curve"][-1][0] / r["curve"][-1][1])
        cells = (
            [f"{seconds:.1f}", f"{own / seconds:.2f}", f"{whole:.1f}", f"{steps:.0f}"]
            if np.isfinite(seconds)
            else [f"not in {median(runs, lambda r: r['curve'][-1][0]):.0f}", "-", "-", "-"]
        )
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {cost:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, default=KERAS_COPY, help="Keras's mnist.npz")
    parser.add_argument("--jax-python", help="a Python interpreter that has kfac-jax")
    parser.add_argument("--seconds", type=float, default=150.0, help="limit for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--optimizer", default="", help="only those whose names contain this")
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.report:
        if args.mnist == KERAS_COPY:
            keras.datasets.mnist.load_data()
        result = {"environments": {}, "runs": []}
        if RESULTS.exists():
            result = json.loads(RESULTS.read_text())
        runs = [run for run in result["runs"] if args.optimizer not in run["optimizer"]]
        result["runs"] = runs
        for run in all_runs(args):
            runs.append(run)
            result["environments"][run["optimizer"]] = environment()
            RESULTS.write_text(json.dumps(result, indent=1))
            print(
                {key: run[key] for key in ("optimizer", "setting", "seed")},
                run["curve"][-1],
                flush=True,
            )
    print(report(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
