"""What the largest factor costs and is worth: `KFAC(max_factor_size=...)` in seconds and loss.

    python benchmarks/factor_size.py [--seconds 40] [--mnist mnist.npz] [--fashion ...]

Trains the conv net of `step_cost.py` on Fashion-MNIST at batch 128, whose dense layers have factors
of 3137 and 1025 rows, and the deep autoencoder of `defaults.py`, with some of 785 and 1001. A limit
keeps larger ones in blocks: cheaper to invert and to multiply by, and without the covariances
between blocks. All train for the same seconds of training steps from the same weights on the same
batches; the loss is that of the first 10,000 training examples. Every curve is written to a JSON
file with the environment; `--report` prints the table in docs/speed.md.
"""

import itertools
import json
import statistics

import keras
from defaults import ROOT, Clock, arguments, milliseconds_per_step
from environment import environment
from problems import Problem, autoencoder, classification, load, pixels
from step_cost import conv_net

from keras_kfac import KFAC, KFACCallback

PATH = ROOT / "benchmarks" / "results" / "factor_size.json"
SIZES = (2304, 1152, 576)
EVALUATIONS = 12
CASES = {
    "conv net, batch 128": Problem(
        "fashion",
        lambda: [keras.layers.Reshape((28, 28, 1)), *conv_net()],
        classification,
        batch_size=128,
    ),
    "deep autoencoder, batch 1000": Problem("mnist", autoencoder, pixels, batch_size=1000),
}


def run(case: str, size: int, data: dict, seconds: float, seed: int) -> dict:
    """Trains one network."""
    problem = CASES[case]
    x, y = data[problem.data]
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(x.shape[1:]), *problem.network()])
    model.compile(KFAC(max_factor_size=size), problem.loss())
    part = x[: problem.evaluated_examples], y[: problem.evaluated_examples]

    def evaluate(model: keras.Model) -> float:
        return float(model.evaluate(*part, batch_size=1000, verbose=0))

    clock = Clock(seconds, EVALUATIONS, -float("inf"), evaluate)
    model.fit(x, y, problem.batch_size, 1_000_000, 0, [clock, KFACCallback()])
    return {"case": case, "max_factor_size": size, "seed": seed, "curve": clock.curve}


def report(result: dict) -> str:
    """Losses of all seeds at the end, and on the way the median."""
    lines = [
        "| network | `max_factor_size` | loss after half of the time | at the end | steps "
        "| ms per step |",
        "|---|---|---|---|---|---|",
    ]
    for case, size in itertools.product(CASES, SIZES):
        runs = [r for r in result["runs"] if (r["case"], r["max_factor_size"]) == (case, size)]
        halves = ", ".join(f"{r['curve'][len(r['curve']) // 2 - 1][2]:.4f}" for r in runs)
        ends = ", ".join(f"{r['curve'][-1][2]:.4f}" for r in runs)
        steps = statistics.median(r["curve"][-1][1] for r in runs)
        cost = statistics.median(milliseconds_per_step(r) for r in runs)
        lines.append(f"| {case} | {size} | {halves} | {ends} | {steps:.0f} | {cost:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures all sizes in turns, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=40.0, seeds=[1, 2, 3])
    if not args.report:
        data = load(args)
        result: dict = {"environment": environment(), "runs": []}
        for case, seed, size in itertools.product(CASES, args.seeds, SIZES):
            result["runs"].append(run(case, size, data, args.seconds, seed))
            print(case, size, seed, result["runs"][-1]["curve"][-1], flush=True)
            PATH.write_text(json.dumps(result, indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
