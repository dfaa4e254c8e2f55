"""Deep autoencoders: K-FAC as the example sets it against Adam at its best learning rate.

    python benchmarks/autoencoder.py curves --seconds 30
    python benchmarks/autoencoder.py mnist --seconds 45 [--data mnist.npz]

Adam runs with each of six learning rates on the first seed; the best of them, by test error at the
end, runs on all seeds. K-FAC runs on all seeds without a setting. Every run is written to a JSON
file with the environment; `--report` prints the table in the README from that file.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks"), str(ROOT)]

import deep_autoencoder as example  # noqa: E402  (its folder has to be on the path)
import keras  # noqa: E402
from environment import environment  # noqa: E402

ADAM_RATES = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 6e-3)


def run(name, optimizer, args, seed) -> dict:
    """Trains one autoencoder and returns its curve."""
    images = example.load_data(argparse.Namespace(**vars(args), seed=seed))
    train_images, test_images = (x.reshape(len(x), -1) for x in images)
    recorder = example.Recorder(name, test_images, args.seconds, None)
    example.train(optimizer, args.setup, train_images, recorder, args.batch_size, seed)
    return {
        "name": name,
        "seed": seed,
        "compile_seconds": recorder.compile_seconds,
        "records": [dataclasses.asdict(record) for record in recorder.records],
    }


def measure(args) -> dict:
    """All runs of one dataset."""
    first, *others = args.seeds
    adam = {}
    for rate in ADAM_RATES:
        adam[rate] = [run(f"Adam {rate:g}", keras.optimizers.Adam(rate), args, first)]
    best = min(ADAM_RATES, key=lambda rate: adam[rate][0]["records"][-1]["test_error"])
    kfac = [run("K-FAC", example.make_kfac(args.setup, first), args, first)]
    for seed in others:  # in turn, so that a noisy minute meets both
        adam[best].append(run(f"Adam {best:g}", keras.optimizers.Adam(best), args, seed))
        kfac.append(run("K-FAC", example.make_kfac(args.setup, seed), args, seed))
    return {
        "dataset": args.dataset,
        "environment": environment(),
        "setup": dataclasses.asdict(args.setup),
        "best_adam": f"Adam {best:g}",
        "runs": [*kfac, *(r for runs in adam.values() for r in runs)],
    }


def report(result: dict) -> str:
    """Median over seeds of the test error at equal steps and at equal seconds."""
    names = ["K-FAC", result["best_adam"]]
    runs = {name: [r for r in result["runs"] if r["name"] == name] for name in names}
    lines = ["| | " + " | ".join(names) + " |", "|---|---|---|"]
    for axis in ("step", "seconds"):
        end = min(r["records"][-1][axis] for each in runs.values() for r in each)
        for value in (end / 4, end / 2, end):
            errors = [
                statistics.median(
                    example.error_at([example.Record(**x) for x in r["records"]], axis, value)
                    for r in runs[name]
                )
                for name in names
            ]
            unit = "steps" if axis == "step" else "s"
            lines.append(
                f"| test error after {value:.0f} {unit} | {errors[0]:.2f} | {errors[1]:.2f} |"
            )
    cost = [
        statistics.median(
            1000 * r["records"][-1]["seconds"] / (r["records"][-1]["step"] - 1) for r in runs[name]
        )
        for name in names
    ]
    lines.append(f"| milliseconds per step | {cost[0]:.0f} | {cost[1]:.0f} |")
    compile_ = [statistics.median(r["compile_seconds"] for r in runs[name]) for name in names]
    lines.append(f"| first step, not counted (s) | {compile_[0]:.1f} | {compile_[1]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=example.SETUPS)
    parser.add_argument("--data", type=Path, help=".npz file with x_train and x_test for mnist")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"autoencoder_{args.dataset}.json"
    if not args.report:
        args.batch_size, args.train_images, args.test_images = 1000, None, None
        args.setup = example.SETUPS[args.dataset]
        path.write_text(json.dumps(measure(args), indent=1))
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
