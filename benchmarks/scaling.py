"""How the cost of a step grows with width, depth, batch and the period of the inverses.

    python benchmarks/scaling.py [--sweep width] [--turns 3] [--report]

`KFAC()` and Adam in turns, as in `step_cost.py`, on dense relu networks of random data. What each
case took is written to a JSON file with the environment; `--report` prints the table in
docs/speed.md.
"""

import argparse
import json

from environment import environment
from step_cost import OPTIMIZERS, ROOT, Net, figures, measure, mlp

from keras_kfac import KFAC

PATH = ROOT / "benchmarks" / "results" / "scaling.json"

SWEEPS: dict[str, dict[str, tuple[Net, dict]]] = {
    "width": {f"3 x {w}, batch 128": (mlp(w), {}) for w in (256, 512, 1024, 2048, 4096)},
    "depth": {f"{d} x 512, batch 128": (mlp(512, depth=d), {}) for d in (2, 4, 8, 16)},
    "batch": {f"3 x 1024, batch {b}": (mlp(1024, batch=b), {}) for b in (32, 128, 512, 2048)},
    "inverse_update_period": {
        f"3 x 1024, batch 128, period {p}": (
            mlp(1024),
            {"inverse_update_period": p, "factor_update_period": 5},
        )
        for p in (5, 20, 40)
    },
}


def report(results: dict) -> str:
    """A row for each case."""
    lines = [
        "| network | KFAC() (ms) | Adam (ms) | ratio | slowest of a turn / median "
        "| first step, KFAC() / Adam (s) |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["cases"].items():
        own, rival = (figures(result, optimizer) for optimizer in ("KFAC()", "Adam"))
        cells = [f"{own.milliseconds:.1f}", f"{rival.milliseconds:.1f}"]
        cells += [f"{own.ratio:.2f}", f"{own.spike:.1f}"]
        cells.append(" / ".join(f"{result['first_step'][o]:.1f}" for o in ("KFAC()", "Adam")))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", default="", help="only sweeps whose names contain this")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    results = json.loads(PATH.read_text()) if PATH.exists() else {"environment": {}, "cases": {}}
    for sweep, cases in SWEEPS.items():
        if args.sweep not in sweep or args.report:
            continue
        for name, (net, options) in cases.items():
            optimizers = {"KFAC()": lambda o=options: KFAC(**o), "Adam": OPTIMIZERS["Adam"]}
            results["environment"] = environment()
            results["cases"][name] = measure(net, args.turns, optimizers)
            PATH.write_text(json.dumps(results, indent=1))
            print(name, flush=True)
    print(report(results))


if __name__ == "__main__":
    main()
