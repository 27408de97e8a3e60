"""Mean and variance: the only statistics in the library.

The variance is not computed as E|x|^2 - |E[x]|^2: where the mean is a few thousand
deviations away from zero, rounding leaves nothing of that difference. First a shift near
the mean is subtracted. With d = x - shift,

    mean = shift + E[d],    var = E|d|^2 - |E[d]|^2.

The difference multiplies the rounding error of the variance by about
1 + (shift - mean)^2 / var (Chan, Golub and LeVeque, "Algorithms for computing the sample
variance", The American Statistician 37, 1983). The shift is one of two:

- The mean, rounded. This reads `x` twice.
- The mean of a few entries of `x`. This reads `x` once. One of n entries is at most
  sqrt(n) deviations away from their mean, and one or two as a rule. Along the axis of the
  examples it is the first entry: a slice there stays on the first device. Along any other
  axis it is the middle one: padding and first tokens, often outliers, are at the ends.
  Along the last axis it is eight entries: one feature may be an outlier in every example.

Over the last axis alone the variance is E|x - mean|^2, where nothing is differentiated and
no mesh axis is named. Then a GPU reads each row of `x` once, in the kernel that also writes
the result.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import min_dim
from jaxtyping import Array

from ._collectives import ALONE, Members
from ._dtypes import promote, real_dtype
from ._sharding import is_sharded, unshard
from ._types import Shape, Size


class Reduction(NamedTuple):
    """What a statistic is over: some axes and, with `groups = (axis, number)`, each of
    `number` contiguous blocks of equal length along one more axis. `example_axis` is the
    axis along which the examples of a batch are; `None` if that is not known.

    A statistic has the axes of the input but for `axes`, which are dropped; along the axis
    of the blocks it has `number` entries. (If `axes` were kept with size 1, XLA would split
    the statistic over devices as it splits the input there, and gather it at each step.)
    """

    axes: tuple[int, ...]
    groups: tuple[int, int] | None = None
    example_axis: int | None = None

    def sum(self, x: Array) -> Array:
        if self.groups is None:
            return jnp.sum(x, self.axes, dtype=x.dtype)
        # After the sums over space, which are long, there is little left to reshape.
        axis, number = self.groups
        x = unshard(jnp.sum(x, self.axes, keepdims=True, dtype=x.dtype), axis)
        split = (*x.shape[:axis], number, x.shape[axis] // number, *x.shape[axis + 1 :])
        return jnp.squeeze(jnp.sum(x.reshape(split), axis + 1, dtype=x.dtype), self.axes)

    def size(self, shape: Shape) -> Size:
        """How many positions of an input of this shape one statistic is over."""
        size = math.prod(shape[axis] for axis in self.axes)
        if self.groups is not None:
            axis, number = self.groups
            size *= shape[axis] // number
        return size

    def number(self, mask: Array, x: Array) -> Array:
        """How many positions of `x` count by a mask that broadcasts to it."""
        mask = jnp.broadcast_to(mask, x.shape)
        # A float32 sum of ones stops growing at 2^24.
        return self.sum(mask.astype(jnp.int32)).astype(real_dtype(x.dtype))

    def spread(self, statistic: Array, x: Array) -> Array:
        """A statistic laid out against `x`, to which it then broadcasts."""
        statistic = jnp.expand_dims(statistic, self.axes)
        if self.groups is None:
            return statistic
        axis, number = self.groups
        return jnp.repeat(statistic, x.shape[axis] // number, axis)

    def a_few(self, x: Array, vmapped: bool) -> Array:
        """Slices `x`, along each of `axes`, to the entries whose mean is the shift.
        `vmapped` says that the examples are along a vmapped axis, and none of `x`."""
        example_axis = None if vmapped else self.example_axis
        # Axis 0 last: if it is split over devices, they exchange what the others left.
        for axis in sorted(self.axes, reverse=True):
            n = x.shape[axis]
            start = 0 if axis == example_axis else n // 2
            # Not four on each side of the middle: where the axis is split over devices,
            # that of one may end there, and XLA would send nearly all of it.
            size = min_dim(n - start, 8) if axis == x.ndim - 1 else 1
            x = lax.slice_in_dim(x, start, start + size, axis=axis)
        return x

    def over_last_axis(self, x: Array) -> bool:
        """Whether a statistic is over the last axis of `x` alone."""
        return self.axes == (x.ndim - 1,) and self.groups is None


class Moments(NamedTuple):
    """Mean and variance, of a statistic's shape. With groups of members they have a leading
    axis: a row for each group.

    - `mean`: `None` where no mean is subtracted. Then `var` is the mean square.
    - `number`: how many positions were counted; `None` if all were.
    """

    mean: Array | None
    var: Array
    number: Array | None = None


class Settings(NamedTuple):
    """The static settings of a call."""

    reduction: Reduction
    feature_axes: tuple[int, ...]
    dtype: np.dtype
    epsilon: float
    scale_offset: float = 0.0
    subtract_mean: bool = True
    use_fast_variance: bool = True
    # Whether it is under differentiation. Then the moments are results too.
    differentiated: bool = False

    def wide(self, x: Array) -> np.dtype:
        """What to compute in, for a result of `dtype`."""
        return promote(x.dtype, self.dtype, jnp.float32)


class Inputs(NamedTuple):
    """The arrays of a call; `None` where there is none. The layer's own scale and that of
    the call are to be added up, and so are the two biases."""

    x: Array
    mask: Array | None = None
    scale: tuple[Array | None, ...] = ()
    bias: tuple[Array | None, ...] = ()
    # If given, used instead of the moments of `x`.
    moments: Moments | None = None
    members: Members = ALONE


def real_product(a: Array, b: Array) -> Array:
    """The real part of conj(a) b."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def abs_square(a: Array) -> Array:
    return real_product(a, a)


