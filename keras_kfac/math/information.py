"""Fisher information of TensorFlow Probability's distributions, in closed form.

The *form* of a class of distributions says which tensors are the parameters `θ` of one, and what
its Fisher information

    I(θ) = E[∇_θ log r(y; θ) ∇_θ log r(y; θ)ᵀ] = R Rᵀ

is: by products `uᵀ I v`, and by products `R z` with the root. Tangents `u` and `v`, and what `R z`
gives, are tuples shaped as the parameters; `None` stands for a parameter that does not vary. Where
parameters are functions of the outputs of a model, derivatives in forward mode bring directions
here, and those in reverse mode bring `R z` back.

All is stated for one distribution for each index of the batch shape: products are `[*batch]`.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from keras_kfac.math.linalg import upper_triangle

Parameters: TypeAlias = tuple[tf.Tensor, ...]
Tangents: TypeAlias = tuple[tf.Tensor | None, ...]


class Form(abc.ABC):
    """The Fisher information of a class of distributions.

    Attributes:
        events: The number of axes of each parameter that belong to one distribution. Parameters of
            which there is no closed form, as the number of draws, have the word "constant" there:
            they are numbers that must not vary.
        has_edges: Whether draws come so near to the ends of their range that rounding takes them
            there, where derivatives of the log-probability are infinite.
    """

    has_edges = False

    def __init__(self, get: Callable[[Any], Sequence[Any]], events: Sequence[int | str]) -> None:
        self._get = get
        self.events = [0 if e == CONSTANT else int(e) for e in events]
        self.is_constant = [e == CONSTANT for e in events]

    def parameters(self, distribution: Any) -> Parameters:
        """The parameters of a distribution, `[*batch, ...]`."""
        first, *others = self._get(distribution)
        first = tf.convert_to_tensor(first)
        values = [first, *(tf.convert_to_tensor(v, dtype_hint=first.dtype) for v in others)]
        each = zip(values, self.events)
        return tuple(_of_batch(distribution, value, events) for value, events in each)

    @abc.abstractmethod
    def product(self, parameters: Parameters, u: Tangents, v: Tangents) -> tf.Tensor:
        """`uᵀ I v`, `[*batch]`."""

    @abc.abstractmethod
    def columns(self, parameters: Parameters, varies: Sequence[bool]) -> int:
        """How many columns the root has."""

    @abc.abstractmethod
    def root_product(
        self, parameters: Parameters, varies: Sequence[bool], z: tf.Tensor
    ) -> Tangents:
        """`R z`, for `z` that is `[columns]` or `[*batch, columns]`."""


CONSTANT = "constant"


def _of_batch(distribution: Any, value: tf.Tensor, events: int) -> tf.Tensor:
    """A parameter for each distribution of a batch."""
    event = tf.shape(value)[value.shape.rank - events :]
    whole = tf.broadcast_to(value, tf.concat([distribution.batch_shape_tensor(), event], axis=0))
    # Not `tf.ensure_shape`: forward-mode derivatives fail there.
    whole.set_shape(distribution.batch_shape.concatenate(value.shape[value.shape.rank - events :]))
    return whole


def sum_event(tensor: tf.Tensor) -> tf.Tensor:
    """The sum over the axis of vectors."""
    return tf.reduce_sum(tensor, axis=-1)


class Scalars(Form):
    """Distributions of one number, by a few parameters that are numbers, too.

    Args:
        get: From a distribution to its parameters.
        information: From the parameters to the rows of the lower triangle of `I`.
        events: 0 for each parameter; as many as rows, and constants.
    """

    def __init__(
        self,
        get: Callable[[Any], Sequence[Any]],
        information: Callable[..., list[list[Any]]],
        events: Sequence[int | str] = (0,),
    ) -> None:
        super().__init__(get, events)
        self._information = information

    def product(self, parameters: Parameters, u: Tangents, v: Tangents) -> tf.Tensor:
        """`uᵀ I v`."""
        rows, dtype = self._rows(parameters), parameters[0].dtype
        result = tf.zeros_like(parameters[0])
        for i, row in enumerate(rows):
            for j, entry in enumerate(tf.cast(e, dtype) for e in row):
                for k, n in {(i, j), (j, i)}:
                    if u[k] is not None and v[n] is not None:
                        result += entry * u[k] * v[n]
        return result

    def columns(self, parameters: Parameters, varies: Sequence[bool]) -> int:
        """As many as there are parameters that vary."""
        return sum(varies)

    def root_product(
        self, parameters: Parameters, varies: Sequence[bool], z: tf.Tensor
    ) -> Tangents:
        """By the Cholesky factor of the part of `I` that counts."""
        rows, dtype = self._rows(parameters), parameters[0].dtype
        kept = [i for i in range(len(rows)) if varies[i]]
        one = tf.ones_like(parameters[0], tf.float64)
        root = cholesky([[rows[i][j] * one for j in kept if j <= i] for i in kept])
        parts = tf.unstack(z, axis=-1)
        values = {
            i: sum(tf.cast(a, dtype) * b for a, b in zip(row, parts)) for i, row in zip(kept, root)
        }
        return tuple(values.get(i) for i in range(len(parameters)))

    def _rows(self, parameters: Parameters) -> list[list[Any]]:
        """In float64: entries can be small differences, and the root of large ones."""
        return self._information(*(tf.cast(p, tf.float64) for p in parameters))


def cholesky(rows: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
    """Cholesky factors of small matrices, by the entries of their lower triangle.

    Semi-definite ones will do: what can't be divided by is left out.
    """
    root: list[list[tf.Tensor]] = []
    for i, row in enumerate(rows):
        root.append([])
        for j, entry in enumerate(row):
            other = root[j]
            rest = entry - sum(a * b for a, b in zip(root[i][:j], other[:j]))
            if j < i:
                root[i].append(tf.math.divide_no_nan(rest, other[j]))
            else:
                root[i].append(tf.sqrt(tf.maximum(rest, 0)))
    return root


class Softmax(Form):
    """Draws among several, by their logits, and perhaps the number of draws."""

    def product(self, parameters: Parameters, u: Tangents, v: Tangents) -> tf.Tensor:
        """The covariance of the directions under the probabilities."""
        logits, *draws = parameters
        probabilities = tf.nn.softmax(logits)
        mean = tf.reduce_sum(probabilities * u[0], axis=-1, keepdims=True)
        return math.prod(draws, start=sum_event(probabilities * (u[0] - mean) * v[0]))

    def columns(self, parameters: Parameters, varies: Sequence[bool]) -> int:
        """One for each outcome."""
        return int(parameters[0].shape[-1])

    def root_product(
        self, parameters: Parameters, varies: Sequence[bool], z: tf.Tensor
    ) -> Tangents:
        """`(diag √p - p √pᵀ) z`."""
        logits, *draws = parameters
        probabilities = tf.nn.softmax(logits)
        scaled = tf.sqrt(probabilities) * z
        result = scaled - probabilities * tf.reduce_sum(scaled, axis=-1, keepdims=True)
        return math.prod([tf.sqrt(n)[..., tf.newaxis] for n in draws], start=result), *(
            None for _ in draws
        )


class Concentrations(Form):
    """Dirichlet distributions: `I = diag ψ'(α) - ψ'(Σ α) 11ᵀ`."""

    def product(self, parameters: Parameters, u: Tangents, v: Tangents) -> tf.Tensor:
        """`uᵀ I v`."""
        (alpha,) = parameters
        common = trigamma(sum_event(alpha)) * sum_event(u[0]) * sum_event(v[0])
        return sum_event(trigamma(alpha) * u[0] * v[0]) - common

    def columns(self, parameters: Parameters, varies: Sequence[bool]) -> int:
        """One for each concentration."""
        return int(parameters[0].shape[-1])

    def root_product(
        self, parameters: Parameters, varies: Sequence[bool], z: tf.Tensor
    ) -> Tangents:
        """By the Cholesky factor."""
        alpha = tf.cast(parameters[0], tf.float64)
        common = trigamma(tf.reduce_sum(alpha, axis=-1, keepdims=True))[..., tf.newaxis]
        root = tf.linalg.cholesky(tf.linalg.diag(trigamma(alpha)) - common)
        return (tf.linalg.matvec(tf.cast(root, z.dtype), z),)


class Gaussian(Form):
    """Normal distributions of vectors, by mean and root `L` of the covariance `L Lᵀ`.

    Along `(a, D)` the information is `‖L⁻¹ a‖² + ½ ‖M + Mᵀ‖²` with `M = L⁻¹ D`: the covariance
    changes by `L (M + Mᵀ) Lᵀ`.
    """

    def product(self, parameters: Parameters, u: Tangents, v: Tangents) -> tf.Tensor:
        """`uᵀ I v`."""
        mean, root = parameters
        result = tf.zeros_like(mean[..., 0])
        if u[0] is not None and v[0] is not None:
            first, second = (_solve(root, tf.expand_dims(x[0], -1)) for x in (u, v))
            result += tf.reduce_sum(first * second, axis=[-2, -1])
        if u[1] is not None and v[1] is not None:
            first, second = (_solve(root, x[1]) for x in (u, v))
            change = first + tf.linalg.matrix_transpose(first)
            result += tf.reduce_sum(change * second, axis=[-2, -1])
        return result

    def columns(self, parameters: Parameters, varies: Sequence[bool]) -> int:
        """One for each entry of the mean, one for each of a symmetric matrix."""
        size = int(parameters[0].shape[-1])
        return varies[0] * size + varies[1] * len(upper_triangle(size))

    def root_product(
        self, parameters: Parameters, varies: Sequence[bool], z: tf.Tensor
    ) -> Tangents:
        """What gives `L⁻¹ a` and `(M + Mᵀ) / √2`, entry by entry."""
        mean, root = parameters
        size = int(mean.shape[-1])
        of_mean, of_root = z[..., : varies[0] * size], z[..., varies[0] * size :]
        matrices = []
        for i, j in upper_triangle(size):
            matrix = tf.scatter_nd([[i, j]], tf.ones([1], mean.dtype), [size, size])
            matrices.append((matrix + tf.transpose(matrix)) / (math.sqrt(2) if i == j else 1))
        return (
            _solve(root, of_mean[..., tf.newaxis], adjoint=True)[..., 0] if varies[0] else None,
            _solve(root, tf.tensordot(of_root, tf.stack(matrices), 1), adjoint=True)
            if varies[1]
            else None,
        )


def _solve(matrix: tf.Tensor, right: tf.Tensor, adjoint: bool = False) -> tf.Tensor:
    return tf.linalg.LinearOperatorFullMatrix(matrix).solve(right, adjoint=adjoint)


class Together(Form):
    """Independent distributions along the last axes of a batch, which make up one event.

    Args:
        form: Of each.
        axes: How many axes.
        each: From the distribution of the event to those of its parts.
    """

    def __init__(self, form: Form, axes: int, each: Callable[[Any], Any]) -> None:
        super().__init__(each, [e + axes for e in form.events])
        self.is_constant, self.has_edges = form.is_constant, form.has_edges
        self._form, self._axes = form, axes

    def parameters(self, distribution: Any) -> Parameters:
        """Those of the parts."""
        return self._form.parameters(self._get(distribution))

    def product(self, parameters: Parameters, u: Tangents, v: Tangents) -> tf.Tensor:
        """The sum of the products of each."""
        each = self._form.product(parameters, u, v)
        return tf.reduce_sum(each, axis=list(range(-self._axes, 0)))

    def columns(self, parameters: Parameters, varies: Sequence[bool]) -> int:
        """Those of each."""
        return self._form.columns(parameters, varies) * math.prod(self._shape(parameters))

    def root_product(
        self, parameters: Parameters, varies: Sequence[bool], z: tf.Tensor
    ) -> Tangents:
        """Each by its own part of `z`."""
        own = [*self._shape(parameters), self._form.columns(parameters, varies)]
        z = tf.reshape(z, tf.concat([tf.shape(z)[:-1], own], axis=0))
        return self._form.root_product(parameters, varies, z)

    def _shape(self, parameters: Parameters) -> list[int]:
        batch = parameters[0].shape[: parameters[0].shape.rank - self._form.events[0]]
        return batch[batch.rank - self._axes :].as_list()


def trigamma(x: tf.Tensor) -> tf.Tensor:
    """`ψ'(x)`, the second derivative of `log Γ(x)`."""
    return tf.math.polygamma(tf.ones_like(x), x)
