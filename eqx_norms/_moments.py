"""Mean and variance: the only statistics in the library.

They are those of *shifted data* (Chan, Golub and LeVeque, "Algorithms for computing the
sample variance", The American Statistician 37, 1983): for any shift s,

    mean = s + E[x - s],    var = E|x - s|^2 - |E[x - s]|^2.

The closer the shift to the mean, the less cancels: the variance is good to about
1 + |mean - s|^2 / var roundings. With s = 0 these are the textbook formulas, which lose
everything once the mean is a few thousand deviations; with s the mean itself, the second
terms only correct its rounding. What the layers offer is how s is found:

- `fast`: a guess, so that the data is read, and communicated, once. On one CPU and
  between devices that is zero, or what is known from before, until it shows to be too far;
  then the mean;
- otherwise: the mean, which costs one more reading, and communication.

The mean is handed on as the pair (shift, offset), to be subtracted one after the other:
their sum would be rounded to the precision of the mean, where a deviation wants that of
the standard deviation.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._axes import is_sharded, on_one_cpu, unshard
from ._collectives import Members, everywhere
from ._dtypes import real_dtype
from ._rules import lean
from ._types import Shape


class Reduction(NamedTuple):
    """What is averaged over, and in which precision.

    A statistic keeps the rank of the input. `groups` is an axis and a number: the axis is
    divided into that many equal stretches, and each shares its statistics.
    """

    axes: tuple[int, ...]
    dtype: np.dtype
    groups: tuple[int, int] | None = None

    def sum(self, x: Array) -> Array:
        x = jnp.sum(x, self.axes, keepdims=True, dtype=x.dtype)
        if self.groups is None:
            return x
        axis, number = self.groups
        x = unshard(x, axis)
        split = (*x.shape[:axis], number, x.shape[axis] // number, *x.shape[axis + 1 :])
        return jnp.sum(x.reshape(split), axis + 1, dtype=x.dtype)

    def mean(self, x: Array) -> Array:
        return self.sum(x) / self.size(x.shape)

    def size(self, shape: Shape) -> int:
        """How many positions go into one statistic of an input of this shape."""
        size = math.prod(shape[axis] for axis in self.axes)
        if self.groups is not None:
            axis, number = self.groups
            size *= shape[axis] // number
        return max(size, 1)

    def shape(self, shape: Shape) -> Shape:
        """The shape of a statistic of an input of this shape."""
        out = [1 if axis in self.axes else n for axis, n in enumerate(shape)]
        if self.groups is not None:
            axis, number = self.groups
            out[axis] = number
        return tuple(out)

    def weight(self, mask: Array, shape: Shape) -> Array:
        """The fraction of the positions of this shape that a mask counts."""
        alone = self
        if self.groups is not None and mask.shape[self.groups[0]] == 1:
            alone = self._replace(groups=None)
        # Integers count exactly; a float32 stops counting at 2^24.
        count = alone.sum(mask.astype(jnp.int32)).astype(real_dtype(self.dtype))
        return jnp.broadcast_to(count / alone.size(mask.shape), self.shape(shape))

    def spread(self, statistic: Array, like: Array) -> Array:
        """Lays a statistic out against the input, in the precision of the statistics."""
        statistic = statistic.astype(self.dtype)
        if self.groups is None:
            return statistic
        axis, number = self.groups
        return jnp.repeat(statistic, like.shape[axis] // number, axis)

    def over_rows(self, ndim: int) -> bool:
        """Whether it is over the last axis of an input of that rank, and no other."""
        return self.axes == (ndim - 1,) and self.groups is None

    def unit(self, x: Array, shift: Array | None, members: int = 1) -> float:
        """What deviations are multiplied by: a power of two, so that those whose squares
        fit do not overflow in their sum, over so many members. One, where the data's dtype
        leaves them room.

        Without a shift XLA's CPU code takes half as long again for it. So it is one as well
        for rows of up to 256, where a sixteenth as large fits (1e18 in float32), and for
        half precision, where nobody goes there: of a thousand numbers 5e17 fits."""
        limits, size = jnp.finfo(self.dtype), self.size(x.shape) * members
        largest = math.sqrt(limits.max)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            largest = min(largest, 2 * float(jnp.finfo(x.dtype).max))
        room = limits.maxexp - 2 * math.log2(largest)
        if shift is None:
            room = math.inf if x.dtype.itemsize == 2 else room + 8
        # `jax.export` has sizes that are not yet known.
        bits = math.log2(size) if isinstance(size, int) else 32
        return 1.0 if bits <= room else 2.0 ** -math.ceil(bits / 2)

    def row_unit(self, x: Array, shift: Array | None) -> float:
        """For what is not squared: the same for rows, where deviations are at hand from the
        sums; none where they are computed anew."""
        return self.unit(x, shift) if self.over_rows(x.ndim) else 1.0

    def deviation(
        self, x: Array, shift: Array | None, offset: Array | None, unit: float
    ) -> Array:
        """`(x - mean) * unit`, in the precision of the statistics."""
        d = x.astype(self.dtype)
        if shift is not None:
            d = d - self.spread(shift, x)
        if unit != 1:
            # Not by a constant: XLA's CPU code writes one that several fusions share out,
            # as large as the input.
            if shift is not None and self.over_rows(x.ndim):
                d = d * self.spread(0 * shift + unit, x)
            else:
                d = d * lax.optimization_barrier(jnp.asarray(unit, d.dtype))
        if offset is not None:
            d = d - self.spread(offset * unit, x)
        return d


class Moments(NamedTuple):
    """The mean is `shift + offset`, or zero where both are `None`; `var` is E|x - mean|^2.

    `weight` is the fraction of positions that were counted, `None` if all were.
    """

    shift: Array | None
    offset: Array | None
    var: Array
    weight: Array | None

    @property
    def mean(self) -> Array:
        parts = [part for part in (self.shift, self.offset) if part is not None]
        return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(self.var)


def real_product(a: Array, b: Array) -> Array:
    """The real part of conj(a) b."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def abs_square(a: Array) -> Array:
    return real_product(a, a)


