r"""`(x - mean) / sqrt(var + epsilon) * scale + bias`, and its derivatives.

With `mean = shift + offset`, and E the mean over what counts, of all members:

    c = (x - shift) - offset
    inv = 1 / sqrt(var + epsilon)
    z = c * inv
    y = z * scale + bias

The derivative `dy`, for tangents `dx`, `dscale` and `dbias`; the shift is a constant:

    dmean = E[dx]                    zero if no mean is subtracted
    dc = dx - dmean
    dvar = 2 E[Re(conj(c) * dx)]     without dmean, since E[c] = 0
    dinv = -dvar / 2 * inv^3
    dz = dc * inv + c * dinv
       = dx * inv + m + c * dinv,    m = -dmean * inv
    dy = dz * scale + z * dscale + dbias

If statistics are given, `dmean` and `dvar` are their tangents. `m` and `dinv` have the
shape of a statistic, and are formed first. If `inv * scale` has the shape of `inv`, laid
out against `x`, so do all factors of `dx` and `c`:

    dy = dx * (inv * scale) + c * (inv * dscale + dinv * scale) + (dbias + m * scale)

The tangent is a linear function of all of these tangents. It computes the rest anew
from `x`, the mask, the scale and the statistics; `jax.checkpoint` keeps these alone for the
backward pass (and the member's index along named axes). JAX transposes the function when
the time comes. That gives reverse mode; `jax.custom_vjp` would rule out forward mode.
"""

import functools
import operator
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Inexact, Shaped

from ._axes import feature_shape, other_axes, to_input_order, to_rank
from ._checks import Check
from ._collectives import ALONE, bound_members
from ._dtypes import ResultDType, cast, real_dtype
from ._names import answers_names
from ._statistics import (
    Inputs,
    Reduction,
    Settings,
    Statistics,
    counted,
    means,
    real_product,
    spread,
    statistics,
)
from ._types import AnyArray, Axes, AxisIndexGroups, AxisName, DTypeLike, Groups, Names


def _inverse(settings: Settings, stats: Statistics, dtype: np.dtype) -> Array:
    """Returns `inv`, with the shape of a statistic. It is zero where nothing was counted;
    and, without epsilon, where rounding explains the variance. `dtype` is what is computed
    in: given statistics may be of another one."""
    v = stats.var.astype(real_dtype(dtype)) + settings.epsilon
    limits = jnp.finfo(v.dtype)
    if settings.epsilon > limits.tiny:
        inv = jax.lax.rsqrt(v)
    else:
        # A deviation that rounding explains counts as zero: one rounding of a mean that is
        # given; of one that was computed 8, and no more than an eighth of the offset, which
        # is what the sums of equal values leave.
        explained = jnp.zeros_like(v)
        if stats.shift is not None:
            explained = float(limits.eps) * jnp.abs(stats.shift).astype(v.dtype)
        if stats.offset is not None:
            explained = jnp.minimum(8 * explained, jnp.abs(stats.offset) / 8)
        varies = v > limits.tiny + explained**2
        inv = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, v, 1)), 0)
    return inv if stats.positions is None else jnp.where(stats.positions > 0, inv, 0)


def _deviation(
    settings: Settings, inputs: Inputs, stats: Statistics
) -> tuple[Array, Array, Array | None]:
    """Returns `c = (x - shift) - offset`, `inv` laid out against it and, with a mask, a
    boolean array `valid`: `False` where the mask excludes a position and `c * inv` would
    not be finite. There `c` is computed from zero in the place of `x`."""
    x = inputs.x.astype(settings.wide(inputs.x))
    inv = spread(settings, inputs, _inverse(settings, stats, x.dtype))
    parts = (part for part in (stats.shift, stats.offset) if part is not None)
    mean = [spread(settings, inputs, part) for part in parts]
    c = functools.reduce(operator.sub, mean, x)
    if inputs.mask is None:
        return c, inv, None
    valid = inputs.mask | jnp.isfinite(c * inv)
    return functools.reduce(operator.sub, mean, jnp.where(valid, x, 0)), inv, valid


