"""Whether the bias should be preconditioned in a row of its own, without joining it to the kernel.

    python benchmarks/bias_column.py [--report]

`A⁻¹ [K; b] G⁻¹` takes a copy of the kernel `K` and one of the result. Split by the blocks of `A⁻¹`,
the kernel stays where it is, and three products with a single row or column take the place of the
copies. Every time is written to a JSON file with the environment; `--report` prints the table in
docs/speed.md.
"""

import os
import statistics
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
from environment import environment
from symmetric_product import in_turns, main

PATH = Path(__file__).parent / "results" / "bias_column.json"
SHAPES = ((256, 256), (576, 576), (784, 1000), (1024, 1024), (1000, 500))

Precondition = Callable[[tuple[tf.Tensor, tf.Tensor]], tf.Tensor]


def functions(inputs: int, outputs: int) -> dict[str, Precondition]:
    """Both ways, and the products for the kernel alone; each returns a scalar of all results."""
    left, right = tf.random.normal([inputs + 1] * 2), tf.random.normal([outputs] * 2)
    corner, column = tf.identity(left[:inputs, :inputs]), tf.identity(left[:inputs, inputs:])
    last = left[inputs, inputs]

    @tf.function
    def joined(gradients: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        kernel, bias = gradients
        both = tf.concat([kernel, bias[tf.newaxis]], axis=0)
        result = tf.matmul(left, tf.matmul(both, right))
        return tf.reduce_sum(result[:inputs]) + tf.reduce_sum(result[inputs])

    @tf.function
    def split(gradients: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        kernel, bias = gradients
        rows, row = tf.matmul(kernel, right), tf.matmul(bias[tf.newaxis], right)
        result = tf.matmul(corner, rows) + column * row
        return tf.reduce_sum(result) + tf.reduce_sum(
            tf.matmul(column, rows, transpose_a=True) + last * row
        )

    @tf.function
    def kernel_alone(gradients: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        kernel, bias = gradients
        result = tf.matmul(corner, tf.matmul(kernel, right))
        return tf.reduce_sum(result) + tf.reduce_sum(bias)

    return {"joined": joined, "split": split, "kernel alone": kernel_alone}


def measure() -> dict:
    """All in turns, for all shapes."""
    result: dict = {"environment": environment(), "seconds": {}}
    for inputs, outputs in SHAPES:
        ways = functions(inputs, outputs)
        gradients = tf.random.normal([inputs, outputs]), tf.random.normal([outputs])
        result["seconds"][f"{inputs} x {outputs}"] = in_turns(ways, gradients)
    return result


def report(result: dict) -> str:
    """A row for each shape."""
    lines = ["| kernel | joined (ms) | split (ms) | kernel alone (ms) |", "|---|---|---|---|"]
    for shape, found in result["seconds"].items():
        medians = [f"{1000 * statistics.median(times):.1f}" for times in found.values()]
        lines.append(f"| {shape} | {' | '.join(medians)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], PATH, measure, report)
