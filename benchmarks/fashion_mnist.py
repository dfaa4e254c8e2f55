"""Classification with K-FAC's defaults, which were chosen here, against Adam: Fashion-MNIST.

    python benchmarks/fashion_mnist.py [--data fashion_mnist.npz]

Every run is written to a JSON file with the environment; `--report` prints the README's table.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import keras  # noqa: E402
import numpy as np  # noqa: E402
from environment import environment  # noqa: E402

from keras_kfac import KFAC, KFACCallback  # noqa: E402

layers = keras.layers
NETS = {
    "3 x 256 relu": lambda: [
        layers.Flatten(),
        *(layers.Dense(256, "relu") for _ in range(3)),
    ],
    "12 x 256 tanh": lambda: [
        layers.Flatten(),
        *(layers.Dense(256, "tanh") for _ in range(12)),
    ],
    "2 conv + dense": lambda: [
        layers.Reshape((28, 28, 1)),
        layers.Conv2D(16, 5, activation="relu", padding="same"),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 5, activation="relu", padding="same"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, "relu"),
    ],
}
OPTIMIZERS = {
    "KFAC()": KFAC,
    "Adam 1e-3": lambda: keras.optimizers.Adam(1e-3),
    "Adam 3e-4": lambda: keras.optimizers.Adam(3e-4),
}


class Clock(keras.callbacks.Callback):
    """Seconds of training steps, the first one apart: Keras compiles in it."""

    def __init__(self):
        super().__init__()
        self.first, self.seconds = None, 0.0

    def on_train_batch_begin(self, batch, logs=None):
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        elapsed = time.perf_counter() - self.began
        if self.first is None:
            self.first = elapsed
        else:
            self.seconds += elapsed


def run(net, optimizer_name, data, epochs, seed):
    """Trains one net and returns training loss and test accuracy after each epoch."""
    (x, y), (x_test, y_test) = data
    keras.utils.set_random_seed(seed)
    optimizer = OPTIMIZERS[optimizer_name]()
    model = keras.Sequential([keras.Input((28, 28)), *NETS[net](), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    clock, curve = Clock(), []
    callbacks = [clock, *([KFACCallback()] if isinstance(optimizer, KFAC) else [])]
    for epoch in range(epochs):
        model.fit(x, y, 128, epoch + 1, 0, callbacks, initial_epoch=epoch)
        train_loss, _ = model.evaluate(x[:10000], y[:10000], 1000, verbose=0)
        _, accuracy = model.evaluate(x_test, y_test, 1000, verbose=0)
        curve.append(
            {"seconds": clock.seconds, "train_loss": train_loss, "test_accuracy": accuracy}
        )
    return {
        "net": net,
        "optimizer": optimizer_name,
        "seed": seed,
        "first_step_seconds": clock.first,
        "epochs": curve,
    }


def report(result):
    """Training loss, test accuracy and seconds after the last epoch, as a table."""
    lines = [
        "| net | optimizer | training loss | test accuracy | seconds | first step (s) |",
        "|---|---|---|---|---|---|",
    ]
    for each in result["runs"]:
        last = each["epochs"][-1]
        lines.append(
            f"| {each['net']} | {each['optimizer']} | {last['train_loss']:.3f} "
            f"| {last['test_accuracy']:.3f} | {last['seconds']:.1f} "
            f"| {each['first_step_seconds']:.1f} |"
        )
    return "\n".join(lines)


def load(path):
    """Images in [0, 1] and labels."""
    if path is None:
        (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    else:
        with np.load(path) as file:
            x, y, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    return ((x / 255).astype("float32"), y), ((x_test / 255).astype("float32"), y_test)


def main():
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help=".npz file in place of the download")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "fashion_mnist.json"
    if not args.report:
        data = load(args.data)
        runs = [run(net, name, data, args.epochs, args.seed) for net in NETS for name in OPTIMIZERS]
        result = {"environment": environment(), "runs": runs}
        path.write_text(json.dumps(result, indent=1))
    print(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
