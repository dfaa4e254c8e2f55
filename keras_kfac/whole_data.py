"""The curvature of the log-likelihood of a whole data set, in the blocks of a model."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import keras
import numpy as np
import tensorflow as tf

from keras_kfac.curvature.block import KroneckerBlock
from keras_kfac.curvature.choice import Curvature
from keras_kfac.curvature.coverage import BlockSettings, Coverage, CoveragePlan, plan_coverage
from keras_kfac.curvature.model_curvature import ModelCurvature
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.data_likelihood import (
    examples_of,
    likelihood_term,
    log_likelihood,
    scaled,
)
from keras_kfac.introspection.losses import Term
from keras_kfac.introspection.model_pass import recorded_pass
from keras_kfac.introspection.weight_sharing import Choice
from keras_kfac.math.inverses import ANY_DAMPING, ExactInverse
from keras_kfac.math.likelihood import Likelihood


class CurvatureSettings(NamedTuple):
    """Whose curvature, and which.

    Attributes:
        model: A built model.
        likelihood: As for `likelihood_term`.
        curvature: The structures of the blocks.
        weight_sharing: How to treat weights that are used at many positions.
        fisher: Which Fisher matrix.
        seed: Of its draws, if it has any.
    """

    model: keras.Model
    likelihood: Any
    curvature: Curvature
    weight_sharing: Choice
    fisher: Fisher
    seed: int

    def term(self, outputs: Any, targets: Any) -> Term:
        """The negative log-likelihood of a batch."""
        term = likelihood_term(self.model, outputs, targets, self.likelihood)
        return _by_example(term) if term.outputs.shape.rank == 1 else term


def _by_example(term: Term) -> Term:
    """A term in which each example counts once, where the loss may be one mean over the batch."""
    coefficients = tf.cast(term.coefficients(), tf.float64) * term.likelihood_weight()
    count = tf.math.count_nonzero(coefficients, dtype=tf.float64)
    return scaled(term, tf.math.divide_no_nan(count, tf.reduce_sum(coefficients)))


class WholeCurvature(NamedTuple):
    """What the data say.

    Attributes:
        blocks: One for each part of a layer. The eigenvalues of their inverses are those of the
            mean over examples.
        coverage: Which weights they cover.
        output_shape: Of the outputs, batch included.
        likelihood: The distribution of targets, of outputs as `Term.differentiable` has them.
        examples: The number `N` of examples.
        log_likelihood: Of all data, float64; `None` without targets.
    """

    blocks: list[KroneckerBlock]
    coverage: Coverage
    output_shape: tf.TensorShape
    likelihood: Likelihood
    examples: tf.Tensor
    log_likelihood: tf.Tensor | None


Add = Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]


def whole_curvature(settings: CurvatureSettings, data: tf.data.Dataset) -> WholeCurvature:
    """Goes through the data once, or twice if a block needs its bases first.

    Args:
        settings: Whose curvature, and which.
        data: Batches of pairs of inputs and targets, or of inputs alone in a tuple.

    Raises:
        ValueError: If there are no data, no layer is covered, or something is not finite.
    """
    plan, output_shape, likelihood = _look(settings, data)
    for block in plan.blocks:
        if not block.block_type.keeps_fisher:
            raise ValueError(
                "`laplace` needs the Fisher matrix of each block, and "
                f"curvature={block.block_type.kind!r} keeps none (nor does 'dense' of so many "
                "weights): choose 'kfac', 'ekfac' or 'diagonal'. Received: "
                f"{math.prod(block.adapter.matrix_shape):,} weights of {block.adapter.path!r}"
            )
    if not plan.blocks:
        raise ValueError(
            "No layer of this model has a curvature block. Received: model "
            f"{settings.model.name!r}\n{plan.rows}"
        )
    curvature = ModelCurvature(plan.blocks, _add_variable, None, spares_weak_blocks=False)
    add = _adder(settings, curvature)
    examples, log_likelihood = _through(data, add)
    lost = curvature.lost_updates()
    if lost:
        raise ValueError(
            "The Fisher matrix of some batches is not finite: look for examples at which the model "
            "has no derivative, such as the norm of a vector of zeros, for infinite derivatives, "
            f"and for overflow. Received: batches for which it is not, by layer: {lost}"
        )
    count = len(curvature.blocks)
    curvature.refresh(range(count), [tf.constant(ANY_DAMPING)] * count)
    if any(block.needs_bases for block in curvature.blocks):
        _through(data, add)
    failed = curvature.failed_refreshes()
    if failed:
        raise ValueError(f"Factors of layers can't be decomposed. Received: {sorted(failed)}")
    has_targets = len(data.element_spec) > 1
    return WholeCurvature(
        curvature.blocks,
        plan.rows,
        output_shape,
        likelihood,
        examples,
        log_likelihood if has_targets else None,
    )


def _look(
    settings: CurvatureSettings, data: tf.data.Dataset
) -> tuple[CoveragePlan, tf.TensorShape, Likelihood]:
    """What a forward pass shows: what can be covered, the shape of outputs, and their likelihood.

    As in the passes to come: within a graph, layers in loops are out of reach.
    """
    looks: list[tuple[CoveragePlan, tf.TensorShape, Likelihood]] = []
    model = settings.model
    # Factors are kept whole: what fills up the last of several blocks are no weights.
    of_blocks = BlockSettings(
        settings.curvature, settings.weight_sharing, ExactInverse, max_factor_size=sys.maxsize
    )

    def look(x: Any) -> None:
        seen = recorded_pass(model, lambda: model(x, training=False))
        term = settings.term(seen.outputs, None)
        if _needs_targets(settings, term) and len(data.element_spec) == 1:
            raise ValueError(
                "This Fisher matrix depends on the targets: `laplace(model, x, y)`. Received: "
                f"y=None for fisher={str(settings.fisher)!r}, loss={term.score.loss!r}"
            )
        outputs, likelihood = term.differentiable(term.outputs)
        plan = plan_coverage(model, _is_trained, of_blocks, seen.calls, seen.unreachable)
        looks.append((plan, outputs.shape, cast(Likelihood, likelihood)))

    tf.function(look, autograph=False).get_concrete_function(data.element_spec[0])
    return looks[-1]


def _needs_targets(settings: CurvatureSettings, term: Term) -> bool:
    return term.needs_targets or settings.fisher is Fisher.EMPIRICAL


def _is_trained(variable: keras.Variable) -> bool:
    return bool(variable.trainable)


def _add_variable(name: str, shape: Any, dtype: Any, initializer: Any = "zeros") -> keras.Variable:
    return keras.Variable(initializer, tuple(shape), dtype, trainable=False)


def _adder(settings: CurvatureSettings, curvature: ModelCurvature) -> Add:
    """A function that includes a batch in the averages.

    It returns the number of examples, their log-likelihood, and whether the outputs are finite.
    """
    model, zero = settings.model, tf.zeros((), tf.float64)

    def add(batch: Any, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        x, y = batch[0], batch[1] if len(batch) > 1 else None
        forward_pass = recorded_pass(model, lambda: model(x, training=False))
        term = settings.term(forward_pass.outputs, y)
        examples = examples_of(term)
        # The averages are over examples, and weighted by their number.
        forward_pass.terms = [scaled(term, 1 / examples)]
        seed = tf.stack([settings.seed, index])
        decay = tf.cast(index > 0, tf.float64)  # Each time through the data starts anew.
        curvature.update([forward_pass], settings.fisher, 1, seed, decay)
        is_finite = tf.reduce_all(tf.math.is_finite(term.outputs))
        return examples, zero if y is None else log_likelihood(term), is_finite

    return tf.function(add, autograph=False, reduce_retracing=True)


def _through(data: tf.data.Dataset, add: Add) -> tuple[tf.Tensor, tf.Tensor]:
    """The number of examples, and their log-likelihood."""
    total = [tf.zeros((), tf.float64)] * 2
    for index, batch in enumerate(data):
        *numbers, is_finite = add(batch, tf.constant(index))
        if not is_finite:
            raise ValueError(
                f"The outputs of the model are not finite. Received: batch {index} of the data"
            )
        total = [sum(pair) for pair in zip(total, numbers)]
    if not total[0] > 0:
        raise ValueError("There are no examples in the data. Received: no batch that counts")
    return total[0], total[1]


def inputs_of(x: Any, batch_size: int) -> Iterator[Any]:
    """Batches of inputs alone: targets and weights of a dataset are left out, as `predict` does.

    Args:
        x: As for `batches_of`.
        batch_size: Of arrays.

    Raises:
        ValueError: For a dataset without an end, or arrays of different length.
    """
    is_dataset = isinstance(x, tf.data.Dataset)
    if is_dataset and x.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f"A dataset must come to an end. Received: x={x!r}")
    for batch in x if is_dataset else batches_of(x, None, batch_size):
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        yield inputs


def batches_of(x: Any, y: Any, batch_size: int) -> tf.data.Dataset:
    """Batches of inputs and targets, as tuples of one or two.

    Args:
        x: An array, or a structure of arrays, with the examples along the first axis; or batches
            of pairs `(x, y)`, or of inputs, as a `tf.data.Dataset`.
        y: Targets; `None` if there are none, or `x` holds them.
        batch_size: Of arrays.

    Raises:
        ValueError: For other than finite data, sample weights, or arrays of different length.
    """
    if isinstance(x, tf.data.Dataset):
        return _checked(x, y)
    # Keras takes inputs in a list; a dataset would make one tensor of them.
    x = tuple(x) if isinstance(x, list) else x
    data = (x,) if y is None else (x, y)
    sizes = {len(array) for array in tf.nest.flatten(data)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "Arrays must have one entry for each example, and at least one. Received: arrays of "
            f"shapes {[tuple(np.shape(array)) for array in tf.nest.flatten(data)]}"
        )
    return tf.data.Dataset.from_tensor_slices(data).batch(batch_size)


def _checked(data: tf.data.Dataset, y: Any) -> tf.data.Dataset:
    spec = data.element_spec
    is_tuple = isinstance(spec, tuple)
    if y is not None or data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "A dataset must hold the targets, and come to an end. Received: "
            f"x={data!r}, y={'None' if y is None else 'targets'}"
        )
    if is_tuple and len(spec) > 2:
        raise ValueError(
            "Sample weights have no place in a likelihood: let an example occur several times. "
            f"Received: a dataset of {len(spec)} parts"
        )
    return data if is_tuple else data.map(lambda x: (x,))
