"""Laplace's approximation: does a network know what it does not know?

A small network learns to read handwritten digits (images of 8 x 8 pixels that come with
scikit-learn) by K-FAC, and `keras_kfac.laplace` makes a posterior of its weights. The prior
precision is that of largest evidence, which needs no other data, or that of the best predictions
for 200 other images. Run it by

    python examples/laplace.py

and find a table of negative log-likelihood, error and expected calibration error for images that
had no part in any of that, as they are, with noise, and rotated.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from keras_kfac import KFAC, KFACCallback, LaplacePosterior, laplace

METHODS = ("linear", "probit", "weights")
BINS = 15
VALIDATION = 200
PRECISIONS = np.geomspace(0.1, 1e4, 11)

Data = tuple[np.ndarray, np.ndarray]


# ---- Data and model -----------------------------------------------------------------------------


def digits(examples: int, seed: int) -> tuple[Data, Data, Data]:
    """Images in [0, 1] with labels: to train on, to choose the prior by, and all others."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = images[order].astype("float32") / 16, labels[order]
    parts = np.split(np.arange(len(y)), [examples, examples + VALIDATION])
    return tuple((x[part], y[part]) for part in parts)


def corruptions(x: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The same images, and what can happen to them."""
    noise = np.random.default_rng(seed).normal(scale=0.3, size=x.shape).astype("float32")
    quarter_turn = np.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(x.shape)
    return {"held out": x, "with noise": x + noise, "rotated": quarter_turn}


def trained(data: Data, epochs: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(50, "relu"),
            keras.layers.Dense(50, "relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(KFAC(), loss)
    model.fit(*data, batch_size=128, epochs=epochs, verbose=0, callbacks=[KFACCallback()])
    return model


# ---- Measures -----------------------------------------------------------------------------------


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean over examples."""
    of_labels = probabilities[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(of_labels, np.finfo(of_labels.dtype).tiny))))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """How far the probability of the answer is from how often it is right.

    The mean over examples, in bins of equal width. Source: Guo, Pleiss, Sun & Weinberger (2017),
    "On calibration of modern neural networks".
    """
    confidence = probabilities.max(axis=-1)
    is_right = probabilities.argmax(axis=-1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(np.sum((is_right - confidence)[bins == i])) for i in range(BINS)]
    return float(np.sum(gaps) / len(labels))


def measures(probabilities: np.ndarray, labels: np.ndarray) -> list[str]:
    error = np.mean(probabilities.argmax(axis=-1) != labels)
    nll = negative_log_likelihood(probabilities, labels)
    return [f"{nll:.3f}", f"{error:.1%}", f"{calibration_error(probabilities, labels):.3f}"]


# ---- Predictions --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Probabilities by the posterior."""

    posterior: LaplacePosterior
    method: str
    draws: int
    precision: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.posterior.prior_precision = self.precision
        return self.posterior.predictive(x, self.method, self.draws).probs_parameter().numpy()

    def validated(self, data: Data) -> "Predictor":
        """The same with the prior precision whose predictions are best."""
        x, y = data
        each = [dataclasses.replace(self, precision=p) for p in PRECISIONS]
        return min(each, key=lambda predictor: negative_log_likelihood(predictor(x), y))


def predictors(
    model: keras.Model, posterior: LaplacePosterior, draws: int, validation: Data
) -> dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]]:
    """Each way to predict, by its name and that of the choice of the prior precision."""
    best = posterior.maximize_evidence()
    found = {("network", ""): lambda x: keras.ops.convert_to_numpy(keras.ops.softmax(model(x)))}
    for method in METHODS:
        by_evidence = Predictor(posterior, method, draws, best)
        by_validation = by_evidence.validated(validation)
        found[method, f"evidence: {best:.3g}"] = by_evidence
        found[method, f"validation: {by_validation.precision:.3g}"] = by_validation
    return found


# ---- Command line -------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="images to train on")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--draws", type=int, default=50, help="for predictions that take draws")
    parser.add_argument(
        "--curvature", default="kfac", choices=["kfac", "ekfac", "full", "diagonal"]
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    train, validation, (x, y) = digits(args.examples, args.seed)
    model = trained(train, args.epochs, args.seed)
    posterior = laplace(model, *train, curvature=args.curvature)
    console = Console()
    console.print(
        f"{posterior.effective_dimension:.0f} of {model.count_params()} weights determined, "
        f"log evidence {float(posterior.log_marginal_likelihood()):.1f}"
    )
    table = Table("images", "predictions", "prior precision", "NLL", "error", "calibration error")
    found = predictors(model, posterior, args.draws, validation)
    for title, images in corruptions(x, args.seed).items():
        table.add_section()
        for (method, prior), predict in found.items():
            table.add_row(title, method, prior, *measures(predict(images), y))
    console.print(table)


if __name__ == "__main__":
    main()
