"""The predictive distributions behind Keras's losses."""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals
from keras_kfac.introspection.negative_log_likelihood import NegativeLogLikelihood
from keras_kfac.math import likelihood as of
from keras_kfac.math.likelihood import Likelihood


class PerPosition(keras.losses.Loss):
    """The values of a loss at each position, not reduced."""

    def __init__(self, loss: keras.losses.Loss) -> None:
        super().__init__("kfac_values", reduction="none", dtype=loss.dtype)
        self.loss = loss

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The values, `[batch, ...]`."""
        return self.loss.call(y_true, y_pred)


_losses = keras.losses


def _crossentropy(
    of_logits: of.Make, of_probabilities: of.Make, averages_outputs: bool
) -> Callable[[keras.losses.Loss], Likelihood]:
    def likelihood(loss: keras.losses.Loss) -> Likelihood:
        _, options = _keras_internals.function_of(loss)
        make = of_logits if options["from_logits"] else of_probabilities
        return Likelihood(make, of_logits, averages_outputs=averages_outputs)

    return likelihood


def _mean_over_outputs(
    make: of.Make, weight: float = 1.0
) -> Callable[[keras.losses.Loss], Likelihood]:
    return lambda loss: Likelihood(make, weight_per_output=weight, averages_outputs=True)


def _huber(loss: keras.losses.Loss) -> Likelihood:
    """Keras does not tell the threshold `δ`: far away the loss is `δ z - δ²/2`."""
    z = 1e4
    with tf.init_scope():
        value = float(PerPosition(loss)(tf.zeros([1, 1]), tf.fill([1, 1], z))[0])
    threshold = 2 * value / (z + math.sqrt(max(z**2 - 2 * value, 0.0)))
    return Likelihood(of.huber(threshold), averages_outputs=True)


_categorical = _crossentropy(of.categorical, of.categorical_of_probabilities, False)
_LIKELIHOODS: dict[type[keras.losses.Loss], Callable[[keras.losses.Loss], Likelihood]] = {
    _losses.CategoricalCrossentropy: _categorical,
    _losses.SparseCategoricalCrossentropy: _categorical,
    _losses.BinaryCrossentropy: _crossentropy(of.bernoulli, of.bernoulli_of_probabilities, True),
    _losses.KLDivergence: lambda loss: Likelihood(of.categorical_of_probabilities),
    _losses.MeanSquaredError: _mean_over_outputs(of.normal, 2.0),
    _losses.MeanSquaredLogarithmicError: _mean_over_outputs(of.normal_of_logarithm, 2.0),
    _losses.MeanAbsoluteError: _mean_over_outputs(of.laplace),
    _losses.LogCosh: _mean_over_outputs(of.logistic, 0.5),
    _losses.Huber: _huber,
    _losses.Poisson: _mean_over_outputs(of.poisson),
}
_FUNCTIONS = {
    _losses.categorical_crossentropy: _losses.CategoricalCrossentropy,
    _losses.sparse_categorical_crossentropy: _losses.SparseCategoricalCrossentropy,
    _losses.binary_crossentropy: _losses.BinaryCrossentropy,
    _losses.kl_divergence: _losses.KLDivergence,
    _losses.mean_squared_error: _losses.MeanSquaredError,
    _losses.mean_squared_logarithmic_error: _losses.MeanSquaredLogarithmicError,
    _losses.mean_absolute_error: _losses.MeanAbsoluteError,
    _losses.log_cosh: _losses.LogCosh,
    _losses.huber: _losses.Huber,
    _losses.poisson: _losses.Poisson,
}
CHOICES = ", ".join(loss.__name__ for loss in _LIKELIHOODS)
# What Keras's `compile` makes of a function: a class without a name of its own in public.
_WRAPPER = _losses.MeanSquaredError.__base__
_COMPUTING = ("call", "__call__")  # The methods that say what a loss is.


def keras_class(
    loss: keras.losses.Loss, classes: Collection[type[keras.losses.Loss]]
) -> type[keras.losses.Loss] | None:
    """Which of some of Keras's classes a loss is of, with its mathematics.

    A subclass that computes something else is of none, be it by its methods or by the function
    that it calls.
    """
    for base in type(loss).__mro__:
        if base in classes:
            own = [getattr(type(loss), name) is getattr(base, name) for name in _COMPUTING]
            function, _ = _keras_internals.function_of(loss)
            usual, _ = _keras_internals.function_of(base())
            return base if all(own) and function is usual else None
    return None


class _FunctionLoss(keras.losses.Loss):
    """A loss function as Keras's `compile` treats it: averaged over the batch."""

    def __init__(self, function: Any) -> None:
        super().__init__(name=getattr(function, "__name__", "loss"))
        self.function = function

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return self.function(y_true, y_pred)

    def __repr__(self) -> str:
        return f"<function {self.name}>"


