"""Both ways to treat shared weights, where a network averages over positions before its loss.

    python benchmarks/weight_sharing.py [--seconds 40] [--fashion fashion_mnist.npz]

`KFAC(weight_sharing=...)` trains a small convolutional network with global average pooling, as most
image classifiers have it, by "expand" and by "reduce", for the same seconds of training steps.
Every curve is written to a JSON file with the environment; `--report` prints the table.
"""

import json
import statistics

import keras
import numpy as np
from defaults import ROOT, Clock, arguments, milliseconds_per_step
from environment import environment
from problems import classification, load

from keras_kfac import KFAC, KFACCallback

layers = keras.layers
EVALUATIONS = 8
PATH = ROOT / "benchmarks" / "results" / "weight_sharing.json"


def network() -> keras.Model:
    """Three convolutions, the average over pixels, one dense layer."""
    body = [layers.Conv2D(n, 3, 2, "same", activation="relu") for n in (32, 64, 128)]
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Reshape((28, 28, 1)),
            *body,
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def run(choice: str, data: tuple, seconds: float, seed: int) -> dict:
    """Trains one network."""
    keras.utils.set_random_seed(seed)
    model = network()
    model.compile(KFAC(weight_sharing=choice), classification())
    x, y = data

    def evaluate(model: keras.Model) -> float:
        return float(model.evaluate(x[:10_000], y[:10_000], batch_size=1000, verbose=0))

    clock = Clock(seconds, EVALUATIONS, -np.inf, evaluate)
    model.fit(x, y, 128, 1_000_000, 0, [clock, KFACCallback()])
    return {"weight_sharing": choice, "seed": seed, "curve": clock.curve}


def report(result: dict) -> str:
    """Medians over seeds, as a table."""
    lines = [
        "| | loss at half of the time | at the end | steps | ms per step |",
        "|---|---|---|---|---|",
    ]
    for choice in ("expand", "reduce"):
        runs = [r for r in result["runs"] if r["weight_sharing"] == choice]
        curves = [r["curve"] for r in runs]
        middle, end = (statistics.median(c[len(c) * k // 2 - 1][2] for c in curves) for k in (1, 2))
        steps = statistics.median(c[-1][1] for c in curves)
        cost = statistics.median(map(milliseconds_per_step, runs))
        lines.append(f'| "{choice}" | {middle:.4f} | {end:.4f} | {steps:.0f} | {cost:.1f} |')
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=40.0, seeds=[1, 2, 3])
    if not args.report:
        data = load(args)["fashion"]
        result: dict = {"environment": environment(), "runs": []}
        for seed in args.seeds:
            for choice in ("expand", "reduce"):
                result["runs"].append(run(choice, data, args.seconds, seed))
                print(choice, seed, result["runs"][-1]["curve"][-1], flush=True)
        PATH.write_text(json.dumps(result, indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