def counted(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def means(
    settings: Settings, inputs: Inputs, number: Array | None, *values: Array
) -> tuple[Array, ...]:
    """The mean of each value over all members, in one collective. `number` is how many
    positions were counted, `None` if all were; a value is zero at any other position."""
    reduction, members = settings.reduction, inputs.members
    sums = members.sum(*(reduction.sum(value) for value in values))
    size = reduction.size(values[0].shape) * members.size
    return tuple(_per(total, number, size) for total in sums)


def _per(total: Array, number: Array | None, size: Size) -> Array:
    return total / (size if number is None else jnp.maximum(number, 1).astype(total.dtype))


def moments(settings: Settings, inputs: Inputs) -> Moments:
    """Mean and variance of `x` over all members, in the precision of the statistics."""
    x, mask, members = inputs.x, inputs.mask, inputs.members
    reduction, number = settings.reduction, None
    if mask is None and x.size == 0:
        mask = jnp.zeros(x.shape, bool)
    wide = x.astype(settings.wide(x))
    # XLA makes one GPU kernel of consecutive reductions over the last axis, which reads `x`
    # once, if each depends on the one before and none is an output of the program.
    one_kernel = reduction.over_last_axis(x) and not (
        members.mesh_names or settings.differentiated
    )
    # Where no axis is reduced, nor one of the members vmapped, there is nothing to slice.
    # With groups all members are needed.
    sliced = reduction.axes or (members.indices and members.group is None)
    may_slice = sliced and not is_sharded(x, reduction.axes)
    fast = settings.use_fast_variance and settings.subtract_mean and mask is None
    if fast and may_slice and not one_kernel:
        # The slice comes before the cast: else compilers may write all of the cast `x`.
        # Without the barrier a TPU's compiler duplicates the shift, as it is and broadcast
        # to `x`, and runs an all-reduce for each.
        few, others = members.first(reduction.a_few(x, vmapped=bool(members.indices)))
        few, others = few.astype(wide.dtype), inputs._replace(members=others)
        (shift,) = lax.optimization_barrier(means(settings, others, None, few))
    else:
        # The count is summed in the same collective as the values.
        value = counted(mask, wide if settings.subtract_mean else abs_square(wide))
        local = () if mask is None else (reduction.number(mask, wide),)
        total, *numbers = members.sum(reduction.sum(value), *local)
        number = numbers[0] if numbers else None
        shift = _per(total, number, reduction.size(x.shape) * members.size)
        if not settings.subtract_mean:
            return Moments(None, shift, number)
    shifted = counted(mask, wide - reduction.spread(members.own_group(shift), x))
    if one_kernel:
        (var,) = means(settings, inputs, number, abs_square(shifted))
        return Moments(shift, var, number)
    offset, square = means(settings, inputs, number, shifted, abs_square(shifted))
    # The difference of square and |offset|^2. XLA would square the sum in `offset` before
    # it divides, which overflows sooner. Squares that overflow are infinite.
    root, size = jnp.sqrt(square), jnp.abs(offset)
    var = jnp.where(square < jnp.inf, jnp.maximum(root - size, 0) * (root + size), square)
    return Moments(shift + offset, var, number)
