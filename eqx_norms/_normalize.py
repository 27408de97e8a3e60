r"""`(x - mean) / sqrt(var + epsilon) * scale + bias`, and its derivatives.

With `d = (x - shift) - offset`, where `mean = shift + offset`, with
`inv = 1 / sqrt(var + epsilon)` and `z = d * inv` it is `z * scale + bias`. Its derivative
`dy`, for tangents `dx`, `dscale`, `dbias` and the statistics of `x` itself:

- The mean is linear in `x`, so `dmean = a` with `a = E[dx]`.
- The variance is E|x - mean|^2, so `dvar = 2 e` with `e = E[d dx]`. (`dmean` does not
  matter there, since E[d] = 0.)
- `d(1 / sqrt(v)) = -dv / (2 v^(3/2))`, so `dinv = -inv^3 e = -inv^2 b` with `b = e * inv`.
- Together `dz = (dx - a) * inv + d * dinv = (dx - a - z * b) * inv`.
- `dy = dz * scale + z * dscale + dbias`.

For complex `x` it is `e = E[Re(conj(d) dx)]`. Where the statistics are given, as in
evaluation, `a` and `e` are `dmean` and `dvar / 2`.

Where `f = inv * scale` has the shape of `inv`, it is formed first:

    y = d * f + bias,    dy = dx * f + z * (dscale - b * f) + (dbias - a * f).

The tangent is a linear function of `dx`, `dscale` and `dbias`. It computes what it needs of
`x`, of scale and of the statistics, which are small; `jax.checkpoint` keeps these for the
backward pass, and nothing else. JAX transposes the function when the time comes: that gives
reverse mode, where `jax.custom_vjp` would give up forward mode and second derivatives.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from ._axes import feature_shape, other_axes, to_input_order, to_rank
from ._dtypes import cast, real_dtype
from ._statistics import (
    Inputs,
    Settings,
    Statistics,
    counted,
    means,
    real_product,
    statistics,
)


def _deviation(
    settings: Settings, inputs: Inputs, stats: Statistics
) -> tuple[Array, Array, Array | None]:
    """Returns `d = (x - shift) - offset`, `inv` and, with a mask, a boolean array `valid`.
    `valid` is `False` where the mask excludes a position and `d * inv` would not be finite;
    `d` is there that of zero."""
    x, spread = inputs.x.astype(settings.wide(inputs.x)), settings.reduction.spread
    stats = jax.tree.map(inputs.members.own_group, stats)
    # Given ones may be of another width than what is computed in.
    v = stats.var.astype(real_dtype(x.dtype)) + settings.epsilon
    shift, offset = (
        jnp.zeros_like(v) if part is None else cast(part, x.dtype)
        for part in (stats.shift, stats.offset)
    )
    limits = jnp.finfo(v.dtype)
    if settings.epsilon > limits.tiny:
        inv = jax.lax.rsqrt(v)
    else:
        # A variance that rounding can explain counts as zero: that of the values
        # themselves, and where the mean is not given, that of the sums about the shift.
        explained = 8 * float(limits.eps) * jnp.abs(shift)
        if stats.offset is not None:
            explained = jnp.minimum(explained, jnp.abs(offset) / 8)
        varies = v > limits.tiny + explained**2
        inv = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, v, 1)), 0)
    if stats.positions is not None:
        inv = jnp.where(stats.positions > 0, inv, 0)
    inv, shift, offset = (spread(part.astype(x.dtype), x) for part in (inv, shift, offset))
    d = (x - shift) - offset
    if inputs.mask is None:
        return d, inv, None
    valid = inputs.mask | jnp.isfinite(d * inv)
    return (jnp.where(valid, x, 0) - shift) - offset, inv, valid


def _total(terms: tuple[Array | None, ...], dtype: np.dtype, offset: float = 0.0) -> Any:
    """The sum of the terms that are not `None`; `None` if there are none. Where terms
    broadcast, the sum has more entries than they have. So the backward pass keeps the
    terms, and computes the sum anew."""
    present = [term.astype(dtype) for term in terms if term is not None]
    total = functools.reduce(operator.add, present) if present else None
    return total if total is None or offset == 0 else total + offset


def _keeps_shape(scale: Array | None, inv: Array) -> bool:
    """Whether `inv * scale` has the shape of `inv`."""
    return scale is None or all(
        n in (1, m) for n, m in zip(scale.shape, inv.shape, strict=True)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(settings: Settings, inputs: Inputs) -> tuple[Array, Statistics]:
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
    """The derivative of `_standardize`. `dx` is `None` where it is zero."""
    reduction, wide = settings.reduction, settings.wide(kept.x)
    d, inv, valid = _deviation(settings, kept, stats)
    z, scale = d * inv, _total(kept.scale, wide, settings.scale_offset)
    dscale, dbias = (_total(t, wide) for t in (tangents.scale, tangents.bias))
    dx = None if dx is None else dx.astype(wide)

    dstats = jax.tree.map(jnp.zeros_like, stats)
    if tangents.given is not None:
        dstats = jax.tree.map(jnp.add, dstats, tangents.given)
    elif dx is not None:
        t = counted(kept.mask, dx)
        values = (t,) * settings.subtract_mean + (real_product(d, t),)
        both, _ = means(settings, kept, *values, positions=stats.positions)
        # Without the barrier XLA fuses these sums, over the last axis, with the gradient of
        # `x` on a GPU, and needs another kernel, which reads `x` again, for the gradients
        # of scale and bias. A LayerNorm of which it did so took 1.13 times as long to train
        # on an H200 as one in a `vmap`, of which it did not.
        *a, e = jax.lax.optimization_barrier(both) if reduction.over_last_axis(d) else both
        dstats = dstats._replace(offset=a[0] if a else None, var=2 * e)
    a, dvar = (
        0 if t is None else cast(reduction.spread(kept.members.own_group(t), d), wide)
        for t in (dstats.mean, dstats.var)
    )
    b = dvar / 2 * inv

    dx = 0 if dx is None else counted(valid, dx)
    dscale, dbias = (0 if t is None else t for t in (dscale, dbias))
    if _keeps_shape(scale, inv):
        f = inv if scale is None else inv * scale
        dy = dx * f + z * (dscale - b * f) + (dbias - a * f)
    else:
        dy = (dx - a - z * b) * inv * scale + z * dscale + dbias
    return jnp.broadcast_to(dy, z.shape).astype(settings.dtype), dstats


def _rule(settings, primals, tangents):
    (inputs,), (tangents,) = primals, tangents
    y, stats = _standardize(settings._replace(differentiated=True), inputs)
    dx = None if isinstance(tangents.x, SymbolicZero) else tangents.x
    # A scalar stands for a tangent that is zero: it takes no memory.
    tangents = jax.tree.map(
        lambda t: jnp.zeros((), t.dtype) if isinstance(t, SymbolicZero) else t,  # pyright: ignore
        tangents._replace(x=None, mask=None, members=None),
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    kept = inputs._replace(bias=(), given=None)
    tangent = functools.partial(_tangent, settings)

    # On a CPU XLA fuses no sum over the last axis, for the gradient of `x`, with one over
    # the others, for those of scale and bias. The backward pass takes 1.5 to 4 times as
    # long where the two share what they compute. On a GPU or a TPU they share a reading of
    # `x`.
    def apart(kept, stats, dx, tangents):
        part = jax.checkpoint(tangent)
        of_x = part(kept, stats, dx, tangents._replace(scale=(), bias=()))
        of_parameters = part(kept, stats, None, tangents._replace(given=None))
        return jax.tree.map(operator.add, of_x, of_parameters)

    def linear(*args):
        if settings.reduction.over_last_axis(inputs.x) and jax.tree.leaves(inputs.scale):
            return jax.lax.platform_dependent(*args, cpu=apart, default=tangent)
        return tangent(*args)

    # The default, `prevent_cse=True`, has XLA compute anew what it computed forward. If not
    # told so, it may keep that in the place of `x`. Compiled for an H200, a step of three
    # unrolled blocks with RMSNorm then takes 9 percent more memory; run on one, with either
    # norm, it takes 1.01 times as long, and scanned ones as long. On a CPU there is no
    # difference in the median. A TPU v5e pays for the default: its compiler estimates
    # unrolled blocks 4 to 6 percent faster without, and scanned ones 1 to 2 percent.
    # (`tests/benchmarks/blocks.py` and `compiled.py`)
    return (y, stats), jax.checkpoint(linear)(kept, stats, dx, tangents)


_standardize.defjvp(_rule, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=0)
def normalize(settings: Settings, inputs: Inputs) -> tuple[Array, Statistics]:
    """Normalises with the statistics of `x`, or with those given, and returns them too.

    Scale, bias and given statistics have the feature shape; scale, bias and mask may
    broadcast to `x`. All of it is one `jax.jit`: a call outside of any other is one
    dispatch, and layers that are alike are traced once.
    """
    x, axes = inputs.x, settings.feature_axes

    def lay_out(array):
        if array.shape == feature_shape(x.shape, axes):
            return jnp.expand_dims(to_input_order(array, axes), other_axes(axes, x.ndim))
        return to_rank(array, x.ndim)

    mask = None if inputs.mask is None else to_rank(inputs.mask, x.ndim)
    scale, bias = jax.tree.map(lay_out, (inputs.scale, inputs.bias))
    given = jax.tree.map(lambda a: to_input_order(a, axes), inputs.given)
    return _standardize(settings, Inputs(x, mask, scale, bias, given, inputs.members))
