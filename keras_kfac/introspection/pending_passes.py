"""The forward passes since the last step: its loss may be made up of them."""

import tensorflow as tf

from keras_kfac.introspection.forward_pass import ForwardPass

# Eager loops may take gradients that no step applies, and the activations of their passes would
# pile up. A loss that `compute_loss` has seen is taken to be one of the next step, if there may be.
_MOST_UNSCORED = 16
_MOST_SCORED = 256


class PendingPasses:
    """Forward passes that no step has taken yet."""

    def __init__(self) -> None:
        self._passes: list[ForwardPass] = []
        self._forgotten = 0
        self._forgets_scored = False
        self._is_scored_elsewhere = False

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, forward_pass: ForwardPass) -> None:
        """Notes a pass; forgets those of graphs that are no longer being built."""
        # An eager loop goes on after something else was traced in the midst of it.
        kept = [p for p in self._passes if p.is_eager or p.is_usable()]
        self._passes = [*kept, forward_pass]
        eager = [p for p in self._passes if p.is_eager]
        for is_scored, most in ((False, _MOST_UNSCORED), (True, _MOST_SCORED)):
            own = [p for p in eager if bool(p.scores) == is_scored]
            if len(own) > most:
                self._passes.remove(own[0])
                self._forgotten += 1
                self._forgets_scored |= is_scored

    def usable(self) -> list[ForwardPass]:
        """Those that belong to the computation under way."""
        return [p for p in self._passes if p.is_usable()]

    def note_other_graph(self) -> None:
        """Notes that `compute_loss` is being traced, and of none of the passes there."""
        self._is_scored_elsewhere |= any(p.is_eager for p in self._passes)

    def check_complete(self, passes: list[ForwardPass]) -> None:
        """Checks that none of a step's passes has been forgotten, nor scored out of sight.

        Args:
            passes: What is known of them.

        Raises:
            RuntimeError: If some may have been.
        """
        if not tf.executing_eagerly():
            return
        is_scored = all(p.scores for p in passes)
        if self._is_scored_elsewhere and not is_scored:
            raise RuntimeError(
                "K-FAC can't see what `compute_loss` makes of a forward pass in a `tf.function` "
                "that does not call the model: call both in the same one, or in none. Received: "
                "a model that is called without a graph, and its `compute_loss` in one"
            )
        # Else what is forgotten had not been scored; later that would be a loss of an unknown
        # tensor.
        is_complete = is_scored and not any(p.other_losses for p in passes)
        if self._forgotten and (self._forgets_scored or not is_complete):
            raise self._too_many()

    def _too_many(self) -> RuntimeError:
        return RuntimeError(
            f"K-FAC keeps {_MOST_UNSCORED} forward passes whose losses it has not seen, and "
            f"{_MOST_SCORED} others. Where a step is after more of the first, compute each one's "
            "loss by `model.compute_loss` before the next; call the model with training=False for "
            "gradients that no step applies; attach the optimizer after a warm-up under another "
            "one, or call `optimizer.detach()` meanwhile. Received: "
            f"{self._forgotten + len(self._passes)} forward passes since the last step"
        )
