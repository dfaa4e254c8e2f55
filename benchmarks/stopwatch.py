"""The training loop that `autoencoder_peers.py` times, the same for every framework.

Imports neither TensorFlow nor JAX, so that either can use it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCH_SIZE = 1000
EVALUATE_EVERY = 0.5  # seconds of training
# Steps that trace and compile are among the first ones (kfac-jax compiles at steps 1, 2, 3 and 10),
FIRST_STEPS = 12
# and take so many times as long as others at least. Steps that merely do more count in full.
COMPILES = 4


def train(
    step: Callable[[np.ndarray, np.ndarray], object],
    reconstruct: Callable[[np.ndarray], np.ndarray],
    images: Path,
    seconds: float,
    target: float,
    seed: int,
) -> dict:
    """Trains until the test error is at the target, or the time is up.

    Args:
        step: Trains on inputs and targets `[batch, pixels]`, and returns when it is done.
        reconstruct: Images `[batch, pixels]` to their reconstructions.
        images: File with `x_train` and `x_test`.
        seconds: Limit of the seconds of training steps.
        target: The squared error of a test image to stop at.
        seed: Of the order of the training images.

    Returns:
        The curve of `(seconds, steps, test error)`, and what tracing and compiling took, which the
        seconds leave out: what the first steps that do so took beyond the median of all others.
    """
    with np.load(images) as file:
        train_images, test_images = (
            (file[name] / 255).astype("float32").reshape(len(file[name]), -1)
            for name in ("x_train", "x_test")
        )

    def test_error() -> float:
        parts = np.split(test_images, len(test_images) // BATCH_SIZE)
        errors = [np.sum((np.asarray(reconstruct(x)) - x) ** 2, axis=1) for x in parts]
        return float(np.mean(errors))

    rng = np.random.default_rng(seed)
    durations: list[float] = []
    errors: dict[int, float] = {}  # by step
    since_evaluation = spent = 0.0
    while True:
        order = rng.permutation(len(train_images))
        for indices in np.split(order, len(order) // BATCH_SIZE):
            batch = train_images[indices]
            began = time.perf_counter()
            step(batch, batch)
            durations.append(time.perf_counter() - began)
            if len(durations) > FIRST_STEPS:
                since_evaluation += durations[-1]
                spent += durations[-1]
            if since_evaluation >= EVALUATE_EVERY:
                since_evaluation = 0.0
                error = errors[len(durations)] = test_error()
                if not (spent < seconds and target < error < np.inf):
                    return _result(durations, errors)


def _result(durations: list[float], errors: dict[int, float]) -> dict:
    typical = statistics.median(durations[FIRST_STEPS:])
    first = np.array(durations[:FIRST_STEPS])
    first[first > COMPILES * typical] = typical
    ends = np.cumsum([*first, *durations[FIRST_STEPS:]])
    return {
        "compile_seconds": float(np.sum(durations[:FIRST_STEPS]) - np.sum(first)),
        "curve": [(float(ends[step - 1]), step, error) for step, error in errors.items()],
    }
