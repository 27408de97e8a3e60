from typing import overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State
from jax.nn.initializers import ones, zeros
from jaxtyping import Array, Bool, Inexact, PRNGKeyArray, Shaped

from ._affine import check_num_features, init_affine
from ._axes import check_axes, example_axes
from ._collectives import bound_members, canonicalize_groups, canonicalize_names
from ._dtypes import check_dtype, check_epsilon
from ._inputs import feature_sizes, prepare
from ._moments import Reduction
from ._normalize import standardize
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer


class InstanceNorm(eqx.Module):
    r"""Normalises each feature of each example by its own mean and variance.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \gamma + \beta$$

    The expectations are over all axes but `batch_axes` and `feature_axes`, usually those of
    space; the scale $\gamma$ and the bias $\beta$ have one entry for each position along
    `feature_axes`. With `axis_name` the expectations are over that named axis as well, for
    space that is split over it.

    Take a batched array, or one example inside `jax.vmap` with `batch_axes=()`: the two are
    the same.

    !!! cite

        [Instance Normalization](https://arxiv.org/abs/1607.08022), with the parameters of
        Flax's `nnx.InstanceNorm`, and `batch_axes`.
    """

    scale: Inexact[Array, "*features"] | None
    bias: Inexact[Array, "*features"] | None
    num_features: int | tuple[int, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    dtype: np.dtype | None = eqx.field(static=True)
    batch_axes: tuple[int, ...] = eqx.field(static=True)
    feature_axes: tuple[int, ...] = eqx.field(static=True)
    axis_name: tuple | None = eqx.field(static=True)
    axis_index_groups: tuple | None = eqx.field(static=True)
    use_fast_variance: bool = eqx.field(static=True)
    scale_offset: float = eqx.field(static=True)

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        batch_axes: Axes = 0,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        scale_offset: float = 0.0,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `num_features`: the size of the feature axis, or a tuple with the size of each, in
            the order of `feature_axes`.
        - `epsilon`: added to the variance. Not negative. With zero, positions without
            variance come out as zero (times scale, plus bias).
        - `dtype`: of the result. By default what the input, scale and bias promote to.
        - `param_dtype`: of scale and bias.
        - `use_bias`, `use_scale`: whether there is a bias, a scale.
        - `bias_init`, `scale_init`: functions `(key, shape, dtype) -> array` that make
            them, as in `jax.nn.initializers`.
        - `feature_axes`: the axes along which scale and bias vary.
        - `batch_axes`: the axes along which there are examples: the first, by default;
            `()` for a single example, as inside `jax.vmap`.
        - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap`
            or `jax.shard_map`: mean and variance are taken over these too.
        - `axis_index_groups`: a list of lists of indices along the one `axis_name`, of
            equal size and together all of them: each group has statistics of its own.
        - `use_fast_variance`: how the data is shifted before it is squared. If `True`, by
            a value seen in it (the median of the first, middle and last position), so
            that it is read once; the variance is good to about
            $1 + (\\text{shift} - \\text{mean})^2 / \\text{Var}$ roundings. Over devices
            the shift in common is zero, so that each of them communicates once. If `False`,
            by the mean, always exact, for one more reading and one more communication. With
            a `mask`, or under `jax.vmap` with `axis_name`, the data of one device is
            always shifted by its mean.
        - `scale_offset`: added to the scale, in the precision of the statistics.
        - `key`: a `jax.random` key for the initializers, if they need one.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        name = type(self).__name__
        self.feature_axes = check_axes(feature_axes, layer=name, argument="feature_axes")
        shape = check_num_features(num_features, self.feature_axes, layer=name)
        self.scale, self.bias = init_affine(
            shape,
            param_dtype,
            key,
            scale_init=scale_init if use_scale else None,
            bias_init=bias_init if use_bias else None,
            layer=name,
        )
        self.num_features = num_features
        self.epsilon = check_epsilon(epsilon, layer=name)
        self.dtype = (
            None if dtype is None else check_dtype(dtype, layer=name, argument="dtype")
        )
        self.batch_axes = check_axes(batch_axes, layer=name, argument="batch_axes")
        self.axis_name = canonicalize_names(axis_name)
        self.axis_index_groups = canonicalize_groups(
            axis_index_groups, self.axis_name, layer=name
        )
        self.use_fast_variance = use_fast_variance
        self.scale_offset = scale_offset

    @overload
    def __call__(
        self,
        x: Array,
        state: None = None,
        *,
        mask: Array | None = None,
        scale: Array | None = None,
        bias: Array | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: Array,
        state: State,
        *,
        mask: Array | None = None,
        scale: Array | None = None,
        bias: Array | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, State]: ...

    @jax.named_scope("eqx_norms.InstanceNorm")
    def __call__(
        self,
        x: Shaped[Array, "*shape"],
        state: State | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        scale: Inexact[Array, "..."] | None = None,
        bias: Inexact[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Inexact[Array, "*shape"] | tuple[Inexact[Array, "*shape"], State]:
        """**Arguments:**

        - `x`: an array of any rank.
        - `state`: anything, returned as it is, so that the layer can stand where a
            [`eqx_norms.BatchNorm`][] stood.
        - `mask`: boolean, broadcastable to `x`. Where it is `False`, `x` does not count for
            mean and variance, whatever it holds. It is normalised all the same; what is not
            finite there counts as zero.
        - `scale`, `bias`: added to the layer's own, if it has any, for this call. Of the
            feature shape, or broadcastable to `x`.
        - `key`: ignored; every layer of Equinox takes one.

        **Returns:**

        An array of the shape of `x`; with `state`, a pair of it and `state`.

        **Raises:**

        `ValueError` if an argument does not fit the layer or `x`, `NameError` if
        `axis_name` is bound nowhere.
        """
        del key
        name = type(self).__name__
        inputs = prepare(
            x,
            mask,
            scale=(self.scale, scale),
            bias=(self.bias, bias),
            scale_offset=self.scale_offset,
            dtype=self.dtype,
            features=feature_sizes(
                self.num_features, self.scale, self.bias, self.axis_name
            ),
            feature_axes=self.feature_axes,
            argument="feature_axes",
            layer=name,
        )
        axes = example_axes(self.batch_axes, inputs.feature_axes, inputs.x.ndim, layer=name)
        if not axes and self.axis_name is None:
            raise ValueError(
                f"{name}: an input of shape {inputs.x.shape} with batch axes "
                f"{self.batch_axes} and feature axes {inputs.feature_axes} has no axis "
                "left to take statistics over. For a single example use `batch_axes=()`."
            )
        y, _ = standardize(
            inputs,
            Reduction(axes, inputs.compute_dtype),
            bound_members(self.axis_name, self.axis_index_groups, layer=name),
            epsilon=self.epsilon,
            fast=self.use_fast_variance,
        )
        return y if state is None else (y, state)
