"""Differential equations: errors of the natural gradient, L-BFGS and Adam after equal seconds.

    python benchmarks/equation_solvers.py [--seconds 30] [--settings]

The equations and optimizers are those of `examples/differential_equations.py`. Adam runs with each
of several rates on the first seed; the one that ends lowest runs on all seeds. The first round of
each run, which traces and compiles, is not counted. Every curve is written to a JSON file with the
environment; `--report` prints the table in docs/residuals.md from that file. `--settings` runs the
natural gradient alone, with several cut-offs and dampings.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks"), str(ROOT)]

import differential_equations as example  # noqa: E402  (its folder has to be on the path)
from environment import environment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "equation_solvers.json"
RESULTS_OF_SETTINGS = RESULTS.with_name("equation_settings.json")
ADAM_RATES = (1e-2, 1e-3, 3e-3, 3e-2)
TARGET = 1e-6
SETTINGS: dict[str, dict[str, float | None]] = {
    "default": {"cutoff": None},
    **{f"cutoff={cutoff:g}": {"cutoff": cutoff} for cutoff in (3e-7, 1e-7, 3e-8, 1e-8, 1e-10)},
    **{f"damping={d:g}": {"cutoff": None, "damping": d} for d in (1e-12, 1e-9, 1e-6)},
}


def one_run(
    equation: str, seconds: float, optimizer: str, make_round: example.MakeRound, seed: int
) -> dict:
    """Trains one network."""
    task = example.Task(example.EQUATIONS[equation], seed)
    curve = example.train(task, make_round(task), seconds)
    return {"equation": equation, "optimizer": optimizer, "seed": seed, "curve": curve}


def runs_of_settings(equation: str, seconds: float, seeds: list[int]) -> Iterator[dict]:
    """The natural gradient with each setting."""
    for seed in seeds:
        for name, setting in SETTINGS.items():
            make_round = partial(example.by_natural_gradient, **setting)
            yield one_run(equation, seconds, name, make_round, seed)


def all_runs(equation: str, seconds: float, seeds: list[int]) -> Iterator[dict]:
    """Every run; first the rates of Adam."""
    first = seeds[0]
    makers = {name: make for name, make in example.OPTIMIZERS.items() if name != "Adam"}
    run = partial(one_run, equation, seconds)
    adam = {}
    for rate in ADAM_RATES:
        name = f"Adam {rate:g}"
        makers[name] = partial(example.by_adam, rate=rate)
        adam[name] = run(name, makers[name], first)
        yield adam[name]
    best = min(adam, key=lambda name: last_error(adam[name]))
    chosen = {name: make for name, make in makers.items() if name == best or name not in adam}
    for seed in seeds:  # in turn, so that a noisy minute meets all
        for name, make_round in chosen.items():
            if (name, seed) != (best, first):
                yield run(name, make_round, seed)


def last_error(run: dict) -> float:
    """The relative L2 error at the end."""
    return run["curve"][-1][2]


def report(result: dict) -> str:
    """Medians over the seeds, and the worst, as a table."""
    lines = [
        "| equation | optimizer | relative L2 error, median | worst seed "
        f"| seconds to {TARGET:.0e}, median | steps | ms per step |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = result["runs"]
    seeds = {run["seed"] for run in runs}
    for equation in dict.fromkeys(run["equation"] for run in runs):
        of = [run for run in runs if run["equation"] == equation]
        for name in dict.fromkeys(run["optimizer"] for run in of):
            same = [run for run in of if run["optimizer"] == name]
            if {run["seed"] for run in same} != seeds:  # a rate that was not the best
                continue
            errors = [last_error(run) for run in same]
            times = [
                next((seconds for seconds, _, error in run["curve"] if error <= TARGET), None)
                for run in same
            ]
            time = "not reached" if None in times else f"{statistics.median(times):.1f}"
            steps = statistics.median(run["curve"][-1][1] for run in same)
            cost = statistics.median(1000 * r["curve"][-1][0] / r["curve"][-1][1] for r in same)
            lines.append(
                f"| {equation} | {name} | {statistics.median(errors):.0e} | {max(errors):.0e} "
                f"| {time} | {steps:.0f} | {cost:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", action="store_true", help="of the natural gradient")
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = RESULTS_OF_SETTINGS if args.settings else RESULTS
    runs = runs_of_settings if args.settings else all_runs
    if not args.report:
        result = {"environment": environment(), "seconds": args.seconds, "runs": []}
        for equation in example.EQUATIONS:
            for run in runs(equation, args.seconds, args.seeds):
                result["runs"].append(run)
                path.write_text(json.dumps(result))
                print(equation, run["optimizer"], run["seed"], run["curve"][-1], flush=True)
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
