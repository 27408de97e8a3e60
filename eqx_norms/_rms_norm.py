from typing import overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State
from jax.nn.initializers import ones
from jaxtyping import Array, Bool, Inexact, PRNGKeyArray, Shaped

from ._affine import check_num_features, init_affine
from ._axes import canonicalize_axes, check_axes
from ._collectives import bound_members, canonicalize_groups, canonicalize_names
from ._dtypes import check_dtype, check_epsilon
from ._inputs import feature_sizes, prepare
from ._moments import Reduction
from ._normalize import standardize
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer


class RMSNorm(eqx.Module):
    r"""Divides each example by the root mean square of its own features.

    $$y = \frac{x}{\sqrt{\mathbb{E}[|x|^2] + \varepsilon}} * \gamma$$

    The expectation is over `reduction_axes`, for every position along the other axes by
    itself; the scale $\gamma$ has one entry for each position along `feature_axes`. With
    `axis_name` the expectation is over that named axis as well, for features that are split
    over it.

    Take a batched array, whose leading axes are left alone, or one example inside
    `jax.vmap`: the two are the same.

    !!! cite

        [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), with the
        parameters of Flax's `nnx.RMSNorm`.
    """

    scale: Inexact[Array, "*features"] | None
    num_features: int | tuple[int, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    dtype: np.dtype | None = eqx.field(static=True)
    reduction_axes: tuple[int, ...] = eqx.field(static=True)
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
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        scale_offset: float = 0.0,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `num_features`: the size of the feature axis, or a tuple with the size of each, in
            the order of `feature_axes`.
        - `epsilon`: added to the mean square. Not negative. With zero, positions that are
            zero come out as zero.
        - `dtype`: of the result. By default what the input and the scale promote to.
        - `param_dtype`: of the scale.
        - `use_scale`: whether there is a scale.
        - `scale_init`: a function `(key, shape, dtype) -> array` that makes it, as in
            `jax.nn.initializers`.
        - `reduction_axes`: the axes that the mean square is taken over.
        - `feature_axes`: the axes along which the scale varies. They need not be among
            the `reduction_axes`.
        - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap`
            or `jax.shard_map`: the mean square is taken over these too.
        - `axis_index_groups`: a list of lists of indices along the one `axis_name`, of
            equal size and together all of them: each group has a mean square of its own.
        - `use_fast_variance`: for the sake of Flax's interface. There is no mean to
            subtract, so the data is read once, and exactly, either way.
        - `scale_offset`: added to the scale, in the precision of the statistics.
        - `key`: a `jax.random` key for the initializers, if they need one.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        name = type(self).__name__
        self.feature_axes = check_axes(feature_axes, layer=name, argument="feature_axes")
        shape = check_num_features(num_features, self.feature_axes, layer=name)
        self.scale, _ = init_affine(
            shape,
            param_dtype,
            key,
            scale_init=scale_init if use_scale else None,
            bias_init=None,
            layer=name,
        )
        self.num_features = num_features
        self.epsilon = check_epsilon(epsilon, layer=name)
        self.dtype = (
            None if dtype is None else check_dtype(dtype, layer=name, argument="dtype")
        )
        self.reduction_axes = check_axes(
            reduction_axes, layer=name, argument="reduction_axes"
        )
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

    @jax.named_scope("eqx_norms.RMSNorm")
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
            the mean square, whatever it holds. It is normalised all the same; what is not
            finite there counts as zero.
        - `scale`: added to the layer's own, if it has one, for this call. Of the feature
            shape, or broadcastable to `x`.
        - `bias`: added to the result, likewise.
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
            bias=(None, bias),
            scale_offset=self.scale_offset,
            dtype=self.dtype,
            features=feature_sizes(self.num_features, self.scale, None, self.axis_name),
            feature_axes=self.feature_axes,
            argument="feature_axes",
            layer=name,
        )
        axes = canonicalize_axes(
            self.reduction_axes, inputs.x.ndim, layer=name, argument="reduction_axes"
        )
        y, _ = standardize(
            inputs,
            Reduction(axes, inputs.compute_dtype),
            bound_members(self.axis_name, self.axis_index_groups, layer=name),
            epsilon=self.epsilon,
            center=False,
            fast=self.use_fast_variance,
        )
        return y if state is None else (y, state)
