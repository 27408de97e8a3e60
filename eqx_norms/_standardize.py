from jaxtyping import Array, Bool, Inexact, Shaped

from ._checks import (
    as_array,
    canonicalize_axes,
    check_axes,
    check_epsilon,
    check_flag,
    check_groups,
    check_inputs,
    check_mask_axes,
    check_names,
    check_reduction,
    check_result_dtype,
    check_scale_offset,
)
from ._collectives import bound_members
from ._names import answers_names
from ._normalize import normalize
from ._statistics import Reduction, Settings
from ._types import AnyArray, Axes, AxisIndexGroups, AxisName, DTypeLike


@answers_names
def standardize(
    x: Shaped[AnyArray, "*shape"],
    axes: Axes = -1,
    *,
    mask: Bool[AnyArray, "..."] | None = None,
    scale: Inexact[AnyArray, "..."] | None = None,
    bias: Inexact[AnyArray, "..."] | None = None,
    scale_offset: float = 0.0,
    epsilon: float = 1e-6,
    subtract_mean: bool = True,
    use_fast_variance: bool = True,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    dtype: DTypeLike | None = None,
) -> Inexact[Array, "*shape"]:
    r"""Normalises an array by its mean and variance over some of its axes.

    This is the function that the layers are made of: for layers of your own, query-key
    norms and adaptive norms.

    $$y = \frac{x - \mathbb{E}[x]}{\sqrt{\text{Var}[x] + \varepsilon}} * \gamma + \beta$$

    !!! example

        ```python
        # A query-key norm: each head by itself, without subtracting the mean.
        q = jnp.ones((2, 5, 4, 16))
        q = en.standardize(q, subtract_mean=False, scale=jnp.ones(16))

        # An adaptive norm, whose scale is predicted around one.
        x, scale, bias = jnp.ones((2, 5, 16)), jnp.zeros((2, 1, 16)), jnp.zeros((2, 1, 16))
        y = en.standardize(x, scale=scale, scale_offset=1.0, bias=bias)
        ```

    **Arguments:**

    - `x`: an array of any rank.
    - `axes`: the axes that mean and variance are taken over; `()` for named axes alone.
    - `mask`: boolean, broadcastable to `x`: `mask[..., None]` if it has no axis of
        features. Where it is `False`, `x` does not count for mean and variance, whatever it
        holds. It is normalised all the same; what is not finite there counts as zero. Where
        nothing counts, the bias comes out.
    - `scale`, `bias`: $\gamma$ and $\beta$, each broadcastable to `x`.
    - `scale_offset`: added to `scale` in the precision of the statistics; without a `scale`
        it has no effect.
    - `epsilon`: $\varepsilon$, added to the variance. Not negative. If it is zero, and the
        variance is no larger than what the rounding of the mean can cause, the normalised
        values are zeros, and the result is the bias.
    - `subtract_mean`: whether to subtract the mean. If `False`, the variance is the mean
        square: a root mean square norm.
    - `use_fast_variance`: whether to compute the variance from `x - shift` in place of
        `x - mean`, as described at [`eqx_norms.LayerNorm`][].
    - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap` or
        `jax.shard_map`: mean and variance are taken over these too.
    - `axis_index_groups`: lists of indices along the axis `axis_name`, which must be one
        name. The lists have one length, and each index is in exactly one of them. Each list
        is a group, with statistics of its own.
    - `dtype`: the dtype of the result. By default what `x`, `scale` and `bias` promote to,
        float32 if these are all integers or booleans; for `"input"` that of `x`, float32 if
        it is an integer or a boolean.

    **Returns:**

    An array of the shape of `x`.

    **Raises:**

    `ValueError` if an argument is not as described or does not fit `x`, or if there is
    nothing to take statistics over; `NameError` if `axis_name` is bound nowhere.
    """
    name = "standardize"
    names = check_names(axis_name, layer=name)
    groups = check_groups(axis_index_groups, names, layer=name)
    result = check_result_dtype(dtype, layer=name)
    x = as_array(x, layer=name, argument="x")
    inputs, dtype = check_inputs(
        x, mask, (None, scale), (None, bias), feature_axes=(), dtype=result, layer=name
    )
    axes = check_axes(axes, layer=name, argument="axes")
    reduction = Reduction(canonicalize_axes(axes, x.ndim, layer=name, argument="axes"))
    check_mask_axes(inputs.mask, x.shape, reduction, layer=name)
    remedy = "Name one in `axes`, or an `axis_name`."
    check_reduction(reduction, names, x.shape, layer=name, remedy=remedy)
    settings = Settings(
        reduction,
        feature_axes=(),
        dtype=dtype,
        epsilon=check_epsilon(epsilon, layer=name),
        scale_offset=check_scale_offset(scale_offset, layer=name),
        subtract_mean=check_flag(subtract_mean, layer=name, argument="subtract_mean"),
        use_fast_variance=check_flag(
            use_fast_variance, layer=name, argument="use_fast_variance"
        ),
    )
    members = bound_members(names, groups, x, layer=name)
    return normalize(settings, inputs._replace(members=members))[0]
