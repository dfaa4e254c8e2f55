"""How well predictions know what they do not know: MAP, Laplace's approximation, noisy K-FAC.

    python benchmarks/calibration.py

Two tasks: the digits of `examples/laplace.py`, and a curve through 30 points. Each network has the
prior of one precision, chosen on the first seed by the likelihood of validation data: one for MAP,
one for noisy K-FAC. All results are written to a JSON file with the environment; `--report` prints
the tables of docs/laplace.md from that file.

    python benchmarks/calibration.py --full

takes Laplace's approximation by Kronecker-factored and by full blocks, of the network of
`examples/laplace.py`, which has no prior; its results stand beside the others, which are kept.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks"), str(ROOT)]

import keras  # noqa: E402  (paths first)
import laplace as example  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_probability as tfp  # noqa: E402
from environment import environment  # noqa: E402

from keras_kfac import (  # noqa: E402
    KFAC,
    KFACCallback,
    NegativeLogLikelihood,
    WeightNoise,
    laplace,
)

tfd = tfp.distributions
RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"
PRECISIONS = (0.1, 1.0, 10.0)
DRAWS = 50
NOISE = 0.2  # of the curve, standard deviation
EPOCHS = 30  # of the network without prior, as in the example

Data = tuple[np.ndarray, np.ndarray]


class Task(NamedTuple):
    """What to learn, and by which networks.

    Attributes:
        widths: Of the layers.
        activation: Of all but the last.
        loss: Makes the loss, a mean of negative log-likelihoods.
        batch_size: In training.
        steps: Of K-FAC.
        noisy: Which kinds of noise to train with.
    """

    widths: tuple[int, ...]
    activation: str
    loss: Callable[[], keras.losses.Loss]
    batch_size: int
    steps: int
    noisy: tuple[str, ...]

    def network(self, features: int, l2: float) -> keras.Model:
        """Dense layers with an L2 regulariser of all weights."""
        names = ("kernel_regularizer", "bias_regularizer")
        prior = dict.fromkeys(names, keras.regularizers.L2(l2))
        *hidden, last = self.widths
        body = [keras.layers.Dense(width, self.activation, **prior) for width in hidden]
        return keras.Sequential(
            [keras.Input((features,)), *body, keras.layers.Dense(last, **prior)]
        )


def normal(means: object) -> tfd.Distribution:
    """The likelihood of the curve."""
    return tfd.Independent(tfd.Normal(means, NOISE), 1)


TASKS = {
    "digits": Task(
        (50, 50, 10),
        "relu",
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        batch_size=128,
        steps=400,
        noisy=("noisy K-FAC", "noisy K-FAC, T = 0.1"),
    ),
    "curve": Task(
        (20, 1),
        "tanh",
        lambda: NegativeLogLikelihood(normal),
        batch_size=30,
        steps=400,
        noisy=("noisy K-FAC",),
    ),
}


# ---- Training -----------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A network, and its noise if it has been trained with it."""

    model: keras.Model
    precision: float
    noise: WeightNoise | None = None

    def outputs(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """Those of the network, or of draws of it."""
        if self.noise is None:
            yield np.asarray(self.model(x))
            return
        for draw in range(DRAWS):
            with self.noise.applied(draw):
                yield np.asarray(self.model(x))


ADAM, MAP = "MAP, Adam", "MAP, K-FAC"
TEMPERATURES = {"noisy K-FAC": 1.0, "noisy K-FAC, T = 0.1": 0.1}


def trained(task: Task, way: str, data: Data, precision: float, seed: int) -> Trained:
    """One network. Adam takes twice the steps; noise comes after these, for 2.5 times as many."""
    keras.utils.set_random_seed(seed)
    x, _ = data
    model = task.network(x.shape[1], precision / (2 * len(x)))
    batches = tf.data.Dataset.from_tensor_slices(data).shuffle(len(x), seed).batch(task.batch_size)

    def fit(steps: int, *callbacks: keras.callbacks.Callback) -> None:
        options = {"shuffle": False, "verbose": 0, "steps_per_epoch": steps}
        model.fit(batches.repeat(), callbacks=list(callbacks), **options)

    if way == ADAM:
        rate = keras.optimizers.schedules.CosineDecay(1e-2, 2 * task.steps)
        model.compile(keras.optimizers.Adam(rate), task.loss())
        fit(2 * task.steps)
        return Trained(model, precision)
    model.compile(KFAC(), task.loss())
    fit(task.steps, KFACCallback())
    if way not in TEMPERATURES:
        return Trained(model, precision)
    noise = WeightNoise(len(x), TEMPERATURES[way], seed)
    fit(task.steps * 5 // 2, KFACCallback(), noise)
    return Trained(model, precision, noise)


def networks(
    task: Task, data: Data, seed: int, chosen: dict[str, float], score: Callable[[Trained], float]
) -> dict[str, Trained]:
    """All ways to train; the first time MAP and the first kind of noise choose their priors."""
    found = {}
    for way in (MAP, *task.noisy):
        kind = MAP if way == MAP else task.noisy[0]
        precisions = [chosen[kind]] if kind in chosen else PRECISIONS
        each = [trained(task, way, data, precision, seed) for precision in precisions]
        found[way] = min(each, key=score) if len(each) > 1 else each[0]
        chosen[kind] = found[way].precision
    means = {f"{way}, means": found[way]._replace(noise=None) for way in task.noisy}
    return {ADAM: trained(task, ADAM, data, chosen[MAP], seed), **found, **means}


# ---- Digits -------------------------------------------------------------------------------------


def probabilities(network: Trained, x: np.ndarray) -> np.ndarray:
    """The mean over draws."""
    each = [np.asarray(keras.ops.softmax(outputs)) for outputs in network.outputs(x)]
    return np.mean(each, axis=0)


def digits(seed: int, chosen: dict[str, float]) -> Iterator[dict]:
    """All predictions of one seed."""
    task = TASKS["digits"]
    data, validation, (x, y) = example.digits(1000, seed)

    def score(network: Trained) -> float:
        return example.negative_log_likelihood(probabilities(network, validation[0]), validation[1])

    found = networks(task, data, seed, chosen, score)
    predictors = {
        (way, "validation", network.precision): lambda x, n=network: probabilities(n, x)
        for way, network in found.items()
    }
    posterior = laplace(found[MAP].model, *data)
    by_laplace = example.predictors(found[MAP].model, posterior, DRAWS, validation)
    for (method, prior), predict in by_laplace.items():
        if prior:
            choice, precision = prior.split(": ")
            predictors[f"Laplace, {method}", choice, float(precision)] = predict
    for images, inputs in example.corruptions(x, seed).items():
        for (method, choice, precision), predict in predictors.items():
            row = {"data": images, "method": method, "prior": choice, "precision": precision}
            yield {**row, **digits_measures(predict(inputs), y)}


def digits_measures(found: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Of probabilities `[images, classes]`."""
    return {
        "nll": example.negative_log_likelihood(found, y),
        "error": float(np.mean(found.argmax(axis=-1) != y)),
        "calibration": example.calibration_error(found, y),
    }


def full_blocks(seed: int, chosen: dict[str, float]) -> Iterator[dict]:
    """Predictions at the precision of the evidence, of a network that was trained without prior."""
    data, _, (x, y) = example.digits(1000, seed)
    model = example.trained(data, EPOCHS, seed)
    predictors = {("without prior", "none", 0.0): lambda x: probabilities(Trained(model, 0.0), x)}
    for curvature in ("kfac", "full"):
        posterior = laplace(model, *data, curvature=curvature)
        best = posterior.prior_precision
        for method in example.METHODS:
            predict = example.Predictor(posterior, method, DRAWS, best)
            predictors[f"Laplace, {curvature}, {method}", "evidence", best] = predict
    for images, inputs in example.corruptions(x, seed).items():
        for (method, choice, precision), predict in predictors.items():
            row = {"data": images, "method": method, "prior": choice, "precision": precision}
            yield {**row, **digits_measures(predict(inputs), y)}


# ---- The curve ----------------------------------------------------------------------------------


def points(rng: np.random.Generator, count: int, low: float, high: float) -> Data:
    """Of a sine, with noise."""
    x = rng.uniform(low, high, (count, 1)).astype("float32")
    return x, (np.sin(3 * x) + NOISE * rng.normal(size=x.shape)).astype("float32")


def mixture(network: Trained, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of the targets, of each draw."""
    means = np.stack(list(network.outputs(x)))
    return means, np.full_like(means, NOISE**2)


def curve_measures(means: np.ndarray, variances: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Of a mixture of normal distributions, `[draws, points, 1]`."""
    logarithms = tfd.Normal(means, np.sqrt(variances)).log_prob(y).numpy()
    nll = -np.mean(np.logaddexp.reduce(logarithms, axis=0) - np.log(len(means)))
    mean = np.mean(means, axis=0)
    deviation = np.sqrt(np.mean(variances + means**2, axis=0) - mean**2)
    return {
        "nll": float(nll),
        "error": float(np.sqrt(np.mean((y - mean) ** 2))),
        "inside": float(np.mean(np.abs(y - mean) < 1.96 * deviation)),
    }


def curve(seed: int, chosen: dict[str, float]) -> Iterator[dict]:
    """All predictions of one seed."""
    task, rng = TASKS["curve"], np.random.default_rng(seed)
    data, validation = points(rng, 30, -1, 1), points(rng, 30, -1, 1)
    sets = {"where data are": points(rng, 1000, -1, 1), "beside": points(rng, 1000, 1, 2)}

    def score(network: Trained) -> float:
        return curve_measures(*mixture(network, validation[0]), validation[1])["nll"]

    found = networks(task, data, seed, chosen, score)
    posterior = laplace(found[MAP].model, *data)

    def by_laplace(x: np.ndarray, precision: float) -> tuple[np.ndarray, np.ndarray]:
        posterior.prior_precision = precision
        targets = posterior.predictive(x)
        return targets.mean().numpy()[np.newaxis], targets.variance().numpy()[np.newaxis]

    precisions = {
        "evidence": posterior.maximize_evidence(),
        "validation": found[MAP].precision,
    }
    for name, (x, y) in sets.items():
        for way, network in found.items():
            row = {"method": way, "prior": "validation", "precision": network.precision}
            yield {"data": name, **row, **curve_measures(*mixture(network, x), y)}
        for choice, precision in precisions.items():
            row = {"method": "Laplace, linear", "prior": choice, "precision": precision}
            yield {"data": name, **row, **curve_measures(*by_laplace(x, precision), y)}


# ---- Report -------------------------------------------------------------------------------------

COLUMNS = {
    "digits": {"nll": "NLL", "error": "error", "calibration": "calibration error"},
    "curve": {"nll": "NLL", "error": "root of squared error", "inside": "in 95 % intervals"},
}
COLUMNS["full"] = COLUMNS["digits"]
PERCENT = {("digits", "error"), ("full", "error"), ("curve", "inside")}


def report(result: dict) -> str:
    """Means over seeds, with the lowest and highest NLL, as tables."""
    tables = []
    for task, columns in COLUMNS.items():
        parts = (result, result.get("full", {"rows": []}))
        rows = [row for part in parts for row in part["rows"] if row["task"] == task]
        if not rows:
            continue
        lines = [f"| data | predictions | `τ` | {' | '.join(columns.values())} |"]
        lines.append("|---" * (3 + len(columns)) + "|")
        for key in dict.fromkeys((r["data"], r["method"], r["prior"]) for r in rows):
            same = [r for r in rows if (r["data"], r["method"], r["prior"]) == key]
            precisions = sorted({float(f"{r['precision']:.2g}") for r in same})
            prior = " to ".join(f"{p:g}" for p in dict.fromkeys([precisions[0], precisions[-1]]))
            cells = [_cell(task, name, [r[name] for r in same]) for name in columns]
            lines.append(f"| {key[0]} | {key[1]} | {prior} ({key[2]}) | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(task: str, name: str, values: list[float]) -> str:
    mean = statistics.mean(values)
    if (task, name) in PERCENT:
        return f"{mean:.1%}"
    if name == "nll":
        return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
    return f"{mean:.3f}"


def measured(runs: dict[str, Callable[..., Iterator[dict]]], seeds: int) -> dict:
    """All predictions of some tasks, with the environment."""
    result: dict = {"environment": environment(), "draws": DRAWS, "rows": []}
    for name, run in runs.items():
        chosen: dict[str, float] = {}
        for seed in range(seeds):
            start = time.perf_counter()
            rows = list(run(seed, chosen))
            result["rows"] += [{"task": name, "seed": seed, **row} for row in rows]
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def main() -> None:
    """Measures, or reports what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--full", action="store_true", help="full blocks, and nothing else")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    args = parser.parse_args()
    if not args.report:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
        if args.full:
            result = {**kept, "full": measured({"full": full_blocks}, args.seeds)}
        else:
            result = measured({"digits": digits, "curve": curve}, args.seeds)
            result |= {"full": kept["full"]} if "full" in kept else {}
        RESULTS.write_text(json.dumps(result, indent=1))
    print(report(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
