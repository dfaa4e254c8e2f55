"""The structures of curvature on the same problems, for the same seconds of training steps.

    python benchmarks/structures.py [--seconds 16] [--mnist mnist.npz] [--fashion fashion_mnist.npz]

`KFAC(curvature=...)` without another setting, each structure from the same weights on the same
batches of the problems of `problems.py`, and of one more for those that keep a matrix of all
weights of a layer or of the model. Evaluation and the first two steps, which trace and compile, are
not counted. Every curve is written to a JSON file with the environment; `--report` prints the table
in docs/curvature.md; `--problem` and `--seeds` measure some again and keep the others.
"""

import json
import statistics

import keras
import numpy as np
from defaults import ROOT, Clock, arguments, milliseconds_per_step
from environment import environment
from problems import PROBLEMS, Problem, dense, load

from keras_kfac import KFAC, KFACCallback

EVALUATIONS = 4
PATH = ROOT / "benchmarks" / "results" / "structures.json"
STRUCTURES = ("kfac", "ekfac", "input", "inverse_free", "diagonal", "tridiagonal")
# "full" would keep gigabytes of larger networks, and "dense" no matrix; this one has 1617 weights.
# "linear_exact" is "kfac" but for the damping, where the learning rate adapts.
OF_SMALL = (*STRUCTURES, "linear_exact", "full", "dense")
SMALL = {
    "small net, same table, batch 256": Problem(
        "table",
        lambda: dense([32, 24], "tanh", 1),
        lambda: keras.losses.MeanSquaredError(),
        256,
    )
}
ALL = PROBLEMS | SMALL


def structures_of(name: str) -> tuple[str, ...]:
    """Those to compare on a problem."""
    if name in SMALL:
        return OF_SMALL
    if "transformer" in name:  # No chain.
        return tuple(s for s in STRUCTURES if s != "tridiagonal")
    return STRUCTURES


def run(name: str, curvature: str, data: dict, seconds: float, seed: int) -> dict:
    """Trains one network."""
    problem = ALL[name]
    x, y = data[problem.data]
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(x.shape[1:]), *problem.network()])
    model.compile(KFAC(curvature=curvature), problem.loss())
    part = x[: problem.evaluated_examples], y[: problem.evaluated_examples]

    def evaluate(model: keras.Model) -> float:
        return float(model.evaluate(*part, batch_size=1000, verbose=0))

    clock = Clock(seconds, EVALUATIONS, -np.inf, evaluate)
    model.fit(x, y, problem.batch_size, 1_000_000, 0, [clock, KFACCallback()])
    memory = model.optimizer.coverage().memory
    found = {"problem": name, "curvature": curvature, "seed": seed, "memory": memory}
    return {**found, "first_two_steps_seconds": clock.first, "curve": clock.curve}


def report(result: dict) -> str:
    """Medians over seeds, a row for each problem and structure."""
    lines = [
        "| problem | curvature | loss at half of the time | at the end | steps | ms per step "
        "| factors and inverses (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ALL:
        for curvature in structures_of(name):
            runs = [
                r
                for r in result["runs"]
                if (r["problem"], r["curvature"]) == (name, curvature) and r["curve"]
            ]
            if not runs:
                continue
            curves = [r["curve"] for r in runs]
            losses = [
                statistics.median(c[len(c) * part // 2 - 1][2] for c in curves) for part in (1, 2)
            ]
            steps = statistics.median(c[-1][1] for c in curves)
            cost = statistics.median(map(milliseconds_per_step, runs))
            memory = runs[0]["memory"] / 2**20
            cells = [*(f"{loss:.4f}" for loss in losses), f"{steps:.0f}", f"{cost:.1f}"]
            lines.append(f'| {name} | "{curvature}" | {" | ".join(cells)} | {memory:.1f} |')
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    args = arguments(__doc__.splitlines()[0], seconds=16.0, seeds=[1])
    result = json.loads(PATH.read_text()) if PATH.exists() else {"environments": {}, "runs": []}
    if not args.report:
        data = load(args)
        for name in (n for n in ALL if args.problem in n):
            for seed in args.seeds:
                result["environments"][f"{name}, seed {seed}"] = environment()
                others = (r for r in result["runs"] if (r["problem"], r["seed"]) != (name, seed))
                result["runs"] = list(others)
                for curvature in structures_of(name):
                    found = run(name, curvature, data, args.seconds, seed)
                    result["runs"].append(found)
                    PATH.write_text(json.dumps(result, indent=1))
                    print(name, curvature, seed, found["curve"][-1:], flush=True)
    print(report(result))


if __name__ == "__main__":
    main()
