"""Mean and variance of an input, over axes or blocks of features, of what a mask counts,
across members.

The variance is not computed as E|x|^2 - |E[x]|^2: where the mean is a few thousand
deviations away from zero, rounding leaves nothing of that difference. First a shift near
the mean is subtracted. Two sums, in one reading of `x`, then give

    offset = E[x - shift],  var = E|x - shift|^2 - |offset|^2,  mean = shift + offset.

The difference multiplies the rounding error of the variance by about
1 + |offset|^2 / var (Chan, Golub and LeVeque, "Algorithms for computing the sample
variance", The American Statistician 37, 1983). The result is computed from
(x - shift) - offset. There x - shift is exact where `x` is near the shift, while the sum of
shift and offset is rounded: by up to 5e-4 at a mean of 1e4.

The shift is one of two:

- The mean of a few entries of `x`. This reads `x` once. One of n entries is at most
  sqrt(n) deviations away from their mean, and one or two as a rule. Along the axis of the
  examples it is the first entry, since that slice is on the first device. Along any other
  axis it is the middle one: padding and first tokens, often outliers, are at the ends.
  Along the last axis it is up to eight, from that one on: one feature may be an outlier in
  every example.
- The mean of all. This reads `x` twice, but for statistics over the last axis alone that
  are no output: then one kernel reads `x` once and also writes the result.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import min_dim
from jaxtyping import Array

from ._collectives import ALONE, Members
from ._dtypes import cast, promote, real_dtype
from ._sharding import is_sharded, unshard
from ._types import Shape, Size


class Reduction(NamedTuple):
    """What a statistic is over: some axes and, with `blocks = (axis, number)`, each of
    `number` contiguous blocks of equal length along one more axis. `example_axis` is the
    axis along which the examples of a batch are, if it is among `axes`.

    A statistic has the axes of the input but for `axes`, which are dropped; along the axis
    of the blocks it has `number` entries. (If `axes` were kept with size 1, XLA would split
    the statistic over devices as it splits the input there, and gather it at each training
    step.)
    """

    axes: tuple[int, ...]
    blocks: tuple[int, int] | None = None
    example_axis: int | None = None

    def sum(self, x: Array) -> Array:
        if self.blocks is None:
            return jnp.sum(x, self.axes, dtype=x.dtype)
        # After the sums over space, which are long, there is little left to reshape.
        axis, number = self.blocks
        x = unshard(jnp.sum(x, self.axes, keepdims=True, dtype=x.dtype), axis)
        split = (*x.shape[:axis], number, x.shape[axis] // number, *x.shape[axis + 1 :])
        return jnp.squeeze(jnp.sum(x.reshape(split), axis + 1, dtype=x.dtype), self.axes)

    def size(self, shape: Shape) -> Size:
        """The number of positions that one statistic of an input of this shape covers."""
        size = math.prod(shape[axis] for axis in self.axes)
        if self.blocks is not None:
            axis, number = self.blocks
            size *= shape[axis] // number
        return size

    def positions(self, mask: Array, x: Array) -> Array:
        """How many positions of `x` count by a mask that broadcasts to it."""
        mask = jnp.broadcast_to(mask, x.shape)
        # A float32 sum of ones stops growing at 2^24.
        return self.sum(mask.astype(jnp.int32)).astype(real_dtype(x.dtype))

    def spread(self, statistic: Array, x: Array) -> Array:
        """A statistic laid out against `x`, to which it then broadcasts."""
        statistic = jnp.expand_dims(statistic, self.axes)
        if self.blocks is None:
            return statistic
        axis, number = self.blocks
        return jnp.repeat(statistic, x.shape[axis] // number, axis)

    def a_few(self, x: Array) -> Array:
        """Slices `x`, along each of `axes`, to the entries whose mean is the shift."""
        # Axis 0 last: if it is split, devices exchange only what the other slices left.
        for axis in sorted(self.axes, reverse=True):
            n = x.shape[axis]
            start = 0 if axis == self.example_axis else n // 2
            # Not four on each side of the middle: where the axis is split over devices, the
            # part of one may end there, and XLA would send nearly all of it.
            size = min_dim(n - start, 8) if axis == x.ndim - 1 else 1
            x = lax.slice_in_dim(x, start, start + size, axis=axis)
        return x

    @property
    def all_axes(self) -> tuple[int, ...]:
        return self.axes if self.blocks is None else (*self.axes, self.blocks[0])


class Statistics(NamedTuple):
    """The statistics of an input, shaped as `Reduction` says. With groups of members they
    have a leading axis, with one entry for each group.

    - `shift`, `offset`: the mean is their sum. They are subtracted one after the other. The
        offset is `None` if the mean was given; both are `None` if no mean is subtracted.
    - `var`: the variance; the mean square where no mean is subtracted.
    - `positions`: how many were counted; `None` if all were.
    """

    shift: Array | None
    offset: Array | None
    var: Array
    positions: Array | None = None

    @property
    def mean(self) -> Array | None:
        if self.shift is None or self.offset is None:
            return self.shift
        return self.shift + self.offset


class Settings(NamedTuple):
    """The static settings of a call."""

    reduction: Reduction
    feature_axes: tuple[int, ...]
    dtype: np.dtype
    epsilon: float
    scale_offset: float = 0.0
    subtract_mean: bool = True
    use_fast_variance: bool = True
    # Whether the statistics are outputs of the program, as they are under differentiation.
    returns_statistics: bool = False

    def wide(self, x: Array) -> np.dtype:
        """The dtype to compute in, for a result of `dtype`."""
        return promote(x.dtype, self.dtype, jnp.float32)


class Inputs(NamedTuple):
    """The arrays of a call; `None` where there is none. The layer's own scale and that of
    the call are to be added up, and so are the two biases."""

    x: Array
    mask: Array | None = None
    scale: tuple[Array | None, ...] = ()
    bias: tuple[Array | None, ...] = ()
    # Statistics to use in the place of those of `x`.
    given: Statistics | None = None
    members: Members = ALONE


def real_product(left: Array, right: Array) -> Array:
    """The real part of conj(left) right."""
    if jnp.iscomplexobj(left):
        return left.real * right.real + left.imag * right.imag
    return left * right


def abs_square(x: Array) -> Array:
    return real_product(x, x)


def counted(mask: Array | None, x: Array) -> Array:
    """Zeros where the mask is `False`."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def spread(settings: Settings, inputs: Inputs, statistic: Array) -> Array:
    """The statistic of this member's group, laid out against `x`, in the dtype that is
    computed in."""
    own = inputs.members.own_group(statistic)
    return cast(settings.reduction.spread(own, inputs.x), settings.wide(inputs.x))


