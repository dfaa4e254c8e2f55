"""What the largest factor costs and is worth: `KFAC(max_factor_size=...)` in seconds and loss.

    python benchmarks/factor_size.py [--seconds 60] [--mnist mnist.npz] [--fashion ...]

Trains the conv net of `step_cost.py` on Fashion-MNIST at batch 128. Its dense layer has an input
factor of 3137 rows, which a lower limit keeps in blocks: cheaper to invert and to multiply by, and
without the covariances between blocks. All train for the same seconds of training steps from the
same weights on the same batches; the loss is that of the first 10,000 training examples. Every
curve is written to a JSON file with the environment; `--report` prints the table in docs/speed.md.
"""

import json
import statistics

import keras
from defaults import ROOT, Clock, arguments, milliseconds_per_step
from environment import environment
from problems import classification, load
from step_cost import conv_net

from keras_kfac import KFAC, KFACCallback

PATH = ROOT / "benchmarks" / "results" / "factor_size.json"
SIZES = (8192, 2048, 1025)  # The other dense layer has 1025 rows.
BATCH_SIZE, EVALUATED, EVALUATIONS = 128, 10_000, 12


def run(size: int, data: tuple, seconds: float, seed: int) -> dict:
    """Trains one network."""
    x, y = data[0][..., None], data[1]
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(x.shape[1:]), *conv_net()])
    model.compile(KFAC(max_factor_size=size), classification())
    part = x[:EVALUATED], y[:EVALUATED]

    def evaluate(model: keras.Model) -> float:
        return float(model.evaluate(*part, batch_size=1000, verbose=0))

    clock = Clock(seconds, EVALUATIONS, -float("inf"), evaluate)
    model.fit(x, y, BATCH_SIZE, 1_000_000, 0, [clock, KFACCallback()])
    return {"max_factor_size": size, "seed": seed, "curve": clock.curve}


def report(result: dict) -> str:
    """Losses of all seeds at the end, and on the way the median."""
    lines = [
        "| `max_factor_size` | loss after half of the time | at the end | steps | ms per step |",
        "|---|---|---|---|---|",
    ]
    for size in SIZES:
        runs = [r for r in result["runs"] if r["max_factor_size"] == size]
        halves = ", ".join(f"{r['curve'][len(r['curve']) // 2 - 1][2]:.4f}" for r in runs)
        ends = ", ".join(f"{r['curve'][-1][2]:.4f}" for r in runs)
        steps = statistics.median(r["curve"][-1][1] for r in runs)
        cost = statistics.median(milliseconds_per_step(r) for r in runs)
        lines.append(f"| {size} | {halves} | {ends} | {steps:.0f} | {cost:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures all sizes in turns, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=60.0, seeds=[1, 2, 3])
    if not args.report:
        data = load(args)["fashion"]
        result: dict = {"environment": environment(), "runs": []}
        for seed in args.seeds:
            for size in SIZES:
                result["runs"].append(run(size, data, args.seconds, seed))
                print(size, seed, result["runs"][-1]["curve"][-1], flush=True)
                PATH.write_text(json.dumps(result, indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
