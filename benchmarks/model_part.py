"""How many rows of a small batch the quadratic model needs: loss after the same seconds.

    python benchmarks/model_part.py [--seconds 20] [--mnist mnist.npz] [--fashion fashion_mnist.npz]

`KFAC()` takes the curvature of its quadratic model on a sixteenth of the batch, and on so many rows
at least. Trains the networks of `defaults.py` whose batches are small enough for that to matter,
from the same weights on the same batches. Every curve is written to a JSON file with the
environment; `--report` prints the table in docs/speed.md.
"""

import json
import statistics
from unittest import mock

from defaults import ROOT, arguments, final_loss, milliseconds_per_step, run
from environment import environment
from problems import PROBLEMS, load

from keras_kfac.step import MODEL_PART

PATH = ROOT / "benchmarks" / "results" / "model_part.json"
ROWS = (32, 16)
# Not those of large batches; the rows of sequences are many, too.
NAMES = [
    n for n, problem in PROBLEMS.items() if problem.batch_size < 500 and problem.data != "source"
]


def report(result: dict) -> str:
    """Losses of all seeds at the end of the time, and what a step takes."""
    lines = ["| problem | rows | loss at the end | steps | ms per step |", "|---|---|---|---|---|"]
    for name in NAMES:
        for rows in ROWS:
            runs = [r for r in result["runs"] if (r["problem"], r["rows"]) == (name, rows)]
            if not runs:
                continue
            losses = ", ".join(f"{final_loss(r):.4f}" for r in runs)
            steps = ", ".join(str(r["curve"][-1][1]) for r in runs)
            cost = statistics.median(map(milliseconds_per_step, runs))
            lines.append(f"| {name} | {rows} | {losses} | {steps} | {cost:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures all in turns, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=20.0, seeds=[1, 2, 3])
    if not args.report:
        data = load(args)
        result: dict = {"environment": environment(), "runs": []}
        for name in NAMES:
            for seed in args.seeds:
                for rows in ROWS:
                    part = MODEL_PART._replace(min_rows=rows)
                    with mock.patch("keras_kfac.step.MODEL_PART", part):
                        one = run(name, None, data, args.seconds, seed)
                    result["runs"].append({**one, "rows": rows})
                    print(name, seed, rows, one["curve"][-1], flush=True)
                    PATH.write_text(json.dumps(result, indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
