"""Deep linear networks: the natural gradient's rate does not know how the data are conditioned.

Bernacchia, Lengyel & Hennequin (2018), "Exact natural gradient in deep linear networks and
application to the nonlinear case": with squared loss, and no layer narrower than inputs and
outputs, a natural gradient step of learning rate `α` leaves `(1 - α)²` of what the loss is above
its minimum, whatever the covariance of the inputs. `KFAC(curvature="linear_exact")` takes such
steps. Gradient descent and Adam, each at the best of some rates, depend on that covariance. Run it
by

    python examples/deep_linear.py

and find a table of what a step leaves of the excess loss, and in `results/deep_linear` the curves,
drawn and as JSON (four minutes).
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_kfac import KFAC, KFACCallback

matplotlib.use("Agg")  # draws to files, without a display
import matplotlib.pyplot as plt

EXAMPLES = 500
INPUTS, OUTPUTS = 8, 6
WIDTHS = (10, 8)  # of hidden layers, none below inputs or outputs
CONDITIONS = (1.0, 1e2, 1e4)  # of the covariance of the inputs
RATES = np.geomspace(1e-3, 1.0, 7)
# Just enough for factors that are singular: a wide layer's inputs have the rank of the data.
DAMPING = 1e-12

Data = tuple[np.ndarray, np.ndarray]
Optimizer = Callable[[float], keras.Optimizer]


def data(condition: float, seed: int) -> Data:
    """Inputs of zero mean, and noisy linear targets."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, condition**-0.5, INPUTS)
    rotation = np.linalg.qr(rng.normal(size=(INPUTS, INPUTS)))[0]
    x = rng.normal(size=(EXAMPLES, INPUTS)) * scales @ rotation
    # Each direction of the inputs matters as much as any other.
    target = rotation.T @ (rng.normal(size=(INPUTS, OUTPUTS)) / scales[:, np.newaxis])
    return x, x @ target + rng.normal(size=(EXAMPLES, OUTPUTS))


def least_loss(x: np.ndarray, y: np.ndarray) -> float:
    """That of linear regression."""
    return float(np.mean(np.square(y - x @ np.linalg.lstsq(x, y, rcond=None)[0])))


def network(seed: int) -> keras.Sequential:
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Dense(width, use_bias=False, kernel_initializer="orthogonal")
        for width in (*WIDTHS, OUTPUTS)
    ]
    return keras.Sequential([keras.Input((INPUTS,)), *layers])


def natural_gradient(rate: float) -> KFAC:
    """Without what K-FAC adapts by itself, on the Fisher matrix of the present step."""
    return KFAC(
        rate,
        curvature="linear_exact",
        fisher="exact",
        damping=DAMPING,
        momentum=0.0,
        factor_ema_decay=0.0,
        factor_update_period=1,
        inverse_update_period=1,
    )


def excess_losses(optimizer: keras.Optimizer, of: Data, steps: int, seed: int) -> np.ndarray:
    """What the loss is above its minimum before each step, on all examples, and at the end."""
    model = network(seed)
    model.compile(optimizer, "mse")
    callbacks = [KFACCallback()] if isinstance(optimizer, KFAC) else []
    options = {"batch_size": EXAMPLES, "shuffle": False, "verbose": 0}
    history = model.fit(*of, epochs=steps, callbacks=callbacks, **options).history["loss"]
    losses = [*history, model.evaluate(*of, batch_size=EXAMPLES, verbose=0)]
    return np.array(losses) - least_loss(*of)


def best(make: Optimizer, of: Data, steps: int, seed: int) -> np.ndarray:
    """The curve that ends lowest of those of all rates."""
    curves = [excess_losses(make(rate), of, steps, seed) for rate in RATES]
    return min(curves, key=lambda curve: curve[-1] if np.isfinite(curve[-1]) else np.inf)


def ratio(curve: np.ndarray) -> float:
    """What a step leaves of the excess loss, on average."""
    return float((curve[-1] / curve[0]) ** (1 / (len(curve) - 1)))


def draw(curves: dict[tuple[float, str], np.ndarray], rate: float, path: Path) -> None:
    figure, every = plt.subplots(1, len(CONDITIONS), figsize=(11, 3.5), sharey=True)
    for axes, condition in zip(every, CONDITIONS):
        for (own, name), curve in curves.items():
            if own == condition:
                axes.semilogy(curve / curve[0], label=name)
        theory = (1 - rate) ** (2 * np.arange(len(curve)))
        axes.semilogy(theory, "k:", label="(1 - α)² per step")
        axes.set(title=f"condition number {condition:g}", xlabel="step")
    every[0].set_ylabel("excess loss, relative")
    every[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.05, help="of the natural gradient")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/deep_linear"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    curves: dict[tuple[float, str], np.ndarray] = {}
    for condition in CONDITIONS:
        of = data(condition, args.seed)
        run = (of, args.steps, args.seed)
        curves[condition, "natural gradient"] = excess_losses(natural_gradient(args.rate), *run)
        curves[condition, "gradient descent"] = best(keras.optimizers.SGD, *run)
        curves[condition, "Adam"] = best(keras.optimizers.Adam, *run)
    table = Table("condition number", "optimizer", "a step leaves", "(1 - α)²", "all steps leave")
    for (condition, name), curve in curves.items():
        theory = f"{(1 - args.rate) ** 2:.4f}" if name == "natural gradient" else ""
        left = f"{curve[-1] / curve[0]:.1e}"
        table.add_row(f"{condition:g}", name, f"{ratio(curve):.4f}", theory, left)
    Console().print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(curves, args.rate, args.output / "excess_loss.png")
    raw = {f"{name}, condition {number:g}": list(own) for (number, name), own in curves.items()}
    (args.output / "excess_loss.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
