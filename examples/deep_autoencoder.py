"""Deep autoencoders: K-FAC against Adam on the classic benchmark of second-order optimisers.

Hinton & Salakhutdinov (2006) needed layer-wise pre-training for these networks; Martens (2010) and
Martens & Grosse (2015, the K-FAC paper) did without, using curvature. Both optimizers here start
from the same weights, see the same batches and get the same number of seconds. Run it by

    python examples/deep_autoencoder.py

and find a CSV with both curves and two pictures in `results/deep_autoencoder`.
"""

import argparse
import csv
import dataclasses
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import matplotlib
import numpy as np
from curves import make_curves
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from keras_kfac import KFAC, KFACCallback

matplotlib.use("Agg")  # draws to files, without a display
import matplotlib.pyplot as plt

EVALUATE_EVERY = 10  # steps
console = Console()


@dataclasses.dataclass(frozen=True)
class Setup:
    """Network and hyperparameters for one dataset.

    Attributes:
        encoder: Widths of the encoder, the last one the code; the decoder mirrors it.
        initializer: Of all kernels, for both optimizers.
        learning_rate: K-FAC's learning rate.
        damping: K-FAC's damping.
        adam_learning_rate: Adam's learning rate.
    """

    encoder: tuple[int, ...]
    initializer: str = "glorot_uniform"
    learning_rate: float | str = "adaptive"
    damping: float | str = "adaptive"
    adam_learning_rate: float = 1e-3


# K-FAC needs no settings. Adam's rate is the best of a grid (see `benchmarks/autoencoder.py`).
SETUPS = {
    # Keras's default initialisation lets the signal fade over twelve layers of tanh: from there
    # either optimizer first spends hundreds of steps predicting the mean image. Like the sparse
    # initialisation in the literature, this one starts from larger weights.
    "curves": Setup(
        encoder=(400, 200, 100, 50, 25, 6), initializer="he_normal", adam_learning_rate=3e-3
    ),
    "mnist": Setup(encoder=(1000, 500, 250, 30)),
}


# ---- Model and optimizers -----------------------------------------------------------------------


def build_model(pixels: int, setup: Setup) -> keras.Model:
    """Builds the autoencoder; its outputs are the logits of the pixels."""

    def dense(width: int, activation: str | None) -> keras.layers.Dense:
        return keras.layers.Dense(width, activation, kernel_initializer=setup.initializer)

    *hidden, code = setup.encoder
    widths = [*hidden, code, *reversed(hidden), pixels]
    linear = (len(hidden), len(widths) - 1)  # the code and the logits
    layers = [dense(width, None if i in linear else "tanh") for i, width in enumerate(widths)]
    return keras.Sequential([keras.Input((pixels,)), *layers])


def make_kfac(setup: Setup, seed: int) -> KFAC:
    """Creates the K-FAC optimizer; without options, it is `KFAC()`."""
    return KFAC(learning_rate=setup.learning_rate, damping=setup.damping, seed=seed)


def train(
    optimizer: keras.optimizers.Optimizer,
    setup: Setup,
    train_images: np.ndarray,
    recorder: "Recorder",
    batch_size: int,
    seed: int,
) -> keras.Model:
    """Trains a new autoencoder until the recorder's budget is used up."""
    keras.utils.set_random_seed(seed)  # the same initial weights and batches for each optimizer
    pixels = train_images.shape[1]
    model = build_model(pixels, setup)
    # Keras averages the cross-entropy over the pixels, the literature sums it. The weight makes it
    # the sum, so that loss and damping are those of whole images. The steps are the same.
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, loss_weights=[float(pixels)])

    # This callback is all that K-FAC asks for beyond what any optimizer does.
    callbacks = [KFACCallback()] if isinstance(optimizer, KFAC) else []
    model.fit(
        train_images,
        train_images,
        batch_size=batch_size,
        epochs=1_000_000,  # the recorder ends it
        verbose=0,
        callbacks=[*callbacks, recorder],
    )
    return model


