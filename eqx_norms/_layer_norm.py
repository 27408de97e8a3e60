from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import PRNGKeyArray

from ._checks import canonicalize_axes, check_axes, check_reduction_axes
from ._layer import AbstractExampleNorm
from ._statistics import Reduction
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer, Shape


class LayerNorm(AbstractExampleNorm):
    r"""Normalises each example by the mean and the variance of its own features.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \gamma + \beta$$

    The expectations are over `reduction_axes`, for every position along the other axes by
    itself; the scale $\gamma$ and the bias $\beta$ have one entry for each position along
    `feature_axes`. With `axis_name` the expectations are over that named axis as well, for
    features that are split over it.

    `x` may be a batched array, whose leading axes are left alone, or one example inside
    `jax.vmap`. Both give the same result. One feature alone is its own mean: then the
    result is the bias.

    !!! example

        ```python
        norm = en.LayerNorm(16)
        y = norm(jnp.ones((4, 16)))
        ```

    !!! cite

        [Layer Normalization](https://arxiv.org/abs/1607.06450), with the parameters of
        Flax's `nnx.LayerNorm`.
    """

    _arguments: ClassVar[tuple[str, ...]] = ("feature_axes", "reduction_axes")

    reduction_axes: tuple[int, ...] = eqx.field(static=True)
    feature_axes: tuple[int, ...] = eqx.field(static=True)

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
        reduction_axes: Axes | None = None,
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
        - `epsilon`: added to the variance. Not negative. If it is zero, and the variance is
            no larger than what the rounding of the mean can cause, the normalised values
            are zeros, and the result is the bias.
        - `dtype`: the dtype of the result. By default what `x`, scale and bias promote to,
            float32 if these are all integers or booleans; for `"input"` that of `x`,
            float32 if it is an integer or a boolean.
        - `param_dtype`: of scale and bias.
        - `use_bias`, `use_scale`: whether there is a bias, a scale.
        - `bias_init`, `scale_init`: functions `(key, shape, dtype) -> array` that make
            them, as in `jax.nn.initializers`.
        - `reduction_axes`: the axes that mean and variance are taken over: the last, by
            default. Needed with `feature_axes` other than the last.
        - `feature_axes`: the axes along which scale and bias vary. They need not be among
            the `reduction_axes`.
        - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap`
            or `jax.shard_map`: mean and variance are taken over these too.
        - `axis_index_groups`: lists of indices along the axis `axis_name`, which must be
            one name. The lists have one length, and each index is in exactly one of them.
            Each list is a group, with statistics of its own.
        - `use_fast_variance`: whether to compute the variance from `x - shift` in place of
            `x - mean`, which reads `x` once less. The shift is the mean of a few entries of
            `x`. Along the last axis, if it is reduced, these are eight entries from the
            middle on; along any other reduced axis it is the middle entry, but along axis 0
            of a batch for [`eqx_norms.BatchNorm`][] the first. The layer uses `x - mean` in
            spite of this setting if there is a `mask`; if the type of `x` says that a
            reduced axis is split over devices; and if the statistics are over the last axis
            alone, are not differentiated, and no mesh axis is in `axis_name`. Of float32
            data of mean $m$ and deviation 1, the result is off by at most
            $3 \\cdot 10^{-7} m + 2 \\cdot 10^{-5}$; the rounding of the data itself makes
            $6 \\cdot 10^{-8} m$ of that. A shift that is $k$ deviations away from the mean
            costs the variance about $k^2$ roundings.
        - `scale_offset`: added to the scale, the layer's or that of the call, in the
            precision of the statistics. Without a scale it has no effect.
        - `key`: a `jax.random` key for the initializers, if they need one.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        name = type(self).__name__
        self.feature_axes = check_axes(feature_axes, layer=name, argument="feature_axes")
        self.reduction_axes = check_reduction_axes(
            reduction_axes, self.feature_axes, layer=name
        )
        self._set_common(
            num_features,
            self.feature_axes,
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

    def _reduction(self, shape: Shape, feature_axes: tuple[int, ...]) -> Reduction:
        name, axes = type(self).__name__, self.reduction_axes
        return Reduction(
            canonicalize_axes(axes, len(shape), layer=name, argument="reduction_axes")
        )
