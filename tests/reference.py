"""Slow, obvious references: dense Fisher/GGN matrices by automatic differentiation.

Everything starts from the loss that Keras computes, differentiated as it is.
"""

import keras
import numpy as np
import tensorflow as tf


def loss_value(model, loss, x, y, sample_weight=None):
    """The scalar that training minimises (Keras sums what a loss without reduction returns)."""
    return tf.reduce_sum(loss(y, model(x, training=True), sample_weight=sample_weight))


def dense_ggn(model, loss, x, y, variables, sample_weight=None, logits_of=None, pfor=True):
    """Generalised Gauss-Newton matrix `Jᵀ H J` of the Keras loss, `[P, P]`.

    `J` is the Jacobian of the natural outputs by the variables (each flattened row-major, one after
    the other), `H` the Hessian of Keras's loss by the natural outputs.

    Args:
        logits_of: Function from the model to a model that puts out logits, where the loss is not
            convex in the outputs themselves.
        pfor: Whether to vectorise the Jacobian; grouped convolutions can't be.
    """
    head = model if logits_of is None else logits_of(model)
    with tf.GradientTape(persistent=not pfor) as tape:
        natural = head(x, training=True)
    jacobian = tape.jacobian(natural, [v.value for v in variables], experimental_use_pfor=pfor)
    size = int(np.prod(natural.shape))
    jacobian = np.concatenate([np.reshape(j, [size, -1]) for j in jacobian], axis=1)
    hessian = output_hessian(loss, natural, y, sample_weight, logits_of is not None)
    return jacobian.T @ hessian @ jacobian


def output_hessian(loss, natural, y, sample_weight=None, through_probabilities=False):
    """Hessian of Keras's loss by the outputs, `[size, size]`, nothing assumed of its structure."""
    natural = tf.convert_to_tensor(natural)
    size = int(np.prod(natural.shape))
    with tf.GradientTape() as outer:
        outer.watch(natural)
        with tf.GradientTape() as inner:
            inner.watch(natural)
            outputs = natural
            if through_probabilities:
                binary = isinstance(loss, keras.losses.BinaryCrossentropy)
                # Arithmetic and not tf.nn.softmax: Keras would look through that for the logits.
                exponent = tf.exp(natural)
                outputs = (
                    exponent / (1 + exponent)
                    if binary
                    else exponent / tf.reduce_sum(exponent, -1, keepdims=True)
                )
            value = tf.reduce_sum(loss(y, outputs, sample_weight=sample_weight))
        gradient = inner.gradient(value, natural)
    hessian = outer.jacobian(gradient, natural)
    return np.reshape(hessian, [size, size])


def layer_block(model, loss, x, y, layer, **kwargs):
    """The GGN block of a layer in the order of `A ⊗ G`: rows of `[kernel; bias]`, row-major."""
    variables = [v for v in (layer.kernel, layer.bias) if v is not None]
    return dense_ggn(model, loss, x, y, variables, **kwargs)


def kron(a, g):
    """`A ⊗ G` of row-major flattened `[d_in, d_out]` matrices."""
    return np.kron(np.asarray(a), np.asarray(g))


def assert_close(actual, expected, rtol=1e-10):
    """Elementwise equality relative to the largest entry, with a report of the worst one."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = np.abs(expected).max()
    error = np.abs(actual - expected).max()
    worst = np.unravel_index(np.abs(actual - expected).argmax(), expected.shape)
    assert scale > 0, "a reference of zeros proves nothing"
    assert error <= rtol * scale, (
        f"largest difference {error:.3e} (relative to {scale:.3e}) at {worst}: "
        f"{actual[worst]} instead of {expected[worst]}"
    )


def relative_difference(actual, expected):
    """Largest difference relative to the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()
