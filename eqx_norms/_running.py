"""Running statistics: what `BatchNorm` remembers, and how a batch changes it."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State, StateIndex
from jax import lax
from jaxtyping import Array, Inexact, Int

from ._axes import from_features, shard_like
from ._dtypes import cast, check_number, promote, real_dtype
from ._moments import Moments, abs_square, over_groups
from ._state import get_state
from ._types import DTypeLike, Shape


class RunningStats(eqx.Module):
    """What a [`eqx_norms.BatchNorm`][] has seen so far, feature by feature.

    - `mean`, `var`: the running mean and variance, float32 or wider.
    - `count`: how many batches each feature has absorbed.
    """

    mean: Inexact[Array, "*features"]
    var: Inexact[Array, "*features"]
    count: Int[Array, "*features"]


class PooledStats(eqx.Module):
    """What `recalibrate` puts in the place of `RunningStats`: the statistics of all data
    since `count` was zero.

    - `mean`, `var`: of these data, and of anything while `count` is zero.
    - `count`: how many positions they have.
    - `rest`: of the mean, what rounding left out: with a mean of many deviations, the
        differences between batches would be lost in it.
    """

    mean: Inexact[Array, "*features"]
    var: Inexact[Array, "*features"]
    count: Int[Array, "*features"]
    rest: Inexact[Array, "*features"]


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


def check_momentum(momentum: float | None, *, layer: str) -> float | None:
    if momentum is None:
        return None
    momentum = check_number(momentum, layer=layer, argument="momentum")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{layer}: `momentum` is the weight of the old running statistics, from 0 to "
            f"1, or `None` for the average over all batches, got {momentum}."
        )
    return momentum


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


def update(
    old: Stats,
    rows: Moments,
    feature_axes: tuple[int, ...],
    *,
    size: int,
    momentum: float | None,
    unbiased: bool,
) -> Stats:
    """Takes a batch in, or leaves a feature as it was where the batch says nothing of it.

    `rows` are the same on all devices, so all devices decide alike. `size` is how many
    positions a statistic is over.
    """
    if isinstance(old, PooledStats):
        return _pool(old, rows, feature_axes, size=size)
    mean, var, weight = over_groups(rows, size, unbiased=unbiased)
    mean = cast(from_features(mean, feature_axes), old.mean.dtype)
    var = cast(from_features(var, feature_axes), old.var.dtype)
    good = jnp.isfinite(mean) & jnp.isfinite(var)
    if weight is not None:
        good = good & (from_features(weight, feature_axes) > 0)
    if momentum is None:
        seen = old.count.astype(var.dtype)
        keep = seen / (seen + 1)
    else:
        keep = momentum

    def blend(old, new):
        a, b = (jnp.asarray(weight, old.dtype) for weight in (keep, 1 - keep))
        return jnp.where(good, a * old + b * new, old)

    # On an Explicit mesh the features may be sharded and the state not: it stays as it is.
    mean, var, good = (shard_like(a, old.count) for a in (mean, var, good))

    stats = RunningStats(
        blend(old.mean, mean),
        blend(old.var, var),
        old.count + good.astype(old.count.dtype),
    )
    return lax.stop_gradient(stats)


def _pool(
    old: PooledStats, rows: Moments, feature_axes: tuple[int, ...], *, size: int
) -> PooledStats:
    """Weighted by how many positions each has, the variance between them included."""
    axes = (0, *(axis + 1 for axis in feature_axes))

    def after(old, rows):
        rows = cast(from_features(rows, axes), old.dtype)
        return jnp.concatenate([old[None], shard_like(rows, old[None])])

    if rows.weight is None:
        count = jnp.full_like(rows.var, size, old.count.dtype)
    else:
        # A fraction of `size`, and of an integer.
        count = jnp.round(rows.weight * size)
    count = after(old.count, count)
    assert rows.shift is not None
    assert rows.offset is not None
    mean, rest = after(old.mean, rows.shift), after(old.rest, rows.offset)
    var = after(old.var, rows.var)

    counted = count > 0
    good = jnp.all(jnp.isfinite(mean[1:]) & jnp.isfinite(var[1:]) | ~counted[1:], 0)
    good = good & jnp.any(counted[1:], 0)
    total = jnp.sum(count, 0, keepdims=True, dtype=count.dtype)
    share = count.astype(var.dtype) / jnp.maximum(total, 1).astype(var.dtype)

    def average(values):
        values = jnp.where(counted, values, 0)
        return jnp.sum(share.astype(values.dtype) * values, 0, keepdims=True)

    # About a shift that is near all of them, as in `_moments`.
    shift = average(mean)
    deviation = (mean - shift) + rest
    offset = average(deviation)
    mean = shift + offset
    new = PooledStats(
        mean,
        average(var + abs_square(deviation - offset)),
        total,
        (shift - mean) + offset,
    )
    stats = jax.tree.map(lambda new, old: jnp.where(good, new[0], old), new, old)
    return lax.stop_gradient(stats)
