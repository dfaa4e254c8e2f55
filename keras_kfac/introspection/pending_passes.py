"""The forward passes since the last step: its loss may be made up of them."""

import tensorflow as tf

from keras_kfac.introspection.forward_pass import ForwardPass

# Eager loops may take gradients that no step applies, and the activations of their passes would
# pile up. A loss that `compute_loss` has seen is taken to be one of the next step.
_MOST_UNSCORED = 16


class PendingPasses:
    """Forward passes that no step has taken yet."""

    def __init__(self) -> None:
        self._passes: list[ForwardPass] = []
        self._forgotten = 0

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, forward_pass: ForwardPass) -> None:
        """Notes a pass; forgets those of graphs that are no longer being built."""
        # An eager loop goes on after something else was traced in the midst of it.
        kept = [p for p in self._passes if p.is_eager or p.is_usable()]
        self._passes = [*kept, forward_pass]
        unscored = [p for p in self._passes if p.is_eager and not p.scores]
        if len(unscored) > _MOST_UNSCORED:
            self._passes.remove(unscored[0])
            self._forgotten += 1

    def usable(self) -> list[ForwardPass]:
        """Those that belong to the computation under way."""
        return [p for p in self._passes if p.is_usable()]

    def check_complete(self, passes: list[ForwardPass]) -> None:
        """Checks that none of a step's passes has been forgotten.

        Args:
            passes: What is known of them.

        Raises:
            RuntimeError: If some may have been.
        """
        if not self._forgotten or not tf.executing_eagerly():
            return
        # What is forgotten had not been scored; later that would be a loss of an unknown tensor.
        if all(p.scores for p in passes) and not any(p.other_losses for p in passes):
            return
        raise RuntimeError(
            f"K-FAC keeps {_MOST_UNSCORED} forward passes whose losses it has not seen. Where a "
            "step is after more of them, compute each one's loss by `model.compute_loss` before "
            "the next; call the model with training=False for gradients that no step applies. "
            f"Received: {self._forgotten + len(self._passes)} forward passes since the last step"
        )

    def clear(self) -> None:
        """Forgets all."""
        self._passes.clear()
        self._forgotten = 0
