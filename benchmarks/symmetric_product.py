"""Whether a symmetric product should be computed by blocks, its lower half by transposition.

    python benchmarks/symmetric_product.py [--report]

`Xᵀ X` of rows `[n, d]` is a Kronecker factor. As one product it takes `2 n d²` operations; as the
products of two halves of the columns, of which one needs no computing, three quarters of that, and
the copies that put the blocks together. Every time is written to a JSON file with the environment;
`--report` prints the table in docs/speed.md.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
from environment import environment

PATH = Path(__file__).parent / "results" / "symmetric_product.json"
SHAPES = ((500, 500), (1000, 576), (1000, 1000), (4000, 576), (25_000, 288), (4000, 2048))
CALLS = 25


@tf.function
def whole(rows: tf.Tensor) -> tf.Tensor:
    """One product."""
    return tf.matmul(rows, rows, transpose_a=True)


@tf.function
def by_halves(rows: tf.Tensor) -> tf.Tensor:
    """Three products."""
    half = rows.shape[1] // 2
    a, b = rows[:, :half], rows[:, half:]
    corner = tf.matmul(a, b, transpose_a=True)
    top = tf.concat([tf.matmul(a, a, transpose_a=True), corner], axis=1)
    bottom = tf.concat([tf.transpose(corner), tf.matmul(b, b, transpose_a=True)], axis=1)
    return tf.concat([top, bottom], axis=0)


def seconds(function: Callable, given: Any) -> float:
    """Of one call."""
    began = time.perf_counter()
    function(given).numpy()
    return time.perf_counter() - began


def in_turns(ways: dict[str, Callable], given: Any) -> dict[str, list[float]]:
    """The seconds of each call of several functions, one after the other and all over again."""
    for function in ways.values():
        function(given)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(CALLS):
        for name, function in ways.items():
            found[name].append(seconds(function, given))
    return found


def measure() -> dict:
    """Both in turns, for all shapes."""
    result: dict = {"environment": environment(), "seconds": {}}
    for shape in SHAPES:
        rows = tf.random.normal(shape)
        both = {"whole": whole, "by halves": by_halves}
        result["seconds"][f"{shape[0]} x {shape[1]}"] = in_turns(both, rows)
    return result


def report(result: dict) -> str:
    """A row for each shape."""
    lines = ["| rows | whole (ms) | by halves (ms) | ratio |", "|---|---|---|---|"]
    for shape, found in result["seconds"].items():
        one, other = (1000 * statistics.median(found[name]) for name in ("whole", "by halves"))
        lines.append(f"| {shape} | {one:.1f} | {other:.1f} | {other / one:.2f} |")
    return "\n".join(lines)


def main(
    description: str, path: Path, measured: Callable[[], dict], table: Callable[[dict], str]
) -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.report:
        path.write_text(json.dumps(measured(), indent=1))
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], PATH, measure, report)
