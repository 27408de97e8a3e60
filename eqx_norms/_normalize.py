r"""`(x - mean) / sqrt(var + epsilon) * scale + bias`: the only normalisation in the library.

With `inv = 1 / sqrt(var + epsilon)` and `z = (x - mean) * inv` it is `y = z * scale + bias`.
Its derivative, for tangents `dx`, `dscale`, `dbias` and moments that are those of `x`:

- The mean is linear in `x`, so `dmean = a` with `a = E[dx]`.
- The variance is E|x - mean|^2, so `dvar = 2 e` with `e = E[(x - mean) dx]`. (`dmean` does
  not matter there, since E[x - mean] = 0.)
- `d(1 / sqrt(v)) = -dv / (2 v^(3/2))`, so `dinv = -inv^3 e = -inv^2 b` with `b = e * inv`.
- Together `dz = (dx - a) * inv + (x - mean) * dinv = (dx - a - z * b) * inv`.
- `dy = dz * scale + z * dscale + dbias`.

For complex `x`, `e` has the real part of conj(x - mean) dx. Where the moments are given, as
in evaluation, `a` and `e` are `dmean` and `dvar / 2`.

Where scale varies as the moments do, products of small arrays are formed first. With
`f = inv * scale`

    y = (x - mean) * f + bias,    dy = dx * f + z * (dscale - b * f) + (dbias - a * f).

The tangent is a linear function of `dx`, `dscale` and `dbias`. It computes what it needs of
`x`, of scale and of the moments, which are small; `jax.checkpoint` keeps these for the
backward pass, and nothing else. JAX transposes the function when the time comes: that gives
reverse mode, where `jax.custom_vjp` would give up forward mode and second derivatives.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from ._axes import feature_shape, to_features, to_rank
from ._collectives import Members
from ._dtypes import cast, real_dtype
from ._statistics import Moments, Reduction, counted, means, moments, real_product


class Settings(NamedTuple):
    """What is known of a call before there is data."""

    reduction: Reduction
    feature_axes: tuple[int, ...]
    # Of the arithmetic, and of the result.
    compute_dtype: np.dtype
    dtype: np.dtype
    epsilon: float
    scale_offset: float = 0.0
    subtract_mean: bool = True
    use_fast_variance: bool = True


def _deviation(
    settings: Settings, x: Array, mask: Array | None, own: Moments
) -> tuple[Array, Array, Array | None]:
    """`x - mean`, `inv`, and which positions are left as they are: one that the mask
    excludes and that would not come out finite is taken for zero."""
    v, tiny = own.var + settings.epsilon, jnp.finfo(own.var.dtype).tiny
    if settings.epsilon > tiny:
        inv = lax.rsqrt(v)
    else:
        # Without variance there is nothing to scale up: such data comes out as zero.
        inv = jnp.where(v > tiny, lax.rsqrt(jnp.where(v > tiny, v, 1)), 0)
    if own.count is not None:
        inv = jnp.where(own.count > 0, inv, 0)
    inv = settings.reduction.spread(inv, x).astype(x.dtype)
    mean = None if own.mean is None else settings.reduction.spread(own.mean, x)
    d = x if mean is None else x - mean
    if mask is None:
        return d, inv, None
    valid = mask | jnp.isfinite(d * inv)
    zero = jnp.zeros_like(d) if mean is None else jnp.broadcast_to(-mean, d.shape)
    return jnp.where(valid, d, zero), inv, valid


def _plus(*terms: Any) -> Any:
    present = [term for term in terms if term is not None]
    return functools.reduce(operator.add, present) if present else None


def _or(tangent: Any, zeros: Any) -> Any:
    return zeros if tangent is None else tangent


def _times(a: Any, *factors: Any) -> Any:
    return None if a is None else functools.reduce(operator.mul, factors, a)


def _total(terms: tuple[Any, ...], dtype: np.dtype, offset: float = 0.0) -> Any:
    """The learned and the given one. Their sum may be larger than each of them, so it is
    taken within the rule, which keeps them apart."""
    total = _plus(*(None if term is None else term.astype(dtype) for term in terms))
    return total if total is None or offset == 0 else total + offset


def _is_small(scale: Array | None, inv: Array) -> bool:
    """Whether their product is no larger than one of them."""
    if scale is None:
        return True
    sizes = list(zip(scale.shape, inv.shape, strict=True))
    return all(n == 1 or m != 1 for n, m in sizes) or all(m == 1 or n != 1 for n, m in sizes)


def _apply(
    settings: Settings,
    x: Array,
    mask: Array | None,
    scale: tuple[Array | None, ...],
    bias: tuple[Array | None, ...],
    own: Moments,
) -> Array:
    wide = settings.compute_dtype
    total_scale = _total(scale, wide, settings.scale_offset)
    d, inv, _ = _deviation(settings, x.astype(wide), mask, own)
    if total_scale is None:
        y = d * inv
    elif _is_small(total_scale, inv):
        y = d * (inv * total_scale)
    else:
        y = d * inv * total_scale
    return _plus(y, _total(bias, wide)).astype(settings.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(
    settings: Settings,
    x: Array,
    mask: Array | None,
    scale: tuple[Array | None, ...],
    bias: tuple[Array | None, ...],
    given: Moments | None,
    members: Members,
) -> tuple[Array, Moments]:
    """The result, and the moments: those given, or those of `x`."""
    rows = given
    if rows is None:
        rows = moments(
            x,
            settings.compute_dtype,
            mask,
            settings.reduction,
            members,
            subtract_mean=settings.subtract_mean,
            fast=settings.use_fast_variance,
        )
    own = jax.tree.map(members.own, rows)
    return _apply(settings, x, mask, scale, bias, own), rows


def _tangent(
    settings: Settings,
    are_given: bool,
    kept: tuple[Any, ...],
    dx: Array | None,
    dscale: tuple[Array | None, ...],
    dbias: tuple[Array | None, ...],
    dgiven: Moments | None,
) -> tuple[Array, Moments]:
    """The derivative of `_standardize`. A tangent that is zero is `None`."""
    x, mask, scale, rows, members = kept
    reduction, wide = settings.reduction, settings.compute_dtype
    d, inv, valid = _deviation(
        settings, x.astype(wide), mask, jax.tree.map(members.own, rows)
    )
    z = d * inv
    scale = _total(scale, wide, settings.scale_offset)
    dx, dscale, dbias = (_total(t, wide) for t in ((dx,), dscale, dbias))

    a = e = None
    if are_given:
        a, e = dgiven.mean, _times(dgiven.var, 0.5)
    elif dx is not None:
        t = counted(mask, dx)
        values = (t,) * settings.subtract_mean + (real_product(d, t),)
        *first, e = means(reduction, members, rows.count, *values)
        a = first[0] if first else None
    drows = jax.tree.map(jnp.zeros_like, rows)
    drows = Moments(_or(a, drows.mean), _or(_times(e, 2), drows.var), drows.count)
    a, e = (
        None if row is None else reduction.spread(members.own(row), x).astype(wide)
        for row in (a, e)
    )
    b = _times(e, inv)

    if dx is not None and valid is not None:
        dx = jnp.where(valid, dx, jnp.zeros_like(dx))
    if _is_small(scale, inv):
        f = inv if scale is None else inv * scale
        slope = _plus(dscale, _times(b, -f))
        dy = _plus(_times(dx, f), _times(slope, z), dbias, _times(a, -f))
    else:
        dz = _plus(dx, _times(a, -1), _times(b, -z))
        dy = _plus(_times(dz, inv, scale), _times(dscale, z), dbias)
    dy = jnp.zeros_like(z) if dy is None else jnp.broadcast_to(dy, z.shape)
    return dy.astype(settings.dtype), drows


def _rule(settings, primals, tangents):
    x, mask, scale, _, given, members = primals
    y, rows = _standardize(settings, *primals)
    kept = (x, mask, scale, rows, members)
    dx, _, dscale, dbias, dgiven, _ = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        tangents,
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    tangent = functools.partial(_tangent, settings, given is not None)
    # The default, `prevent_cse=True`, keeps to what is given to it. Without, what is kept
    # between the passes would be up to XLA.
    linear = tangent
    if settings.reduction.over_rows(x) and dx is not None and jax.tree.leaves(dscale):
        # XLA's CPU code does one pass over rows, or one over columns, at a time. There the
        # backward pass takes 1.5 to 4 times as long if the gradients of `x` and of scale
        # and bias share what they compute; on GPUs and TPUs the same reading serves both.

        def apart(kept, dx, dscale, dbias, dgiven):
            part = jax.checkpoint(tangent)
            of_x = part(kept, dx, (), (), dgiven)
            of_parameters = part(kept, None, dscale, dbias, None)
            return jax.tree.map(operator.add, of_x, of_parameters)

        def linear(*args):
            return lax.platform_dependent(*args, cpu=apart, default=tangent)

    return (y, rows), jax.checkpoint(linear)(kept, dx, dscale, dbias, dgiven)


_standardize.defjvp(_rule, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=0)
def normalize(
    settings: Settings,
    x: Array,
    mask: Array | None,
    scale: tuple[Array | None, ...],
    bias: tuple[Array | None, ...],
    given: Moments | None,
    members: Members,
) -> tuple[Array, Moments]:
    """Normalises `x` with its own moments, or with those given.

    The mask and each scale and bias have the feature shape, or broadcast to `x`; moments
    that are given have the feature shape.

    All of it is one `jax.jit`: a call outside of any other is one dispatch, and layers that
    are alike are traced once.
    """
    axes = settings.feature_axes

    def lay_out(array):
        if array.shape == feature_shape(x.shape, axes):
            return to_features(array, axes, x.ndim)
        return to_rank(array, x.ndim)

    mask = None if mask is None else to_rank(mask, x.ndim)
    scale, bias, given = jax.tree.map(lay_out, (scale, bias, given))
    if given is not None:
        # Statistics may be of another width than what is computed in.
        wide = settings.compute_dtype
        given = Moments(cast(given.mean, wide), cast(given.var, real_dtype(wide)))
    return _standardize(settings, x, mask, scale, bias, given, members)
