"""Differential equations solved by networks: the exact natural gradient, Adam and L-BFGS.

A physics-informed network stands for the solution of a differential equation; its loss is the mean
square of what is left of the equation at points of the domain, and of the boundary conditions.
First-order methods get such networks to a few digits and no further. `keras_kfac.natural_gradient`
takes the exact natural gradient of that loss, in float64, with a line search along it. All three
start from the same weights, see the same points and get the same number of seconds. Run it by

    python examples/differential_equations.py

and find a CSV with all curves and a picture in `results/differential_equations`.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import matplotlib
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from rich.console import Console
from rich.table import Table

from keras_kfac import natural_gradient

matplotlib.use("Agg")  # draws to files, without a display
import matplotlib.pyplot as plt

DTYPE = "float64"
WIDTH = 64
RATES = 0.5 ** np.arange(25)  # of the line search
LBFGS_ROUND = 50  # iterations between looks at the clock
console = Console()


class Equation(NamedTuple):
    """A differential equation on the unit square whose solution is known.

    Attributes:
        solution: By points `[n, 2]`, `[n, 1]`.
        left: What is left of the equation, by points, first and second derivatives, each `[n, 2]`.
        edges: Edges with a condition, as axis and coordinate.
    """

    solution: Callable[[tf.Tensor], tf.Tensor]
    left: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
    edges: Sequence[tuple[int, float]]


def waves(points: tf.Tensor) -> tf.Tensor:
    """`sin πx sin πy`."""
    return tf.reduce_prod(tf.sin(np.pi * points), axis=1, keepdims=True)


def cooling(points: tf.Tensor) -> tf.Tensor:
    """`exp(-π² t / 4) sin πx`, with time in the first column."""
    time_, place = tf.split(points, 2, axis=1)
    return tf.exp(-(np.pi**2) * time_ / 4) * tf.sin(np.pi * place)


EQUATIONS = {
    # Poisson's: u_xx + u_yy = -2π² sin πx sin πy, zero on the boundary.
    "poisson": Equation(
        waves,
        lambda x, first, second: tf.reduce_sum(second, axis=1) + 2 * np.pi**2 * waves(x)[:, 0],
        [(axis, edge) for axis in (0, 1) for edge in (0.0, 1.0)],
    ),
    # The heat equation: u_t = u_xx / 4 from sin πx at time 0, zero at both ends.
    "heat": Equation(
        cooling,
        lambda x, first, second: first[:, 0] - second[:, 1] / 4,
        [(0, 0.0), (1, 0.0), (1, 1.0)],
    ),
}


def grid(size: int) -> np.ndarray:
    """Points inside the unit square, `[size², 2]`."""
    ticks = (np.arange(size) + 0.5) / size
    return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)


def edge_points(equation: Equation, size: int) -> np.ndarray:
    """Points on the edges that have a condition."""
    ticks = np.linspace(0, 1, size)
    edges = []
    for axis, edge in equation.edges:
        points = np.full((size, 2), edge)
        points[:, 1 - axis] = ticks
        edges.append(points)
    return np.concatenate(edges)


def derivatives(model: keras.Model, points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """First and second derivatives along both axes, each `[n, 2]`."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(points)
        with tf.GradientTape() as inner:
            inner.watch(points)
            values = model(points)
        first = inner.gradient(values, points)
        columns = tf.unstack(first, axis=1)
    second = [outer.gradient(column, points)[:, i] for i, column in enumerate(columns)]
    return first, tf.stack(second, axis=1)


class Task:
    """A network that is to solve an equation.

    Args:
        equation: The equation.
        seed: Of the weights.
        size: Points along an edge.
    """

    def __init__(self, equation: Equation, seed: int, size: int = 30) -> None:
        keras.utils.set_random_seed(seed)
        self._equation = equation
        self._inside = tf.constant(grid(size), DTYPE)
        self._edge = tf.constant(edge_points(equation, size), DTYPE)
        self._tests = tf.constant(grid(100), DTYPE)
        layers = keras.layers
        self.model = keras.Sequential(
            [
                keras.Input((2,), dtype=DTYPE),
                layers.Dense(WIDTH, "tanh", dtype=DTYPE),
                layers.Dense(1, dtype=DTYPE),
            ]
        )
        self.variables = [v.value for v in self.model.trainable_variables]
        self.error = tf.function(self._error)

    def residuals(self) -> list[tf.Tensor]:
        """Those whose squares add up to the mean squares of equation and boundary conditions."""
        inside, edge = self._inside, self._edge
        left = self._equation.left(inside, *derivatives(self.model, inside))
        missing = self.model(edge) - self._equation.solution(edge)
        return [part / part.shape[0] ** 0.5 for part in (left, missing)]

    def loss(self) -> tf.Tensor:
        """Half the sum of their squares."""
        return tf.add_n([tf.nn.l2_loss(part) for part in self.residuals()])

    def _error(self) -> tf.Tensor:
        """Relative error of the solution in the L2 norm."""
        exact = self._equation.solution(self._tests)
        return tf.norm(self.model(self._tests) - exact) / tf.norm(exact)


# ---- Optimizers: each yields once in a while, when its weights can be looked at -----------------


