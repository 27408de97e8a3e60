"""`(x - mean) / sqrt(var + epsilon) * scale + bias`: the library's only normalisation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._collectives import ALONE, Members
from ._moments import Moments, Reduction, moments, sums_tangent
from ._rules import lean


class Inputs(NamedTuple):
    """An input and what goes with it, all of its rank."""

    x: Array
    mask: Array | None
    scale: Array | None
    bias: Array | None
    feature_axes: tuple[int, ...]
    # What to compute in, and what to return.
    compute_dtype: np.dtype
    dtype: np.dtype


class _Spec(NamedTuple):
    reduction: Reduction
    epsilon: float
    dtype: np.dtype


class _OwnSpec(NamedTuple):
    reduction: Reduction
    epsilon: float
    dtype: np.dtype
    center: bool
    fast: bool


def _standardize(spec, x, mask, m):
    """The standardized input, the inverse deviation, and what was left as it is."""
    # Without variance, and without an epsilon, there is nothing to scale up: such data
    # is normalised to zero, and so are its derivatives.
    v = m.var + spec.epsilon
    inverse = jnp.where(v > 0, lax.rsqrt(jnp.where(v > 0, v, 1)), 0)
    wide = spec.reduction.spread(inverse, x).astype(spec.reduction.dtype)
    z = spec.reduction.deviation(x, m.shift, m.offset) * wide
    if mask is None:
        return z, inverse, None
    # An excluded position is normalised as well, but what cannot be counts as a zero.
    valid = mask | jnp.isfinite(z)
    zero = spec.reduction.deviation(jnp.zeros_like(x), m.shift, m.offset) * wide
    return jnp.where(valid, z, zero), inverse, valid


def _apply(spec, x, mask, scale, bias, m):
    y, _, _ = _standardize(spec, x, mask, m)
    if scale is not None:
        y = y * scale.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(spec.dtype)


def _apply_tangent(spec, x, mask, scale, m, dx, dscale, dbias, dmean, dvar):
    z, inverse, valid = _standardize(spec, x, mask, m)

    def spread(statistic, like):
        return spec.reduction.spread(statistic, like).astype(z.dtype)

    t = jnp.zeros_like(z)
    if dx is not None:
        dx = dx.astype(z.dtype)
        t = dx if valid is None else jnp.where(valid, dx, t)
    if dmean is not None:
        t = t - spread(dmean, x)
    t = t * spread(inverse, x)
    if dvar is not None:
        t = t - z * spread(dvar * inverse * inverse / 2, x)
    if scale is not None:
        t = t * scale.astype(z.dtype)
    if dscale is not None:
        t = t + z * dscale.astype(z.dtype)
    if dbias is not None:
        t = t + dbias.astype(z.dtype)
    return t.astype(spec.dtype)


def _normalize_tangent(spec, kept, dx, dmask, dscale, dbias, dm):
    del dmask
    parts = [part for part in (dm.shift, dm.offset) if part is not None]
    dmean = sum(parts[1:], parts[0]) if parts else None
    x, mask, scale, m = kept
    return _apply_tangent(spec, x, mask, scale, m, dx, dscale, dbias, dmean, dm.var)


_normalize = lean(
    _apply,
    _normalize_tangent,
    lambda args, _: (*args[:3], args[4]),
)


# Where nothing is collective, moments and normalisation are one function, whose derivative
# is the composition of theirs: XLA then reads the input fewer times than for one after
# the other.


def _apply_own(spec, x, mask, scale, bias):
    m, _ = moments(
        x, mask, spec.reduction, (ALONE, ALONE), center=spec.center, fast=spec.fast
    )
    return _apply(spec, x, mask, scale, bias, m), m


def _apply_own_tangent(spec, kept, dx, dmask, dscale, dbias):
    del dmask
    x, mask, scale, m = kept
    dmean = dvar = None
    if dx is not None:
        dmean, dvar = sums_tangent(
            spec.reduction, spec.center, x, mask, m.shift, m.offset, dx
        )
        if m.weight is not None:
            divisor = jnp.where(m.weight > 0, m.weight, 1)
            dvar = dvar / divisor
            dmean = None if dmean is None else dmean / divisor.astype(dmean.dtype)
    dy = _apply_tangent(spec, x, mask, scale, m, dx, dscale, dbias, dmean, dvar)
    dm = jax.tree.map(jnp.zeros_like, m)
    if dx is not None:
        dm = dm._replace(offset=dmean, var=dvar)
    return dy, dm


_normalize_own = lean(
    _apply_own,
    _apply_own_tangent,
    lambda args, out: (*args[:3], out[1]),
)


def normalize(inputs: Inputs, m: Moments, *, epsilon: float) -> Array:
    """Normalises with given moments, of the rank of the input."""
    spec = _Spec(Reduction((), inputs.compute_dtype), epsilon, inputs.dtype)
    return _normalize(spec, inputs.x, inputs.mask, inputs.scale, inputs.bias, m)


def standardize(
    inputs: Inputs,
    reduction: Reduction,
    members: tuple[Members, Members],
    *,
    epsilon: float,
    center: bool = True,
    fast: bool = True,
    origin: Array | None = None,
) -> tuple[Array, Moments]:
    """Normalises with the input's own moments. These too, a row for each group."""
    x, mask, scale, bias = inputs.x, inputs.mask, inputs.scale, inputs.bias
    if not any(m.names for m in members):
        spec = _OwnSpec(reduction, epsilon, inputs.dtype, center, fast)
        y, m = _normalize_own(spec, x, mask, scale, bias)
        return y, jax.tree.map(lambda leaf: leaf[None], m)
    m, rows = moments(x, mask, reduction, members, center=center, fast=fast, origin=origin)
    spec = _Spec(reduction, epsilon, inputs.dtype)
    return _normalize(spec, x, mask, scale, bias, m), rows
