"""Predictive distributions: where the Fisher matrix comes from.

A loss that is a scaled negative log-likelihood, `ℓ(y, f) = -w log r(y | f) + const`, has the
generalised Gauss-Newton matrix `w F` with `F` the Fisher information of `r` with respect to the
outputs `f`. The curvature enters K-FAC through vectors to back-propagate from the outputs whose
outer products are, exactly or in expectation, `w F`:

* *sampled* (the true Fisher, Monte Carlo): `√w ∇_f(-log r(ŷ | f))` with `ŷ ~ r(· | f)`;
* *exact* (type-2): columns `s_c` of a root, `Σ_c s_c s_cᵀ = w F`.

The first needs a distribution that can be sampled, the second one whose information is known in
closed form (`families.py`): for its parameters, from where derivatives lead to the outputs.
Source: Martens (2020), "New insights and perspectives on the natural gradient method", JMLR 21,
sections 5, 8 and 9.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf
import tensorflow_probability as tfp

from keras_kfac.math.draws import draw
from keras_kfac.math.families import form_of
from keras_kfac.math.huber import Huber
from keras_kfac.math.information import Form, Parameters
from keras_kfac.math.linalg import scalar, upper_triangle
from keras_kfac.math.log_normal import LogNormalLessOne

tfd = tfp.distributions

Make: TypeAlias = Callable[[tf.Tensor], Any]
"""From outputs `[..., width]` to a TFP distribution with a batch index for each position."""

Products: TypeAlias = dict[tuple[int, int], tf.Tensor]
"""Products of pairs of directions, by their place in the upper triangle."""


def products_of(components: Sequence[tf.Tensor]) -> Products:
    """Those of a matrix that is one outer product, from the components along its vector."""
    pairs = upper_triangle(len(components))
    return {(i, j): components[i] * components[j] for i, j in pairs}


# Probabilities are clipped to [_FLOOR, 1 - _FLOOR], as Keras clips them in its losses.
_FLOOR = 1e-7


def categorical(logits: tf.Tensor) -> Any:
    """One draw among the outputs."""
    return tfd.Categorical(logits=logits)


def categorical_of_probabilities(outputs: tf.Tensor) -> Any:
    """One draw among the outputs, which need not add up to 1."""
    return categorical(tf.math.log(tf.maximum(outputs, _FLOOR)))


def bernoulli(logits: tf.Tensor) -> Any:
    """An independent draw for each output."""
    return tfd.Independent(tfd.Bernoulli(logits, dtype=logits.dtype), 1)


def bernoulli_of_probabilities(outputs: tf.Tensor) -> Any:
    """An independent draw for each output."""
    probabilities = tf.clip_by_value(outputs, _FLOOR, 1 - _FLOOR)
    return bernoulli(tf.math.log(probabilities) - tf.math.log1p(-probabilities))


def normal(means: tf.Tensor) -> Any:
    """Independent numbers of variance 1."""
    return tfd.Independent(tfd.Normal(means, tf.ones((), means.dtype)), 1)


def laplace(medians: tf.Tensor) -> Any:
    """Independent numbers whose distance from the medians has mean 1."""
    return tfd.Independent(tfd.Laplace(medians, tf.ones((), medians.dtype)), 1)


def logistic(means: tf.Tensor) -> Any:
    """Independent numbers whose `-log r` is `2 log cosh` of the distance from the mean."""
    return tfd.Independent(tfd.Logistic(means, tf.constant(0.5, means.dtype)), 1)


def poisson(rates: tf.Tensor) -> Any:
    """Independent counts."""
    return tfd.Independent(tfd.Poisson(tf.maximum(rates, _FLOOR)), 1)


def normal_of_logarithm(outputs: tf.Tensor) -> Any:
    """Independent normal numbers, `log(1 + y)` of what is predicted."""
    return normal(tf.math.log1p(tf.maximum(outputs, _FLOOR)))


def huber(threshold: float) -> Make:
    """Independent numbers whose `-log r` is Huber's function of the distance."""
    return lambda means: tfd.Independent(Huber(means, threshold), 1)


class _Seen(NamedTuple):
    """A distribution whose information is known, and how its parameters depend on the outputs."""

    outputs: tf.Tensor
    form: Form
    parameters: Parameters
    varies: Sequence[bool]
    tape: tf.GradientTape


