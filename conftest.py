"""Settings of the test run: quiet logs, and the names that doctests use."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace) -> None:
    import keras_kfac

    doctest_namespace.update(
        {
            "keras": keras,
            "np": np,
            "tf": tf,
            "tfp": tfp,
            **{n: getattr(keras_kfac, n) for n in keras_kfac.__all__ if n[0] != "_"},
        }
    )
