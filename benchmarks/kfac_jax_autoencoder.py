"""The autoencoder of `autoencoder_peers.py` trained by kfac-jax; that script runs this one.

python kfac_jax_autoencoder.py IMAGES WEIGHTS DAMPING SECONDS TARGET SEED

Learning rate, momentum and damping adapt. The other settings are the best found in tries.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
from stopwatch import train

L2 = 1e-5
PERIODS = (2, 10)  # Of factors and inverses.


def logits(weights: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """The autoencoder's outputs: tanh but for the code and the logits."""
    for i, (kernel, bias) in enumerate(weights, start=1):
        x = x @ kernel + bias
        if i not in (len(weights) // 2, len(weights)):
            x = jnp.tanh(x)
    return x


def loss(weights: list[tuple[jax.Array, jax.Array]], batch: tuple[jax.Array, jax.Array]):
    """Cross-entropy summed over pixels, mean over images, and the L2 term kfac-jax asks for."""
    images, targets = batch
    outputs = logits(weights, images)
    kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, targets)
    entropy = jnp.maximum(outputs, 0) - outputs * targets + jnp.log1p(jnp.exp(-jnp.abs(outputs)))
    l2 = sum(jnp.sum(w**2) for w in jax.tree.leaves(weights)) / 2
    return jnp.mean(jnp.sum(entropy, axis=1)) + L2 * l2


class Training:
    """Steps of kfac-jax's optimizer from given weights.

    Args:
        initial: File with the weights, kernels and biases in turn.
        damping: The initial one.
        seed: Of the targets drawn.
        periods: Steps between updates of the factors, and of their inverses.
    """

    def __init__(self, initial: str, damping: float, seed: int, periods: tuple[int, int]) -> None:
        with np.load(initial) as file:
            arrays = [jnp.asarray(file[name]) for name in file.files]
        self.params = list(zip(arrays[::2], arrays[1::2]))
        self._optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(loss),
            l2_reg=L2,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=damping,
            min_damping=1e-5,
            damping_adaptation_decay=0.95,
            curvature_update_period=periods[0],
            inverse_update_period=periods[1],
            num_burnin_steps=0,
            multi_device=False,
        )
        self._key = jax.random.PRNGKey(seed)
        self._state = None

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """Makes a step, and waits for its end."""
        batch = (jnp.asarray(x), jnp.asarray(y))
        if self._state is None:
            self._state = self._optimizer.init(self.params, self._key, batch)
        self._key, draw = jax.random.split(self._key)
        self.params, self._state, *_ = self._optimizer.step(
            self.params, self._state, draw, batch=batch
        )
        jax.block_until_ready(self.params)


def versions() -> dict[str, str]:
    """Of the packages."""
    return {"jax": jax.__version__, "kfac-jax": kfac_jax.__version__}


def main() -> None:
    """Trains, and prints the result as JSON."""
    images, initial, damping, seconds, target, seed = sys.argv[1:]
    training = Training(initial, float(damping), int(seed), PERIODS)
    outputs = jax.jit(lambda weights, x: jax.nn.sigmoid(logits(weights, x)))
    result = train(
        training.step,
        lambda x: outputs(training.params, x),
        Path(images),
        float(seconds),
        float(target),
        int(seed),
    )
    print(json.dumps(result | {"versions": versions()}))


if __name__ == "__main__":
    main()
