"""Problems of several kinds for benchmarks of optimizers: networks, losses and data."""

import argparse
import dataclasses
import sysconfig
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

CHARACTERS = 128  # ASCII; what is not counts as the last one
layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its data by name, loss and batch size."""

    data: str
    network: Callable[[], list[keras.Layer]]
    loss: Callable[[], keras.losses.Loss]
    batch_size: int
    evaluated_examples: int = 10_000


def dense(widths: list[int], activation: str, outputs: int) -> list[keras.Layer]:
    return [layers.Flatten(), *(layers.Dense(w, activation) for w in widths), layers.Dense(outputs)]


def autoencoder() -> list[keras.Layer]:
    half = [layers.Dense(width, "tanh") for width in (1000, 500, 250)]
    back = [layers.Dense(width, "tanh") for width in (250, 500, 1000)]
    return [layers.Flatten(), *half, layers.Dense(30), *back, layers.Dense(784)]


def conv_net() -> list[keras.Layer]:
    return [
        layers.Reshape((28, 28, 1)),
        layers.Conv2D(16, 3, strides=2, activation="relu"),
        layers.Conv2D(32, 3, strides=2, activation="relu"),
        *dense([128], "relu", 10),
    ]


def transformer(
    blocks: int = 2, length: int = 64, width: int = 64, heads: int = 4
) -> list[keras.Layer]:
    """Blocks of causal attention; the mask alone tells them the order of the characters."""
    body: list[keras.Layer] = [layers.Embedding(CHARACTERS, width)]
    for _ in range(blocks):
        x = start = keras.Input((length, width))
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(h, h, use_causal_mask=True)
        h = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        body.append(keras.Model(start, x + layers.Dense(width)(h)))
    return [*body, layers.LayerNormalization(), layers.Dense(CHARACTERS)]


def classification() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def pixels() -> keras.losses.Loss:
    return keras.losses.BinaryCrossentropy(from_logits=True)


PROBLEMS = {
    "deep autoencoder, MNIST, batch 1000": Problem("mnist", autoencoder, pixels, 1000),
    "conv net, Fashion-MNIST, batch 128": Problem("fashion", conv_net, classification, 128),
    "12 x 256 tanh, Fashion-MNIST, batch 128": Problem(
        "fashion", lambda: dense([256] * 12, "tanh", 10), classification, 128
    ),
    "3 x 256 relu, Fashion-MNIST, batch 32": Problem(
        "fashion", lambda: dense([256] * 3, "relu", 10), classification, 32
    ),
    "tabular regression, batch 256": Problem(
        "table",
        lambda: dense([128, 128, 64], "relu", 1),
        lambda: keras.losses.MeanSquaredError(),
        256,
    ),
    "2-block transformer, Python source, batch 32": Problem(
        "source", transformer, classification, 32, evaluated_examples=2000
    ),
}


def table(examples: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features, and a smooth function of six projections of them with noise."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(examples, 24)) @ rng.normal(size=(24, 24)) / 5
    h = (x @ rng.normal(size=(24, 6)) / 5).T
    y = np.sin(2 * h[0]) * h[1] + 2 * np.tanh(h[2]) + h[3] * h[4] + np.abs(h[5]) / 2
    y += 0.3 * rng.normal(size=examples)
    return x.astype("float32"), ((y - y.mean()) / y.std()).astype("float32")[:, None]


def source(windows: int = 20_000, length: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Windows of Python's standard library, and each character's successor."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(path.read_text("utf-8") for path in sorted(folder.glob("*.py")))
    codes = np.minimum([ord(c) for c in text], CHARACTERS - 1).astype("int32")
    starts = np.random.default_rng(7).integers(0, len(codes) - length, windows)
    both = codes[starts[:, None] + np.arange(length + 1)]
    return both[:, :-1], both[:, 1:]


def load(args: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training data by name: images in [0, 1]."""

    def images(path: Path | None, module: object) -> tuple[np.ndarray, np.ndarray]:
        if path is None:
            (x, y), _ = module.load_data()
        else:
            with np.load(path) as file:
                x, y = file["x_train"], file["y_train"]
        return (x / 255).astype("float32"), y

    x, _ = images(args.mnist, keras.datasets.mnist)
    return {
        "mnist": (x, x.reshape(len(x), -1)),
        "fashion": images(args.fashion, keras.datasets.fashion_mnist),
        "table": table(),
        "source": source(),
    }
