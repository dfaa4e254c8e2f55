"""What `KFAC()` takes beside the steps: importing, the first step, and memory.

    python benchmarks/footprint.py [--net autoencoder] [--report]

Each network of `step_cost.py` takes some steps under each optimizer in a process of its own, which
tells the largest memory that it ever held (resident, peak). What SGD without momentum takes is that
of TensorFlow, the network and its data. `KFAC()` is also asked what its factors and inverses take,
before the first step. Of that, tracing is what Python takes to build the graph; the rest is
TensorFlow, which optimises and runs it. The results are written to a JSON file with the
environment; `--report` prints the table in docs/speed.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATH = ROOT / "benchmarks" / "results" / "footprint.json"
STEPS = 45  # Two periods of the inverses, and a few.
SGD = "SGD without momentum"


def timed_traces(model: Any) -> list[float]:
    """The seconds that each tracing of a model's training step takes, once it is traced."""
    seconds: list[float] = []
    train_step = model.train_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = train_step(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    model.train_step = timed
    return seconds


def measure(net_name: str, optimizer_name: str) -> dict:
    """One network under one optimizer, to be called in a new process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    began = time.perf_counter()
    import keras

    keras_imported = time.perf_counter()
    import keras_kfac

    imported = time.perf_counter()
    import resource

    import step_cost

    optimizers = {"KFAC()": keras_kfac.KFAC, "Adam": keras.optimizers.Adam}
    optimizer = optimizers.get(optimizer_name, lambda: keras.optimizers.SGD(1e-4))()
    run = step_cost.Run(step_cost.NETS[net_name], optimizer)
    attached = 0.0
    if optimizer_name == "KFAC()":
        optimizer.detach()
        attaching = time.perf_counter()
        optimizer.attach(run.model)
        attached = time.perf_counter() - attaching
    stated = optimizer.coverage().memory if optimizer_name == "KFAC()" else 0
    traced = timed_traces(run.model)
    first, *_ = run.settle()
    for _ in range(STEPS):
        run.step()
    return {
        "import_keras_seconds": keras_imported - began,
        "import_keras_kfac_seconds": imported - keras_imported,
        "attach_seconds": attached,
        "trace_seconds": sum(traced),
        "first_step_seconds": first,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "stated_mib": stated / 2**20,
        "weights_mib": run.model.count_params() * 4 / 2**20,
    }


def report(results: dict) -> str:
    """A row for each network."""
    lines = [
        "| network | weights (MiB) | factors and inverses, as stated | peak above SGD: KFAC() "
        "| Adam | first step: KFAC() (s) | of this tracing | attaching | Adam | of this tracing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        own, adam, sgd = (runs[o] for o in ("KFAC()", "Adam", SGD))
        above = [f"{r['peak_mib'] - sgd['peak_mib']:.0f}" for r in (own, adam)]
        first = [
            f"{own['first_step_seconds']:.1f}",
            f"{own['trace_seconds']:.1f}",
            f"{own['attach_seconds']:.3f}",
            f"{adam['first_step_seconds']:.1f}",
            f"{adam['trace_seconds']:.1f}",
        ]
        size = f"{own['weights_mib']:.1f} | {own['stated_mib']:.1f}"
        lines.append(f"| {name} | {size} | {' | '.join(above)} | {' | '.join(first)} |")
    children = [run for runs in results["runs"].values() for run in runs.values()]
    for name in ("keras", "keras_kfac"):
        seconds = statistics.median(child[f"import_{name}_seconds"] for child in children)
        lines.append(f"import {name}: {seconds:.2f} s" + (" more" if name != "keras" else ""))
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="", help="only networks whose names contain this")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    results = json.loads(PATH.read_text()) if PATH.exists() else {"environment": {}, "runs": {}}
    if not args.report:
        from environment import environment
        from step_cost import NETS

        results["environment"] = environment()
        for net in (name for name in NETS if args.net in name):
            results["runs"][net] = {}
            for optimizer in ("KFAC()", "Adam", SGD):
                command = [sys.executable, __file__, "--child", net, optimizer]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results["runs"][net][optimizer] = json.loads(output.splitlines()[-1])
                print(net, optimizer, results["runs"][net][optimizer], flush=True)
            PATH.write_text(json.dumps(results, indent=1))
    print(report(results))


if __name__ == "__main__":
    main()
