"""How much of a batch the quadratic model needs: loss after the same seconds.

    python benchmarks/model_part.py [--seconds 20] [--mnist mnist.npz] [--fashion fashion_mnist.npz]

`KFAC()` takes the curvature of its quadratic model on a small part of the batch, and on so many
rows at least. Trains the networks of `defaults.py` with several such parts (the transformer takes
two sequences with all of them), from the same weights on the same batches. Every curve is written
to a JSON file with the environment; `--report` prints the table in docs/speed.md.
"""

import json
import statistics
from unittest import mock

from defaults import ROOT, arguments, final_loss, milliseconds_per_step, run
from environment import environment
from problems import PROBLEMS, load

from keras_kfac.step import MODEL_PART

PATH = ROOT / "benchmarks" / "results" / "model_part.json"
PARTS = ((1 / 16, 32), (1 / 32, 16))  # Fraction, and rows at least.
NAMES = [name for name, problem in PROBLEMS.items() if problem.data != "source"]


def report(result: dict) -> str:
    """Losses of all seeds at the end of the time, and what a step takes."""
    lines = [
        "| problem | part, rows at least | loss at the end | steps | ms per step |",
        "|---|---|---|---|---|",
    ]
    for name in NAMES:
        for fraction, rows in PARTS:
            key = name, fraction, rows
            runs = [r for r in result["runs"] if (r["problem"], r["fraction"], r["rows"]) == key]
            if not runs:
                continue
            losses = ", ".join(f"{final_loss(r):.4f}" for r in runs)
            steps = ", ".join(str(r["curve"][-1][1]) for r in runs)
            cost = statistics.median(map(milliseconds_per_step, runs))
            lines.append(
                f"| {name} | 1/{1 / fraction:.0f}, {rows} | {losses} | {steps} | {cost:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures all in turns, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=20.0, seeds=[1, 2, 3])
    if not args.report:
        data = load(args)
        result: dict = {"environment": environment(), "runs": []}
        for name in NAMES:
            for seed in args.seeds:
                for fraction, rows in PARTS:
                    part = MODEL_PART._replace(fraction=fraction, min_rows=rows)
                    with mock.patch("keras_kfac.step.MODEL_PART", part):
                        one = run(name, None, data, args.seconds, seed)
                    result["runs"].append({**one, "fraction": fraction, "rows": rows})
                    print(name, seed, rows, one["curve"][-1], flush=True)
                    PATH.write_text(json.dumps(result, indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
