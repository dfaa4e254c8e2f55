"""Laplace's approximation: the posterior distribution of weights around a trained model."""

import warnings
from typing import Any

import keras

from keras_kfac import validation
from keras_kfac.curvature.choice import Curvature
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.weight_sharing import EXPAND, Choice
from keras_kfac.posterior import LaplacePosterior
from keras_kfac.whole_data import CurvatureSettings, batches_of, whole_curvature


def laplace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    prior_precision: float | None = None,
    curvature: Curvature = "kfac",
    likelihood: Any = None,
    fisher: str = "exact",
    weight_sharing: Choice = EXPAND,
    batch_size: int = 128,
    seed: int = 0,
) -> LaplacePosterior:
    """The posterior of a trained model's weights, by its curvature on the training data.

    A normal distribution around the trained weights, which are taken to be its maximum. Its
    precision in each layer is the Fisher matrix of the log-likelihood, summed over the examples,
    plus `τ I` of the prior `N(0, I/τ)`; between layers it is zero. The model is in inference mode:
    no dropout, moving statistics as they are.

    The likelihood is that of the model's loss (docs/likelihoods.md), whatever factor or reduction
    the loss has beside it: a mean squared error is a normal distribution of variance 1 for each
    output. For noise of another scale name it by `likelihood`, or train with
    `NegativeLogLikelihood`. Regularisers are not looked at: with a loss that is the mean of
    `-log r` over `N` examples, an `L2(l)` of all weights is the prior of `prior_precision=2 * l *
    N`.

    Args:
        model: A built model, compiled with a loss that is a likelihood. It is not changed.
        x: Inputs of the training data: an array, or a structure of them as the model takes it; or
            a `tf.data.Dataset` of batches, of inputs or of pairs `(x, y)`.
        y: Targets. They matter to the value of the evidence, and to the matrix if
            `fisher="empirical"` or the loss has an `ignore_class`.
        prior_precision: `τ > 0`; `None` for the one of largest evidence.
        curvature: The structure of the Fisher matrix, as for `KFAC`: `"kfac"`, `"ekfac"`,
            `"input"`, `"diagonal"`, `"full"`, or `"dense"` of up to 4096 weights, or one by layer.
            Factors are kept whole, whatever their size.
        likelihood: As for `KFAC`: a function from outputs to a TFP distribution, or a Keras loss,
            if the loss does not say it.
        fisher: Which Fisher matrix, as for `KFAC`.
        weight_sharing: As for `KFAC`.
        batch_size: Of the passes through arrays.
        seed: Of `fisher="sampled"`.

    Returns:
        The posterior.

    Raises:
        ValueError: If the model is not built, has several outputs, no loss, or one that is no
            likelihood; if no layer is covered; or for data that are empty, not of one length, or
            lead to outputs or a Fisher matrix that are not finite.

    Warns:
        UserWarning: If some trained weights have no curvature block. They are taken to be known.

    Example:
    >>> x = np.array([[-1.0], [0.0], [1.0]])
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> _ = model.fit(x, 2 * x, epochs=200, verbose=0)
    >>> posterior = laplace(model, x, 2 * x, prior_precision=1.0)
    >>> near, far = posterior.outputs(np.array([[0.0], [9.0]])).variance().numpy()
    >>> bool(far > 10 * near)
    True

    Source: MacKay (1992), "A practical Bayesian framework for backpropagation networks"; Ritter,
    Botev & Barber (2018), "A scalable Laplace approximation for neural networks"; Immer, Korzepa &
    Bauer (2021), arXiv:2008.08400 (predictions of the linearised model); Daxberger et al. (2021),
    arXiv:2106.14806.
    """
    if not model.built:
        raise ValueError(
            "The posterior is that of a trained model; this one is not built. Received: model "
            f"{model.name!r}"
        )
    validation.check_positive_int("batch_size", batch_size)
    if prior_precision is not None:
        validation.check_finite_positive("prior_precision", prior_precision)
    curvature = validation.check_curvature(curvature)
    settings = CurvatureSettings(
        model,
        validation.check_likelihood(likelihood),
        curvature,
        validation.check_weight_sharing(weight_sharing),
        Fisher(validation.check_fisher(fisher, curvature)),
        seed,
    )
    found = whole_curvature(settings, batches_of(x, y, batch_size))
    posterior = LaplacePosterior(settings, found)
    if prior_precision is None:
        posterior.maximize_evidence()
    else:
        posterior.prior_precision = prior_precision
    if found.coverage.fraction < 1:
        warnings.warn(
            "Some trained weights have no curvature block. The posterior takes them to be known, "
            f"so that predictions are too certain:\n{found.coverage}",
            stacklevel=2,
        )
    return posterior