def means(
    settings: Settings, inputs: Inputs, *values: Array, positions: Array | None = None
) -> tuple[tuple[Array, ...], Array | None]:
    """The mean of each value over all members, in one collective, and how many positions
    were counted: `None` if all were. The caller has put zeros where the mask is `False`.
    Positions are counted here, in the same collective, if there is a mask and they are not
    given."""
    reduction, members = settings.reduction, inputs.members
    sums = [reduction.sum(value) for value in values]
    if inputs.mask is not None and positions is None:
        *sums, positions = members.sum(*sums, reduction.positions(inputs.mask, values[0]))
    else:
        sums = members.sum(*sums)
    size = reduction.size(values[0].shape) * members.size
    if positions is None:
        return tuple(total / size for total in sums), None
    count = jnp.maximum(positions, 1)
    return tuple(total / count.astype(total.dtype) for total in sums), positions


def _shortened(array: Array) -> Array:
    """Rounds to one bit less than the dtype has.

    Under a mask a mean is a product in the end, the sum times 1 / count. Where compilers
    fuse this with `x - mean` in several kernels, they may round the product in some of
    these and not in others. The means then differ by a rounding. An operation on bits
    between the two prevents it.
    """
    if jnp.iscomplexobj(array):
        return lax.complex(_shortened(array.real), _shortened(array.imag))
    limits = jnp.finfo(array.dtype)
    return lax.reduce_precision(array, limits.nexp, limits.nmant - 1)


