"""Running statistics: what `BatchNorm` remembers, and how a batch changes it."""

import functools
import math
import warnings
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State, StateIndex
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Inexact, Real

from ._axes import to_feature_order
from ._checks import Check
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
    count: Real[Array, "*features"]


class PooledStats(eqx.Module):
    """What `recalibrate` puts in the place of `RunningStats` for one call of a model.

    - `mean`, `var`: of all positions that were counted; while `count` is zero, for calls in
        evaluation, the running mean and variance.
    - `count`: how many positions were counted.
    """

    mean: Inexact[Array, "*features"]
    var: Inexact[Array, "*features"]
    count: Real[Array, "*features"]


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
    check: Check,
) -> Stats:
    """The running statistics in `state`, for features of this shape if it is known."""
    stats = get_state(state, index, check=check)
    received, number = stats.mean.shape, len(feature_axes)
    wanted = f"one of length {number}" if features is None else features
    if len(received) != number if features is None else received != features:
        raise check.error(
            f"the running statistics in `state` have shape {received}, the layer's "
            f"features {wanted}. Was `state` made for another model, or left out of the "
            "axes of a `vmap`? Write `jax.vmap(model, in_axes=(0, None), out_axes=(0, "
            "None), axis_name=...)(x, state)`."
        )
    return stats


def warn_if_new(stats: Any, *, check: Check) -> None:
    """For running statistics that no batch has entered. Those of Flax have a count of zero
    too, but not the mean and variance of the start. Nothing is said of what is traced."""

    def is_all(array: Any, value: int) -> bool:
        if isinstance(array, Tracer):
            return False
        whole = getattr(array, "is_fully_replicated", True)
        return whole and bool(np.all(jax.device_get(array) == value))

    if (
        isinstance(stats, RunningStats)
        and is_all(stats.count, 0)
        and is_all(stats.mean, 0)
        and is_all(stats.var, 1)
    ):
        warnings.warn(
            f"{check.name}: evaluates with running statistics that no batch has entered, "
            "mean 0 and variance 1: the input is not normalised. Train first and keep the "
            "state that each call returns, load the state together with the model, or use "
            "`eqx_norms.recalibrate`.",
            # Beyond the wrappers of `BatchNorm.__call__`.
            stacklevel=6,
        )


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
def update(step: Step, old: RunningStats, batch: Statistics) -> RunningStats:
    """Takes a step towards the statistics of a batch, feature by feature."""
    found = _as_stored(step, old, *_average(step, *_groups(step, batch)))
    return _where_good(old, found, _stepped(step, old, *found[:2]))


@functools.partial(jax.jit, static_argnums=0)
def pool(step: Step, old: PooledStats, batch: Statistics) -> PooledStats:
    """Joins a batch to what was seen before, each position counting once."""
    found = _as_stored(step, old, *_pool(*_groups(step, batch)))
    before = (old.mean, old.var, old.count.astype(found[2].dtype))
    return _where_good(old, found, _pool(*map(jnp.stack, zip(before, found, strict=True))))


def _groups(step: Step, batch: Statistics) -> tuple[Array, Array, Array]:
    """Mean, variance and number of positions of each group of members, along axis 0."""
    mean, var, positions = batch.mean, batch.var, batch.positions
    assert mean is not None
    if positions is None:
        positions = jnp.full_like(var, step.size)
    count = positions.astype(var.dtype)
    return (mean, var, count) if step.grouped else (mean[None], var[None], count[None])


def _as_stored(step: Step, old: Stats, *of_batch: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and number of positions in the order of axes of what is stored, the
    last in the dtype of the variance; and split over devices as that is. (On an Explicit
    mesh the features may be sharded and the state not.)"""
    dtypes = old.mean.dtype, old.var.dtype, old.var.dtype
    mean, var, count = (
        shard_like(to_feature_order(cast(array, dtype), step.feature_axes), old.count)
        for array, dtype in zip(of_batch, dtypes, strict=True)
    )
    return mean, var, count


def _where_good(
    old: Stats, found: tuple[Array, Array, Array], new: tuple[Array, Array, Array]
) -> Stats:
    """The new statistics, or the old ones where a batch says nothing of a feature. (What is
    found of a batch is the same on all devices, so all devices decide alike.)"""
    mean, var, positions = found
    good = jnp.isfinite(mean) & jnp.isfinite(var) & (positions > 0)
    stats = (
        jnp.where(good, after.astype(before.dtype), before)
        for after, before in zip(new, (old.mean, old.var, old.count), strict=True)
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
    step: Step, mean: Array, var: Array, count: Array
) -> tuple[Array, Array, Array]:
    """The means and the variances of several samples, along the first axis, averaged by
    their numbers of positions; and the sum of these. A sample of one position, which says
    nothing of a variance, counts as empty."""
    count = jnp.where(count > 1, count, 0)
    if step.unbiased:
        var = var * (count / jnp.maximum(count - 1, 1))
    return _weighted(mean, var, count)


def _weighted(mean: Array, var: Array, count: Array) -> tuple[Array, Array, Array]:
    total = jnp.sum(count, 0)
    share = count / jnp.maximum(total, 1)[None]
    mean = jnp.sum(share.astype(mean.dtype) * mean, 0)
    return mean, jnp.sum(share * var, 0), total


def _stepped(
    step: Step, old: RunningStats, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """The running statistics after a step towards the mean and variance of a batch."""
    of_old, of_new = _weights(step, old.count.astype(var.dtype))
    # The batch's share is small after many batches: 1 - keep would lose its digits.
    keep, share = of_old / (of_old + of_new), of_new / (of_old + of_new)

    def blend(old, new):
        # What has no weight may be anything, not a number too.
        old = jnp.where(keep > 0, old, 0)
        kept, shared = (jnp.asarray(weight, old.dtype) for weight in (keep, share))
        # A difference that is rounded, not a sum: a million equal batches change nothing.
        small = old + (shared * new - shared * old)
        return jnp.where(share < 0.5, small, kept * old + shared * new)

    return blend(old.mean, mean), blend(old.var, var), old.count + 1


def _weights(step: Step, seen: Array) -> tuple[Any, Any]:
    """The weights, up to a common factor, of the running statistics after `seen` batches,
    and of one batch more."""
    # The average over all batches is the limit for a momentum of one.
    if step.momentum is None or (step.debias and step.momentum == 1):
        return seen, 1
    if not step.debias or step.momentum == 0:
        return step.momentum, 1 - step.momentum
    # m + m^2 + ... + m^n = m (1 - m^n) / (1 - m) after n batches. Powers near one would
    # lose precision.
    rest = -jnp.expm1(seen * math.log(step.momentum))
    return step.momentum / (1 - step.momentum) * rest, 1
