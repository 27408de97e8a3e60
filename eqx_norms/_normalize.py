"""`(x - mean) / sqrt(var + epsilon) * scale + bias`: the library's only normalisation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._axes import on_one_cpu
from ._collectives import ALONE, Members
from ._moments import Moments, Reduction, moments, per_counted, sums_tangent
from ._rules import lean


class Inputs(NamedTuple):
    """An input and what goes with it, all of its rank."""

    x: Array
    mask: Array | None
    # Those learned and those given at the call, to be added up.
    scale: tuple[Array, ...]
    bias: tuple[Array, ...]
    scale_offset: float
    feature_axes: tuple[int, ...]
    # What to compute in, and what to return.
    compute_dtype: np.dtype
    dtype: np.dtype


class _Spec(NamedTuple):
    reduction: Reduction
    epsilon: float
    scale_offset: float
    dtype: np.dtype
    # Where the moments are the input's own.
    center: bool = True
    fast: bool = True


def _deviation(spec, x, mask, m):
    """`(x - mean) * unit`, what to multiply that with, laid out against it, and which
    positions are left as they are: an excluded one that does not come out finite counts as
    zero."""
    v, tiny = m.var + spec.epsilon, jnp.finfo(m.var.dtype).tiny
    if spec.epsilon > tiny:
        inverse = lax.rsqrt(v)
    else:
        # Without variance there is nothing to scale up: such data is normalised to zero,
        # and so are its derivatives.
        inverse = jnp.where(v > tiny, lax.rsqrt(jnp.where(v > tiny, v, 1)), 0)
    if m.weight is not None:
        inverse = jnp.where(m.weight > 0, inverse, 0)
    unit = spec.reduction.row_unit(x, m.shift)
    inverse = spec.reduction.spread(inverse / unit, x)
    d = spec.reduction.deviation(x, m.shift, m.offset, unit)
    if mask is None:
        return d, inverse, None
    valid = mask | jnp.isfinite(d * inverse)
    zero = spec.reduction.deviation(jnp.zeros_like(x), m.shift, m.offset, unit)
    return jnp.where(valid, d, zero), inverse, valid


def _varies_as(a: Array, b: Array) -> bool:
    """Whether the one varies along no axis but those that the other varies along."""
    sizes = zip(a.shape, b.shape, strict=True)
    return all(own == 1 or other != 1 for own, other in sizes)


def _times(a: Array | None, b: Array | None) -> Array | None:
    return None if a is None or b is None else a * b


def _plus(*terms: Array | None) -> Any:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _total(terms: tuple[Array | None, ...], dtype: np.dtype) -> Array | None:
    """Added up here, within the rule, as their sum may be larger than each of them."""
    return _plus(*(None if term is None else term.astype(dtype) for term in terms))


def _total_scale(spec: _Spec, terms: tuple[Array, ...]) -> Array | None:
    total = _total(terms, spec.reduction.dtype)
    return total if total is None or spec.scale_offset == 0 else total + spec.scale_offset


def _apply(spec, x, mask, scale, bias, m):
    reduction = spec.reduction
    scale, bias = _total_scale(spec, scale), _total(bias, reduction.dtype)
    if not all(term is None or _varies_as(term, m.var) for term in (scale, bias)):
        d, inverse, _ = _deviation(spec, x, mask, m)
        y = d * inverse
        y = y if scale is None else y * scale
        return _plus(y, bias).astype(spec.dtype)
    # One multiplication and one addition: what is left of the mean goes with the bias.
    # (Factors of less than 1e-38 or more than 1e38 are lost, though their product may fit.)
    d, factor, _ = _deviation(spec, x, mask, m._replace(offset=None))
    factor = factor if scale is None else factor * scale
    if m.offset is not None:
        offset = reduction.spread(m.offset * reduction.row_unit(x, m.shift), x)
        bias = _plus(bias, -offset * factor)
    return _plus(d * factor, bias).astype(spec.dtype)


def _apply_tangent(spec, x, mask, scale, m, dx, dscale, dbias, dmean, dvar):
    """`dx * factor + z * slope + level`, the last two of which are small: transposed,
    each is one sum over the input."""
    d, inverse, valid = _deviation(spec, x, mask, m)
    z = d * inverse
    inverse = inverse * spec.reduction.row_unit(x, m.shift)
    scale = _total_scale(spec, scale)
    dx, dscale, dbias = (_total(terms, d.dtype) for terms in ((dx,), dscale, dbias))
    if dx is not None and valid is not None:
        dx = jnp.where(valid, dx, jnp.zeros_like(dx))
    dmean, dvar = jax.tree.map(lambda s: spec.reduction.spread(s, x), (dmean, dvar))
    slope = _times(dvar, -inverse * inverse / 2)
    level = _times(dmean, -inverse)
    # A product no larger than its factors is better formed first.
    if scale is None or _varies_as(inverse, scale) or _varies_as(scale, inverse):
        factor = inverse
        if scale is not None:
            factor, slope, level = (
                inverse * scale,
                _times(slope, scale),
                _times(level, scale),
            )
        slope, level = _plus(slope, dscale), _plus(level, dbias)
        t = _plus(_times(dx, factor), _times(z, slope), level)
    else:
        t = _plus(_times(dx, inverse), _times(z, slope), level)
        t = _plus(_times(t, scale), _times(z, dscale), dbias)
    t = jnp.zeros_like(z) if t is None else jnp.broadcast_to(t, z.shape)
    return t.astype(spec.dtype)


def _normalize_tangent(spec, kept, dx, dmask, dscale, dbias, dm):
    del dmask
    dmean = _plus(dm.shift, dm.offset)
    x, mask, scale, m = kept
    return _apply_tangent(spec, x, mask, scale, m, dx, dscale, dbias, dmean, dm.var)


_normalize = lean(
    _apply,
    _normalize_tangent,
    lambda args, _: (*args[:3], args[4]),
)


# Where all members are on this device, moments and normalisation are one function, whose
# derivative is the composition of theirs: XLA then reads the input fewer times than for one
# after the other.


def _own_moments(spec, x, mask, here):
    return moments(
        x, mask, spec.reduction, (here, ALONE), center=spec.center, fast=spec.fast
    )


def _apply_own(spec, x, mask, scale, bias, here):
    m, rows = _own_moments(spec, x, mask, here)
    return _apply(spec, x, mask, scale, bias, m), rows


def _apply_own_tangent(spec, kept, dx, dmask, dscale, dbias, dhere):
    del dmask, dhere
    x, mask, scale, here, rows = kept
    m = jax.tree.map(here.own, rows)
    drows = jax.tree.map(jnp.zeros_like, rows)
    dmean = dvar = None
    if dx is not None:
        offset, var = (
            per_counted(rows.weight, t)
            for t in sums_tangent(
                spec.reduction, spec.center, x, mask, m.shift, m.offset, here, dx
            )
        )
        drows = drows._replace(offset=offset, var=var)
        dmean, dvar = jax.tree.map(here.own, (offset, var))
    dy = _apply_tangent(spec, x, mask, scale, m, dx, dscale, dbias, dmean, dvar)
    return dy, drows


_normalize_own = lean(
    _apply_own,
    _apply_own_tangent,
    lambda args, out: (*args[:3], args[4], out[1]),
)


# On a CPU, rows are done without the moments being kept. XLA does a whole forward or
# backward pass over the last axis in one go, each row while it is at hand, if nothing else
# is asked of it: not the moments, nor the sums over columns that scale and bias want, whose
# pass finds the moments once more. Elsewhere, to have them again costs readings, and on a
# mesh communication.


def _apply_row(spec, x, mask, scale, bias):
    return _apply_own(spec, x, mask, scale, bias, ALONE)[0]


def _apply_row_tangent(spec, kept, dx, dmask, dscale, dbias):
    x, mask, scale = kept
    _, rows = _own_moments(spec, x, mask, ALONE)
    kept = (x, mask, scale, ALONE, rows)
    return _apply_own_tangent(spec, kept, dx, dmask, dscale, dbias, None)[0]


def _input_apart(dx, dmask, dscale, dbias):
    def none(tangents):
        return jax.tree.map(lambda _: None, tangents)

    if dx is None or not jax.tree.leaves(dscale):
        # (Bias alone would be broadcast, and its gradient added up, in `spec.dtype`.)
        return [(dx, dmask, dscale, dbias)]
    return [(dx, dmask, none(dscale), none(dbias)), (None, dmask, dscale, dbias)]


_normalize_row = lean(
    _apply_row, _apply_row_tangent, lambda args, _: args[:3], _input_apart
)


def _in_rows(inputs: Inputs, reduction: Reduction) -> bool:
    """Whether to do so: for rows along which scale and bias vary, if there are any."""
    x, terms = inputs.x, (*inputs.scale, *inputs.bias)
    along = any(term.shape[axis] != 1 for term in terms for axis in reduction.axes)
    return reduction.over_rows(x.ndim) and (along or not terms) and on_one_cpu(x)


def normalize(inputs: Inputs, m: Moments, *, epsilon: float) -> Array:
    """Normalises with given moments, of the rank of the input."""
    reduction = Reduction((), inputs.compute_dtype)
    spec = _Spec(reduction, epsilon, inputs.scale_offset, inputs.dtype)
    return _normalize(spec, inputs.x, inputs.mask, inputs.scale, inputs.bias, m)


def standardize(
    inputs: Inputs,
    reduction: Reduction,
    members: tuple[Members, Members],
    *,
    epsilon: float,
    center: bool = True,
    fast: bool = True,
) -> Array:
    """Normalises with the input's own moments."""
    if not any(m.names for m in members) and _in_rows(inputs, reduction):
        # A row at hand is shifted by its mean as fast as by anything else.
        spec = _Spec(reduction, epsilon, inputs.scale_offset, inputs.dtype, center, False)
        return _normalize_row(spec, inputs.x, inputs.mask, inputs.scale, inputs.bias)
    y, _ = standardize_batch(
        inputs, reduction, members, epsilon=epsilon, center=center, fast=fast
    )
    return y


def standardize_batch(
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
    spec = _Spec(reduction, epsilon, inputs.scale_offset, inputs.dtype, center, fast)
    here, elsewhere = members
    if not elsewhere.names:
        return _normalize_own(spec, x, mask, scale, bias, here)
    m, rows = moments(x, mask, reduction, members, center=center, fast=fast, origin=origin)
    return _normalize(spec, x, mask, scale, bias, m), rows
