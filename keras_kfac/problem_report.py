"""Warnings and errors of what went wrong inside the graph, where nothing can be raised."""

import warnings

from keras_kfac.curvature.model_curvature import ModelCurvature
from keras_kfac.introspection.losses import NEGATIVE_WEIGHTS


class ProblemReport:
    """Remembers what has been reported, so that every warning tells news."""

    def __init__(self) -> None:
        self._skipped = 0
        self._refused = 0
        self._failed: dict[str, int] = {}
        self._lost: dict[str, int] = {}

    def refuse_negative_weights(self, refused: int) -> None:
        """Raises if more batches with negative weights have come since the last report.

        Raises:
            ValueError: If so.
        """
        new, self._refused = refused - self._refused, refused
        if new > 0:
            raise ValueError(
                f"{NEGATIVE_WEIGHTS} Batches with others were left out. Received: batches with "
                f"negative weights: {new}"
            )

    def warn_of_skipped_steps(self, skipped: int) -> None:
        """Warns if more steps have been skipped since the last report."""
        if skipped > self._skipped:
            warnings.warn(
                f"K-FAC skipped {skipped - self._skipped} training steps whose gradients were not "
                f"finite ({skipped} in all). Trained weights and factors are unharmed. Look for "
                "NaN or infinity in the data, or lower the learning rate.",
                stacklevel=4,
            )
        self._skipped = skipped

    def warn_of_lost_updates(self, curvature: ModelCurvature) -> None:
        """Warns if statistics of more batches have been left out since the last report."""
        self._lost = _warned_of(
            curvature.lost_updates(),
            self._lost,
            "K-FAC left out statistics of batches that were not finite: draws from the "
            "predictive distribution may have infinite derivatives, or activations overflow. "
            "Averages go on without them, and are biased if that is often. Batches left out "
            "so far",
        )

    def warn_of_singular_factors(self, curvature: ModelCurvature) -> None:
        """Warns if more refreshes of inverses have failed since the last report."""
        self._failed = _warned_of(
            curvature.failed_refreshes(),
            self._failed,
            "K-FAC factors could not be inverted: they are singular to working precision at "
            "this damping. Their layers keep the previous inverse (before the first one: step "
            "along the plain gradient). Increase `damping`. Failed refreshes so far",
        )


def _warned_of(counts: dict[str, int], before: dict[str, int], message: str) -> dict[str, int]:
    """Warns of failures of blocks, if there are more than before; returns how many there are."""
    if any(count > before.get(name, 0) for name, count in counts.items()):
        each = ", ".join(f"{name}: {count}" for name, count in counts.items())
        warnings.warn(f"{message}: {each}", stacklevel=5)
    return counts