def reconstruct(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Passes images through the autoencoder, to pixels in [0, 1]."""
    logits = model.predict(images, batch_size=1000, verbose=0)
    return keras.ops.convert_to_numpy(keras.ops.sigmoid(logits))


def reconstruction_error(model: keras.Model, images: np.ndarray) -> float:
    """The squared error of an image, summed over pixels and averaged over images."""
    return float(np.mean(np.sum((reconstruct(model, images) - images) ** 2, axis=1)))


# ---- Measuring ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """One point of a training curve: a line of the CSV file."""

    optimizer: str
    step: int
    seconds: float
    train_loss: float  # mean over the steps since the last record
    test_error: float
    damping: float  # nan for Adam
    learning_rate: float


class Recorder(keras.callbacks.Callback):
    """Measures training steps, and stops when the budget is used up.

    The clock runs during training steps only, not during evaluations, and starts after the first
    step, for which Keras compiles the model.

    Args:
        name: Name of the optimizer.
        test_images: Images to evaluate on.
        max_seconds: Budget.
        max_steps: Another one, if not `None`.
    """

    def __init__(
        self, name: str, test_images: np.ndarray, max_seconds: float, max_steps: int | None
    ) -> None:
        super().__init__()
        self.name, self.test_images = name, test_images
        self.max_seconds, self.max_steps = max_seconds, max_steps
        self.records: list[Record] = []
        self.step, self.seconds, self.compile_seconds = 0, 0.0, 0.0
        # A bar that moves is for terminals; elsewhere there is a line for each tenth of the budget.
        text = TextColumn("{task.description}")
        self.progress = Progress(text, BarColumn(), console=console, transient=True)
        self.progress.disable = not console.is_terminal
        self.task = self.progress.add_task(name, total=1.0)
        self.tenths_shown = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Records the untrained network."""
        console.print(f"{self.name}: compiling the first step ...", highlight=False)
        self.progress.start()
        self._record(float("nan"))

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Stops the clock, and evaluates when it is time to."""
        elapsed = time.perf_counter() - self._began
        if self.step == 0:
            self.compile_seconds = elapsed
        else:
            self.seconds += elapsed
        self.step += 1
        done = self._share_done()
        if done >= 1 or self.step % EVALUATE_EVERY == 0:
            self._record(logs["loss"])
            self._show(done)
            self.model.reset_metrics()  # the loss is averaged anew
        self.model.stop_training = done >= 1

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leaves the final line."""
        self.progress.stop()

    def _share_done(self) -> float:
        steps = self.step / self.max_steps if self.max_steps else 0.0
        return max(self.seconds / self.max_seconds, steps)

    def _record(self, train_loss: float) -> None:
        optimizer = self.model.optimizer
        damping = optimizer.damping if isinstance(optimizer, KFAC) else float("nan")
        self.records.append(
            Record(
                optimizer=self.name,
                step=self.step,
                seconds=self.seconds,
                train_loss=float(train_loss),
                test_error=reconstruction_error(self.model, self.test_images),
                damping=float(keras.ops.convert_to_numpy(damping)),
                learning_rate=float(keras.ops.convert_to_numpy(optimizer.learning_rate)),
            )
        )

    def _show(self, done: float) -> None:
        last = self.records[-1]
        damping = "" if np.isnan(last.damping) else f"  damping {last.damping:.2g}"
        line = (
            f"{self.name:5s} {last.seconds:6.1f} s  step {last.step:5d}  "
            f"loss {last.train_loss:7.2f}  test error {last.test_error:7.3f}{damping}"
        )
        self.progress.update(self.task, completed=done, description=line)
        if int(done * 10) > self.tenths_shown:
            self.tenths_shown = int(done * 10)
            self.progress.console.print(line, highlight=False)


# ---- Results ------------------------------------------------------------------------------------


def error_at(records: Sequence[Record], axis: str, value: float) -> float:
    """Test error at a step or second, interpolated between records.

    Args:
        records: Those of one optimizer.
        axis: `"step"` or `"seconds"`.
        value: Where on that axis.
    """
    positions = [getattr(record, axis) for record in records]
    return float(np.interp(value, positions, [record.test_error for record in records]))


def print_summary(recorders: Sequence[Recorder]) -> None:
    """Prints who is ahead at equal steps and at equal seconds."""
    table = Table(title="Test error (squared, for each image)")
    for heading in ("", *(recorder.name for recorder in recorders), "ahead"):
        table.add_column(heading, justify="right" if heading else "left")
    for axis, unit in (("step", "steps"), ("seconds", "seconds")):
        # The longest stretch that both have run.
        end = min(getattr(recorder.records[-1], axis) for recorder in recorders)
        for value in (end // 4, end // 2, end):
            errors = {r.name: error_at(r.records, axis, value) for r in recorders}
            cells = [f"{error:.3f}" for error in errors.values()]
            table.add_row(f"after {value:.0f} {unit}", *cells, min(errors, key=errors.get))
        table.add_section()
    for row, format_value in (
        ("milliseconds for each step", lambda r: f"{1000 * r.seconds / max(r.step - 1, 1):.0f}"),
        ("steps taken", lambda r: str(r.step)),
        ("compile time, not counted (s)", lambda r: f"{r.compile_seconds:.1f}"),
    ):
        table.add_row(row, *(format_value(recorder) for recorder in recorders), "")
    console.print(table)


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Writes the curves, a line for each record."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Record)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(record) for record in records)


def plot_curves(path: Path, recorders: Sequence[Recorder]) -> None:
    """Plots the test error over steps and over seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, field in zip(axes, ("step", "seconds")):
        for recorder in recorders:
            positions = [getattr(record, field) for record in recorder.records]
            errors = [record.test_error for record in recorder.records]
            axis.semilogy(positions, errors, label=recorder.name)
        axis.set(xlabel=field, title=f"Error by {field}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("squared test error of an image")
    axes[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_reconstructions(path: Path, rows: dict[str, np.ndarray], shape: Sequence[int]) -> None:
    """Draws a row of images for each entry."""
    if len(shape) != 2:  # flat data: show it as a square where it is one
        side = round(shape[0] ** 0.5)
        shape = (side, side) if side**2 == shape[0] else (1, shape[0])
    columns = len(next(iter(rows.values())))
    size = (columns, len(rows) + 0.2)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image.reshape(shape), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


# ---- Data ---------------------------------------------------------------------------------------


def load_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads training and test images from a file of NumPy arrays.

    Raises:
        ValueError: If it isn't such a file.
    """
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {key: stored[key] for key in ("x_train", "x_test", "x") if key in stored}
    except TypeError:  # a lone .npy array cannot be opened like this
        raise ValueError(f"{path} is not an .npz file of arrays") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path} as an .npz file of arrays: {error}") from error
    if "x_train" in arrays and "x_test" in arrays:
        return arrays["x_train"], arrays["x_test"]
    if "x" not in arrays:
        raise ValueError(f"{path} needs the arrays x_train and x_test, or x")
    images = np.atleast_1d(arrays["x"])
    held_out = max(1, len(images) // 10)
    return images[:-held_out], images[-held_out:]


def as_images(images: np.ndarray, name: str) -> np.ndarray:
    """Checks images and brings them to float32 in [0, 1].

    Raises:
        ValueError: If they are no images.
    """
    if images.ndim < 2 or images.size == 0:
        raise ValueError(f"{name} has shape {images.shape}, expected (images, height, width)")
    if images.dtype == np.uint8:
        return images.astype("float32") / 255
    if images.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {images.dtype}, expected uint8 or float")
    images = images.astype("float32")
    if not np.all(np.isfinite(images)):
        raise ValueError(f"{name} has values that are not finite")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"{name} has values outside [0, 1]; only uint8 images may go up to 255")
    return images


def load_data(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Loads what the options ask for: training and test images, in [0, 1].

    Raises:
        ValueError: If the data is not usable.
    """
    if args.data is not None:
        train_images, test_images = load_npz(args.data)
    elif args.dataset == "mnist":
        try:
            (train_images, _), (test_images, _) = keras.datasets.mnist.load_data()
        except Exception as error:  # Keras raises no narrower class when a download fails
            raise ValueError(f"cannot load MNIST: {error}") from error
    else:
        count = args.train_images or 20_000
        images = make_curves(count + (args.test_images or 2_000), args.seed)
        train_images, test_images = images[:count], images[count:]
    train_images = as_images(train_images[: args.train_images], "x_train")
    test_images = as_images(test_images[: args.test_images], "x_test")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"x_train and x_test differ in shape: {train_images.shape} and {test_images.shape}"
        )
    whole_batches = len(train_images) // args.batch_size * args.batch_size
    if not whole_batches:
        raise ValueError(
            f"--batch-size {args.batch_size} is larger than the data: {len(train_images)} images"
        )
    return train_images[:whole_batches], test_images


# ---- Command line -------------------------------------------------------------------------------


def positive(kind: type) -> Callable[[str], int | float]:
    """Returns an argparse type: a positive, finite number of the given kind."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = kind.__name__  # for argparse's own messages
    return parse


def seed(text: str) -> int:
    """Parses a seed that NumPy, TensorFlow and K-FAC all accept."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {2**31 - 1}")
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a deep autoencoder by K-FAC and by Adam, and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    own, default = argparse.SUPPRESS, "(default: that of the dataset, see SETUPS in this file)"
    add("--dataset", choices=SETUPS, default="curves", help="images; curves are made here")
    add("--data", type=Path, help=".npz file to use instead, with x_train and x_test, or x: "
        "(images, height, width) or (images, pixels), uint8 or float in [0, 1]; the network "
        "is that for mnist")  # fmt: skip
    add("--seconds", type=positive(float), default=60.0, help="training time for each optimizer")
    add("--steps", type=positive(int), help="stop after as many steps, if that is earlier")
    add("--batch-size", type=positive(int), default=1000, help="images in a step")
    add("--learning-rate", type=positive(float), default=own,
        help="of K-FAC (default: adaptive)")  # fmt: skip
    add("--damping", type=positive(float), default=own, help="of K-FAC (default: adaptive)")
    add("--adam-learning-rate", type=positive(float), default=own, help=f"of Adam {default}")
    add("--train-images", type=positive(int), help="use as many; None: 20,000 curves, or all")
    add("--test-images", type=positive(int), help="use as many; None: 2,000 curves, or all")
    add("--seed", type=seed, default=0, help="for weights, curves, batches and K-FAC's sampling")
    add("--output-dir", type=Path, default=Path("results/deep_autoencoder"), help="for results")
    args = parser.parse_args(argv)
    setup = SETUPS["mnist" if args.data else args.dataset]
    options = ("learning_rate", "damping", "adam_learning_rate")
    chosen = {name: value for name, value in vars(args).items() if name in options}
    args.setup = dataclasses.replace(setup, **chosen)
    try:
        args.images = load_data(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    args = parse_arguments(argv)
    train_images, test_images = args.images
    shape = train_images.shape[1:]
    train_images, test_images = (x.reshape(len(x), -1) for x in args.images)
    console.print(f"{len(train_images)} training images, {len(test_images)} test images of {shape}")

    optimizers = {
        "K-FAC": make_kfac(args.setup, args.seed),
        "Adam": keras.optimizers.Adam(args.setup.adam_learning_rate),
    }
    recorders = []
    rows = {"original": test_images[:12]}
    for name, optimizer in optimizers.items():
        recorder = Recorder(name, test_images, args.seconds, args.steps)
        model = train(optimizer, args.setup, train_images, recorder, args.batch_size, args.seed)
        recorders.append(recorder)
        rows[name] = reconstruct(model, rows["original"])

    records = [record for recorder in recorders for record in recorder.records]
    write_csv(args.output_dir / "curves.csv", records)
    plot_curves(args.output_dir / "error.png", recorders)
    plot_reconstructions(args.output_dir / "reconstructions.png", rows, shape)
    print_summary(recorders)
    console.print(f"Results are in {args.output_dir}")


if __name__ == "__main__":
    main()
