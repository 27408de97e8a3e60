r"""`(x - mean) / sqrt(var + epsilon) * scale + bias`, and its derivatives.

With `d = (x - shift) - offset`, where `mean = shift + offset`, with
`inv = 1 / sqrt(var + epsilon)` and `z = d * inv` it is `z * scale + bias`. Its derivative
`dy`, for tangents `dx`, `dscale`, `dbias` and the statistics of `x` itself:

- The mean is linear in `x`, so `dmean = a` with `a = E[dx]`.
- The variance is E|x - mean|^2, so `dvar = 2 e` with `e = E[d dx]`. (`dmean` does not
  matter there, since E[d] = 0.)
- `d(1 / sqrt(v)) = -dv / (2 v^(3/2))`, so `dinv = -k` with `k = e * inv^3`.
- Together `dz = (dx - a) * inv + d * dinv = dx * inv - m - d * k` with `m = a * inv`.
- `dy = dz * scale + z * dscale + dbias`.

For complex `x` it is `e = E[Re(conj(d) dx)]`. Where the statistics are given, as in
evaluation, `a` and `e` are `dmean` and `dvar / 2`.

`m` and `k` are small, and formed first. So are, where `inv * scale` has the shape of `inv`,
that and the factor of `d`:

    dy = dx * (inv * scale) + d * (inv * dscale - k * scale) + (dbias - m * scale).

The tangent is a linear function of `dx`, `dscale` and `dbias`. It computes the rest anew
from `x`, the mask, the scale and the statistics; `jax.checkpoint` keeps these alone for the
backward pass (and what says who the members are). JAX transposes the function when the time
comes: that gives reverse mode, where `jax.custom_vjp` would give up forward mode and second
derivatives.
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
    statistics,
)
from ._types import AnyArray, Axes, AxisIndexGroups, AxisName, DTypeLike, Groups, Names


def _inverse(settings: Settings, stats: Statistics, dtype: np.dtype) -> Array:
    """Returns `inv`, which is zero where nothing was counted. `dtype` is what is computed
    in; given statistics may be of another width."""
    v = stats.var.astype(real_dtype(dtype)) + settings.epsilon
    limits = jnp.finfo(v.dtype)
    if settings.epsilon > limits.tiny:
        inv = jax.lax.rsqrt(v)
    else:
        # A deviation that rounding explains counts as zero: that of a mean that is given,
        # or up to 8 of them where the mean was computed, if it is no more than an eighth of
        # the offset as well: of values that are equal, the rounding of the sums is left.
        explained = jnp.zeros_like(v)
        if stats.shift is not None:
            explained = float(limits.eps) * jnp.abs(stats.shift).astype(v.dtype)
        if stats.offset is not None:
            explained = jnp.minimum(8 * explained, jnp.abs(stats.offset) / 8)
        varies = v > limits.tiny + explained**2
        inv = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, v, 1)), 0)
    return inv if stats.positions is None else jnp.where(stats.positions > 0, inv, 0)


def _spread(settings: Settings, inputs: Inputs, statistic: Array) -> Array:
    """That of this member's group, laid out against `x`."""
    own = inputs.members.own_group(statistic)
    return cast(settings.reduction.spread(own, inputs.x), settings.wide(inputs.x))


def _deviation(
    settings: Settings, inputs: Inputs, stats: Statistics
) -> tuple[Array, Array, Array | None]:
    """Returns `d = (x - shift) - offset`, `inv` and, with a mask, a boolean array `valid`.
    `valid` is `False` where the mask excludes a position and `d * inv` would not be finite;
    `d` is there that of zero."""
    x = inputs.x.astype(settings.wide(inputs.x))
    inv = _spread(settings, inputs, _inverse(settings, stats, x.dtype))
    parts = (part for part in (stats.shift, stats.offset) if part is not None)
    mean = [_spread(settings, inputs, part) for part in parts]
    d = functools.reduce(operator.sub, mean, x)
    if inputs.mask is None:
        return d, inv, None
    valid = inputs.mask | jnp.isfinite(d * inv)
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
    """The result, and the statistics that it was normalised with."""
    wide = settings.wide(inputs.x)
    stats = statistics(settings, inputs) if inputs.given is None else inputs.given
    d, inv, _ = _deviation(settings, inputs, stats)
    scale = _total(inputs.scale, wide, settings.scale_offset)
    bias = _total(inputs.bias, wide)
    if _keeps_shape(scale, inv):
        y = d * (inv if scale is None else inv * scale)
    else:
        y = d * inv * scale
    return (y if bias is None else y + bias).astype(settings.dtype), stats


