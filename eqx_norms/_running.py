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

from ._axes import from_features
from ._dtypes import cast, promote, real_dtype
from ._sharding import shard_like
from ._state import get_state
from ._statistics import Moments, abs_square
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
def update(how: Step, old: Stats, rows: Moments) -> Stats:
    """Takes a batch in, or leaves a feature as it was where the batch says nothing of it.

    `rows` are the same on all devices, so all devices decide alike.
    """
    pooled = isinstance(old, PooledStats)
    if not how.grouped:
        rows = jax.tree.map(lambda row: row[None], rows)
    mean, var, count = _over_groups(
        rows, how.size, unbiased=how.unbiased and not pooled, between=pooled
    )
    mean = cast(from_features(mean, how.feature_axes), old.mean.dtype)
    var = cast(from_features(var, how.feature_axes), old.var.dtype)
    count = from_features(count, how.feature_axes).astype(old.var.dtype)
    # On an Explicit mesh the features may be sharded and the state not: it stays as it is.
    mean, var, count = (shard_like(a, old.count) for a in (mean, var, count))
    good = jnp.isfinite(mean) & jnp.isfinite(var) & (count > 0)
    # The batch's share is small after many batches: 1 - keep would lose its digits.
    of_old, of_new = _weights(how, old, count)
    keep, share = of_old / (of_old + of_new), of_new / (of_old + of_new)
    if pooled:
        # While the count is zero, the old ones are running statistics, not pooled ones.
        fresh = good & (old.count == 0)
        old = eqx.tree_at(
            lambda old: (old.mean, old.var),
            old,
            (jnp.where(fresh, mean, old.mean), jnp.where(fresh, var, old.var)),
        )
        var = var + keep * abs_square(mean - old.mean)
    added = jnp.where(good, count if pooled else 1, 0).astype(old.count.dtype)

    def blend(old, new):
        a, b = (jnp.asarray(weight, old.dtype) for weight in (keep, share))
        # A difference that is rounded, not a sum: a million equal batches change nothing.
        new = jnp.where(share < 0.5, old + (b * new - b * old), a * old + b * new)
        return jnp.where(good, new, old)

    stats = (blend(old.mean, mean), blend(old.var, var), old.count + added)
    return lax.stop_gradient(type(old)(*stats))


def _weights(how: Step, old: Stats, count: Array) -> tuple[Any, Any]:
    """Of the old statistics and of the new ones, up to a common factor."""
    seen = old.count.astype(count.dtype)
    if isinstance(old, PooledStats):
        return seen, jnp.maximum(count, 1)
    # The average over all batches is the limit for a momentum of one.
    if how.momentum is None or (how.debias and how.momentum == 1):
        return seen, 1
    if not how.debias or how.momentum == 0:
        return how.momentum, 1 - how.momentum
    # m + m^2 + ... + m^n after n batches. Powers near one would lose precision.
    sums = -jnp.expm1(seen * math.log(how.momentum))
    return how.momentum / (1 - how.momentum) * sums, 1


def _over_groups(
    rows: Moments, size: Size, *, unbiased: bool, between: bool
) -> tuple[Array, Array, Array]:
    """Mean, variance and count of all groups of members together, each group weighted by
    its count. `unbiased` divides a variance by one less than the count, where that is not
    zero; `between` adds the variance of the groups' means."""
    mean, var, count = rows
    assert mean is not None
    if count is None:
        count = jnp.broadcast_to(jnp.asarray(size, var.dtype), var.shape)
    if not between:
        # One position says nothing of a variance.
        count = jnp.where(count > 1, count, 0)
    if unbiased:
        var = var * (count / jnp.where(count > 1, count - 1, 1))
    total = jnp.sum(count, 0, keepdims=True)
    share = count / jnp.maximum(total, 1)
    average = jnp.sum(share.astype(mean.dtype) * mean, 0, keepdims=True)
    if between:
        var = var + abs_square(mean - average)
    return average[0], jnp.sum(share * var, 0), total[0]
