"""Noisy K-FAC: a callback that trains with weights drawn from their posterior.

Source: Zhang, Sun, Duvenaud & Grosse (2018), "Noisy natural gradient as variational inference",
arXiv:1712.02390.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_kfac import _keras_internals, validation
from keras_kfac.attachable import Built
from keras_kfac.block_normal import BlockNormal, draws
from keras_kfac.callbacks import kfac_of
from keras_kfac.curvature.block import KroneckerBlock
from keras_kfac.curvature.regularization import l2_coefficient
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.data_likelihood import loss_scale
from keras_kfac.math.eigenbasis_normal import EigenbasisNormal
from keras_kfac.math.linalg import is_finite, scalar
from keras_kfac.optimizer import KFAC

_TRAINING, _AFTERWARDS = 0, 1  # What draws are for: each has its own.

Tensors = list[tf.Tensor]


class WeightNoise(keras.callbacks.Callback):
    """Noisy K-FAC: trains the mean of a normal posterior of the weights.

    While a batch is trained on, weights with a curvature block are a draw from

        N(µ, T (N F + τ I)⁻¹)

    with the weights `µ` of the model, the number `N` of training examples, the Fisher matrix `F` of
    the log-likelihood of an example as the optimizer's factors have it, and the precision `τ` of
    the prior `N(0, I/τ)`. Gradients and factors are those at the draw, the step is taken by `µ`,
    and at all other times the weights are `µ`: in evaluation, to other callbacks, in checkpoints,
    after `fit`. That maximises the evidence lower bound of the normal distribution (Zhang et al.
    2018). A block's covariance is that of `laplace`, by `A ⊗ G` or its other structure; damping has
    no part in it.

    The loss says the rest. It is the mean over examples of `-c log r`, with the constant `c` that
    the losses of docs/likelihoods.md have, a loss weight, and one over the number of positions as
    factors of `c`. The prior is its L2 regulariser, `L2(c τ / (2 N))` of all weights of a layer:
    kernels, biases, scales. Weight decay is no prior: it is not preconditioned.

    The distribution is renewed as often as the optimizer's inverses. Before the first step there is
    none, and no noise. Weights without a curvature block have none, with a warning. While a batch
    is trained on, weights take three times their memory.

    Args:
        training_examples: `N`, a positive int.
        temperature: `T > 0`. Below 1 the posterior is narrower than Bayes's rule has it: the
            weight of the KL divergence from the prior (`λ` of Zhang et al.), if the prior is
            widened by it.
        seed: Of the draws, an int.

    Raises:
        ValueError: For arguments out of range; in training, for a model that is not compiled with
            `KFAC`, or with `steps_per_execution` above 1, weight averaging (`use_ema`), weight
            decay, several outputs, a loss that is no likelihood or no mean over examples, weights
            without an L2 regulariser in common, or constrained; `fisher="forward_only"`; or a
            `curvature` that keeps no Fisher matrix (`"inverse_free"`, `"tridiagonal"`,
            `"linear_exact"`, `"sample_space"`, `"dense"` of more than 4096 weights); or outputs
            with a mask, or examples with weights.

    Example:
    >>> x = np.random.default_rng(0).normal(size=(32, 2))
    >>> prior = keras.regularizers.L2(1 / 32)  # `c τ / (2 N)`, with `c = 2` for one output.
    >>> dense = keras.layers.Dense(1, kernel_regularizer=prior, bias_regularizer=prior)
    >>> model = keras.Sequential([keras.Input((2,)), dense])
    >>> model.compile(KFAC(), "mse")
    >>> noise = WeightNoise(training_examples=32)
    >>> _ = model.fit(x, x[:, :1], epochs=5, verbose=0, callbacks=[KFACCallback(), noise])
    >>> list(noise.prior_precisions.values())
    [1.0]
    >>> mean = dense.kernel.numpy()
    >>> with noise.applied(draw=0):
    ...     bool(np.all(dense.kernel.numpy() != mean))
    True
    >>> bool(np.all(dense.kernel.numpy() == mean))
    True
    """

    def __init__(self, training_examples: int, temperature: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.training_examples = validation.check_positive_int(
            "training_examples", training_examples
        )
        self.temperature = validation.check_finite_positive("temperature", temperature)
        self.seed = validation.check_count("seed", seed)
        self._noise: _Noise | None = None
        self._batches = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that there can be noise."""
        self._optimizer = kfac_of(self.model)
        self._is_first = True
        _check_training(self.model, self._optimizer)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Has the batch trained on with noise, but for the first of all."""
        _keras_internals.around_next_batch(self.model, partial(_unweighted, self._next_noise()))

    def _next_noise(self) -> contextlib.AbstractContextManager:
        """A context with the noise of the next batch; without any for the first of all."""
        found = self._optimizer.findings
        if found is None:
            return contextlib.nullcontext()
        if self._noise is None or self._noise.found is not found:
            self._noise = _Noise(self, self._optimizer, found)
        # The model may have trained in other ways since.
        self._noise.renew(in_any_case=self._is_first)
        self._is_first = False
        micro_steps = self._optimizer.gradient_accumulation_steps or 1
        index = micro_steps * self._optimizer.batches_seen + self._batches % micro_steps
        self._batches += 1
        return self._noise.applied(_TRAINING, index)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Warns of draws that were not finite."""
        if self._noise is not None:
            self._noise.report()

    @property
    def prior_precisions(self) -> dict[str, float]:
        """`τ` of each layer's weights, by path, as their regularisers have it.

        Raises:
            RuntimeError: Before the second step.
        """
        return self._known().prior_precisions

    def applied(self, draw: int = 0) -> contextlib.AbstractContextManager:
        """A context in which the weights are a draw from their distribution, for predictions.

        Args:
            draw: Which, an int >= 0.

        Raises:
            RuntimeError: Before the second step.
        """
        index = tf.constant(validation.check_count("draw", draw), tf.int64)
        return self._known().applied(_AFTERWARDS, index)

    def _known(self) -> "_Noise":
        if self._noise is None:
            raise RuntimeError(
                "Weights have a distribution from the second training step on. Received: a "
                "`WeightNoise` without one"
            )
        return self._noise


