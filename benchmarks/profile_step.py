"""Where the time of a settled step goes: to which part of it, and to what kind of operation.

    python benchmarks/profile_step.py [--net autoencoder] [--same-work] [--report]

TensorFlow's profiler tells what each operation took in some steps of `KFAC()`. Its two threads run
operations side by side, so that their sum is up to twice the time of a step; beside another one, an
operation takes longer than alone. `--same-work` does in a step what kfac-jax does, as in
`peer_step_cost.py`. Sums by part and by kind go to a JSON file with the environment.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf
from environment import environment
from peer_step_cost import same_work_run, same_work_steps, steps_of
from step_cost import NETS, ROOT, Run, peak
from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

from keras_kfac import KFAC

PATH = ROOT / "benchmarks" / "results" / "profile_step.json"
STEPS = 20  # One period of the inverses.
PARTS = {
    "factors": "factors",
    "refresh": "inverses",
    "precondition": "preconditioning",
    "quadratic_model": "quadratic model",
    "adapt_damping": "loss after the step",
    "take_step": "the step itself",
}
PRODUCTS = "MatMul"
LARGEST = 12  # Kinds of operations to tell apart.


def operations(folder: str) -> Iterator[tuple[str, str, float]]:
    """Name, kind and milliseconds of all that ran in a profile."""
    (path,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
    space = XSpace.FromString(path.read_bytes())
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events if line.name.startswith("tf_Compute") else ():
                name, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if name and not name.endswith(":"):
                    yield name, kind, event.duration_ps / 1e9


def part_of(name: str) -> str:
    """The part of a step that an operation belongs to, by the scopes it is in."""
    scopes = name.split("/")
    return next((part for scope, part in PARTS.items() if scope in scopes), "gradient and others")


def profile(steps) -> dict:
    """Milliseconds in a step, by part and kind."""
    seconds = steps(STEPS)
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            steps(STEPS)
        parts, kinds = Counter(), Counter()
        for name, kind, duration in operations(folder):
            parts[part_of(name)] += duration / STEPS
            kinds[PRODUCTS if PRODUCTS in kind else kind] += duration / STEPS
    mean = 1000 * statistics.mean(seconds)
    return {"step": mean, "parts": parts, "kinds": kinds, "peak": peak()}


def report(results: dict) -> str:
    """Tables by part, and by kind."""
    lines = []
    for name, result in results.items():
        total = sum(result["parts"].values())
        lines += ["", f"{name}: {result['step']:.0f} ms a step, operations {total:.0f} ms", ""]
        lines += ["| part or kind of operation | ms | share |", "|---|---|---|"]
        kinds = sorted(result["kinds"].items(), key=lambda item: -item[1])
        rows = sorted(result["parts"].items(), key=lambda item: -item[1]) + kinds[:LARGEST]
        lines += [f"| {key} | {value:.1f} | {value / total:.2f} |" for key, value in rows]
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="autoencoder", help="networks whose names contain this")
    parser.add_argument("--same-work", action="store_true", help="of the autoencoder")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    args = parser.parse_args()
    results = json.loads(PATH.read_text()) if PATH.exists() else {}
    for name, net in NETS.items():
        if args.net not in name or args.report:
            continue
        if args.same_work:
            name += ", the work of kfac-jax"
            steps = same_work_steps(same_work_run(net))
        else:
            steps = steps_of(Run(net, KFAC()))
        steps(STEPS)
        results[name] = {"environment": environment(), **profile(steps)}
        PATH.write_text(json.dumps(results, indent=1))
    print(report(results))


if __name__ == "__main__":
    main()
