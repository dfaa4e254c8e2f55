"""What a training step costs with `KFAC()` and with Keras's own optimizers, in turns.

    python benchmarks/step_cost.py [--net autoencoder] [--turns 5] [--variants] [--report]

All optimizers train copies of one network on the same random batch in one process: so many steps
with the one, then as many with the next, and all over again. What counts is the ratio to Adam
within a turn, and its median over turns. `KFAC()` is measured where its schedule has settled: a
turn holds two periods of the inverses, as rare as they get. The first step (tracing, compiling,
creating variables) is timed apart, and so are, for `KFAC()` and Adam, the first hundred, in which
factors and inverses are renewed more often.

The floating-point operations of the matrix products of a step are counted, by TensorFlow for the
gradient and from the shapes of the blocks for what K-FAC adds, and compared with what the machine
does in a product of two large matrices. `--variants` compares `KFAC()` and Adam with themselves
under `jit_compile=True`, and with products in bfloat16.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import keras  # noqa: E402
import numpy as np  # noqa: E402
import problems  # noqa: E402
import tensorflow as tf  # noqa: E402
from environment import environment  # noqa: E402

from keras_kfac import KFAC  # noqa: E402
from keras_kfac.introspection.gradient_rows import MIN_PRODUCTS  # noqa: E402
from keras_kfac.math.structure import products  # noqa: E402

PATH = ROOT / "benchmarks" / "results" / "step_cost.json"
SETTLED = 1000  # Iterations after which no period grows any more.
EARLY = 100  # First steps, timed as they come.
TURN = 40
PEAK_SIZE = 2048
layers = keras.layers

Factory = Callable[[], keras.optimizers.Optimizer]
OPTIMIZERS: dict[str, Factory] = {
    "KFAC()": KFAC,
    "Adam": keras.optimizers.Adam,
    "SGD": lambda: keras.optimizers.SGD(1e-4, 0.9, nesterov=True),
    "Muon": lambda: keras.optimizers.Muon(1e-4),
}


COMPARED = ("KFAC()", "Adam")


class Net(NamedTuple):
    """A network, its loss, and the shape of a batch."""

    body: Callable[[], list[keras.Layer]]
    loss: Callable[[], keras.losses.Loss]
    batch: tuple[int, ...]
    is_text: bool = False


JIT = ", jit_compile"  # What the names of optimizers end in that are for XLA.
VARIANTS: dict[str, Factory] = {
    **{n + jit: OPTIMIZERS[n] for n in ("KFAC()", "Adam") for jit in ("", JIT)},
    "KFAC(product_dtype='bfloat16')": lambda: KFAC(product_dtype="bfloat16"),
}


def conv_net() -> list[keras.Layer]:
    """Two convolutions and two dense layers, the first of them with 3136 inputs."""
    convolutions = [
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
    ]
    return [*convolutions, *problems.dense([1024], "relu", 10)]


def resnet20() -> list[keras.Layer]:
    """He et al. (2015), section 4.2."""

    def convolved(x: keras.KerasTensor, filters: int, strides: int = 1) -> keras.KerasTensor:
        x = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    start = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolved(start, 16))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            h = convolved(layers.ReLU()(convolved(x, filters, strides)), filters)
            around = layers.Conv2D(filters, 1, strides, use_bias=False)(x) if strides > 1 else x
            x = layers.ReLU()(h + around)
    return [keras.Model(start, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))]


def mlp(width: int, depth: int = 3, batch: int = 128) -> Net:
    """Hidden layers as wide as the inputs."""
    body = lambda: problems.dense([width] * depth, "relu", 10)  # noqa: E731
    return Net(body, problems.classification, (batch, width))


def text(blocks: int) -> Net:
    """A transformer on characters."""
    return Net(lambda: problems.transformer(blocks), problems.classification, (32, 64), True)


NETS = {
    "deep autoencoder, batch 1000": Net(problems.autoencoder, problems.pixels, (1000, 784)),
    "conv net, batch 128": Net(conv_net, problems.classification, (128, 28, 28, 1)),
    "ResNet-20, batch 128": Net(resnet20, problems.classification, (128, 32, 32, 3)),
    **{f"{blocks}-block transformer, batch 32": text(blocks) for blocks in (2, 4)},
    **{f"3 x {width}, batch 128": mlp(width) for width in (256, 1024, 2048)},
}


class Run:
    """A network under one optimizer."""

    def __init__(
        self, net: Net, optimizer: keras.optimizers.Optimizer, jit_compile: bool = False
    ) -> None:
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential([keras.Input(net.batch[1:]), *net.body()])
        self.loss = net.loss()
        self.model.compile(optimizer, self.loss, jit_compile=jit_compile)
        if isinstance(optimizer, KFAC):
            optimizer.attach(self.model)
        rng = np.random.default_rng(0)
        x = rng.integers(0, 128, net.batch) if net.is_text else rng.random(net.batch)
        self.x = x.astype("int32" if net.is_text else "float32")
        rows = self.model.output_shape[1:-1] if net.is_text else ()
        is_pixels = net.loss is problems.pixels
        self.y = self.x if is_pixels else rng.integers(0, 10, (net.batch[0], *rows))

    def step(self) -> float:
        """Makes a step; the seconds that it took."""
        began = time.perf_counter()
        self.model.train_on_batch(self.x, self.y)
        return time.perf_counter() - began

    def settle(self, steps: int = 2) -> list[float]:
        """Makes some first steps, and goes on as if at a late one; the seconds of the first."""
        seconds = [self.step() for _ in range(steps)]
        self.model.optimizer.iterations.assign(SETTLED)
        return seconds

    def gradient_operations(self) -> float:
        """Floating-point operations of the gradient of the loss."""

        @tf.function
        def gradient(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                loss = self.loss(y, self.model(x, training=True))
            return tape.gradient(loss, self.model.trainable_weights)

        graph = gradient.get_concrete_function(tf.constant(self.x), tf.constant(self.y)).graph
        profiler = tf.compat.v1.profiler
        options = profiler.ProfileOptionBuilder.float_operation()
        options["output"] = "none"
        return float(profiler.profile(graph, options=options).total_float_ops)

    def curvature_operations(self) -> dict[str, float]:
        """Floating-point operations of preconditioning, and of computing all inverses."""
        blocks = self.model.optimizer._known.curvature.blocks
        precondition = sum(products(b.adapter.structures) * (b.adapter.groups or 1) for b in blocks)
        large = [
            block.adapter.structures
            for block in blocks
            if isinstance(block.adapter.layer, layers.Dense)
            and len(block.adapter.layer.input.shape) == 2
            and products(block.adapter.structures) >= MIN_PRODUCTS
        ]
        summed = sum(products(structures) for structures in large)
        by_rows = sum(products(structures, len(self.x)) for structures in large)
        precondition -= max(0, summed - by_rows)
        inverse = sum(block.refresh_cost for block in blocks)
        return {"precondition": 2.0 * precondition, "inverse": float(inverse)}


def peak() -> float:
    """Floating-point operations a second in the product of two matrices."""
    matrix = tf.random.normal([PEAK_SIZE, PEAK_SIZE])
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        tf.matmul(matrix, matrix).numpy()
        seconds.append(time.perf_counter() - began)
    return 2 * PEAK_SIZE**3 / min(seconds)


def measure(
    net: Net, turns: int, optimizers: dict[str, Factory] = OPTIMIZERS, first_steps: int = 2
) -> dict:
    """All optimizers on one network; `KFAC()` and Adam make so many first steps."""
    runs = {name: Run(net, make(), name.endswith(JIT)) for name, make in optimizers.items()}
    early = {n: run.settle(first_steps if n in COMPARED else 2) for n, run in runs.items()}
    steps: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            steps[name].append([run.step() for _ in range(TURN)])
    return {
        "environment": environment(),
        "first_step": {name: seconds[0] for name, seconds in early.items()},
        "early": {name: early[name] for name in early if len(early[name]) > 2},
        "steps": steps,
        "gradient_operations": runs["Adam"].gradient_operations(),
        "curvature_operations": runs["KFAC()"].curvature_operations(),
        "peak": peak(),
    }


class Figures(NamedTuple):
    """Medians over turns.

    Attributes:
        milliseconds: Of a step.
        ratio: To those of Adam in the same turn.
        spike: The slowest step of a turn over its median.
        largest_spike: The largest of these, not their median.
        early_ratio: To Adam in the first hundred steps, but for the two that trace; `None` if it
            was not measured.
    """

    milliseconds: float
    ratio: float
    spike: float
    largest_spike: float
    early_ratio: float | None


def figures(result: dict, name: str) -> Figures:
    """What an optimizer takes."""
    turns = result["steps"][name]
    each = [statistics.mean(turn) for turn in turns]
    rival = [statistics.mean(turn) for turn in result["steps"]["Adam"]]
    spikes = [max(turn) / statistics.median(turn) for turn in turns]
    early = {n: statistics.mean(s[2:]) for n, s in result.get("early", {}).items()}
    return Figures(
        1000 * statistics.median(each),
        statistics.median(a / b for a, b in zip(each, rival)),
        statistics.median(spikes),
        max(spikes),
        early[name] / early["Adam"] if name in early else None,
    )


def report(results: dict) -> str:
    """A table, a row for each network and optimizer."""
    lines = [
        "| network | optimizer | ms per step | of Adam's | in the first 100 steps "
        "| slowest of a turn / median (largest) | GFLOP of the gradient and preconditioning "
        "| at the peak (ms) | first step (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for net, result in results.items():
        for name in result["steps"]:
            cost = figures(result, name)
            cells = [f"{cost.milliseconds:.1f}", f"{cost.ratio:.2f}"]
            cells.append(f"{cost.early_ratio:.2f}" if cost.early_ratio else "")
            cells.append(f"{cost.spike:.1f} ({cost.largest_spike:.1f})")
            count = result["gradient_operations"]
            if name.startswith("KFAC"):
                count += result["curvature_operations"]["precondition"]
            is_counted = name != "Muon"
            cells.append(f"{count / 1e9:.1f}" if is_counted else "")
            cells.append(f"{1000 * count / result['peak']:.0f}" if is_counted else "")
            cells.append(f"{result['first_step'][name]:.1f}")
            lines.append(f"| {net} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="", help="only networks whose names contain this")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--variants", action="store_true", help="of KFAC() and Adam")
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = PATH.with_stem("step_cost_variants") if args.variants else PATH
    optimizers = VARIANTS if args.variants else OPTIMIZERS
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, net in NETS.items():
        if args.net in name and not args.report:
            first_steps = 2 if args.variants else EARLY
            results[name] = measure(net, args.turns, optimizers, first_steps)
            path.write_text(json.dumps(results, indent=1))
            print(report({name: results[name]}), flush=True)
    print(report(results))


if __name__ == "__main__":
    main()
