"""Differential equations solved by networks: the exact natural gradient, L-BFGS and Adam.

A physics-informed network stands for the solution of a differential equation; its loss is the mean
square of what is left of the equation at points of the domain, and of the boundary conditions.
First-order methods get such networks to a few digits and no further. `keras_kfac.natural_gradient`
takes the exact natural gradient of that loss, in float64, with a line search along it (Müller &
Zeinhofer (2023), arXiv:2302.13163). All three start from the same weights, see the same points and
get the same number of seconds. Run it by

    python examples/differential_equations.py

and find all curves in a JSON file, and a picture, in `results/differential_equations`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
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
WIDTH = 96
CUTOFF = 3e-8  # a larger one ends at a larger error, a smaller one takes more steps
LEAST_RATE = 1e-9
ADAM_RATE = 1e-2
ADAM_DECAY = 1e-3  # of the rate, over all seconds
ROUND = 20  # steps of Adam and L-BFGS between looks at the clock
RECORDS = 200  # points of a curve, at most
console = Console()


# ---- Equations ----------------------------------------------------------------------------------


class Equation(NamedTuple):
    """A differential equation on the unit square whose solution is known.

    Attributes:
        solution: By points `[n, 2]`, `[n]`.
        left: What is left of the equation, by points, first and second derivatives, each `[n, 2]`.
        edges: Edges with a condition, as axis and coordinate.
    """

    solution: Callable[[tf.Tensor], tf.Tensor]
    left: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
    edges: Sequence[tuple[int, float]]


def waves(points: tf.Tensor) -> tf.Tensor:
    """`sin πx sin πy`."""
    return tf.reduce_prod(tf.sin(np.pi * points), axis=1)


def cooling(points: tf.Tensor) -> tf.Tensor:
    """`exp(-π² t / 4) sin πx`, with time in the first column."""
    time_, place = tf.unstack(points, axis=1)
    return tf.exp(-(np.pi**2) * time_ / 4) * tf.sin(np.pi * place)


EQUATIONS = {
    # Poisson's: -Δu = 2π² sin πx sin πy, zero on the boundary.
    "poisson": Equation(
        waves,
        lambda x, first, second: tf.reduce_sum(second, axis=1) + 2 * np.pi**2 * waves(x),
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
    edges = []
    for axis, edge in equation.edges:
        points = np.full((size, 2), edge)
        points[:, 1 - axis] = np.linspace(0, 1, size)
        edges.append(points)
    return np.concatenate(edges)


def derivatives(
    function: Callable[[tf.Tensor], tf.Tensor], points: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """First and second derivatives along both axes, each `[n, 2]`."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(points)
        with tf.GradientTape() as inner:
            inner.watch(points)
            values = function(points)
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
        width: Of the hidden layer.
    """

    def __init__(self, equation: Equation, seed: int, size: int = 30, width: int = WIDTH) -> None:
        keras.utils.set_random_seed(seed)
        self._equation = equation
        self.inside = tf.constant(grid(size), DTYPE)
        self.edge = tf.constant(edge_points(equation, size), DTYPE)
        self._tests = tf.constant(grid(100), DTYPE)
        # Without biases from the start, all units would bend on lines through one corner.
        hidden = keras.layers.Dense(
            width,
            "tanh",
            kernel_initializer=keras.initializers.RandomNormal(stddev=1.0),
            bias_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype=DTYPE,
        )
        self.model = keras.Sequential(
            [keras.Input((2,), dtype=DTYPE), hidden, keras.layers.Dense(1, dtype=DTYPE)]
        )
        self.variables = [v.value for v in self.model.trainable_variables]
        self.error = tf.function(self._error)

    def equation(self, points: tf.Tensor) -> tf.Tensor:
        """Residuals of the equation: their squares add up to a mean."""
        left = self._equation.left(points, *derivatives(self.model, points))
        return left / self.inside.shape[0] ** 0.5

    def boundary(self, points: tf.Tensor) -> tf.Tensor:
        """Those of the boundary conditions."""
        missing = self.model(points)[:, 0] - self._equation.solution(points)
        return missing / self.edge.shape[0] ** 0.5

    def loss(self) -> tf.Tensor:
        """Half the sum of the squares of all residuals."""
        return tf.nn.l2_loss(self.equation(self.inside)) + tf.nn.l2_loss(self.boundary(self.edge))

    def _error(self) -> tf.Tensor:
        """Relative error of the solution in the L2 norm."""
        exact = self._equation.solution(self._tests)
        return tf.norm(self.model(self._tests)[:, 0] - exact) / tf.norm(exact)


# ---- Optimizers: of a task, a function that trains for a round and returns the number of steps ---
# L-BFGS and Adam take a third to half the time under XLA. The natural gradient does without, as
# XLA's singular vectors on a CPU are right to eight digits only.

Round = Callable[[float], int]  # of the part of the seconds that is over
MakeRound = Callable[[Task], Round]


def by_natural_gradient(task: Task, cutoff: float | None = CUTOFF, damping: float = 0.0) -> Round:
    """The exact natural gradient. The step is halved as long as that lowers the loss."""
    variables = task.variables

    @tf.function
    def step() -> None:
        before = [tf.identity(v) for v in variables]
        found = natural_gradient(
            [task.equation, task.boundary],
            variables,
            points=[task.inside, task.edge],
            cutoff=cutoff,
            damping=damping,
        )

        def move(rate: tf.Tensor) -> None:
            for variable, start, direction in zip(variables, before, found.directions):
                variable.assign(start - rate * direction)

        def loss_at(rate: tf.Tensor) -> tf.Tensor:
            move(rate)
            return task.loss()

        rate = tf.constant(1.0, DTYPE)
        loss, loss_of_half = loss_at(rate), loss_at(rate / 2)
        while rate > LEAST_RATE and (loss_of_half < loss or not loss < found.loss):
            rate, loss, loss_of_half = rate / 2, loss_of_half, loss_at(rate / 4)
        move(rate)

    def one_step(over: float) -> int:
        step()
        return 1

    return one_step


def by_lbfgs(task: Task) -> Round:
    """TensorFlow Probability's L-BFGS; where it gets stuck, it starts again from there."""
    sizes = [v.shape.num_elements() for v in task.variables]

    def flat(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)

    def assign(vector: tf.Tensor) -> None:
        for variable, part in zip(task.variables, tf.split(vector, sizes)):
            variable.assign(tf.reshape(part, variable.shape))

    def value_and_gradient(vector: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        assign(vector)
        with tf.GradientTape() as tape:
            loss = task.loss()
        return loss, flat(tape.gradient(loss, task.variables))

    def minimize(start: tf.Tensor | None, state: Any, steps: int | tf.Tensor) -> Any:
        result = tfp.optimizer.lbfgs_minimize(
            value_and_gradient,
            initial_position=start,
            previous_optimizer_results=state,
            num_correction_pairs=50,
            tolerance=0.0,
            max_iterations=steps,
        )
        assign(result.position)
        return result

    def begin() -> Any:  # no step, so nothing to compile
        return minimize(flat(task.variables), None, 0)

    @tf.function(jit_compile=True)
    def go_on(state: Any) -> Any:
        return minimize(None, state, state.num_iterations + ROUND)

    state = begin()

    def some_steps(over: float) -> int:
        nonlocal state
        before = int(state.num_iterations)
        state = go_on(state)
        steps = int(state.num_iterations) - before
        if bool(state.failed) or bool(state.converged):
            state = begin()
        return steps

    return some_steps


def by_adam(task: Task, rate: float = ADAM_RATE) -> Round:
    """Keras's Adam; its rate decays with the time."""
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build(task.model.trainable_variables)

    @tf.function(jit_compile=True)
    def steps() -> None:
        for _ in tf.range(ROUND):
            with tf.GradientTape() as tape:
                loss = task.loss()
            optimizer.apply(tape.gradient(loss, task.variables))

    def some_steps(over: float) -> int:
        optimizer.learning_rate = rate * ADAM_DECAY**over
        steps()
        return ROUND

    return some_steps


OPTIMIZERS: dict[str, MakeRound] = {
    "natural gradient": by_natural_gradient,
    "L-BFGS": by_lbfgs,
    "Adam": by_adam,
}


class Record(NamedTuple):
    """A point of a curve."""

    seconds: float
    steps: int
    error: float


def train(task: Task, train_round: Round, seconds: float) -> list[Record]:
    """Trains for some seconds; the first round, which traces and compiles, is not counted."""
    curve = [Record(0.0, 0, float(task.error()))]
    steps, spent = train_round(0.0), 0.0
    while spent < seconds:
        began = time.perf_counter()
        steps += train_round(min(1.0, spent / seconds))
        spent += time.perf_counter() - began
        if spent >= seconds or spent - curve[-1].seconds >= seconds / RECORDS:
            curve.append(Record(spent, steps, float(task.error())))
    return curve


# ---- What it leaves -----------------------------------------------------------------------------


def draw(results: dict[str, dict[str, list[Record]]], path: Path) -> None:
    """A picture of all curves."""
    figure, all_axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axes, (equation, curves) in zip(all_axes[0], results.items()):
        for optimizer, curve in curves.items():
            seconds, _, errors = zip(*curve)
            axes.semilogy(seconds, errors, label=optimizer)
        axes.set(title=equation, xlabel="seconds", ylabel="relative error in the L2 norm")
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Solves the equations by all optimizers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("equations", nargs="*", help=f"some of {list(EQUATIONS)}; all if none")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each optimizer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--output-dir", type=Path, default=Path("results/differential_equations"))
    args = parser.parse_args(arguments)
    if unknown := set(args.equations) - set(EQUATIONS):
        parser.error(f"no equations called {sorted(unknown)}: choose from {list(EQUATIONS)}")
    results: dict[str, dict[str, list[Record]]] = {}
    table = Table("equation", "optimizer", "steps", "seconds", "relative L2 error")
    for name in args.equations or EQUATIONS:
        results[name] = {}
        for optimizer, make_round in OPTIMIZERS.items():
            console.print(f"{name}: {optimizer} ...")
            task = Task(EQUATIONS[name], args.seed)
            curve = results[name][optimizer] = train(task, make_round(task), args.seconds)
            seconds, steps, error = curve[-1]
            table.add_row(name, optimizer, str(steps), f"{seconds:.1f}", f"{error:.1e}")
    console.print(table)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "curves.json").write_text(json.dumps(results))
    draw(results, args.output_dir / "error.png")
    console.print(f"Curves and picture are in {args.output_dir}")


if __name__ == "__main__":
    main()