def _tangent(
    settings: Settings, kept: Inputs, stats: Statistics, dx: Any, tangents: Any
) -> tuple[Array, Statistics]:
    """The derivative of `_formula`. `dx` is `None` where it is zero."""
    wide = settings.wide(kept.x)
    # With other statistics, as far as XLA knows, than those of the forward pass: so it
    # computes `d` and `z` anew, and does not keep them in the place of `x`. Without any
    # barrier, unrolled blocks with RMSNorm took 9 percent more memory, and a vision
    # transformer in float32 read and wrote 2 percent more. With a barrier around `x` and
    # the cotangent too, as `prevent_cse=True` has it, XLA writes an `x` to memory that it
    # would compute anew from what comes before: a U-Net read and wrote 7 percent more and
    # took 9 percent more memory. (Compiled for an H200: `tests/benchmarks/models.py`,
    # `compiled.py`. For a TPU v5e unrolled blocks are 4 to 6 percent faster so.)
    stats = jax.lax.optimization_barrier(stats)
    d, inv, valid = _deviation(settings, kept, stats)
    z, scale = d * inv, _total(kept.scale, wide, settings.scale_offset)
    dscale, dbias = (_total(t, wide) for t in (tangents.scale, tangents.bias))
    dx = None if dx is None else dx.astype(wide)

    dstats = jax.tree.map(jnp.zeros_like, stats)
    if tangents.given is not None:
        dstats = jax.tree.map(jnp.add, dstats, tangents.given)
    elif dx is not None:
        t = counted(kept.mask, dx)
        products = real_product(d, t)
        values = (t, products) if settings.subtract_mean else (products,)
        averages, _ = means(settings, kept, *values, positions=stats.positions)
        a, e = averages if settings.subtract_mean else (None, *averages)
        # What the mean changes by is the offset's, all of it: the shift may be anything.
        dstats = dstats._replace(offset=a, var=2 * e)
    m = k = None
    if tangents.given is not None or dx is not None:
        inverse = _inverse(settings, stats, wide)
        if dstats.mean is not None:
            m = cast(dstats.mean, wide) * inverse.astype(wide)
        k = dstats.var.astype(inverse.dtype) / 2 * inverse * inverse * inverse
    m, k = (0 if t is None else _spread(settings, kept, t) for t in (m, k))

    dx = 0 if dx is None else counted(valid, dx)
    dscale, dbias = (0 if t is None else t for t in (dscale, dbias))
    if _keeps_shape(scale, inv):
        factor = 1 if scale is None else scale
        dy = dx * (inv * factor) + d * (inv * dscale - k * factor) + (dbias - m * factor)
    else:
        dy = (dx * inv - m - d * k) * scale + z * dscale + dbias
    return jnp.broadcast_to(dy, z.shape).astype(settings.dtype), dstats


def _rule(settings, primals, tangents):
    (inputs,), (tangents,) = primals, tangents
    # The statistics are kept for the backward pass, and so are results. For rows the shift
    # is then that of a few entries, and `y` may differ by a rounding from that of a call
    # without derivative.
    y, stats = _formula(settings._replace(returns_statistics=True), inputs)
    dx = None if isinstance(tangents.x, SymbolicZero) else tangents.x
    # A scalar stands for a tangent that is zero: it takes no memory.
    tangents = jax.tree.map(
        lambda t: jnp.zeros((), t.dtype) if isinstance(t, SymbolicZero) else t,  # pyright: ignore
        tangents._replace(x=None, mask=None, members=None),
    )
    kept = inputs._replace(bias=(), given=None)
    tangent = functools.partial(_tangent, settings)
    linear = jax.checkpoint(tangent, prevent_cse=False)
    return (y, stats), linear(kept, stats, dx, tangents)


_formula.defjvp(_rule, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=0)
def compute(settings: Settings, inputs: Inputs) -> tuple[Array, Statistics]:
    """Normalises with the statistics of `x`, or with those given, and returns them too.

    The mask broadcasts to `x`. So do scale and bias, unless they have the feature shape:
    then they lie along the feature axes. Given statistics have the feature shape; without
    feature axes, that of a statistic. All of it is one `jax.jit`: a call outside of any
    other is one dispatch, and layers that are alike are traced once.
    """
    x, axes = inputs.x, settings.feature_axes

    def lay_out(array):
        if array.shape == feature_shape(x.shape, axes):
            return jnp.expand_dims(to_input_order(array, axes), other_axes(axes, x.ndim))
        return to_rank(array, x.ndim)

    mask = None if inputs.mask is None else to_rank(inputs.mask, x.ndim)
    scale, bias = jax.tree.map(lay_out, (inputs.scale, inputs.bias))
    given = inputs.given
    if axes:
        given = jax.tree.map(lambda array: to_input_order(array, axes), given)
    return _formula(settings, Inputs(x, mask, scale, bias, given, inputs.members))


@functools.partial(jax.jit, static_argnums=0)
def _only_statistics(settings: Settings, inputs: Inputs) -> Statistics:
    # Compilers leave out what nobody reads.
    return compute(settings, inputs)[1]


def prepare(
    x: Array,
    reduction: Reduction,
    *,
    check: Check,
    mask: Any,
    scale: tuple[Any, ...] = (),
    bias: tuple[Any, ...] = (),
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

    Of the scales and biases the last is that of the call, and what is before it the
    layer's own. `remedy` says what to do where there is nothing to take statistics over;
    `one_position` where they are of one each, if that is refused.
    """
    (mask,) = check.arrays("mask", mask)
    reduced = reduction.all_axes
    check.mask(mask, x, reduced, feature_axes)
    scale, bias = check.arrays("scale", *scale), check.arrays("bias", *bias)
    features = feature_shape(x.shape, feature_axes)
    for argument, terms in (("scale", scale[-1:]), ("bias", bias[-1:])):
        for term in terms:
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
    """As `prepare`, for a function, which is given all at once."""
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

        # A batch norm, and the same with moments that were kept of a batch: but for the
        # mean, which then is one number, with the rounding that it has.
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
        return compute(settings, inputs)[0]
    if inputs.given is not None:
        raise check.error(
            "`return_moments` is for the moments of `x`, got `mean` and `var` to use in "
            "their place. Leave it out; `eqx_norms.moments` has those of `x`."
        )
    y, found = compute(settings._replace(returns_statistics=True), inputs)
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
    settings = settings._replace(returns_statistics=True)
    return _as_moments(settings, inputs, _only_statistics(settings, inputs))