def _in_one_kernel(settings: Settings, inputs: Inputs) -> bool:
    """Whether XLA fuses the sum for the mean, the two sums about it, and the result into
    one kernel, which reads `x` once, on a GPU and on a CPU: if all are over the last axis
    and no statistic is an output."""
    reduction, last = settings.reduction, inputs.x.ndim - 1
    over_last_axis = reduction.axes == (last,) and reduction.blocks is None
    return over_last_axis and not (inputs.members.mesh_names or settings.returns_statistics)


def _few_suffice(settings: Settings, inputs: Inputs) -> bool:
    """Whether the shift is the mean of a few entries of `x`, and not of all."""
    x, reduction, members = inputs.x, settings.reduction, inputs.members
    # A mask may exclude these few.
    if not settings.use_fast_variance or inputs.mask is not None:
        return False
    # JAX does not slice along a split axis of an Explicit mesh.
    if is_sharded(x, reduction.axes) or _in_one_kernel(settings, inputs):
        return False
    # There must be something to slice: a reduced axis, or members along a vmapped one.
    # (With groups, each member is needed.)
    return bool(reduction.axes or (members.indices and members.group is None))


def _shift(settings: Settings, inputs: Inputs, wide: Array) -> tuple[Array, Array | None]:
    """A number near each mean, and how many positions were counted; `None` if all were."""
    reduction, members = settings.reduction, inputs.members
    if inputs.mask is not None:
        # The sum of large numbers would overflow. (A power of two: it rounds nothing.)
        small = counted(inputs.mask, wide * 2.0**-24)
        (mean,), positions = means(settings, inputs, small)
        return _shortened(mean * 2.0**24), positions
    entries = wide
    if _few_suffice(settings, inputs):
        # Where the examples are along a vmapped axis, axis 0 of `x` is one like the others.
        if members.indices:
            reduction = reduction._replace(example_axis=None)
        # The slice comes before the cast: else compilers may write all of the cast `x`.
        few, members = members.first(reduction.a_few(inputs.x))
        entries = few.astype(wide.dtype)
    # Divided first: the sum of large numbers would overflow, a GPU would need a kernel to
    # divide the sum, and where compilers fuse its product with `x - shift` in several
    # kernels, they may round it in some of these and not in others.
    size = reduction.size(entries.shape) * members.size
    (shift,) = members.sum(reduction.sum(entries * (1 / size)))
    if _in_one_kernel(settings, inputs):
        return shift, None
    # Without the barrier a TPU's compiler duplicates the shift, as it is and broadcast to
    # `x`, and runs an all-reduce for each.
    return lax.optimization_barrier(shift), None


def _with_finite_square(offset: Array) -> Array:
    """The offset, but no larger than has a finite square. If it is larger, the mean square
    is infinite, and so is to be the variance. The result is then zero, as the offset is
    finite. (Else XLA would also square the sum, before it is divided, which overflows
    sooner. Of `jnp.clip` it would make a `clamp`; as with `abs` and `select`, a CPU then
    has several kernels for `LayerNorm` in evaluation, and takes up to twice the time.)"""
    if jnp.iscomplexobj(offset):
        return offset
    limit = 0.99 * float(jnp.finfo(offset.dtype).max) ** 0.5
    return -jnp.maximum(-jnp.maximum(offset, -limit), -limit)


def statistics(settings: Settings, inputs: Inputs) -> Statistics:
    """The statistics of `x` over all members, in the dtype that is computed in."""
    x = inputs.x
    # Where there is nothing, nothing counts: no division of zero by zero.
    if inputs.mask is None and x.size == 0:
        inputs = inputs._replace(mask=jnp.zeros(x.shape, bool))
    wide = x.astype(settings.wide(x))
    if not settings.subtract_mean:
        square = counted(inputs.mask, abs_square(wide))
        (square,), positions = means(settings, inputs, square)
        return Statistics(None, None, square, positions)
    shift, positions = _shift(settings, inputs, wide)
    shifted = counted(inputs.mask, wide - spread(settings, inputs, shift))
    (offset, square), _ = means(
        settings, inputs, shifted, abs_square(shifted), positions=positions
    )
    offset = _with_finite_square(offset)
    var = jnp.maximum(square - abs_square(offset), 0)
    return Statistics(shift, offset, var, positions)
