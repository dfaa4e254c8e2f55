"""K-FAC natural-gradient optimisation for Keras 3 on TensorFlow."""

from keras_kfac._version import __version__
from keras_kfac.batches import growing_batches
from keras_kfac.callbacks import KFACCallback
from keras_kfac.curvature.coverage import Coverage, CoverageRow
from keras_kfac.damping import LevenbergMarquardt
from keras_kfac.fisher_matrix import FisherMatrix, GaussNewtonMatrix
from keras_kfac.introspection.affine import AffineAdapter
from keras_kfac.introspection.negative_log_likelihood import NegativeLogLikelihood
from keras_kfac.introspection.per_example import PerExampleAdapter, RawWeightsAdapter
from keras_kfac.introspection.registry import register
from keras_kfac.laplace import laplace
from keras_kfac.optimizer import KFAC
from keras_kfac.plateau import DampingOnPlateau
from keras_kfac.posterior import LaplacePosterior
from keras_kfac.residuals import NaturalGradient, natural_gradient
from keras_kfac.staleness import StalenessSchedule
from keras_kfac.weight_noise import WeightNoise
from keras_kfac.whitening import Whitening, WhiteningCallback, rewhiten

__all__ = [
    "KFAC",
    "AffineAdapter",
    "Coverage",
    "CoverageRow",
    "DampingOnPlateau",
    "FisherMatrix",
    "GaussNewtonMatrix",
    "KFACCallback",
    "LaplacePosterior",
    "LevenbergMarquardt",
    "NaturalGradient",
    "NegativeLogLikelihood",
    "PerExampleAdapter",
    "RawWeightsAdapter",
    "StalenessSchedule",
    "WeightNoise",
    "Whitening",
    "WhiteningCallback",
    "__version__",
    "growing_batches",
    "laplace",
    "natural_gradient",
    "register",
    "rewhiten",
]