def by_natural_gradient(task: Task) -> Iterator[int]:
    """The exact natural gradient, with the best of some step lengths."""

    @tf.function
    def step() -> None:
        directions = natural_gradient(task.residuals, task.variables).directions
        before = [tf.identity(v) for v in task.variables]
        losses = []
        for rate in RATES:
            move(before, directions, rate)
            losses.append(task.loss())
        move(before, directions, tf.gather(tf.constant(RATES), tf.argmin(losses)))

    def move(before: list[tf.Tensor], directions: list[tf.Tensor], rate: Any) -> None:
        for variable, start, direction in zip(task.variables, before, directions):
            variable.assign(start - rate * direction)

    while True:
        step()
        yield 1


def by_adam(task: Task) -> Iterator[int]:
    """Keras's Adam."""
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(task.model.trainable_variables)

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = task.loss()
        optimizer.apply(tape.gradient(loss, task.variables), task.model.trainable_variables)

    while True:
        for _ in range(LBFGS_ROUND):
            step()
        yield LBFGS_ROUND


def by_lbfgs(task: Task) -> Iterator[int]:
    """TensorFlow Probability's L-BFGS, which goes on where it was."""
    shapes = [v.shape for v in task.variables]
    sizes = [shape.num_elements() for shape in shapes]

    def assign(vector: tf.Tensor) -> None:
        for variable, part in zip(task.variables, tf.split(vector, sizes)):
            variable.assign(tf.reshape(part, variable.shape))

    def value_and_gradient(vector: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        assign(vector)
        with tf.GradientTape() as tape:
            loss = task.loss()
        parts = [tf.reshape(g, [-1]) for g in tape.gradient(loss, task.variables)]
        return loss, tf.concat(parts, axis=0)

    @tf.function
    def go_on(state: Any, start: tf.Tensor, count: tf.Tensor) -> Any:
        result = tfp.optimizer.lbfgs_minimize(
            value_and_gradient,
            initial_position=start if state is None else None,
            previous_optimizer_results=state,
            num_correction_pairs=50,
            max_iterations=count,
            tolerance=0.0,
            x_tolerance=0.0,
            f_relative_tolerance=0.0,
            max_line_search_iterations=50,
        )
        assign(result.position)
        return result

    start = tf.concat([tf.reshape(v, [-1]) for v in task.variables], axis=0)
    state, count = None, 0
    while True:
        count += LBFGS_ROUND
        state = go_on(state, start, tf.constant(count))
        yield LBFGS_ROUND
        if bool(state.failed) or bool(state.converged):
            return


OPTIMIZERS: dict[str, Callable[[Task], Iterator[int]]] = {
    "natural gradient": by_natural_gradient,
    "L-BFGS": by_lbfgs,
    "Adam 1e-3": by_adam,
}


def train(task: Task, optimizer: str, seconds: float) -> list[tuple[float, int, float]]:
    """Seconds, steps and errors along the way; tracing and compiling is not counted."""
    curve = [(0.0, 0, float(task.error()))]
    spent, steps = 0.0, 0
    rounds = OPTIMIZERS[optimizer](task)
    for is_first in (True, *[False] * 10**9):
        began = time.perf_counter()
        done = next(rounds, None)
        if done is None:  # It can't go on.
            break
        spent += 0.0 if is_first else time.perf_counter() - began
        steps += done
        curve.append((spent, steps, float(task.error())))
        if spent >= seconds:
            break
    return curve


# ---- What it leaves -----------------------------------------------------------------------------


def write(results: dict[str, dict[str, list]], folder: Path) -> None:
    """A CSV of all curves, and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["equation", "optimizer", "seconds", "steps", "relative L2 error"])
        for equation, curves in results.items():
            for optimizer, curve in curves.items():
                writer.writerows([equation, optimizer, *row] for row in curve)
    figure, all_axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axes, (equation, curves) in zip(all_axes[0], results.items()):
        for optimizer, curve in curves.items():
            spent, _, errors = zip(*curve)
            axes.semilogy(spent, errors, label=optimizer)
        axes.set(title=equation, xlabel="seconds", ylabel="relative error in the L2 norm")
        axes.legend()
    figure.savefig(folder / "error.png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list]]:
    """Solves the equations by all optimizers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("equations", nargs="*", help=f"some of {list(EQUATIONS)}; all if none")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each optimizer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--output", type=Path, default=Path("results/differential_equations"))
    args = parser.parse_args(arguments)
    if unknown := set(args.equations) - set(EQUATIONS):
        parser.error(f"no equations called {sorted(unknown)}: choose from {list(EQUATIONS)}")
    results: dict[str, dict[str, list]] = {}
    table = Table("equation", "optimizer", "steps", "seconds", "relative L2 error")
    for name in args.equations or EQUATIONS:
        results[name] = {}
        for optimizer in OPTIMIZERS:
            curve = train(Task(EQUATIONS[name], args.seed), optimizer, args.seconds)
            results[name][optimizer] = curve
            spent, steps, error = curve[-1]
            table.add_row(name, optimizer, str(steps), f"{spent:.1f}", f"{error:.1e}")
            console.print(f"{name}, {optimizer}: {error:.1e} after {spent:.0f} s")
    console.print(table)
    write(results, args.output)
    return results


if __name__ == "__main__":
    main()
