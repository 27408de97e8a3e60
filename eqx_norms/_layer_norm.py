import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import PRNGKeyArray

from ._layer import AbstractAxesNorm
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer


class LayerNorm(AbstractAxesNorm):
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
            the order of `feature_axes`. Where features are split over `axis_name`: how many
            this member has inside `jax.vmap`; how many there are in all inside
            `jax.shard_map`, whose specifications split scale and bias.
        - `epsilon`: added to the variance. Not negative. If it is zero, and the variance is
            no larger than what rounding can cause, the normalised values are zeros, and the
            result is the bias.
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
        - `use_fast_variance`: whether the variance may be computed about the mean of a few
            entries of `x`, not about that of all. This reads `x` once less. The result is
            as exact, but for outliers: where these entries are $k$ deviations away from the
            mean, the variance loses about $k^2$ roundings.
            [How it works](../how-it-works.md#the-shift) says which entries they are.
        - `scale_offset`: added to the scale, the layer's or that of the call, in the
            precision of the statistics. Without a scale it has no effect.
        - `key`: a `jax.random` key for the initializers, if they need one.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        self._set_axes(feature_axes, reduction_axes)
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
