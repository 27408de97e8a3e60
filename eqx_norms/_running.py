"""Running statistics: what `BatchNorm` remembers, and how a batch changes it."""

import functools
import math
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State, StateIndex
from jax import lax
from jaxtyping import Array, Inexact, Int

from ._axes import to_feature_order
from ._dtypes import cast, promote, real_dtype
from ._sharding import shard_like
from ._state import get_state
from ._statistics import Statistics, abs_square
from ._types import DTypeLike, Shape, Size


class RunningStats(eqx.Module):
    """What a [`eqx_norms.BatchNorm`][] has seen so far, feature by feature.

    - `mean`, `var`: the running mean and variance, float32 or wider.
    - `count`: how many batches each feature has absorbed.
    """

    mean: Inexact[Array, "*features"]
    var: Inexact[Array, "*features"]
    count: Int[Array, "*features"]


class PooledStats(eqx.Module):
    """What `recalibrate` puts in the place of `RunningStats` for one call of a model.

    - `mean`, `var`: of all positions that were counted; while `count` is zero, for calls in
        evaluation, the running mean and variance.
    - `count`: how many positions were counted.
    """

    mean: Inexact[Array, "*features"]
    var: Inexact[Array, "*features"]
    count: Int[Array, "*features"]


Stats = TypeVar("Stats", RunningStats, PooledStats)


def init_stats(shape: Shape, param_dtype: DTypeLike) -> StateIndex[RunningStats]:
    dtype = promote(param_dtype, jnp.float32)
    return StateIndex(
        RunningStats(
            jnp.zeros(shape, dtype),
            jnp.ones(shape, real_dtype(dtype)),
            jnp.zeros(shape, jnp.int32),
        )
    )


def get_stats(
    state: State,
    index: StateIndex[Stats],
    features: Shape | None,
    feature_axes: tuple[int, ...],
    *,
    layer: str,
) -> Stats:
    """The running statistics in `state`, for features of this shape if it is known."""
    stats = get_state(state, index, layer=layer)
    received = stats.mean.shape
    if features is None:
        wanted, fits = (
            f"one of length {len(feature_axes)}",
            len(received) == len(feature_axes),
        )
    else:
        wanted, fits = features, received == features
    if not fits:
        raise ValueError(
            f"{layer}: the running statistics in `state` have shape {received}, the "
            f"layer's features {wanted}. Was `state` made for another model, or left "
            "out of the axes of a `vmap`? Write `jax.vmap(model, in_axes=(0, None), "
            "out_axes=(0, None), axis_name=...)(x, state)`."
        )
    return stats


class Step(NamedTuple):
    """How the statistics of a batch are taken into the running ones."""

    feature_axes: tuple[int, ...]
    # How many positions a group of members has, and whether there are groups.
    size: Size
    grouped: bool
    momentum: float | None
    unbiased: bool
    debias: bool


@functools.partial(jax.jit, static_argnums=0)
def update(how: Step, old: Stats, batch: Statistics) -> Stats:
    """Takes a batch in, or leaves a feature as it was where the batch says nothing of it.

    The statistics of the batch are the same on all devices, so all devices decide alike.
    """
    mean, var, positions = batch.mean, batch.var, batch.positions
    assert mean is not None
    count = (
        jnp.full_like(var, how.size) if positions is None else positions.astype(var.dtype)
    )
    groups = mean, var, count
    if not how.grouped:
        groups = tuple(array[None] for array in groups)
    pooled = isinstance(old, PooledStats)
    of_batch = _pool(*groups) if pooled else _average(how, *groups)
    # On an Explicit mesh the features may be sharded and the state not: it stays as it is.
    mean, var, count = (
        shard_like(to_feature_order(cast(array, kind), how.feature_axes), old.count)
        for array, kind in zip(
            of_batch, (old.mean.dtype, old.var.dtype, old.var.dtype), strict=True
        )
    )
    good = jnp.isfinite(mean) & jnp.isfinite(var) & (count > 0)
    if pooled:
        before = (old.mean, old.var, old.count.astype(count.dtype))
        new = _pool(*map(jnp.stack, zip(before, (mean, var, count), strict=True)))
    else:
        new = _step(how, old, mean, var)
    stats = (
        jnp.where(good, a.astype(b.dtype), b)
        for a, b in zip(new, (old.mean, old.var, old.count), strict=True)
    )
    return lax.stop_gradient(type(old)(*stats))


def _pool(mean: Array, var: Array, count: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and count of several samples, along the first axis, joined to one."""
    # Nothing is known of an empty one.
    mean, var = (jnp.where(count > 0, array, 0) for array in (mean, var))
    average, _, total = _weighted(mean, var, count)
    var = var + abs_square(mean - average[None])
    return average, _weighted(mean, var, count)[1], total


def _average(
    how: Step, mean: Array, var: Array, count: Array
) -> tuple[Array, Array, Array]:
    """The mean of the means and that of the variances of several samples, along the first
    axis, and how many positions were counted."""
    # One position says nothing of a variance.
    count = jnp.where(count > 1, count, 0)
    if how.unbiased:
        var = var * (count / jnp.maximum(count - 1, 1))
    return _weighted(mean, var, count)


def _weighted(mean: Array, var: Array, count: Array) -> tuple[Array, Array, Array]:
    total = jnp.sum(count, 0)
    share = count / jnp.maximum(total, 1)[None]
    mean = jnp.sum(share.astype(mean.dtype) * mean, 0)
    return mean, jnp.sum(share * var, 0), total


def _step(
    how: Step, old: RunningStats, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """The running statistics after a step towards the mean and variance of a batch."""
    of_old, of_new = _weights(how, old.count.astype(var.dtype))
    # The batch's share is small after many batches: 1 - keep would lose its digits.
    keep, share = of_old / (of_old + of_new), of_new / (of_old + of_new)

    def blend(old, new):
        # What has no weight may be anything, not a number too.
        old = jnp.where(keep > 0, old, 0)
        a, b = (jnp.asarray(weight, old.dtype) for weight in (keep, share))
        # A difference that is rounded, not a sum: a million equal batches change nothing.
        return jnp.where(share < 0.5, old + (b * new - b * old), a * old + b * new)

    return blend(old.mean, mean), blend(old.var, var), old.count + 1


def _weights(how: Step, seen: Array) -> tuple[Any, Any]:
    """The weights, up to a common factor, of the running statistics after `seen` batches,
    and of one batch more."""
    # The average over all batches is the limit for a momentum of one.
    if how.momentum is None or (how.debias and how.momentum == 1):
        return seen, 1
    if not how.debias or how.momentum == 0:
        return how.momentum, 1 - how.momentum
    # m + m^2 + ... + m^n after n batches. Powers near one would lose precision.
    sums = -jnp.expm1(seen * math.log(how.momentum))
    return how.momentum / (1 - how.momentum) * sums, 1
