"""What each part of the adaptive step is worth: `KFAC()` with one part changed at a time.

    python benchmarks/step_control.py --seconds 12 [--mnist mnist.npz] [--fashion fashion_mnist.npz]

The problems are those of `defaults.py` but for the conv net. A variant replaces a constant or a
rule of the library for one run. Every curve is written to a JSON file with the environment;
`--report` prints the table in docs/step-control.md from it.
"""

import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import defaults
from environment import environment

from keras_kfac import LevenbergMarquardt, step_rule

AveragedModel, next_damping = step_rule.AveragedModel, LevenbergMarquardt.next


def averaging(decay: float) -> Any:
    """The model averaged with a constant decay."""
    include = AveragedModel.include
    return mock.patch.object(AveragedModel, "include", lambda self, m, _: include(self, m, decay))


def discount(power: float) -> Any:
    """The slope discounted by a power of the signal share."""
    return mock.patch.object(step_rule, "_DISCOUNT_POWER", power)


def floor_at_mean_eigenvalue() -> Any:
    """The floor of the damping as for batches that are all noise."""

    def changed(self: Any, damping: Any, ratio: Any, scale: Any, _: Any, iterations: Any) -> Any:
        return next_damping(self, damping, ratio, scale, 0 * damping, iterations)

    return mock.patch.object(LevenbergMarquardt, "next", changed)


VARIANTS: dict[str, Callable[[], Any]] = {
    "the default": contextlib.nullcontext,
    "no averaging": lambda: averaging(0.0),
    "averaging with decay .98 always": lambda: averaging(0.98),
    "no discount": lambda: discount(0.0),
    "discount `√r`": lambda: discount(0.5),
    "discount `r`": lambda: discount(1.0),
    "floor at the mean eigenvalue": floor_at_mean_eigenvalue,
}
PROBLEMS = [name for name in defaults.PROBLEMS if "conv" not in name]


def measure(args: Any, path: Path) -> None:
    """All runs, each written when it ends; those of other problems in the file stay."""
    data = defaults.load(args)
    problems = [name for name in PROBLEMS if args.problem in name]
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in old if run["problem"] not in problems]
    for problem, seed in itertools.product(problems, args.seeds):
        for variant, change in VARIANTS.items():
            with change():
                result = defaults.run(problem, None, data, args.seconds, seed)
            runs.append(result | {"variant": variant, "seconds": args.seconds})
            path.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1))
            print(problem, variant, result["curve"][-1][2], flush=True)


def report(result: dict) -> str:
    """Final training losses, medians over seeds, as a table."""
    problems = list(dict.fromkeys(run["problem"] for run in result["runs"]))
    lines = ["| | " + " | ".join(problems) + " |", "|---" * (1 + len(problems)) + "|"]
    for variant in VARIANTS:
        cells = []
        for problem in problems:
            finals = [
                run["curve"][-1][2]
                for run in result["runs"]
                if (run["problem"], run["variant"]) == (problem, variant)
            ]
            loss = statistics.median(x if math.isfinite(x) else math.inf for x in finals)
            cells.append(f"{loss:.4f}" if math.isfinite(loss) else "not finite")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    args = defaults.arguments(__doc__.splitlines()[0], seconds=12.0, seeds=[1])
    path = Path(__file__).parent / "results" / "step_control.json"
    if not args.report:
        measure(args, path)
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