class _Noise:
    """The distributions of a model's weights around their means, and what is drawn from them.

    Attributes:
        found: What the optimizer knows of the model.
        prior_precisions: `τ` of each block, by path.
    """

    def __init__(self, given: WeightNoise, optimizer: KFAC, found: Built) -> None:
        self.found = found
        self._optimizer = optimizer
        self._seed = given.seed
        self._blocks = found.curvature.blocks
        self._adapters = [block.adapter for block in self._blocks]
        self._variables = [v for adapter in self._adapters for v in adapter.variables]
        if found.has_masks:
            raise ValueError(
                "A loss that is a mean over positions without a mask has another scale in each "
                "batch: there is no prior of it. Received: a model whose outputs have a mask"
            )
        per_loss = given.training_examples / loss_scale(given.model, found.outputs)
        unit = 0.5 / per_loss  # The L2 regulariser that is a prior of precision 1.
        l2 = [_prior_coefficient(block, unit) for block in self._blocks]
        self.prior_precisions = {a.path: c * per_loss for a, c in zip(self._adapters, l2)}
        # Factors and regularisers are of the loss, which is `c / N` times what the posterior has.
        self._factor = per_loss / given.temperature
        self._priors = [coefficient * self._factor for coefficient in l2]
        self._normals: list[EigenbasisNormal] = []
        self._failed = tf.Variable(0, dtype=tf.int64)
        self._reported = 0
        # Whatever depends on the state of the optimizer is computed where that is: no value is
        # waited for.
        self._fresh = tf.function(self._fresh_normals, autograph=False)
        self._renewed = tf.function(self._renewed_normals, autograph=False)
        self._add = tf.function(self._add_draw, autograph=False)
        self._take_away = tf.function(self._take_draw_away, autograph=False)
        _warn_of_others(found)

    # ---- Distributions --------------------------------------------------------------------------

    def renew(self, in_any_case: bool) -> None:
        """Makes the distributions anew if it is time to."""
        self._normals = self._fresh() if in_any_case else self._renewed(self._normals)

    def _fresh_normals(self) -> list[EigenbasisNormal]:
        """From the factors as they are now; means are zero."""
        return [self._of(block, prior) for block, prior in zip(self._blocks, self._priors)]

    def _of(self, block: KroneckerBlock, prior: float) -> EigenbasisNormal:
        normal = BlockNormal.of(block, self._factor).normal(prior)
        # Before statistics of the layer have come, and inverses, there is no noise.
        is_known = (tf.convert_to_tensor(block.weight) > 0) & (block.refreshes.value > 0)
        precision = tf.where(is_known, normal.precision, float("inf"))
        return normal._replace(mean=scalar(0.0, precision.dtype), precision=precision)

    def _renewed_normals(self, old: list[EigenbasisNormal]) -> list[EigenbasisNormal]:
        return tf.cond(self._optimizer.inverses_were_due(), self._fresh_normals, lambda: old)

    # ---- Draws ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def applied(self, purpose: int, index: tf.Tensor) -> Iterator[None]:
        """Weights are a draw in the body; afterwards their means, and what the body added."""
        means, drawn = self._add(self._normals, tf.constant(purpose), index)
        try:
            yield
        finally:
            self._take_away(means, drawn)

    def _add_draw(
        self, normals: Sequence[EigenbasisNormal], purpose: tf.Tensor, index: tf.Tensor
    ) -> tuple[Tensors, Tensors]:
        """Makes the weights a draw; returns their means, and the draw."""
        seed = tf.stack([self._seed, purpose])
        seed = tf.random.experimental.stateless_fold_in(seed, index)
        means = {id(v): tf.convert_to_tensor(v.value) for v in self._variables}
        drawn: dict[int, tf.Tensor] = {}
        for noise in draws(self._adapters, normals, seed):
            moved = {key: means[key] + value for key, value in noise.items()}
            finite = tf.reduce_all([is_finite(value) for value in moved.values()])
            self._failed.assign_add(tf.cast(~finite, tf.int64))
            drawn |= {key: tf.where(finite, value, means[key]) for key, value in moved.items()}
        for variable in self._variables:
            variable.assign(drawn[id(variable)])
        return [means[id(v)] for v in self._variables], [drawn[id(v)] for v in self._variables]

    def _take_draw_away(self, means: Tensors, drawn: Tensors) -> None:
        # Not the noise is subtracted: rounding would add up, and move weights without a step.
        for variable, mean, before in zip(self._variables, means, drawn):
            variable.assign(mean + (variable.value - before))

    def report(self) -> None:
        """Warns of draws that were not finite, since the last report."""
        failed, before = int(self._failed.numpy()), self._reported
        self._reported = failed
        if failed > before:
            warnings.warn(
                f"{failed - before} draws of the noise of a layer were not finite, and left out. "
                "Is the L2 regulariser too small, or the temperature too high?",
                stacklevel=3,
            )