def as_loss(loss: Any) -> keras.losses.Loss:
    """A loss by name, function or instance, as Keras's `compile` understands it."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        return loss
    named = _FUNCTIONS.get(loss)
    return _FunctionLoss(loss) if named is None else named()


def only_loss(model: keras.Model) -> tuple[Any, float]:
    """The loss that a model of one output was compiled with, and its loss weight.

    Returns:
        The loss as given, `None` if there is none or there are several.
    """
    if not model.compiled or getattr(model, "loss", None) is None:
        return None, 1.0
    loss = model.loss
    losses = tf.nest.flatten(loss) if isinstance(loss, (list, tuple, dict)) else [loss]
    # Serialising reads variables, which a graph can't, and warns of functions that are not saved.
    with tf.init_scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = model.get_compile_config() or {}
    weights = tf.nest.flatten(config.get("loss_weights"))
    weight = 1.0 if len(weights) != 1 or weights[0] is None else float(weights[0])
    return losses[0] if len(losses) == 1 else None, weight


def only_entry(given: Any) -> Any:
    """What is given for the only output of a model, by itself or in a list or dict."""
    if isinstance(given, (list, tuple, dict)):
        flat = tf.nest.flatten(given)
        return flat[0] if len(flat) == 1 else given
    return given


def known(loss: keras.losses.Loss) -> tuple[keras.losses.Loss, Likelihood | None]:
    """A loss, as its class where Keras wrapped a function, and the likelihood behind it.

    Raises:
        ValueError: For options under which there is none.
    """
    if isinstance(loss, NegativeLogLikelihood):
        own = [getattr(type(loss), n) is getattr(NegativeLogLikelihood, n) for n in _COMPUTING]
        return loss, Likelihood(loss.distribution) if all(own) else None
    named = _FUNCTIONS.get(wrapped_function(loss))
    if named is not None:
        loss = named(reduction=loss.reduction, dtype=loss.dtype)
    found = keras_class(loss, _LIKELIHOODS)
    if found is None:
        return loss, None
    _check_supported(loss)
    return loss, _LIKELIHOODS[found](loss)


def wrapped_function(loss: keras.losses.Loss) -> Any:
    """The function of Keras's that a loss is, if it is nothing else and has no options."""
    if type(loss) is not _WRAPPER or not loss.fn.__module__.startswith("keras."):
        return None
    options = set(loss.get_config()) - {"name", "reduction", "dtype", "fn"}
    return None if options else loss.fn


def as_likelihood(given: Any) -> Likelihood:
    """The likelihood that somebody means.

    Args:
        given: A Keras loss by name, function or instance, or a function from outputs to a
            distribution.

    Raises:
        ValueError: For a loss that has none.
    """
    if not isinstance(given, (str, keras.losses.Loss)) and given not in _FUNCTIONS:
        return Likelihood(given)
    if getattr(given, "ignore_class", None) is not None:
        raise ValueError(
            "`likelihood` says what is predicted, not which targets count: leave classes out by "
            f"the loss itself, or by sample weights. Received: likelihood={given!r} with "
            f"ignore_class={given.ignore_class}"
        )
    try:
        _, likelihood = known(as_loss(given))
    except ValueError:
        if not isinstance(given, str):
            raise
        likelihood = None  # Keras knows no loss of that name.
    if likelihood is None:
        raise ValueError(
            "`likelihood` must be a loss with a known predictive distribution, one of keras.losses."
            f"{CHOICES}, or a function from outputs to a distribution. Received: "
            f"likelihood={given!r}"
        )
    return likelihood


def likelihoods_of(
    given: Any, outputs: Any, names: Sequence[str] | None
) -> list[Likelihood | None]:
    """Those that somebody means for the outputs of a model, one after the other.

    Args:
        given: For a model of one output; or a list or dict of them, by output, nested as these
            are. `None` for those whose losses say it.
        outputs: What the model returns.
        names: Of the outputs, where these are no dict.

    Raises:
        ValueError: For others than there are outputs.
    """
    each = _by_output(given, outputs, names or [])
    if each is None:
        raise ValueError(
            "`likelihood` must have an entry for each output of the model, in a list, or in a dict "
            f"by name. Received: likelihood={given!r} for {len(tf.nest.flatten(outputs))} outputs, "
            f"names {names}"
        )
    return [None if one is None else as_likelihood(one) for one in each]


def given_likelihoods(model: keras.Model, likelihood: Any, outputs: Any) -> list[Likelihood | None]:
    """Those that somebody named for the outputs of a model, or for its optimizer.

    Args:
        model: The model.
        likelihood: As for `likelihoods_of`; `None` for that of the optimizer, if it has one.
        outputs: What the model returns.
    """
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if likelihood is None:
        likelihood = getattr(optimizer, "likelihood", None)
    return likelihoods_of(likelihood, outputs, getattr(model, "output_names", None))


def _by_output(given: Any, outputs: Any, names: Sequence[str]) -> list[Any] | None:
    """What is given for each output, in a flat list; `None` if it does not fit."""
    count = len(tf.nest.flatten(outputs))
    if given is None:
        return [None] * count
    if isinstance(given, dict) and isinstance(outputs, dict):
        pairs = [(given.get(key), outputs[key]) for key in sorted(outputs)]
        return _of_parts(pairs) if set(given) <= set(outputs) else None
    if isinstance(given, (list, tuple)) and isinstance(outputs, (list, tuple)):
        nested = _of_parts(list(zip(given, outputs))) if len(given) == len(outputs) else None
        if nested is not None:
            return nested
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    if isinstance(given, dict):
        each = [given.get(name) for name in names] if set(given) <= set(names) else []
    is_flat = not any(isinstance(one, (list, tuple, dict)) for one in each)
    return each if is_flat and len(each) == count else None


def _of_parts(pairs: Sequence[tuple[Any, Any]]) -> list[Any] | None:
    """What is given for each output of several parts, one after the other."""
    parts = [_by_output(given, outputs, []) for given, outputs in pairs]
    return None if None in parts else [one for part in parts for one in part or []]


def _check_supported(loss: keras.losses.Loss) -> None:
    _, options = _keras_internals.function_of(loss)
    if options.get("axis", -1) != -1:
        raise ValueError(
            "K-FAC supports losses over the last axis only. "
            f"Received: {type(loss).__name__}(axis={options['axis']})"
        )
