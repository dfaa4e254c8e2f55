"""The K-FAC optimizer."""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
import tensorflow as tf
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_kfac.curvature.choice import Curvature
from keras_kfac.damping import LevenbergMarquardt
from keras_kfac.introspection.adapters import MAX_FACTOR_SIZE
from keras_kfac.introspection.backward_passes import Fisher
from keras_kfac.introspection.forward_pass import instance_attribute
from keras_kfac.introspection.weight_sharing import EXPAND, Choice
from keras_kfac.math.linalg import scaled_rows
from keras_kfac.problem_report import ProblemReport
from keras_kfac.settings import ADAPTIVE
from keras_kfac.step import Batch, Move, all_finite
from keras_kfac.stepping import SteppingOptimizer

T = TypeVar("T")


def _outside_graphs(function: Callable[[], T]) -> T:
    """Calls a function that creates variables where no graph is being built: in another thread.

    A `tf.function` in which variables come to be traces all of it a second time, and notices those
    of a `tf.init_scope` too.
    """
    if tf.executing_eagerly() or tf.distribute.has_strategy():
        return function()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@keras.saving.register_keras_serializable(package="keras_kfac")
class KFAC(SteppingOptimizer):
    """Natural gradient descent with Kronecker-factored approximate curvature (K-FAC).

    For every layer that is an affine map (dense, einsum, convolution, embedding, a step of a
    recurrent layer) with input rows `ā` (the 1 of the bias included) and pre-activation gradients
    `g` the optimizer keeps moving averages of

        A = E[ā āᵀ],   G = E[g gᵀ]   (scaled so that A ⊗ G is the Fisher block of the model's loss)

    and replaces the gradient `∇W` of kernel and bias by `(A + π√λ I)⁻¹ ∇W (G + √λ/π I)⁻¹`. The
    step combines that direction with the previous step,

        δ = -α (A + π√λ I)⁻¹ ∇W (G + √λ/π I)⁻¹ + μ δ₀

    By default learning rate `α`, momentum `μ` and damping `λ` adapt themselves: `α` and `μ`
    minimise the quadratic model of the loss with its exact Gauss-Newton matrix, averaged over as
    many steps as the noise between batches asks for, and `λ` follows how well that model predicts
    the loss. Up to three groups of layers then have rates of their own, whose mean is `α`: they
    make up for the blocks between layers.

    Scales and offsets (normalisation, PReLU) have blocks of exact gradients, example by example.
    Weights of layers that are not known are stepped by the `fallback` optimizer; `register` makes
    them known.

    `A ⊗ G` equals the layer's Fisher block for one example, and for deep linear networks with
    squared loss; otherwise it assumes inputs and output gradients to be independent. Blocks between
    layers are taken to be zero.

    Adaptive values need to see the targets: custom loops compute the loss by `model.compute_loss`.
    With `gradient_accumulation_steps` they model the last micro-batch.

    The optimizer must see the model: pass `callbacks=[KFACCallback()]` to `fit`, or call
    `attach`. With `gradient_accumulation_steps`, factors average over the micro-batches of a step.
    A step whose gradients are not all finite is skipped whole and counted in `skipped_steps`, one
    of negative weights in `refused_batches` under XLA, where no error can be raised: the callback
    does so when the epoch ends.

    Args:
        learning_rate: `"adaptive"`, or `α >= 0`: number, `LearningRateSchedule` or callable, as for
            any Keras optimizer. `optimizer.learning_rate` shows the last adaptive one; assigning a
            float (by hand, or by `ReduceLROnPlateau`) fixes it. It multiplies `weight_decay`.
        damping: `"adaptive"`, or a `LevenbergMarquardt` rule, or `λ >= 0`, float or
            `LearningRateSchedule` of the iterations: what is added to the curvature, in units of
            the loss per squared weight. It takes effect when the inverses are next refreshed.
            Larger is more like gradient descent. Scale a fixed one with the loss. 0 is allowed;
            factors that are singular then are reported, and keep their previous inverse, or have
            a pseudo-inverse if damped exactly. L2 regularisers of weights add to their damping.
        momentum: `"adaptive"`, or `μ` in [0, 1), float or `LearningRateSchedule`.
        factor_ema_decay: Decay in [0, 1) of the moving averages of the factors, for each update;
            float or `LearningRateSchedule`. It is lower at first, so that the factors remember no
            more than a quarter of the steps taken.
        factor_update_period: Steps between updates of the factors, a positive int. At first there
            are fewer: no more than a quarter of the steps taken, or one. `None` takes 10, or
            `inverse_update_period` if that is less.
        inverse_update_period: Steps between refreshes of the inverses, a positive int, at least
            `factor_update_period`. Fewer at first, likewise.
        curvature: The structure of the layers' blocks of the Fisher matrix:

            - `"kfac"`: `A ⊗ G`.
            - `"ekfac"`: the eigenbases of `A` and `G`, and in these the second moments of the
              gradients of single examples in place of the products of eigenvalues.
            - `"input"`: `A ⊗ g I` with the mean eigenvalue `g` of `G`: whitening of the inputs
              (PRONG, FOOF).
            - `"inverse_free"`: that of `"kfac"` from half as many numbers: in place of `A` and `G`
              roots of their damped inverses, kept up by matrix products alone. For weights in
              bfloat16, too. In factored damping only.
            - `"linear_exact"`: `A ⊗ G` times the number of layers: exact for deep linear networks,
              blocks between layers included.
            - `"diagonal"`: the diagonal of the block. `"full"`: the block as it is, for small
              layers: a matrix with a row for each weight. `"dense"`: the Fisher matrix of all
              layers that have this structure as it is, for small models.
            - `"sample_space"`: that of the step's batch alone, by its samples: no matrix is kept,
              but each step takes the passes backwards that `fisher` takes for an update of the
              factors. For more weights than samples and outputs. `"dense"` is this, too, of more
              than 4096 weights.
            - `"tridiagonal"`: for a chain of `Dense` layers, with what neighbours have in common.
              In factored damping only.

            A dict by name, path or class of a layer, as in `{"conv2d": "ekfac"}` or
            `{keras.layers.Dense: "input"}`, chooses for some, the others are `"kfac"`; so does a
            function from a layer to a name or None. Where a layer can't have the structure, its
            block is that of `"kfac"`, and `coverage()` says so; one that is chosen by its own name
            or path is an error. See docs/curvature.md.
        likelihood: The predictive distribution, where the loss does not say it (a function of your
            own, or a Keras loss that K-FAC does not know): a Keras loss, or a function from outputs
            `[batch, ..., width]` to a `tfp.distributions.Distribution` with batch shape
            `[batch, ...]`; a list or dict of these for several outputs. The training loss is then
            taken to be that Keras loss, or the negative log-likelihood, as far as the curvature is
            concerned. `None` for what the losses say; see docs/likelihoods.md.
        fisher: Which Fisher matrix: `"sampled"` (the true one, targets sampled from the model: one
            more backward pass per factor update, of which half of the batch counts, at least 128
            rows of outputs and 8 examples, and of large images some of the pixels), `"exact"` (the
            same without sampling noise: one backward pass per output), `"curvature_propagation"`
            (random signs in place of targets, as dear as sampled), `"empirical"` (from the training
            targets; works with any loss, and is a different matrix) or `"forward_only"` (output
            factors are the identity: no backward pass, but a coarser matrix).
        fisher_samples: How many targets to sample for each example, a positive int: the noise of
            a batch's factors falls as its root, and a backward pass is taken for each.
        exact_damping: Whether a block's inverse is `(A ⊗ G + λ I)⁻¹`, by the eigenbases of its
            factors, in place of the factored one above; the pseudo-inverse for `λ = 0`. Where both
            were measured it took more steps (docs/curvature.md), and eigenbases take several times
            as long to compute.
        weight_sharing: How to treat layers that use their weights at many positions, pixels or time
            steps: `"expand"`, exact for linear networks whose loss has a term for each position, or
            `"reduce"`, exact for those that average over positions before the loss; `"auto"` takes
            "reduce" for the layers of functional and sequential models that are followed by such
            an average (global average pooling), and `coverage()` says so. A dict by name or path
            of a layer, as in `{"conv2d": "reduce"}`, chooses for some; the others expand.
        kl_clip: Bound `κ > 0` on `α² Σ vᵀ∇`, about twice the KL divergence of a step before
            momentum, in units of the loss, float or `LearningRateSchedule`; `None` for none. With a
            fixed learning rate, 1e-4 to 1e-2 keeps the steps of the first epochs in bounds.
            (tensorflow/kfac and kfac-jax call it `norm_constraint`.)
        burn_in_steps: So many batches at first only go into the factors, as a plain average: no
            weight moves, and they count as no step.
        max_factor_size: A factor of more rows is kept as blocks of at most so many on its diagonal,
            as `coverage()` says: to invert `d` rows takes about `d³` operations, to multiply by
            them `d²` for each row of the batch. Vectors of embeddings, groups of convolutions and
            blocks of exact gradients stay as they are.
        memory_limit: How many bytes factors and inverses may take, `None` for any number. What
            they take is in `coverage()`; needing more is an error before they are allocated.
        product_dtype: Dtype in which to multiply gradients by inverses: `"bfloat16"` (sums are
            still accumulated in float32) for devices that are faster in it; `None` for that of the
            weights. Factors and inverses are in full precision either way.
        fallback: Keras optimizer for the weights that no curvature block covers. It keeps its own
            learning rate, and steps whenever K-FAC does. Defaults to `keras.optimizers.Adam()`.
        seed: Int, for sampling targets. Draws depend on it and the iteration (and are others
            under `jit_compile`).
        name: Name of the optimizer.
        **kwargs: `weight_decay`, `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor` and
            `gradient_accumulation_steps` of `keras.optimizers.Optimizer`. Clipping applies to the
            gradient before preconditioning.

    Raises:
        ValueError: For arguments out of range.

    Example:
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile(optimizer=KFAC(), loss=loss)
    >>> x, y = np.eye(4), np.array([0, 1, 2, 0])
    >>> history = model.fit(x, y, epochs=20, verbose=0, callbacks=[KFACCallback()])
    >>> history.history["loss"][-1] < history.history["loss"][0]
    True

    References:
        Martens & Grosse (2015), arXiv:1503.05671: sections 3 (factors), 5 (moving averages), 6.3
        (factored damping), 6.4 and 7 (learning rate and momentum), 6.5 (adapting the damping).
        Grosse & Martens (2016), arXiv:1602.01407: convolutions. Ba, Grosse & Martens (2017): KL
        clip. Eschenhagen et al. (2023), arXiv:2311.00636: "expand" and "reduce". George et al.
        (2018), arXiv:1806.03884: EKFAC.
    """

    def __init__(
        self,
        learning_rate: float | str | LearningRateSchedule = ADAPTIVE,
        damping: float | str | LearningRateSchedule | LevenbergMarquardt = ADAPTIVE,
        momentum: float | str | LearningRateSchedule = ADAPTIVE,
        factor_ema_decay: float | LearningRateSchedule = 0.95,
        factor_update_period: int | None = None,
        inverse_update_period: int = 20,
        curvature: Curvature = "kfac",
        likelihood: Any = None,
        fisher: str = "sampled",
        fisher_samples: int = 1,
        exact_damping: bool = False,
        weight_sharing: Choice = EXPAND,
        kl_clip: float | LearningRateSchedule | None = None,
        burn_in_steps: int = 0,
        max_factor_size: int = MAX_FACTOR_SIZE,
        memory_limit: int | None = None,
        product_dtype: str | None = None,
        fallback: keras.optimizers.Optimizer | None = None,
        seed: int = 0,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            damping,
            momentum,
            factor_ema_decay,
            factor_update_period,
            inverse_update_period,
            curvature,
            likelihood,
            fisher,
            fisher_samples,
            exact_damping,
            weight_sharing,
            kl_clip,
            burn_in_steps,
            max_factor_size,
            memory_limit,
            product_dtype,
            fallback,
            seed,
            name,
            **kwargs,
        )
        self.skipped_steps = self.add_variable((), dtype="int64", name="skipped_steps")
        # No state to be saved: it was an error of these data.
        self.refused_batches = keras.Variable(0, dtype="int64", trainable=False)
        self._report = ProblemReport()

    # ---- The step -------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Steps the variables; see `keras.optimizers.Optimizer.apply`.

        Raises:
            RuntimeError: If the optimizer is not attached, or saw no forward pass.
            ValueError: If the model, its loss or its layers can't be handled; see the message.
        """
        attachment = self._require_attachment()
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                _outside_graphs(lambda: self.build(trainable_variables))
        elif not self.built:
            super().apply(grads)  # Raises: it must be built to know the variables.
        passes = attachment.take_passes()
        # What is unknown raises here, and not in a branch of the step or at some later one.
        draws = self.fisher == Fisher.SAMPLED or self.can_adapt
        compiles = attachment.is_compiled and draws
        terms = [term for forward_pass in passes for term in forward_pass.terms]
        # Their sums over the positions are enough for those that take the loss as it is.
        sums = self.fisher in (Fisher.EMPIRICAL, Fisher.FORWARD_ONLY) and not self.can_adapt
        for forward_pass in passes:
            needs_positions = not sums or any(term.is_weighted for term in forward_pass.terms)
            for term in forward_pass.terms:
                term.check(self._damping_rule is not None, needs_positions, compiles_draws=compiles)
        is_refused = tf.reduce_any([term.counts_negatively() for term in terms])
        built = _outside_graphs(lambda: self._build_curvature(passes))

        rows = self._rows(passes)
        is_burning_in = self._is_burning_in()

        def step() -> None:
            variables = trainable_variables or self._trainable_variables
            batch = Batch(passes, self._unscaled(grads, variables), rows, self._step_seed())
            # For `_backend_update_step`, to which Keras hands no more than gradients.
            with instance_attribute(self, "_batch", batch):
                super(KFAC, self).apply(grads, trainable_variables)

        def proceed() -> None:
            self._update_factors(built.curvature, passes, is_burning_in)
            ops.cond(is_burning_in, lambda: None, step)

        def skip() -> None:
            self.skipped_steps.assign_add(tf.cast(~is_refused, tf.int64))
            self.refused_batches.assign_add(tf.cast(is_refused, tf.int64))

        ops.cond(all_finite(grads) & ~is_refused, proceed, skip)

    def _unscaled(
        self, grads: Sequence[Any], variables: Sequence[keras.Variable]
    ) -> dict[int, tf.Tensor]:
        by_index = {self._get_variable_index(v): g for g, v in zip(grads, variables)}
        covered = {id(v): (v, by_index.get(i)) for i, v in self._known.covered.items()}
        present = {key: (v, g) for key, (v, g) in covered.items() if g is not None}
        if not self.loss_scale_factor:
            return {key: g for key, (_, g) in present.items()}
        scale = 1 / self.loss_scale_factor
        return {key: scaled_rows(g, tf.constant(scale, v.dtype)) for key, (v, g) in present.items()}

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        gradients, others = {}, []
        for gradient, variable in zip(grads, trainable_variables):
            index = self._get_variable_index(variable)
            if index in self._known.covered:
                gradients[id(self._known.covered[index])] = gradient
            else:
                others.append((gradient, variable))
        moves, accepted = self._covered_steps(self._batch, gradients, learning_rate)

        def step() -> None:
            super(KFAC, self)._apply_weight_decay(trainable_variables)
            for index, variable in self._known.covered.items():
                if id(variable) in moves:
                    self._take(index, variable, moves[id(variable)])
            if others:
                self.fallback.apply(*zip(*others))

        with tf.name_scope("take_step"):
            ops.cond(accepted, step, lambda: None)

    def _take(self, index: int, variable: keras.Variable, move: Move) -> None:
        if not self._has_momentum:
            variable.assign_add(tf.cast(move.total(), variable.dtype))
            return
        # velocity ← momentum velocity - rate direction, weights ← weights + velocity, in one pass.
        rate, direction, momentum = (tf.cast(x, variable.dtype) for x in move[:3])
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.value.handle,
            accum=self.model_variables[f"velocity.{index}"].value.handle,
            lr=rate,
            grad=direction,
            momentum=momentum,
        )

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Comes with the step: decoupled decay is no part of the model of the step."""

    @property
    def batches_seen(self) -> tf.Tensor:
        """How many batches came, whether they were stepped on or not; int64 scalar."""
        stepped = tf.cast(self.iterations, tf.int64)
        left_out = self.skipped_steps.value + self.refused_batches.value
        return stepped + left_out + self._burnt_in.value

    # ---- Reports --------------------------------------------------------------------------------

    def last_step(self) -> dict[str, float]:
        """What the last step was like.

        Returns:
            `learning_rate`, `momentum` and `damping`; `kl_clip_scale`, the factor that the KL clip
            put on the step (1 is none); `condition_number`, the largest of `condition_numbers`; if
            anything adapts itself also `step_kl`, the KL divergence
            of the step in units of the loss, `signal_share`, and `reduction_ratio`, which the
            damping follows (both near 1 if the loss does as the quadratic model says).
        """
        names = ["learning_rate", "momentum", "damping", "kl_clip_scale"]
        if self.can_adapt:
            names += ["step_kl", "signal_share", "reduction_ratio"]
        values = {name: float(ops.convert_to_numpy(getattr(self, name))) for name in names}
        return {**values, "condition_number": max(self.condition_numbers().values(), default=1.0)}

    def report_problems(self) -> None:
        """Warns of steps and statistics left out, and of factors not inverted, since last time.

        `KFACCallback` calls it after every epoch, `fit` at its end.

        Raises:
            ValueError: If losses or examples of negative weight came, which XLA can't refuse by
                itself. Nothing was stepped on them.
        """
        self._report.refuse_negative_weights(int(self.refused_batches.numpy()))
        self._report.warn_of_skipped_steps(int(self.skipped_steps.numpy()))
        if self._built is not None:
            self._report.warn_of_lost_updates(self._built.curvature)
            self._report.warn_of_singular_factors(self._built.curvature)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Hook of Keras at the end of `fit`."""
        super().finalize_variable_values(var_list)
        self.report_problems()