# ---- Checks -------------------------------------------------------------------------------------


def _check_training(model: keras.Model, optimizer: KFAC) -> None:
    """Checks what does not depend on the blocks."""
    if model.steps_per_execution > 1:
        raise ValueError(
            "Noise is drawn for each batch, and batches of one execution would share it. Compile "
            "with `steps_per_execution=1`. Received: steps_per_execution="
            f"{model.steps_per_execution}"
        )
    if optimizer.use_ema or model.optimizer.use_ema:
        raise ValueError(
            "`use_ema` averages the weights with their noise. Received: an optimizer with "
            "use_ema=True"
        )
    if optimizer.weight_decay:
        raise ValueError(
            "Weight decay is no prior of the weights, as it is not preconditioned. Use L2 "
            f"regularisers in its place. Received: weight_decay={optimizer.weight_decay}"
        )
    if optimizer.fisher == Fisher.FORWARD_ONLY:
        raise ValueError(
            "The covariance needs output factors, which fisher='forward_only' has not. Received: "
            f"fisher={str(optimizer.fisher)!r}"
        )


def _unweighted(
    context: contextlib.AbstractContextManager, data: Any
) -> contextlib.AbstractContextManager:
    """The context of a batch, of whose data these are the specs.

    Raises:
        ValueError: If examples have weights: of a class, too, as `fit` makes these of them.
    """
    weights = tf.nest.flatten(data[2]) if isinstance(data, tuple) and len(data) == 3 else []
    if any(isinstance(spec, tf.TensorSpec) for spec in weights):  # Of `None` there is another one.
        raise ValueError(
            "Sample weights, and class weights, have no place in a likelihood: let an example "
            f"occur several times. Received: data of {len(data)} parts, the last of them {data[2]}"
        )
    return context


def _prior_coefficient(block: KroneckerBlock, unit: float) -> float:
    """`η` of the regulariser `½ η Σ w²` of a block's weights.

    Raises:
        ValueError: If they have no such one in common, are constrained, or the block has no
            covariance.
    """
    variables, path = block.adapter.variables, block.adapter.path
    if not block.keeps_fisher:
        raise ValueError(
            f"`curvature` {block.kind!r} keeps no Fisher matrix of the layer's weights to draw "
            f"noise by (nor does 'dense' of many weights). Received: layer {path!r}"
        )
    constrained = [v.path for v in variables if v.constraint is not None]
    if constrained:
        raise ValueError(
            "Weights with noise can't be constrained: a normal distribution is not. Received: "
            f"constraints of {constrained}"
        )
    found = {v.path: v.regularizer for v in variables}
    coefficients = {l2_coefficient(v) if _is_normal(v.regularizer) else 0.0 for v in variables}
    if len(coefficients) > 1 or not min(coefficients) > 0:
        raise ValueError(
            "The prior of weights with noise is their L2 regulariser, one for all weights of a "
            f"layer. `keras.regularizers.L2({unit:.3g})` is a prior of precision 1 for this loss; "
            "it has to be given for kernel and bias. Received: layer "
            f"{path!r} with {found}"
        )
    return coefficients.pop()


def _is_normal(regularizer: Any) -> bool:
    """Whether a regulariser is the logarithm of a normal distribution."""
    if isinstance(regularizer, keras.regularizers.L1L2):
        return not regularizer.l1
    return isinstance(regularizer, keras.regularizers.L2)


def _warn_of_others(found: Built) -> None:
    if found.coverage.fraction < 1:
        warnings.warn(
            f"Some trained weights have no curvature block, and no noise:\n{found.coverage}",
            stacklevel=4,
        )
