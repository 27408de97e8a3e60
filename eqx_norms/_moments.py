"""Mean and variance: the only statistics in the library.

They are those of *shifted data* (Chan, Golub and LeVeque, "Algorithms for computing the
sample variance", The American Statistician 37, 1983): for any shift s,

    mean = s + E[x - s],    var = E|x - s|^2 - |E[x - s]|^2.

The closer the shift to the mean, the less cancels: the variance is good to about
1 + |mean - s|^2 / var roundings. With s = 0 these are the textbook formulas, which lose
everything once the mean is a few thousand deviations; with s the mean itself, the second
terms only correct its rounding. What the layers offer is how s is found:

- `fast`: a guess, so that the data is read, and communicated, once;
- otherwise: the mean, which costs one more reading, and communication.

The mean is handed on as the pair (shift, offset), to be subtracted one after the other:
their sum would be rounded to the precision of the mean, where a deviation wants that of
the standard deviation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._axes import is_sharded, unshard
from ._collectives import Members
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
        """Lays a statistic out against the input."""
        if self.groups is None:
            return statistic
        axis, number = self.groups
        return jnp.repeat(statistic, like.shape[axis] // number, axis)

    def trailing(self, ndim: int) -> bool:
        """Whether it is over the last axes of an input of that rank: over rows."""
        return set(self.axes) == set(range(ndim - len(self.axes), ndim))

    def unit(self, x: Array, shift: Array | None) -> float:
        """What deviations are multiplied by: a power of two, so that those whose squares
        fit do not overflow in their sum. One, where the data's dtype leaves them room. So
        it does for short rows without a shift, up to a sixteenth of these (1e18 in
        float32): there the multiplication costs more."""
        limits, size = jnp.finfo(self.dtype), self.size(x.shape)
        largest = math.sqrt(limits.max)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            largest = min(largest, 2 * float(jnp.finfo(x.dtype).max))
        room = limits.maxexp - 2 * math.log2(largest) + (8 if shift is None else 0)
        if math.log2(size) <= room:
            return 1.0
        return 2.0 ** -math.ceil(math.log2(size) / 2)

    def row_unit(self, x: Array, shift: Array | None) -> float:
        """For what is not squared: the same for rows, where deviations are at hand from the
        sums; none where they are computed anew."""
        return self.unit(x, shift) if self.trailing(x.ndim) else 1.0

    def deviation(
        self, x: Array, shift: Array | None, offset: Array | None, unit: float
    ) -> Array:
        """`(x - mean) * unit`, in the precision of the statistics."""
        d = x.astype(self.dtype)
        if shift is not None:
            d = d - self.spread(shift, x).astype(d.dtype)
        if unit != 1:
            # Not by a constant: XLA's CPU code writes one that several fusions share out,
            # as large as the input.
            if shift is not None and self.trailing(x.ndim):
                d = d * self.spread(0 * shift + unit, x).astype(d.dtype)
            else:
                d = d * lax.optimization_barrier(jnp.asarray(unit, d.dtype))
        if offset is not None:
            d = d - self.spread(offset * unit, x).astype(d.dtype)
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


# What is read off the input: means, over the positions at hand, of the deviations from a
# shift and of their squares. Only this keeps the input for the backward pass, so only this
# needs a rule of its own; all that follows works on a few numbers.


class _Spec(NamedTuple):
    reduction: Reduction
    center: bool


def _sums(spec, x, mask, shift):
    unit = spec.reduction.unit(x, shift)
    d = counted(mask, spec.reduction.deviation(x, shift, None, unit))
    first = spec.reduction.mean(d) / unit if spec.center else None
    return first, spec.reduction.mean(abs_square(d)) / unit**2


def sums_tangent(reduction, center, x, mask, shift, offset, dx):
    """The derivative of the two means; with shift and offset together, that of mean and
    variance, if nothing is masked."""
    unit = reduction.row_unit(x, shift)
    d = counted(mask, reduction.deviation(x, shift, offset, unit))
    t = counted(mask, dx.astype(d.dtype))
    first = reduction.mean(t) if center else None
    return first, 2 * reduction.mean(real_product(d, t)) / unit


def _sums_tangent(spec, kept, dx, *_):
    x, mask, shift = kept
    return sums_tangent(spec.reduction, spec.center, x, mask, shift, None, dx)


_block_sums = lean(_sums, _sums_tangent, lambda args, _: args)


def _guess(x: Array, reduction: Reduction) -> Array | None:
    """The median of the first, middle and last position: one outlier does no harm.

    `None` where these are not to be had, or the mean costs no more: XLA keeps what it
    reduces over trailing axes at hand, and reads it from memory once, but not if it has to
    be sliced as well.
    """
    # On an Explicit mesh JAX refuses to slice along a sharded axis.
    sharded = is_sharded(x, reduction.axes)
    if sharded or reduction.trailing(x.ndim) or jnp.iscomplexobj(x) or x.size == 0:
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


def _weighted_mean(members, weight, *values):
    """Means over members of values that are zero where nothing counts, and their weight.

    One row for each group of members.
    """
    if weight is None:
        return *members.mean(*values), None
    *means, weight = members.mean(*values, weight)
    divisor = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    return *(mean / divisor.astype(mean.dtype) for mean in means), weight


def _pool(members, shift, weight, first, second, within=None) -> Moments:
    """Moments from what each member found about a common shift, a row for each group.

    `within` are variances that the members have already, about means of their own.
    """
    if first is None:
        var, weight = _weighted_mean(members, weight, second)
        return Moments(None, None, var, weight)
    values = (first, second) if within is None else (first, second, within)
    *means, weight = _weighted_mean(members, weight, *values)
    offset, square = means[0], abs_square(means[0])
    var = jnp.maximum(means[1] - square, 0)
    if members.names:
        # What is left after cancelling down to the last roundings is nothing but these.
        # (Not on the data of one member: that shift is near, and XLA can fuse all of a
        # layer's forward pass, but for a comparison.)
        var = jnp.where(var <= 4 * jnp.finfo(var.dtype).eps * square, 0, var)
    return Moments(shift, offset, var if within is None else var + means[2], weight)


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

    weight = None
    if mask is not None:
        weight = reduction.weight(mask, x.shape)
    elif x.size == 0:
        weight = jnp.zeros(reduction.shape(x.shape), real_dtype(reduction.dtype))

    # First what is on this device, about a shift of its own.
    shift = shifts = None
    if center:
        guess = _guess(x, reduction) if fast and mask is None and not here.names else None
        if guess is None:
            total = reduction.mean(counted(mask, x.astype(reduction.dtype)))
            shifts, _ = _weighted_mean(here, weight, total)
        else:
            shifts = guess[None]
        shifts = lax.stop_gradient(shifts)
        shift = here.own(shifts)
    first, second = _block_sums(_Spec(reduction, center), x, mask, shift)
    rows = _pool(here, shifts, weight, first, second)
    own = jax.tree.map(here.own, rows)
    if not elsewhere.names:
        return own, rows

    # Then the devices: a few numbers from each, about a shift in common.
    def weighted(value):
        return value if own.weight is None else own.weight.astype(value.dtype) * value

    if center:
        if fast:
            shifts = jnp.zeros_like(own.shift) if origin is None else origin
            shifts = jnp.broadcast_to(shifts, own.shift.shape)[None]
        else:
            shifts, _ = _weighted_mean(elsewhere, own.weight, weighted(own.mean))
        shifts = lax.stop_gradient(shifts)
        # The difference of two near means is exact; adding the offset first is not.
        delta = (own.shift - elsewhere.own(shifts)) + own.offset
        first, second = weighted(delta), weighted(abs_square(delta))
        rows = _pool(elsewhere, shifts, own.weight, first, second, weighted(own.var))
    else:
        rows = _pool(elsewhere, None, own.weight, None, weighted(own.var))
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
