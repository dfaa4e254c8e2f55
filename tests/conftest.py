"""What all tests share without asking for it."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _numbers_of_the_test_alone(request, monkeypatch) -> None:
    """Restarts a module's `RNG`: what a test draws must not depend on the tests before it."""
    if hasattr(getattr(request, "module", None), "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(0))
