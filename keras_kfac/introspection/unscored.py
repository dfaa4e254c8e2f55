"""Outputs that a total loss depends on without a loss of them, so that they have no curvature."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.adapters import layer_path
from keras_kfac.introspection.forward_pass import ForwardPass


def check_scored(
    model: keras.Model,
    passes: Sequence[ForwardPass],
    is_trained: Callable[[keras.Variable], bool],
) -> None:
    """Checks that `compute_loss` has shown losses which tell the curvature of all layers.

    What it adds to them is left out of the Fisher matrix, as what layers add is. That layers which
    they do not depend on are trained by it alone is an error.

    Args:
        model: The model.
        passes: Its forward passes in the step, which `compute_loss` has seen.
        is_trained: Whether a variable is to be trained.

    Raises:
        ValueError: If there are no losses of outputs, or layers which they do not depend on are
            behind other outputs in the total.
    """
    trained: dict[int, keras.Layer] = {}
    if any(p.unscored for p in passes):
        layers = _keras_internals.flatten_layers(model)
        trained = {id(x): x for x in layers if any(is_trained(v) for v in x.variables)}
    for p in passes:  # One that leads to no trained layer is as good as a constant.
        p.unscored = [o for o in p.unscored if trained.keys() & p.layers_behind(o)]
    names = sorted({n for p in passes for n in names_of(model, p.outputs, p.unscored)})
    if not any(p.scores for p in passes):
        raise unscored_error(model, names)
    if names:
        missing = _layers_of_unscored(passes) - _layers_of_scores(passes)
        paths = [layer_path(x) for key, x in trained.items() if key in missing]
        if paths:
            raise unscored_error(model, names, f", behind which are layers {paths}")
        warnings.warn(
            "The loss depends on outputs that no instance of `keras.losses.Loss` is called on. "
            "Its gradient by them counts, its curvature is left out of K-FAC's. Outputs: "
            + ", ".join(names),
            stacklevel=2,
        )
    others = sorted({name for forward_pass in passes for name in forward_pass.other_losses})
    if others:
        warnings.warn(
            "A loss is of a tensor that the model does not return as it is. If it is part of the "
            "loss, its gradient counts, its curvature is left out of K-FAC's. Let the model return "
            "that tensor, or give the loss the model's output. Losses: " + ", ".join(others),
            stacklevel=2,
        )


def unscored_error(model: keras.Model, outputs: Sequence[str], more: str = "") -> ValueError:
    """The error for a total loss that does not show whose curvature to take.

    Args:
        model: The model.
        outputs: Names of those that the total depends on without a loss; none if it has no losses.
        more: What else is to be said of them.
    """
    received = f"a total of outputs {outputs} without one" if outputs else "a total without any"
    return ValueError(
        "The Fisher matrix of an output is that of the loss that `compute_loss` is seen to call on "
        "it; what functions compute can't be seen. Call an instance of `keras.losses.Loss` "
        "(of a class with Keras's own `__call__`) on the output as the model returns it: "
        "`keras_kfac.NegativeLogLikelihood` of a distribution, for example, or any loss with "
        "KFAC(likelihood=...). Received: model "
        f"{model.name!r} with {received}{more}"
    )


def names_of(model: keras.Model, outputs: Any, some: Sequence[tf.Tensor]) -> list[str]:
    """What some of a model's outputs are called."""
    flat, own = tf.nest.flatten(outputs), {id(output) for output in some}
    names = sorted(outputs) if isinstance(outputs, dict) else getattr(model, "output_names", [])
    if len(names) != len(flat):
        names = range(len(flat))
    return [str(name) for name, output in zip(names, flat) if id(output) in own]


def _layers_of_scores(passes: Sequence[ForwardPass]) -> set[int]:
    scored = [p for p in passes if p.scores]
    return set().union(*(p.layers_behind([s.outputs for s in p.scores]) for p in scored))


def _layers_of_unscored(passes: Sequence[ForwardPass]) -> set[int]:
    return set().union(*(p.layers_behind(p.unscored) for p in passes if p.unscored))
