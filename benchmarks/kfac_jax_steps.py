"""Times steps of kfac-jax on the autoencoder; `peer_step_cost.py` runs this script.

python kfac_jax_steps.py WEIGHTS BATCH FACTOR_PERIOD INVERSE_PERIOD

Compiles, says so by a line, and then answers each line, the number of steps to make, with what each
of them took, as JSON.
"""

import json
import sys
import time

import numpy as np
from kfac_jax_autoencoder import Training, versions

DAMPING = 0.01
FIRST_STEPS = 20  # All that is compiled is compiled then.


def main() -> None:
    """Makes steps until the input ends."""
    weights, batch, *periods = sys.argv[1:]
    x = np.load(batch)
    training = Training(weights, DAMPING, seed=0, periods=(int(periods[0]), int(periods[1])))
    for _ in range(FIRST_STEPS):
        training.step(x, x)
    print(json.dumps(versions()), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            training.step(x, x)
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