class OutputCurvature(abc.ABC):
    """A matrix `w F` for each position of the outputs of a model, as curvature of its loss.

    Outputs are `[..., width]`, or `[batch]`, which stands for `[batch, 1]`.
    """

    @abc.abstractmethod
    def sampled_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """A vector whose outer product is the matrix, at least on average.

        Args:
            outputs: `[..., width]`, with a matrix for each leading index.
            seed: Stateless seed, int32 `[2]`.

        Returns:
            Tensor shaped as `outputs`, independent between leading indices.
        """

    @abc.abstractmethod
    def columns(self, outputs: tf.Tensor) -> int:
        """How many columns a root of the matrix has.

        Raises:
            ValueError: If there is no closed form.
        """

    @abc.abstractmethod
    def root_column(self, outputs: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Column `index` of a root of the matrix: `[..., width]`.

        Raises:
            ValueError: If there is no closed form.
        """

    @abc.abstractmethod
    def propagated_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """All columns with random signs: a vector whose outer product is the matrix on average.

        Raises:
            ValueError: If there is no closed form.
        """

    def curvature_products(
        self, outputs: tf.Tensor, directions: Sequence[tf.Tensor], seed: tf.Tensor
    ) -> Products:
        """`uᵀ (w F) v` for all pairs of directions in the space of the outputs.

        Args:
            outputs: `[..., width]`.
            directions: Shaped as the outputs.
            seed: Stateless seed, int32 `[2]`: without a closed form, products are those with
                `sampled_vector`.

        Returns:
            Tensors `[...]` by place in the upper triangle.
        """
        vector = self.sampled_vector(outputs, seed)
        return products_of([tf.reduce_sum(vector * u, axis=-1) for u in directions])


@dataclasses.dataclass(frozen=True)
class Likelihood(OutputCurvature):
    """The predictive distribution `r(y | outputs)` behind a loss `-w log r`.

    Attributes:
        make: The distribution of outputs.
        of_logits: The same of the logits behind the outputs, where these may be probabilities.
        weight_per_output: `w` times the number of outputs: the losses that average over the last
            axis have `w = weight_per_output / outputs`.
        averages_outputs: Whether the loss averages over the last axis.
    """

    make: Make
    of_logits: Make | None = None
    weight_per_output: float = 1.0
    averages_outputs: bool = False

    def weight(self, outputs: tf.Tensor) -> float:
        """The factor `w` for outputs as these."""
        return self.weight_per_output / (_column(outputs).shape[-1] if self.averages_outputs else 1)

    def distribution(self, outputs: tf.Tensor) -> Any:
        """TFP distribution with one batch entry for each position of the outputs.

        Raises:
            ValueError: If it has others, is none, or can't be made.
        """
        outputs = _column(outputs)
        distribution = made(self.make, _wide(outputs))
        if not distribution.batch_shape.is_compatible_with(outputs.shape[:-1]):
            raise ValueError(
                "A likelihood must be one distribution for each position of the outputs "
                "`[..., width]`: wrap it in `tfp.distributions.Independent` to join those of one "
                f"position. Received: outputs of shape {outputs.shape}, and {distribution}"
            )
        return distribution

    def of_targets(self, outputs: tf.Tensor) -> Any:
        """The same as `distribution`, but of the targets where that is of their logarithms.

        Example:
        >>> likelihood = Likelihood(normal_of_logarithm)
        >>> likelihood.of_targets(tf.constant([[3.0]])).sample(seed=[0, 1]).shape.as_list()
        [1, 1]
        """
        distribution = self.distribution(outputs)
        if self.make is not normal_of_logarithm:
            return distribution
        logarithms = distribution.distribution
        return tfd.Independent(LogNormalLessOne(logarithms.loc, logarithms.scale), 1)

    def sampled_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """`√w` times the gradient of `-log r(ŷ | f)` for targets sampled from the model."""
        outputs = tf.stop_gradient(outputs)
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            distribution = self.distribution(outputs)
            form = form_of(distribution)
            seen = self._seen(outputs) if form and form.has_edges else None
            if seen is not None:
                return self._normal_vector(seen, seed)
            targets = tf.stop_gradient(draw(distribution, seed))
            negative_log_likelihood = -distribution.log_prob(targets)
        gradient = tape.gradient(negative_log_likelihood, outputs)
        if gradient is None:
            raise _constant(distribution)
        return gradient * scalar(self.weight(outputs) ** 0.5, outputs.dtype)

    def _normal_vector(self, seen: _Seen, seed: tf.Tensor) -> tf.Tensor:
        """The columns with random normal factors: a vector of the same second moments."""
        shape = tf.concat([tf.shape(_column(seen.outputs))[:-1], [self._columns(seen)]], axis=0)
        z = tf.random.stateless_normal(shape, seed, dtype=_wide(seen.outputs).dtype)
        return self._root_product(seen, z)

    def columns(self, outputs: tf.Tensor) -> int:
        """How many columns a root of `w F` has."""
        return self._columns(self._exactly(outputs))

    def root_column(self, outputs: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Column `index` of a root of `w F`.

        Example:
        >>> likelihood = Likelihood(normal, weight_per_output=2.0, averages_outputs=True)
        >>> likelihood.root_column(tf.zeros([1, 2]), 0).numpy().tolist()  # √(2/2) e_0
        [[1.0, 0.0]]
        """
        seen = self._exactly(outputs)
        unit = tf.one_hot(index, self._columns(seen), dtype=_wide(outputs).dtype)
        return self._root_product(seen, unit)

    def propagated_vector(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The sum of all columns with random signs: its outer product is `w F` on average.

        Source: Martens, Sutskever & Swersky (2012), "Estimating the Hessian by back-propagating
        curvature".
        """
        seen = self._exactly(outputs)
        positions = tf.shape(_column(outputs))[:-1]
        shape = tf.concat([positions, [self._columns(seen)]], axis=0)
        bits = tf.random.stateless_uniform(shape, seed, 0, 2, tf.int32)
        return self._root_product(seen, tf.cast(2 * bits - 1, _wide(outputs).dtype))

    def _root_product(self, seen: _Seen, z: tf.Tensor) -> tf.Tensor:
        product = seen.form.root_product(seen.parameters, seen.varies, z)
        used = [(p, part) for p, part in zip(seen.parameters, product) if part is not None]
        # Those of the same column at all positions are one row.
        parts = [tf.broadcast_to(part, tf.shape(p)) for p, part in used]
        back = seen.tape.gradient([p for p, _ in used], seen.outputs, parts)
        return back * scalar(self.weight(seen.outputs) ** 0.5, back.dtype)

    @staticmethod
    def _columns(seen: _Seen) -> int:
        return seen.form.columns(seen.parameters, seen.varies)

    def curvature_products(
        self, outputs: tf.Tensor, directions: Sequence[tf.Tensor], seed: tf.Tensor
    ) -> Products:
        """`uᵀ (w F) v` for all pairs of directions.

        Example:
        >>> one, likelihood = tf.ones([1, 2]), Likelihood(bernoulli)
        >>> products = likelihood.curvature_products(tf.zeros([1, 2]), [one], tf.zeros(2, tf.int32))
        >>> products[0, 0].numpy().tolist()  # Σ p (1 - p)
        [0.5]
        """
        seen, places = self._seen(outputs), upper_triangle(len(directions))
        if seen is None:
            return super().curvature_products(outputs, directions, seed)
        tangents = [self._tangents(seen.form, outputs, d) for d in directions]
        weight = self.weight(outputs)
        products = {
            (i, j): seen.form.product(seen.parameters, tangents[i], tangents[j]) for i, j in places
        }
        return {place: p * scalar(weight, p.dtype) for place, p in products.items()}

    def _tangents(self, form: Form, outputs: tf.Tensor, direction: tf.Tensor) -> Any:
        with tf.autodiff.ForwardAccumulator(outputs, direction) as accumulator:
            parameters = form.parameters(self.distribution(outputs))
        return tuple(accumulator.jvp(p) for p in parameters)

    def _exactly(self, outputs: tf.Tensor) -> _Seen:
        seen = self._seen(outputs)
        if seen is None:
            raise ValueError(
                "The Fisher information of this distribution is not known in closed form. Use "
                "KFAC(fisher='sampled'), or 'empirical', or FisherMatrix(draws=...). Received: "
                f"{self.distribution(outputs)}"
            )
        return seen

    def _seen(self, outputs: tf.Tensor) -> _Seen | None:
        """`None` if there is no closed form."""
        outputs = tf.stop_gradient(outputs)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(outputs)
            distribution = self.distribution(outputs)
            form = form_of(distribution)
            parameters = () if form is None else form.parameters(distribution)
        varies = [tape.gradient(p, outputs) is not None for p in parameters]
        if form is not None and not any(varies):
            raise _constant(distribution)
        if form is None or any(v and fixed for v, fixed in zip(varies, form.is_constant)):
            return None
        return _Seen(outputs, form, parameters, varies, tape)


def made(make: Make, outputs: tf.Tensor) -> Any:
    """The distribution that a function makes of outputs.

    Raises:
        ValueError: If it can't, or what it makes is none.
    """
    try:
        distribution = make(outputs)
    except Exception as error:  # Of whatever class: the function is the user's.
        first, *_ = str(error).splitlines() or [""]
        raise ValueError(
            "A likelihood must be a function that makes a distribution of outputs `[..., width]`, "
            "of the width that the model has. Received: outputs of shape "
            f"{outputs.shape}, for which it fails with {type(error).__name__}: {first}"
        ) from error
    is_one = isinstance(distribution, tfd.Distribution)
    # That of joint distributions is a list of shapes.
    if not is_one or not isinstance(distribution.batch_shape, tf.TensorShape):
        raise ValueError(
            "A likelihood must be a function from outputs to a `tfp.distributions.Distribution` of "
            f"one tensor. Received: one that returns {distribution!r}"
        )
    return distribution


def _constant(distribution: Any) -> ValueError:
    return ValueError(
        "The log-probability of a likelihood must depend on the outputs, by operations that can be "
        f"differentiated. Received: {distribution}"
    )


def _column(outputs: tf.Tensor) -> tf.Tensor:
    """Outputs that are one number for each example, as those of others."""
    return outputs[:, tf.newaxis] if outputs.shape.rank == 1 else outputs


def _wide(outputs: tf.Tensor) -> tf.Tensor:
    """In float32 or float64."""
    return outputs if outputs.dtype in (tf.float32, tf.float64) else tf.cast(outputs, tf.float32)
