"""The loss of a model of one output, by what is said of it where nobody sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac.introspection.known_losses import PerPosition, as_loss, only_entry, only_loss
from keras_kfac.introspection.losses import Score
from keras_kfac.introspection.replay import tensors_of
from keras_kfac.introspection.value_shapes import is_for_all

_ARGUMENTS = ("x", "y", "y_pred", "sample_weight", "training")


def given_score(
    loss: Any, args: Sequence[Any], kwargs: Mapping[str, Any], seen: Sequence[Score]
) -> Score:
    """That of a loss which somebody names, on the output that `compute_loss` is called with.

    It is of what the loss is that is seen in its place, is reduced as that, if that has values to
    reduce, and counts what that does.

    Args:
        loss: A name, function or `keras.Loss`.
        args: What `compute_loss` is called with.
        kwargs: Likewise.
        seen: The losses in its total.

    Raises:
        ValueError: For several outputs, or several losses in its place.
    """
    given = {**dict(zip(_ARGUMENTS, args)), **kwargs}
    outputs, targets = tensors_of(given.get("y_pred")), tf.nest.flatten(given.get("y"))
    if len(outputs) != 1 or len(targets) != 1:
        raise _one_output_only(len(outputs))
    replaced = [score for score in seen if score.outputs is outputs[0]]
    if len(replaced) > 1:
        raise ValueError(
            "`attach(model, loss=...)` names one loss, and the model's total has several of its "
            "output: K-FAC sees them without a name. Received: losses "
            f"{[score.loss.name for score in replaced]}"
        )
    if replaced:
        return _in_place_of(replaced[0], as_loss(loss))
    sample_weight, is_complete = only_entry(given.get("sample_weight")), targets[0] is not None
    return Score(as_loss(loss), outputs[0], targets[0], sample_weight, is_complete=is_complete)


def _in_place_of(score: Score, loss: keras.losses.Loss) -> Score:
    if loss.reduction == score.loss.reduction:
        return score._replace(loss=loss)
    values = PerPosition(score.loss)(score.targets, score.outputs)
    # Of one value that a loss has for the whole batch, its reduction says nothing.
    is_reduced = not is_for_all(values, score.outputs)
    # Keras takes `None` for "none".
    reduction = score.loss.reduction or "none"
    return score._replace(loss=loss, reduction=reduction if is_reduced else None)


def unseen_score(model: keras.Model, loss: Any, outputs: Any) -> Score:
    """That of a loss where `compute_loss` does not see the outputs.

    Args:
        model: The model; its loss weight counts.
        loss: A name, function or `keras.Loss`; `None` for what the model is compiled with.
        outputs: What the model returned.

    Raises:
        ValueError: If there is no loss, or more than one output.
    """
    compiled, weight = only_loss(model)
    loss = compiled if loss is None else loss
    flat = tensors_of(outputs)
    if len(flat) != 1:
        raise _one_output_only(len(flat))
    if loss is None:
        raise ValueError(
            "K-FAC needs the loss of the model to know its Fisher matrix. Compile the model "
            "with a loss, or name it: `optimizer.attach(model, loss=...)`. Received: "
            f"model {model.name!r} without a loss"
        )
    return Score(as_loss(loss), flat[0], weight=weight, is_complete=False)


def _one_output_only(outputs: int) -> ValueError:
    return ValueError(
        "K-FAC can't tell which loss belongs to which output. Compile the model with the losses of "
        "its outputs, and in a custom training loop compute the total by `model.compute_loss(x, y, "
        f"y_pred, sample_weight)`. Received: a model with {outputs} outputs"
    )