def _total(terms: tuple[Array | None, ...], dtype: np.dtype, added: float = 0.0) -> Any:
    """The sum of the terms that are not `None`, and of `added`; `None` if there are no
    terms."""
    # Where terms broadcast, the sum has more entries than they have. So the backward pass
    # keeps the terms, and computes the sum anew.
    present = [term.astype(dtype) for term in terms if term is not None]
    total = functools.reduce(operator.add, present) if present else None
    return total if total is None or added == 0 else total + added


def _keeps_shape(scale: Array | None, inv: Array) -> bool:
    """Whether `inv * scale` has the shape of `inv`."""
    return scale is None or all(
        n in (1, m) for n, m in zip(scale.shape, inv.shape, strict=True)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _formula(settings: Settings, inputs: Inputs) -> tuple[Array, Statistics]:
    """The result, and the statistics that `x` was normalised with."""
    wide = settings.wide(inputs.x)
    stats = statistics(settings, inputs) if inputs.given is None else inputs.given
    c, inv, _ = _deviation(settings, inputs, stats)
    scale = _total(inputs.scale, wide, settings.scale_offset)
    bias = _total(inputs.bias, wide)
    if _keeps_shape(scale, inv):
        y = c * (inv if scale is None else inv * scale)
    else:
        y = c * inv * scale
    return (y if bias is None else y + bias).astype(settings.dtype), stats


def _tangent(
    settings: Settings, kept: Inputs, stats: Statistics, tangents: Any
) -> tuple[Array, Statistics]:
    """The derivative of `_formula`, for the `tangents` of `Inputs`; that of `x` is `None`
    where it is zero."""
    wide = settings.wide(kept.x)
    # Behind the barrier XLA does not see that the statistics are those of the forward pass:
    # so it computes `c` and `z` anew, and does not keep them in the place of `x`. Without
    # any barrier, unrolled blocks with RMSNorm took 9 percent more memory, and a vision
    # transformer in float32 read and wrote 2 percent more. With a barrier around `x` and
    # the cotangent too, as `prevent_cse=True` has it, XLA writes an `x` to memory that it
    # would compute anew from what comes before: a U-Net read and wrote 7 percent more and
    # took 9 percent more memory. (Compiled for an H200: `tests/benchmarks/models.py`,
    # `compiled.py`. For a TPU v5e unrolled blocks are 4 to 6 percent faster so.)
    stats = jax.lax.optimization_barrier(stats)
    c, inv, valid = _deviation(settings, kept, stats)
    scale = _total(kept.scale, wide, settings.scale_offset)
    dscale, dbias = (_total(t, wide) for t in (tangents.scale, tangents.bias))

    dx, m, dinv = 0, 0, 0
    dstats = jax.tree.map(jnp.zeros_like, stats)
    if tangents.given is not None:
        dstats = jax.tree.map(jnp.add, dstats, tangents.given)
    elif tangents.x is not None:
        t = counted(kept.mask, tangents.x.astype(wide))
        products = real_product(c, t)
        values = (t, products) if settings.subtract_mean else (products,)
        averages, _ = means(settings, kept, *values, positions=stats.positions)
        dmean, half = averages if settings.subtract_mean else (None, *averages)
        # All of the mean's change is the offset's, since the shift is a constant.
        dstats = dstats._replace(offset=dmean, var=2 * half)
    if tangents.x is not None:
        dx = counted(valid, tangents.x.astype(wide))
    if tangents.given is not None or tangents.x is not None:
        inverse = _inverse(settings, stats, wide)
        if dstats.mean is not None:
            m = spread(settings, kept, -cast(dstats.mean, wide) * inverse.astype(wide))
        dinv = -dstats.var.astype(inverse.dtype) / 2 * inverse * inverse * inverse
        # Where the variance overflows, its derivative does too.
        dinv = spread(settings, kept, jnp.where(inverse > 0, dinv, 0))

    dscale, dbias = (0 if t is None else t for t in (dscale, dbias))
    if _keeps_shape(scale, inv):
        scale = 1 if scale is None else scale
        dy = dx * (inv * scale) + c * (inv * dscale + dinv * scale) + (dbias + m * scale)
    else:
        dy = (dx * inv + m + c * dinv) * scale + c * inv * dscale + dbias
    return jnp.broadcast_to(dy, c.shape).astype(settings.dtype), dstats


def _rule(settings, primals, tangents):
    (inputs,), (tangents,) = primals, tangents
    # The statistics are kept for the backward pass, so they are outputs. For rows the shift
    # is then the mean of a few entries, and `y` differs by roundings from that of a call
    # without derivative; by more of them if these few are outliers.
    y, stats = _formula(settings._replace(returns_statistics=True), inputs)
    x = None if isinstance(tangents.x, SymbolicZero) else tangents.x
    # A scalar stands for any other tangent that is zero: it takes no memory.
    others = jax.tree.map(
        lambda t: jnp.zeros((), t.dtype) if isinstance(t, SymbolicZero) else t,  # pyright: ignore
        tangents._replace(x=None, mask=None, members=None),
    )
    kept = inputs._replace(bias=(), given=None)
    tangent = functools.partial(_tangent, settings)
    linear = jax.checkpoint(tangent, prevent_cse=False)
    return (y, stats), linear(kept, stats, others._replace(x=x))


_formula.defjvp(_rule, symbolic_zeros=True)


def _lay_out(inputs: Inputs, feature_axes: tuple[int, ...]) -> Inputs:
    """Mask, scale and bias, laid out so that they broadcast to `x` axis by axis, and given
    statistics in the order of the input's axes."""
    x = inputs.x

    def along_features(array):
        if array.shape != feature_shape(x.shape, feature_axes):
            return to_rank(array, x.ndim)
        array = to_input_order(array, feature_axes)
        return jnp.expand_dims(array, other_axes(feature_axes, x.ndim))

    given = inputs.given
    if feature_axes:
        given = jax.tree.map(lambda array: to_input_order(array, feature_axes), given)
    return inputs._replace(
        mask=None if inputs.mask is None else to_rank(inputs.mask, x.ndim),
        scale=jax.tree.map(along_features, inputs.scale),
        bias=jax.tree.map(along_features, inputs.bias),
        given=given,
    )


@functools.partial(jax.jit, static_argnums=0)
def compute(settings: Settings, inputs: Inputs) -> Array:
    """Normalises with the statistics of `x`, or with those given.

    The mask broadcasts to `x`. So do scale and bias, unless they have the feature shape:
    then they lie along the feature axes. Given statistics have the feature shape; without
    feature axes, that of a statistic. All of it is one `jax.jit`: a call outside of
    `jax.jit` is one dispatch, and layers that are alike are traced once.
    """
    return _formula(settings, _lay_out(inputs, settings.feature_axes))[0]


@functools.partial(jax.jit, static_argnums=0)
def compute_both(settings: Settings, inputs: Inputs) -> tuple[Array, Statistics]:
    """The same, and the statistics."""
    settings = settings._replace(returns_statistics=True)
    return _formula(settings, _lay_out(inputs, settings.feature_axes))


@functools.partial(jax.jit, static_argnums=0)
def _only_statistics(settings: Settings, inputs: Inputs) -> Statistics:
    # Compilers leave out what nobody reads.
    return compute_both(settings, inputs)[1]


def prepare(
    x: Array,
    reduction: Reduction,
    *,
    check: Check,
    mask: Any,
    scale: tuple[Any, ...] = (None,),
    bias: tuple[Any, ...] = (None,),
    feature_axes: tuple[int, ...] = (),
    given: Statistics | None = None,
    dtype: ResultDType,
    epsilon: float,
    scale_offset: float = 0.0,
    subtract_mean: bool = True,
    use_fast_variance: bool = True,
    names: Names | None,
    groups: Groups | None,
    remedy: str,
    one_position: str = "",
) -> tuple[Settings, Inputs]:
    """Checks the arrays of a call. Returns what `compute` takes.

    The last scale and the last bias are those of the call; one before them is the layer's
    own. Errors end with `remedy` if there is nothing to take statistics over, and with
    `one_position` if each would be of one position; empty, it allows that.
    """
    (mask,) = check.arrays("mask", mask)
    reduced = reduction.all_axes
    check.mask(mask, x, reduced, feature_axes)
    scale, bias = check.arrays("scale", *scale), check.arrays("bias", *bias)
    features = feature_shape(x.shape, feature_axes)
    for argument, term in (("scale", scale[-1]), ("bias", bias[-1])):
        if term is not None and term.shape != features:
            check.broadcasts(term, x, argument)
    members = ALONE
    if given is None:
        if not reduced and names is None:
            raise check.error(
                f"no axis left to take statistics over in an input of shape {x.shape}. "
                f"{remedy}"
            )
        members = bound_members(names, groups, x, check=check)
        if one_position and reduction.size(x.shape) * members.size == 1:
            raise check.error(
                "needs more than one position for each mean and variance, got an input of "
                f"shape {x.shape}, where each is of one: the result would be the bias, "
                f"whatever the input. {one_position}"
            )
    settings = Settings(
        reduction,
        feature_axes,
        check.dtype_of(dtype, x, *scale, *bias),
        epsilon,
        scale_offset,
        subtract_mean,
        use_fast_variance,
    )
    return settings, Inputs(x, mask, scale, bias, given, members)


class Moments(NamedTuple):
    """The mean and the variance of an array over some of its axes, which have size 1 here,
    so that each field broadcasts to the array.

    - `mean`: float32 or wider; zero where no mean is subtracted.
    - `var`: real; the mean square where no mean is subtracted. Zero where nothing counts.
    - `positions`: how many positions were counted for each.
    """

    mean: Inexact[Array, "..."]
    var: Float[Array, "..."]
    positions: Float[Array, "..."]


def _as_moments(settings: Settings, inputs: Inputs, found: Statistics) -> Moments:
    x, members, reduction = inputs.x, inputs.members, settings.reduction
    own = jax.tree.map(members.own_group, found)
    mean, positions = own.mean, own.positions
    if mean is None:
        mean = jnp.zeros_like(own.var, settings.wide(x))
    if positions is None:
        positions = jnp.full_like(own.var, reduction.size(x.shape) * members.size)
    return Moments(*(reduction.spread(part, x) for part in (mean, own.var, positions)))


def _given(
    mean: Any, var: Any, x: Array, axes: tuple[int, ...], check: Check
) -> Statistics | None:
    """Moments that a caller gives, as `compute` takes them."""
    if mean is None and var is None:
        return None
    if mean is None or var is None:
        missing, remedy = ("mean", "zeros") if mean is None else ("var", "ones")
        raise check.error(
            f"`mean` and `var` go together, got no `{missing}`. Give both, or neither to "
            f"have them computed. To do without `{missing}`, give {remedy}."
        )
    parts = []
    for argument, value in (("mean", mean), ("var", var)):
        part = check.array(value, argument)
        check.broadcasts(part, x, argument)
        part = to_rank(part, x.ndim)
        if any(part.shape[axis] != 1 for axis in axes):
            raise check.error(
                f"`{argument}` of shape {part.shape} must have size 1 along the axes "
                f"{axes} of the input, of shape {x.shape}, which it is over. Give one like "
                f"`jnp.{argument}(x, {axes}, keepdims=True)`."
            )
        if jnp.iscomplexobj(part) and (argument == "var" or not jnp.iscomplexobj(x)):
            raise check.error(
                f"`{argument}` must be real here, got dtype {part.dtype}. Give "
                f"`{argument}.real`."
            )
        if not jnp.issubdtype(part.dtype, jnp.inexact):
            part = part.astype(jnp.float32)
        parts.append(jnp.squeeze(part, axes))
    return Statistics(parts[0], None, parts[1])


def _prepare_function(
    check: Check,
    x: Any,
    axes: Axes,
    axis_name: AxisName,
    axis_index_groups: AxisIndexGroups,
    mean: Any = None,
    var: Any = None,
    **others: Any,
) -> tuple[Settings, Inputs]:
    """Checks the arguments of a public function, then prepares as `prepare` does."""
    x = check.array(x, "x")
    axes = check.axes_in(x.ndim, check.axes(axes, "axes"), "axes")
    names = check.names(axis_name)
    return prepare(
        x,
        Reduction(axes),
        check=check,
        given=_given(mean, var, x, axes, check),
        names=names,
        groups=check.groups(axis_index_groups, names),
        remedy="Name one in `axes`, or an `axis_name`.",
        **others,
    )


@overload
def standardize(
    x: AnyArray,
    axes: Axes = -1,
    *,
    mean: AnyArray | None = None,
    var: AnyArray | None = None,
    mask: AnyArray | None = None,
    scale: AnyArray | None = None,
    bias: AnyArray | None = None,
    scale_offset: float = 0.0,
    epsilon: float = 1e-6,
    subtract_mean: bool = True,
    use_fast_variance: bool = True,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    dtype: DTypeLike | None = None,
    return_moments: Literal[False] = False,
) -> Array: ...


@overload
def standardize(
    x: AnyArray,
    axes: Axes = -1,
    *,
    mask: AnyArray | None = None,
    scale: AnyArray | None = None,
    bias: AnyArray | None = None,
    scale_offset: float = 0.0,
    epsilon: float = 1e-6,
    subtract_mean: bool = True,
    use_fast_variance: bool = True,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    dtype: DTypeLike | None = None,
    return_moments: Literal[True],
) -> tuple[Array, Moments]: ...


@answers_names
def standardize(
    x: Shaped[AnyArray, "*shape"],
    axes: Axes = -1,
    *,
    mean: Shaped[AnyArray, "..."] | None = None,
    var: Shaped[AnyArray, "..."] | None = None,
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
    return_moments: bool = False,
) -> Inexact[Array, "*shape"] | tuple[Inexact[Array, "*shape"], Moments]:
    r"""Normalises an array by its mean and variance over some of its axes, or by those
    given.

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

        # A batch norm, and the same with stored moments. A stored mean is one number, and
        # rounded.
        y, moments = en.standardize(x, (0, 1), return_moments=True)
        y = en.standardize(x, (0, 1), mean=moments.mean, var=moments.var)
        ```

    **Arguments:**

    - `x`: an array of any rank.
    - `axes`: the axes that mean and variance are taken over; `()` for named axes alone.
    - `mean`, `var`: moments to normalise with in the place of those of `x`, both or
        neither, each broadcastable to `x` and of size 1 along `axes`. Zeros for `mean` have
        `x` divided by the deviation alone. For an $\varepsilon$ that is an array or traced,
        add it to `var` and give `epsilon=0.0`. With these two, the arguments that say how
        moments are computed have no effect: `subtract_mean`, `use_fast_variance`,
        `axis_name` and `axis_index_groups`.
    - `mask`: boolean, broadcastable to `x`: `mask[..., None]` if it has no axis of
        features. Where it is `False`, `x` does not count for mean and variance, whatever it
        holds. It is normalised all the same; what is not finite there counts as zero. Where
        nothing counts, the bias comes out.
    - `scale`, `bias`: $\gamma$ and $\beta$, each broadcastable to `x`.
    - `scale_offset`: added to `scale` in the precision of the statistics; without a `scale`
        it has no effect.
    - `epsilon`: $\varepsilon$, a Python number that is added to the variance. Not negative.
        If it is zero, and the variance is no larger than what rounding can cause, the
        normalised values are zeros, and the result is the bias.
    - `subtract_mean`: whether to subtract the mean. If `False`, the variance is the mean
        square: a root mean square norm.
    - `use_fast_variance`: as in [`eqx_norms.LayerNorm`][].
    - `axis_name`: a name, or a tuple of names, of axes of `jax.vmap`, `eqx.filter_pmap` or
        `jax.shard_map`: mean and variance are taken over these too.
    - `axis_index_groups`: lists of indices along the axis `axis_name`, which must be one
        name. The lists have one length, and each index is in exactly one of them. Each list
        is a group, with statistics of its own.
    - `dtype`: the dtype of the result. By default what `x`, `scale` and `bias` promote to,
        float32 if these are all integers or booleans; for `"input"` that of `x`, float32 if
        it is an integer or a boolean.
    - `return_moments`: whether to return the moments of `x` too.

    **Returns:**

    An array of the shape of `x`; with `return_moments`, a pair of it and
    [`eqx_norms.Moments`][]. Both may be differentiated.

    **Raises:**

    `ValueError` if an argument is not as described or does not fit `x`, or if there is
    nothing to take statistics over; `NameError` if `axis_name` is bound nowhere.
    """
    check = Check("standardize")
    return_moments = check.flag(return_moments, "return_moments")
    settings, inputs = _prepare_function(
        check,
        x,
        axes,
        axis_name,
        axis_index_groups,
        mean,
        var,
        mask=mask,
        scale=(scale,),
        bias=(bias,),
        dtype=check.result_dtype(dtype),
        epsilon=check.epsilon(epsilon),
        scale_offset=check.scale_offset(scale_offset),
        subtract_mean=check.flag(subtract_mean, "subtract_mean"),
        use_fast_variance=check.flag(use_fast_variance, "use_fast_variance"),
    )
    if not return_moments:
        return compute(settings, inputs)
    if inputs.given is not None:
        raise check.error(
            "`return_moments` is for the moments of `x`, got `mean` and `var` to use in "
            "their place. Leave it out; `eqx_norms.moments` has those of `x`."
        )
    y, found = compute_both(settings, inputs)
    return y, _as_moments(settings, inputs, found)


@answers_names
def moments(
    x: Shaped[AnyArray, "..."],
    axes: Axes = -1,
    *,
    mask: Bool[AnyArray, "..."] | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
) -> Moments:
    r"""The mean and the variance of an array over some of its axes, exact at any mean,
    under masks and over devices.

    $$\text{mean} = \mathbb{E}[x], \qquad
    \text{var} = \mathbb{E}\left[|x - \mathbb{E}[x]|^2\right]$$

    Each position counts once, wherever it is: over several devices with different numbers
    of positions too, where a mean of means would be wrong. An array that is constant has
    variance zero.

    !!! example

        ```python
        x, mask = jnp.ones((4, 5, 16)), jnp.arange(5) < 3
        mean, var, positions = en.moments(x, (0, 1), mask=mask[:, None])
        ```

    **Arguments:**

    - `x`, `axes`, `mask`, `axis_name`, `axis_index_groups`: as in
        [`eqx_norms.standardize`][].

    **Returns:**

    [`eqx_norms.Moments`][], which may be differentiated.

    **Raises:**

    As [`eqx_norms.standardize`][].
    """
    settings, inputs = _prepare_function(
        Check("moments"),
        x,
        axes,
        axis_name,
        axis_index_groups,
        mask=mask,
        dtype="input",
        epsilon=1e-6,  # On which no moment depends.
    )
    return _as_moments(settings, inputs, _only_statistics(settings, inputs))
