"""What steps cost, by one command: runs the benchmarks of speed, and draws what they found.

    python benchmarks/speed.py [--jax-python jax/bin/python] [--report]

Each script runs in a process of its own, one after the other (about an hour on 2 cores), and writes
its results to `benchmarks/results`. Then, or at once with `--report`, their tables are printed and
`step_cost.png` and `scaling.png` drawn in `docs/images`. Without a Python that has kfac-jax that
comparison is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
SCRIPTS = (
    ("step_cost.py",),
    ("step_cost.py", "--variants"),
    ("scaling.py",),
    ("footprint.py",),
    ("profile_step.py",),
    ("profile_step.py", "--same-work"),
    ("symmetric_product.py",),
)


def milliseconds(result: dict, optimizer: str) -> float:
    """Of a step: the median over turns of their means."""
    return 1000 * statistics.median(map(statistics.mean, result["steps"][optimizer]))


def draw_step_cost() -> None:
    """Bars: the step of each optimizer in that of Adam, for each network."""
    results = json.loads((RESULTS / "step_cost.json").read_text())
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    optimizers = ["KFAC()", "SGD", "Muon"]
    for place, name in enumerate(optimizers):
        ratios = [milliseconds(r, name) / milliseconds(r, "Adam") for r in results.values()]
        positions = [index + 0.27 * (place - 1) for index in range(len(ratios))]
        bars = axes.bar(positions, ratios, 0.25, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [name.replace(", ", "\n") for name in results])
    axes.tick_params(axis="x", labelsize=8)
    axes.set(yscale="log", ylabel="time of a step / Adam's", title="What a settled step costs")
    axes.legend()
    figure.savefig(IMAGES / "step_cost.png", dpi=120)


def draw_scaling() -> None:
    """A curve for each sweep: the step of `KFAC()` in that of Adam."""
    cases = json.loads((RESULTS / "scaling.json").read_text())["cases"]
    figure, all_axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
    sweeps = {
        "width of 3 layers, batch 128": lambda n: n.startswith("3 x") and n.endswith("batch 128"),
        "layers of 512 units, batch 128": lambda n: " x 512" in n and not n.startswith("3 x"),
        "batch, 3 layers of 1024 units": lambda n: n.startswith("3 x 1024") and "period" not in n,
    }
    for axes, (title, belongs) in zip(all_axes, sweeps.items()):
        found = {_number(name, title): r for name, r in cases.items() if belongs(name)}
        numbers = sorted(found)
        ratios = [
            milliseconds(found[n], "KFAC()") / milliseconds(found[n], "Adam") for n in numbers
        ]
        axes.plot(numbers, ratios, marker="o")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xticks=numbers, xticklabels=numbers)
    all_axes[0].set_ylabel("step of KFAC() / Adam's")
    all_axes[0].set_ylim(0, None)
    figure.savefig(IMAGES / "scaling.png", dpi=120)


def _number(name: str, title: str) -> int:
    """What a sweep varies, from the name of a case: `3 x 1024, batch 128`."""
    body, batch = name.split(", batch ")
    depth, width = body.split(" x ")
    return int({"width": width, "layer": depth, "batch": batch}[title[:5]])


def main() -> None:
    """Runs everything, or shows what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jax-python", help="a Python interpreter that has kfac-jax")
    parser.add_argument("--report", action="store_true", help="only tables and plots")
    args = parser.parse_args()
    scripts = list(SCRIPTS)
    if args.report:
        scripts = [(*script, "--report") for script in [*scripts, ("peer_step_cost.py",)]]
    elif args.jax_python:
        scripts.append(("peer_step_cost.py", "--jax-python", args.jax_python))
    for name, *options in scripts:
        print(f"\n{name} {' '.join(options)}", flush=True)
        subprocess.run([sys.executable, ROOT / "benchmarks" / name, *options], check=True)
    IMAGES.mkdir(exist_ok=True)
    draw_step_cost()
    draw_scaling()


if __name__ == "__main__":
    main()
