"""Mean and variance: the only statistics in the library.

The variance of `x` is not E|x|^2 - |E[x]|^2: for data whose mean is a few thousand
deviations away from zero, rounding leaves nothing of that difference. It is taken of
d = x - shift instead, in one of two ways:

- about the mean: the shift is the mean, and var = E|d|^2. This reads `x` twice; but where
  the statistic is over the last axis alone, compilers keep a row at hand and read it once.
- about a position: the shift is the first position of what the statistic is over, and
  mean = shift + E[d], var = E|d|^2 - |E[d]|^2. This reads `x` once. The difference costs the
  variance about 1 + (shift - mean)^2 / var roundings (Chan, Golub and LeVeque, "Algorithms
  for computing the sample variance", The American Statistician 37, 1983). One of n positions
  is at most sqrt(n) deviations away from their mean, and one or two as a rule.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._collectives import Members
from ._dtypes import real_dtype
from ._sharding import is_sharded, unshard
from ._types import Shape


class Reduction(NamedTuple):
    """What a statistic is over: some axes and, with `groups = (axis, number)`, stretches of
    equal length that divide one more axis into that many.

    A statistic keeps the rank of the input: its size is 1 along `axes`, and the number of
    stretches along the axis that is divided.
    """

    axes: tuple[int, ...]
    groups: tuple[int, int] | None = None

    def sum(self, x: Array) -> Array:
        x = jnp.sum(x, self.axes, keepdims=True, dtype=x.dtype)
        if self.groups is None:
            return x
        # After the sums over space, which are long, there is little left to reshape.
        axis, number = self.groups
        x = unshard(x, axis)
        split = (*x.shape[:axis], number, x.shape[axis] // number, *x.shape[axis + 1 :])
        return jnp.sum(x.reshape(split), axis + 1, dtype=x.dtype)

    def size(self, shape: Shape) -> int:
        """How many positions of an input of this shape one statistic is over."""
        size = math.prod(shape[axis] for axis in self.axes)
        if self.groups is not None:
            axis, number = self.groups
            size *= shape[axis] // number
        return size

    def count(self, mask: Array, x: Array) -> Array:
        """How many positions of `x` a mask that broadcasts to it counts."""
        mask = jnp.broadcast_to(mask, x.shape)
        # A sum of float32 numbers stops to grow at 2^24.
        return self.sum(mask.astype(jnp.int32)).astype(real_dtype(x.dtype))

    def spread(self, statistic: Array, x: Array) -> Array:
        """A statistic laid out against `x`, to which it then broadcasts."""
        if self.groups is None:
            return statistic
        axis, number = self.groups
        return jnp.repeat(statistic, x.shape[axis] // number, axis)

    def over_rows(self, x: Array) -> bool:
        """Whether it is over the last axis of `x` alone."""
        return self.axes == (x.ndim - 1,) and self.groups is None

    def position(self, x: Array) -> Array:
        """The first position along the axes: of size 1 there, all of `x` along others."""
        limits = [1 if axis in self.axes else n for axis, n in enumerate(x.shape)]
        return lax.slice(x, [0] * x.ndim, limits)


class Moments(NamedTuple):
    """Mean and variance, of the rank of the input. With groups of members they have a
    leading axis: a row for each group.

    - `mean`: `None` where no mean is subtracted. Then `var` is the mean square.
    - `count`: how many positions were counted; `None` if all were.
    """

    mean: Array | None
    var: Array
    count: Array | None = None


def real_product(a: Array, b: Array) -> Array:
    """The real part of conj(a) b."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def abs_square(a: Array) -> Array:
    return real_product(a, a)


def counted(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def means(
    reduction: Reduction, members: Members, count: Array | None, *values: Array
) -> tuple[Array, ...]:
    """The mean of each value over all members, in one collective. `count` is how many
    positions were counted, `None` if all were; a value is zero at any other position."""
    size = reduction.size(values[0].shape) * members.size
    sums = members.sum(*(reduction.sum(value) for value in values))
    return tuple(_per(total, size if count is None else count) for total in sums)


def _per(total: Array, count: Any) -> Array:
    if isinstance(count, jax.Array):
        count = jnp.maximum(count, 1).astype(total.dtype)
    return total / count


def moments(
    x: Array,
    dtype: np.dtype,
    mask: Array | None,
    reduction: Reduction,
    members: Members,
    *,
    subtract_mean: bool,
    fast: bool,
) -> Moments:
    """The moments of `x` over all members, computed in `dtype`. `fast` allows a position."""
    if mask is None and x.size == 0:
        mask = jnp.zeros(x.shape, bool)
    wide, count = x.astype(dtype), None
    # XLA's GPU code keeps a row at hand for one sum after the other, not for two at a time.
    one_by_one = reduction.over_rows(x) and not members.mesh_names
    vmapped = members.indices and members.group is None
    may_slice = (reduction.axes or vmapped) and not is_sharded(x, reduction.axes)
    if subtract_mean and fast and mask is None and may_slice and not one_by_one:
        # Sliced before the cast: compilers may write, or read again, all of the cast `x`.
        # Averaged over axes of size 1 too: XLA would split a slice over devices as `x` is.
        position, others = members.first(reduction.position(x))
        (shift,) = means(reduction, others, None, position.astype(dtype))
    else:
        value = counted(mask, wide if subtract_mean else abs_square(wide))
        if mask is None:
            (shift,) = means(reduction, members, None, value)
        else:
            # How many are counted travels with what is added up.
            local = reduction.sum(value), reduction.count(mask, wide)
            total, count = members.sum(*local)
            shift = _per(total, count)
        if not subtract_mean:
            return Moments(None, shift, count)
    d = counted(mask, wide - reduction.spread(members.own(shift), x))
    if one_by_one:
        (var,) = means(reduction, members, count, abs_square(d))
        return Moments(shift, var, count)
    # Where the shift is the mean, its rounding is made good here.
    offset, square = means(reduction, members, count, d, abs_square(d))
    # Squares that overflow are infinite, and the difference would not be a number.
    var = jnp.where(square < jnp.inf, jnp.maximum(square - abs_square(offset), 0), square)
    return Moments(shift + offset, var, count)