def counted(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


# What is read off the input: means, over the positions on this device, of the deviations
# from a shift and of their squares. Only this keeps the input for the backward pass, so
# only this needs a rule of its own; all that follows works on a few numbers. A row of them
# for each group of members.


class _Spec(NamedTuple):
    reduction: Reduction
    center: bool


def _sums(spec, x, mask, shift, here):
    unit = spec.reduction.unit(x, shift, here.size)
    if spec.center and shift is None:
        unit = 1.0  # Sums about zero are for trial: what is too large is too far.
    d = counted(mask, spec.reduction.deviation(x, shift, None, unit))
    first = None
    if spec.center:
        (first,) = here.mean(spec.reduction.mean(d))
        first = first / unit
    (second,) = here.mean(spec.reduction.mean(abs_square(d)))
    return first, second / unit**2


def _where_far(near: Array, found: Any, anew: Callable[[], Any]) -> Any:
    """What was found, but anew where it is of no use. Those that are near keep theirs to
    the bit, whatever the others hold; if all are, nothing is done anew."""

    def mixed():
        return jax.tree.map(functools.partial(jnp.where, near), found, anew())

    return lax.cond(everywhere(near), lambda: found, mixed)


@functools.partial(jax.jit, static_argnums=0)  # else traced anew at each call outside one
def _sums_where_far(spec, x, mask, shift, here, near, *found):
    return _where_far(near, found, lambda: _sums(spec, x, mask, shift, here))


def _sums_unless_found(spec, x, mask, shift, here, found):
    if found is None:
        return _sums(spec, x, mask, shift, here)
    return _sums_where_far(spec, x, mask, shift, here, *found)


def sums_tangent(reduction, center, x, mask, shift, offset, here, dx):
    """The derivative of the two means; with shift and offset together, that of mean and
    variance, if nothing is masked."""
    unit = reduction.row_unit(x, shift)
    d = counted(mask, reduction.deviation(x, shift, offset, unit))
    t = counted(mask, dx.astype(d.dtype))
    first = here.mean(reduction.mean(t))[0] if center else None
    (second,) = here.mean(reduction.mean(real_product(d, t)))
    return first, 2 * second / unit


def _sums_tangent(spec, kept, dx, *_):
    x, mask, shift, here = kept
    return sums_tangent(spec.reduction, spec.center, x, mask, shift, None, here, dx)


_block_sums = lean(_sums_unless_found, _sums_tangent, lambda args, _: args[:4])


def _guess(x: Array, reduction: Reduction) -> Array | None:
    """The median of the first, middle and last position: one outlier does no harm.

    `None` where these are not to be had, or the mean costs no more: XLA keeps what it
    reduces over trailing axes at hand, and reads it from memory once, but not if it has to
    be sliced as well.
    """
    axes = set(reduction.axes)
    trailing = axes == set(range(x.ndim - len(axes), x.ndim))
    # On an Explicit mesh JAX refuses to slice along a sharded axis.
    sharded = is_sharded(x, reduction.axes)
    if sharded or trailing or jnp.iscomplexobj(x) or x.size == 0:
        return None

    def at(position):
        starts, limits = [0] * x.ndim, list(x.shape)
        for axis in reduction.axes:
            starts[axis] = position(x.shape[axis])
            limits[axis] = starts[axis] + 1
        return lax.slice(x, starts, limits).astype(reduction.dtype)

    a, b, c = at(lambda n: 0), at(lambda n: n // 2), at(lambda n: n - 1)
    median = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    return reduction._replace(axes=()).mean(median)


def per_counted(weight: Array | None, mean: Any) -> Any:
    """The mean over the positions that count, from one of zeros in the place of others."""
    if weight is None or mean is None:
        return mean
    return mean / jnp.where(weight > 0, weight, 1).astype(mean.dtype)


# How many times its variance the square of a mean may be, for data to be near what their
# sums are about.
_NEAR = 4


def _is_near(first: Array, second: Array) -> Array:
    """Whether data is, by the means of deviations and of their squares."""
    # If all are zero, as a rectifier may leave them, they are.
    return ((1 + _NEAR) * abs_square(first) <= _NEAR * second) & jnp.isfinite(second)


def _about_zero(spec, x, mask, weight, here):
    """What to take the sums about: zero, or where that is too far, or the squares overflow,
    the mean. And which are near, with their sums about zero."""
    sums = _block_sums(spec, x, mask, None, here, None)
    first, second = (per_counted(weight, mean) for mean in sums)
    near = _is_near(first, second)
    return jnp.where(near, 0, first), (near, *sums)


def _shifts(spec, x, mask, weight, here, fast):
    """What to take the sums about, a row for each group, and what is known of them."""
    reduction = spec.reduction
    if fast and on_one_cpu(x):
        return _about_zero(spec, x, mask, weight, here)
    if fast and mask is None and not here.names:
        guess = _guess(x, reduction)
        if guess is not None:
            return guess[None], None
    mean = reduction.mean(counted(mask, x.astype(reduction.dtype)))
    return per_counted(weight, *here.mean(mean)), None


def _pool(members: Members, weight: Array | None, *values: Array) -> Any:
    """Means over members, by what each counted, and what all did: a row for each group."""
    if weight is None:
        return *members.mean(*values), None
    weighted = (weight.astype(value.dtype) * value for value in values)
    *means, weight = members.mean(*weighted, weight)
    return *(per_counted(weight, mean) for mean in means), weight


def moments(
    x: Array,
    mask: Array | None,
    reduction: Reduction,
    members: tuple[Members, Members],
    *,
    center: bool,
    fast: bool,
    origin: Array | None = None,
) -> tuple[Moments, Moments]:
    """The moments to normalise with, and a row of them for each group of members.

    `members` are those on this device, and those on others. `origin` is a guess at the mean
    that is the same on every device.
    """
    here, elsewhere = members
    spec = _Spec(reduction, center)
    weight = None
    if mask is not None:
        weight = reduction.weight(mask, x.shape)
    elif x.size == 0:
        weight = jnp.zeros(reduction.shape(x.shape), real_dtype(reduction.dtype))
    if weight is not None:
        (weight,) = here.mean(weight)

    # First what is on this device, about a shift of its own.
    shifts = shift = found = None
    if center:
        constant = lax.stop_gradient(x)
        shifts, found = _shifts(spec, constant, mask, weight, here, fast)
        shift = here.own(shifts)
    sums = _block_sums(spec, x, mask, shift, here, found)
    first, var = (per_counted(weight, mean) for mean in sums)
    if center:
        var = jnp.maximum(var - abs_square(first), 0)
    rows = Moments(shifts, first, var, weight)
    own = jax.tree.map(here.own, rows)
    if not elsewhere.names:
        return own, rows

    # Then the devices: a few numbers from each, about a shift in common.
    if not center:
        var, weight = _pool(elsewhere, own.weight, own.var)
        rows = Moments(None, None, var, weight)
        return jax.tree.map(elsewhere.own, rows), rows
    if fast:
        shifts = jnp.zeros_like(own.shift) if origin is None else origin
        shifts = jnp.broadcast_to(shifts, own.shift.shape)[None]
    else:
        shifts, _ = _pool(elsewhere, own.weight, own.mean)
    shifts = lax.stop_gradient(shifts)

    def deltas(shifts):
        # The difference of two near means is exact; adding the offset first is not.
        delta = (own.shift - elsewhere.own(shifts)) + own.offset
        return delta, abs_square(delta)

    first, second, var, weight = _pool(elsewhere, own.weight, *deltas(shifts), own.var)
    if fast:
        near = lax.stop_gradient(_is_near(first, second + var))
        shifts = jnp.where(near, shifts, shifts + lax.stop_gradient(first))

        def anew():
            first, second, _ = _pool(elsewhere, own.weight, *deltas(shifts))
            return first, second

        first, second = _where_far(near, (first, second), anew)
    var = var + jnp.maximum(second - abs_square(first), 0)
    rows = Moments(shifts, first, var, weight)
    return jax.tree.map(elsewhere.own, rows), rows


def over_groups(
    rows: Moments, size: int, *, unbiased: bool
) -> tuple[Array, Array, Array | None]:
    """Mean, variance and weight on average over the groups, by what each counted.

    `unbiased` divides by one less than the count, where that is not zero; all of it would
    be `size`.
    """
    mean, var, weight = rows.mean, rows.var, rows.weight
    if unbiased:
        count = jnp.asarray(size if weight is None else jnp.round(weight * size), var.dtype)
        var = var * (count / jnp.where(count > 1, count - 1, 1))
    if weight is None:
        return jnp.mean(mean, 0), jnp.mean(var, 0), None
    total = jnp.sum(weight, 0, keepdims=True)
    share = weight / jnp.where(total > 0, total, 1)
    mean = jnp.sum(share.astype(mean.dtype) * mean, 0)
    return mean, jnp.sum(share * var, 0), total[0]
