"""One curvature block for all heads of an attention layer, or one for each.

    python benchmarks/attention_heads.py [--steps 600]

Trains the transformer of `problems.py` with `KFAC()` as it is, and with the covariances between
heads left out of the factors of attention's projections: each head then has blocks of its own. Both
make the same number of steps from the same weights on the same batches. At this width a step costs
the same either way, so that losses after equal steps tell which is better.
"""

import argparse
import json
from typing import Any

import keras
import tensorflow as tf
from defaults import ROOT
from environment import environment
from problems import PROBLEMS, source

from keras_kfac import KFAC, KFACCallback
from keras_kfac.introspection.einsum import EinsumBiasAdapter, EinsumDenseAdapter
from keras_kfac.introspection.registry import ADAPTERS

PATH = ROOT / "benchmarks" / "results" / "attention_heads.json"
PROBLEM = "2-block transformer, Python source, batch 32"
PARTS = 3  # Losses are noted after each of as many parts of the steps.


class PerHeadAdapter(EinsumDenseAdapter):
    """A projection whose heads have blocks of their own: no covariances between them."""

    def input_moment(self, inputs: tf.Tensor, *args: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Of the projection from heads; the bias, which all heads share, is on its own, too."""
        moment, weight = super().input_moment(inputs, *args)
        return self._within_heads(moment, self._axes.features), weight

    def output_factor(self, gradients: tf.Tensor, *observed: Any) -> tf.Tensor:
        """Of the projections to heads."""
        return self._within_heads(super().output_factor(gradients, *observed), self._axes.units)

    def _within_heads(self, factor: tf.Tensor, axes: str) -> tf.Tensor:
        if len(axes) < 2:  # Not split into heads.
            return factor
        head = tf.range(factor.shape[-1]) // self._size(axes[1:])
        return tf.where(head[:, tf.newaxis] == head, factor, tf.zeros_like(factor))


CHOICES = {
    "one for all heads": (EinsumDenseAdapter, EinsumBiasAdapter),
    "one for each head": (PerHeadAdapter, EinsumBiasAdapter),
}


def run(choice: str, data: tuple, steps: int, seed: int) -> dict:
    """Trains one network."""
    ADAPTERS[keras.layers.EinsumDense] = CHOICES[choice]
    keras.utils.set_random_seed(seed)
    problem = PROBLEMS[PROBLEM]
    x, y = data
    model = keras.Sequential([keras.Input(x.shape[1:]), *problem.network()])
    model.compile(KFAC(), problem.loss())
    size = problem.batch_size * steps // PARTS
    curve = []
    for part in range(PARTS):
        now = slice(part * size, (part + 1) * size)
        model.fit(x[now], y[now], problem.batch_size, verbose=0, callbacks=[KFACCallback()])
        loss = model.evaluate(x[:2000], y[:2000], batch_size=1000, verbose=0)
        curve.append((int(model.optimizer.iterations.numpy()), float(loss)))
    return {"blocks": choice, "seed": seed, "curve": curve}


def main() -> None:
    """Measures both choices in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    data = source(windows=PROBLEMS[PROBLEM].batch_size * args.steps)
    result: dict = {"environment": environment(), "runs": []}
    for seed in args.seeds:
        for choice in CHOICES:
            result["runs"].append(run(choice, data, args.steps, seed))
            print(choice, seed, result["runs"][-1]["curve"], flush=True)
            PATH.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
