"""`KFAC()` without a setting against Adam at the best of six learning rates, on six problems.

    python benchmarks/defaults.py --seconds 120 [--mnist mnist.npz] [--fashion fashion_mnist.npz]

For each problem Adam trains at every rate on the first seed, and at the best of them on the others,
for the same seconds of training steps (evaluation and the first two steps, which trace and compile,
apart). The target is the median training loss that its best rate has at the end; `KFAC()` trains
until it is there, or the time is up. The figure of merit is the share of the time that it needs.
Every curve is written to a JSON file with the environment; `--report` prints the README's table.
`--problem` measures some problems again and keeps the runs of the others.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import keras  # noqa: E402
import numpy as np  # noqa: E402
from environment import environment  # noqa: E402
from problems import PROBLEMS, load  # noqa: E402

from keras_kfac import KFAC, KFACCallback  # noqa: E402

ADAM_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# Adam's curve is only to be looked at, that of `KFAC()` tells when it is at the target.
ADAM_EVALUATIONS, KFAC_EVALUATIONS = 12, 60
KFAC_NAME = "KFAC()"


class Clock(keras.callbacks.Callback):
    """Times training steps, evaluates along the way; stops at a target or when the time is up."""

    def __init__(
        self,
        seconds: float,
        evaluations: int,
        target: float,
        evaluate: Callable[[keras.Model], float],
    ) -> None:
        super().__init__()
        self.target = target
        self.times = [seconds * (i + 1) / evaluations for i in range(evaluations)]
        self.evaluate = evaluate
        self.steps, self.first, self.seconds = 0, 0.0, 0.0
        self.curve: list[tuple[float, int, float]] = []

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Stops the clock."""
        elapsed = time.perf_counter() - self.began
        self.steps += 1
        if self.steps <= 2:
            self.first += elapsed
            return
        self.seconds += elapsed
        if self.seconds >= self.times[0]:
            self.times.pop(0)
            loss = self.evaluate(self.model)
            self.curve.append((self.seconds, self.steps, loss))
            self.model.stop_training = not self.times or loss <= self.target


def run(name: str, rate: float | None, data: dict, seconds: float, seed: int, target=-np.inf):
    """Trains one network: with Adam at a rate, or with `KFAC()`."""
    problem = PROBLEMS[name]
    x, y = data[problem.data]
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(x.shape[1:]), *problem.network()])
    model.compile(KFAC() if rate is None else keras.optimizers.Adam(rate), problem.loss())
    part = x[: problem.evaluated_examples], y[: problem.evaluated_examples]

    def evaluate(model: keras.Model) -> float:
        return float(model.evaluate(*part, batch_size=1000, verbose=0))

    evaluations = KFAC_EVALUATIONS if rate is None else ADAM_EVALUATIONS
    clock = Clock(seconds, evaluations, target, evaluate)
    callbacks = [clock, *([KFACCallback()] if rate is None else [])]
    model.fit(x, y, problem.batch_size, 1_000_000, 0, callbacks)
    return {
        "problem": name,
        "optimizer": KFAC_NAME if rate is None else f"Adam {rate:g}",
        "seed": seed,
        "first_two_steps_seconds": clock.first,
        "curve": clock.curve,
    }


def final_loss(run: dict) -> float:
    """The loss at the end, infinite if it is not a number."""
    loss = run["curve"][-1][2]
    return loss if np.isfinite(loss) else np.inf


def runs_of(name: str, data: dict, args: argparse.Namespace) -> Iterator[dict]:
    """All runs on one problem: Adam's grid, its best rate on all seeds, then `KFAC()`."""
    first, *others = args.seeds
    best: list[dict] = []
    for rate in ADAM_RATES:
        result = run(name, rate, data, args.seconds, first)
        yield result
        if not best or final_loss(result) < final_loss(best[0]):
            best, best_rate = [result], rate
    for seed in others:
        best.append(run(name, best_rate, data, args.seconds, seed))
        yield best[-1]
    target = statistics.median(map(final_loss, best))
    for seed in args.seeds:
        yield run(name, None, data, args.seconds, seed, target)


def measure(args: argparse.Namespace, path: Path) -> None:
    """All runs, each written when it ends; those of other problems in the file stay."""
    data = load(args)
    result = json.loads(path.read_text()) if path.exists() else {"environments": {}, "runs": []}
    for name in PROBLEMS:
        if args.problem not in name:
            continue
        result["environments"][name] = environment()
        result["runs"] = [run for run in result["runs"] if run["problem"] != name]
        for run in runs_of(name, data, args):
            result["runs"].append(run)
            path.write_text(json.dumps(result, indent=1))
            print(name, run["optimizer"], run["seed"], run["curve"][-1], flush=True)


def reached(curve: list, target: float) -> float:
    """When the loss first is at the target; infinite if it never is."""
    return next((seconds for seconds, _, loss in curve if loss <= target), float("inf"))


def report(result: dict) -> str:
    """Medians over seeds, as a table."""
    lines = [
        "| problem | best Adam | its loss | its seconds | `KFAC()`'s seconds to it | share "
        "| ms per step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PROBLEMS:
        runs = [r for r in result["runs"] if r["problem"] == name]
        if not runs:
            continue
        own = [r for r in runs if r["optimizer"] == KFAC_NAME]
        seeds = {r["seed"] for r in own}
        rivals: dict[str, list[dict]] = {}
        for r in runs:
            rivals.setdefault(r["optimizer"], []).append(r)
        rivals = {o: rs for o, rs in rivals.items() if {r["seed"] for r in rs} == seeds}
        label = min(rivals.keys() - {KFAC_NAME}, key=lambda o: _median(rivals[o], final_loss))
        adam = rivals[label]
        target = _median(adam, final_loss)
        adam_seconds = _median(adam, lambda r: r["curve"][-1][0])
        each = [reached(r["curve"], target) for r in own]
        own_seconds = statistics.median(each)
        share = f"{own_seconds / adam_seconds:.2f}" if np.isfinite(own_seconds) else "-"
        seconds = ", ".join(f"{t:.0f}" if np.isfinite(t) else "not reached" for t in each)
        cost = (
            _median(rs, lambda r: 1000 * r["curve"][-1][0] / r["curve"][-1][1])
            for rs in (own, adam)
        )
        lines.append(
            f"| {name} | {label.removeprefix('Adam ')} | {target:.4f} | {adam_seconds:.0f} "
            f"| {seconds} | {share} | {' / '.join(f'{c:.1f}' for c in cost)} |"
        )
    return "\n".join(lines)


def milliseconds_per_step(run: dict) -> float:
    """The mean, evaluations apart."""
    seconds, steps, _ = run["curve"][-1]
    return 1000 * seconds / steps


def _median(runs: list[dict], value: Callable[[dict], float]) -> float:
    return statistics.median(value(run) for run in runs)


def arguments(description: str, seconds: float, seeds: list[int]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--mnist", type=Path, help=".npz file in place of the download")
    parser.add_argument("--fashion", type=Path, help=".npz file in place of the download")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--problem", default="", help="only problems whose names contain this")
    parser.add_argument("--report", action="store_true", help="only print the table")
    return parser.parse_args()


def main() -> None:
    """Measures, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=120.0, seeds=[1, 2, 3])
    path = ROOT / "benchmarks" / "results" / "defaults.json"
    if not args.report:
        measure(args, path)
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
