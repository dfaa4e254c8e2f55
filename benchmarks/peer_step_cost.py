"""What a step of kfac-jax costs on the autoencoder beside one of `KFAC()`, in turns.

    python benchmarks/peer_step_cost.py --jax-python jax/bin/python [--turns 5] [--report]

Same network, weights and batch of 1000 images. `KFAC()` at its settled schedule against kfac-jax at
its default one (factors every step, inverses every fifth), and both with the same work: the periods
of kfac-jax, whole factors, statistics and quadratic model on the whole batch, one learning rate for
all layers. In every turn each makes some steps while the others wait. Every step is written to a
JSON file with the environment; `--report` prints the table in docs/speed.md.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from autoencoder_peers import ROOT, new_model
from environment import environment
from step_cost import NETS, Net, Run

from keras_kfac import KFAC
from keras_kfac.introspection.batch_part import WHOLE

PATH = ROOT / "benchmarks" / "results" / "peer_step_cost.json"
OWN, SAME, JAX = "KFAC()", "KFAC, the work of kfac-jax", "kfac-jax"
DEFAULT_PERIODS = (1, 5)  # kfac-jax's.
STEPS = 40

Steps = Callable[[int], list[float]]
"""Makes so many steps, and says how many seconds each of them took."""


def steps_of(run: Run) -> Steps:
    """Those of our optimizer, where its schedule has settled."""
    run.settle()
    return lambda count: [run.step() for _ in range(count)]


def same_work_run(net: Net) -> Run:
    """With the periods of kfac-jax, and no factor in blocks."""
    periods = dict(zip(("factor_update_period", "inverse_update_period"), DEFAULT_PERIODS))
    return Run(net, KFAC(**periods, max_factor_size=2304))


def same_work_steps(run: Run) -> Steps:
    """Those of our optimizer if it does in a step what kfac-jax does."""
    with ExitStack() as stack:  # While the step is traced.
        for place, value in (
            ("keras_kfac.step.MODEL_PART", WHOLE),
            ("keras_kfac.step.GROUPS", 1),
            ("keras_kfac.introspection.statistics.SAMPLED_PART", WHOLE),
        ):
            stack.enter_context(mock.patch(place, value))
        return steps_of(run)


@contextmanager
def jax_steps(python: str, batch: np.ndarray) -> Iterator[Steps]:
    """Those of kfac-jax, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        weights, images = Path(folder) / "weights.npz", Path(folder) / "batch.npy"
        np.savez(weights, *new_model(seed=0).get_weights())
        np.save(images, batch)
        script = ROOT / "benchmarks" / "kfac_jax_steps.py"
        command = [python, script, weights, images, *DEFAULT_PERIODS]
        with subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            print(process.stdout.readline().strip(), flush=True)

            def steps(count: int) -> list[float]:
                process.stdin.write(f"{count}\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            yield steps
            process.stdin.close()


def measure(python: str, turns: int) -> dict:
    """All of them in turns."""
    result: dict = {"environment": environment(), "steps": {OWN: [], SAME: [], JAX: []}}
    net = NETS["deep autoencoder, batch 1000"]
    # Both before either makes a step: to set seeds, as this does, has TensorFlow compile anew.
    plain = Run(net, KFAC())
    same = same_work_run(net)
    with jax_steps(python, plain.x) as jax:
        makers = {OWN: steps_of(plain), SAME: same_work_steps(same), JAX: jax}
        for _ in range(turns):
            for name, steps in makers.items():
                result["steps"][name].append(steps(STEPS))
    return result


def report(result: dict) -> str:
    """Medians over turns, as a table."""
    means = {
        name: [1000 * statistics.mean(turn) for turn in turns]
        for name, turns in result["steps"].items()
    }
    lines = ["| | ms per step | of kfac-jax's |", "|---|---|---|"]
    for name, each in means.items():
        ratio = statistics.median(a / b for a, b in zip(each, means[JAX]))
        lines.append(f"| {name} | {statistics.median(each):.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jax-python", help="a Python interpreter that has kfac-jax")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.report:
        PATH.write_text(json.dumps(measure(args.jax_python, args.turns), indent=1))
    print(report(json.loads(PATH.read_text())))


if __name__ == "__main__":
    main()
