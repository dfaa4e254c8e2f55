"""A forward pass of a whole model, recorded in all layers that have adapters."""

from collections.abc import Callable
from typing import Any

import keras

from keras_kfac import _keras_internals
from keras_kfac.introspection.forward_pass import ForwardPass, recording
from keras_kfac.introspection.registry import find_adapters


def recorded_pass(model: keras.Model, call: Callable[[], Any]) -> ForwardPass:
    """The record of one call of a model, with its outputs.

    Args:
        model: The model.
        call: Calls it.
    """
    layers = _keras_internals.flatten_layers(model)
    found = [(layer, find_adapters(layer)[0]) for layer in layers]
    adaptable = [layer for layer, adapters in found if adapters]
    whole = {id(layer) for layer, adapters in found if any(a.with_activation for a in adapters)}
    with recording(adaptable, whole, layers) as forward_pass:
        outputs = call()
    forward_pass.outputs = outputs
    return forward_pass
