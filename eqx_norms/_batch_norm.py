from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State, StatefulLayer, StateIndex
from jax.nn.initializers import ones, zeros
from jaxtyping import Array, Bool, Inexact, PRNGKeyArray, Shaped

from ._axes import other_axes
from ._layer import AbstractNorm
from ._running import (
    PooledStats,
    RunningStats,
    Step,
    get_stats,
    init_stats,
    pool,
    update,
    warn_if_new,
)
from ._standardize import compute, compute_both
from ._state import check_precision, get_state, needs_state, set_state
from ._statistics import Reduction, Statistics
from ._types import AnyArray, Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


class BatchNorm(AbstractNorm, StatefulLayer):
    r"""Normalises each feature by its mean and variance over the batch.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \gamma + \beta$$

    In training the expectations are over all axes but the feature axes, and over the named
    axes of `axis_name`; the running statistics take a step towards them,

    $$r \leftarrow \text{momentum} * r + (1 - \text{momentum}) * \text{batch},$$

    unless a mask left fewer than two positions, or what was counted is not finite: then a
    feature's running statistics, and its count, stay as they were. In evaluation the
    running statistics stand in for the expectations.

    They start from mean 0 and variance 1, which with a momentum of 0.99 are felt for some
    hundreds of steps: a model that is evaluated earlier seems not to learn. With
    `debias=True` they are not felt at all: after $n$ batches,

    $$r = \frac{\sum_{i=1}^n \text{momentum}^{n - i} * \text{batch}_i}
    {\sum_{i=1}^n \text{momentum}^{n - i}},$$

    feature by feature, over the batches that had something for it.

    Take a batched array, or one example inside a `jax.vmap` that binds `axis_name`: the two
    are the same. Make a whole model and its state with one `equinox.nn.make_with_state`:
    layers that are made apart do not know their states apart.

    !!! example

        ```python
        norm, state = eqx.nn.make_with_state(en.BatchNorm)(3, axis_name="batch")
        batched = jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        y, state = batched(jax.random.normal(jax.random.key(0), (8, 3)), state)

        norm = eqx.nn.inference_mode(norm)
        y, _ = norm(jnp.ones(3), state)
        ```

    !!! warning

        Flax and this layer weight the *old* statistics with `momentum`, 0.99 by default.
        PyTorch weights the *new* ones: its `momentum=0.1` is `momentum=0.9` here.

    !!! cite

        [Batch Normalization](https://arxiv.org/abs/1502.03167), with the parameters of
        Flax's `nnx.BatchNorm`.
    """

    _axes_arguments: ClassVar[tuple[str, ...]] = ("axis",)
    _one_position: ClassVar[str] = (
        "For training give a larger batch, or leave out a last batch of one; or evaluate "
        "with `equinox.nn.inference_mode`."
    )
    _remedy: ClassVar[str] = (
        "Give a batch; or, for one example inside `jax.vmap(..., axis_name='batch')`, make "
        "the layer with `axis_name='batch'`."
    )

    state_index: StateIndex[RunningStats]
    inference: bool
    axis: tuple[int, ...] = eqx.field(static=True)
    momentum: float | None = eqx.field(static=True)
    use_unbiased_variance: bool = eqx.field(static=True, default=False, kw_only=True)
    debias: bool = eqx.field(static=True, default=False, kw_only=True)
    frozen: bool = eqx.field(default=False, kw_only=True)

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        axis: Axes = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        use_unbiased_variance: bool = False,
        debias: bool = False,
        scale_offset: float = 0.0,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `num_features`: the size of the feature axis, or a tuple with the size of each, in
            the order of `axis`.
        - `use_running_average`: whether to normalise with the running statistics and leave
            them alone. Kept in the field `inference`, which `equinox.nn.inference_mode`
            toggles.
        - `axis`: the feature axis or axes; the statistics are over all others.
        - `momentum`: the weight of the old running statistics, from 0 to 1; `None` for the
            average over all batches so far. Each call in training is a step of its own:
            where the gradients of `k` calls are accumulated to one step of the optimizer,
            `momentum ** (1 / k)` makes `k` calls forget as much as one did.
        - `param_dtype`: of scale and bias. The running statistics are at least float32.
            Complex input needs a complex one, for the running mean.
        - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap`
            or `jax.shard_map` that the statistics are taken over too. Without it each
            example of a `vmap` has statistics of its own, and JAX refuses `out_axes=None`
            for the state: [Troubleshooting](../troubleshooting.md).
        - `axis_index_groups`: as in [`eqx_norms.LayerNorm`][]. The running statistics take
            the average over the groups, weighted by what each counted.
        - `use_unbiased_variance`: whether the running variance is of the sample, divided
            by one less than the positions counted, as in PyTorch. The batch itself is
            normalised with the biased one either way.
        - `debias`: whether the running statistics are those of the batches alone, from the
            first one on. Otherwise they are those of Flax, step by step. It changes nothing
            for `momentum=None`; for `momentum=1` it is the same as `None`.
        - `epsilon`, `dtype`, `use_bias`, `use_scale`, `bias_init`, `scale_init`,
            `use_fast_variance`, `scale_offset`, `key`: as in [`eqx_norms.LayerNorm`][].

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        check = self._check
        self.axis = check.axes(axis, "axis")
        self.momentum = check.momentum(momentum)
        shape = self._set_common(
            num_features,
            self.axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            scale_offset=scale_offset,
            key=key,
        )
        self.state_index = init_stats(shape, param_dtype)
        self.inference = check.flag(use_running_average, "use_running_average")
        self.frozen = False
        self.use_unbiased_variance = check.flag(
            use_unbiased_variance, "use_unbiased_variance"
        )
        self.debias = check.flag(debias, "debias")

    @needs_state
    @jax.named_scope("eqx_norms.BatchNorm")
    def __call__(
        self,
        x: Shaped[AnyArray, "*shape"],
        state: State,
        *,
        use_running_average: bool | None = None,
        mask: Bool[AnyArray, "..."] | None = None,
        scale: Inexact[AnyArray, "..."] | None = None,
        bias: Inexact[AnyArray, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Inexact[Array, "*shape"], State]:
        """**Arguments:**

        - `x`: an array of any rank.
        - `state`: the model's `equinox.nn.State`, which holds the running statistics.
        - `use_running_average`: if given, takes the place of the field `inference`.
        - `mask`, `scale`, `bias`, `key`: as in [`eqx_norms.LayerNorm.__call__`][].

        **Returns:**

        A pair of an array of the shape of `x`, and the state, updated in training.

        **Raises:**

        `ValueError` if an argument does not fit the layer or `x`; in training, if there is
        nothing to average over or one position alone, or if the running statistics are
        narrower than float32. In training, `NameError` if `axis_name` is bound nowhere.
        """
        del key
        check = self._check
        running = get_stats(
            state, self.state_index, self._features(), self.axis, check=check
        )
        evaluates = self._evaluates(use_running_average)
        settings, inputs = self._prepare(
            x,
            mask,
            scale,
            bias,
            running.mean.shape,
            given=Statistics(running.mean, None, running.var) if evaluates else None,
            # What is pooled over a data set may have a batch of one at its end.
            allow_one_position=mask is not None or isinstance(running, PooledStats),
        )
        if evaluates:
            warn_if_new(running, check=check)
            return compute(settings, inputs), state

        check_precision(running, check=check)
        if jnp.iscomplexobj(inputs.x) and not jnp.iscomplexobj(running.mean):
            raise check.error(
                f"the running mean, of dtype {running.mean.dtype}, cannot hold that of "
                f"complex input of dtype {inputs.x.dtype}. Give the layer a complex "
                "`param_dtype`."
            )
        y, batch = compute_both(settings, inputs)
        step = Step(
            feature_axes=settings.feature_axes,
            size=settings.reduction.size(inputs.x.shape) * inputs.members.size,
            grouped=self.axis_index_groups is not None,
            momentum=self.momentum,
            unbiased=self.use_unbiased_variance,
            debias=self.debias,
        )
        if isinstance(running, PooledStats):
            new = pool(step, running, batch)
        else:
            new = update(step, running, batch)
        return y, set_state(state, self.state_index, new)

    def _evaluates(self, use_running_average: bool | None) -> bool:
        check = self._check
        if check.flag(self.frozen, "frozen"):
            return True
        if use_running_average is None:
            return check.flag(self.inference, "inference")
        return check.flag(use_running_average, "use_running_average")

    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        return Reduction(other_axes(feature_axes, len(shape)), example_axis=0)

    def running_stats(self, state: State) -> RunningStats:
        """The running statistics that `state` holds for this layer."""
        return get_state(state, self.state_index, check=self._check)
