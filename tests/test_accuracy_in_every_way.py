"""Accuracy in every way they are called, at any mean, at the first step."""

import functools as ft
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import NORMS, all_norms, call, every, make_mesh, normal, reference, step


forms = pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])


# `f(arrays, examples)`, each part of the examples on a device of its own, or one by one.


def sharded(f: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jax.shard_map(f, mesh=make_mesh(d=8), **specs, **kwargs)


def vmapped(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(f, in_axes=(None, 0), axis_name="a")


@dataclass(frozen=True)
class Way:
    """How examples reach a layer: under these names, through these transformations."""

    names: tuple[str, ...]
    transform: Callable[..., Any]
    # Whether a layer gets several examples at once, and whether they lie on devices.
    batched: bool = True
    placed: bool = False


WAYS = {
    "batch": Way((), lambda f: f),
    "vmap": Way(("a",), vmapped, batched=False),
    "pmap": Way(
        ("d",),
        lambda f: jax.pmap(f, in_axes=(None, 0), axis_name="d"),
        batched=False,
    ),
    "shard_map": Way(("d",), sharded),
    "shard_map, unchecked": Way(("d",), lambda f: sharded(f, check_vma=False)),
    "vmap in shard_map": Way(("d", "a"), lambda f: sharded(vmapped(f)), batched=False),
    "jit over shards": Way((), lambda f: f, placed=True),
}


# Statistics over examples and rows; of LayerNorm over features as well.
KINDS = {
    "BatchNorm": lambda ndim, **kwargs: eqx.nn.make_with_state(en.BatchNorm)(
        16, momentum=0.0, **kwargs
    ),
    "LayerNorm": lambda ndim, **kwargs: (
        en.LayerNorm(16, reduction_axes=tuple(range(ndim)), **kwargs),
        None,
    ),
}
all_ways = pytest.mark.parametrize("way", WAYS)


def in_a_way(kind: str, way: str, **kwargs: Any) -> tuple[Any, Any]:
    """A layer's arrays, and a function of them, and of examples and their mask.

    It returns the output and, of BatchNorm, mean and variance of the batch: one row of them
    for each example or device.
    """
    names, batched = WAYS[way].names, WAYS[way].batched
    layer, state = KINDS[kind](3 if batched else 2, axis_name=names, **kwargs)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def f(arrays, examples):
        x, mask = examples
        layer = eqx.combine(arrays, static)
        y, new = step(layer, state, x, mask=mask)
        if new is None:
            return y, None
        stats = layer.running_stats(new)
        lead = (lambda a: a[None]) if batched else (lambda a: a)
        return y, jax.tree.map(lead, (stats.mean, stats.var))

    return arrays, WAYS[way].transform(f)


def place(way: str, examples: Any) -> Any:
    """Where they lie in that way."""
    sharding = NamedSharding(make_mesh(d=8), P("d"))
    return jax.device_put(examples, sharding) if WAYS[way].placed else examples


# Before JAX 0.10.2 the sums of a CPU are not good enough for the last: `docs/limits.md`.
MEANS = (0.0, 10.0, 1e3, 1e4, *[1e6] * (jax.__version_info__ >= (0, 10, 2)))
# Of the error, for data of deviation one in single precision, whatever the mean.
BOUND = 1e-5


@every(2)
@forms
@pytest.mark.parametrize("training", [False, True], ids=["output", "under vjp"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@all_norms
def test_accuracy_of_a_batch(case, masked, training, fast):
    """Where a backward pass is to follow, the statistics may take another form."""
    layer, state = case.build(16, use_fast_variance=fast)
    mask = jnp.asarray(np.random.default_rng(1).random((16, 24, 16)) < 0.6)

    @jax.jit
    def f(x):
        def apply(x):
            return call(layer, state, x, mask=mask if masked else None)

        return jax.vjp(apply, x)[0] if training else apply(x)

    for mean in MEANS:
        x = mean + normal(0, mask.shape)
        wanted, _, _ = reference(
            x,
            case.reduction_axes(3),
            **case.formula,
            epsilon=layer.epsilon,
            mask=mask if masked else None,
        )
        assert np.abs(f(x) - wanted).max() <= BOUND, mean


@pytest.mark.parametrize("training", [False, True], ids=["output", "under vjp"])
@pytest.mark.parametrize(("axes", "deviation"), [(-1, 1e16), ((0, 1), 1e15)])
def test_large_numbers(axes, deviation, training):
    """Their squares do not overflow, but that of the sum of their deviations does."""
    x = deviation * (3 + normal(0, (512, 4096)))
    x = x.at[0, 2048:2056].set(0).at[256, 2048:2056].set(0)
    wanted, _, _ = reference(x, axes, epsilon=1e-6)

    @jax.jit
    def f(x):
        apply = ft.partial(en.standardize, axes=axes)
        return jax.vjp(apply, x)[0] if training else apply(x)

    assert np.abs(f(x) - wanted).max() <= 1e-4


@pytest.mark.parametrize("vmapped", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_outliers_among_the_features(kind, vmapped):
    """In a large model one feature may be a thousand deviations away from the others, in
    all examples: in training that one may be among those that the shift is made of."""
    (case,) = (case for case in NORMS if case.name == kind)
    layer, state = case.build(1024)
    norm = ft.partial(call, layer, state)
    norm = jax.vmap(norm) if vmapped else norm
    f = jax.jit(lambda x: jax.vjp(norm, x)[0])
    # Within the eight of the shift, 512 to 519, beside them, and far away.
    for at in (0, 300, 511, 512, 515, 519, 520, 1023):
        x = normal(0, (64, 1024)).at[:, at].add(1000.0)
        wanted, _, _ = reference(x, (-1,), **case.formula, epsilon=layer.epsilon)
        y, others = f(x), np.arange(1024) != at
        assert np.abs(y / wanted - 1)[:, at].max() <= 5e-6, at
        assert np.abs(y - wanted)[:, others].max() <= 1e-6, at


@every(2)
@forms
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@all_ways
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm"])
def test_accuracy_in_every_way(kind, way, masked, fast):
    """From the first batch on, that is to say with nothing known of the mean before; and
    where devices differ in what they count and in their means."""
    arrays, f = in_a_way(kind, way, use_fast_variance=fast)
    shape = (8, 24, 16) if way == "pmap" else (16, 24, 16)
    rng = np.random.default_rng(2)
    share = rng.uniform(0.2, 1.0, (shape[0], 1, 1))
    mask = rng.random(shape) < share if masked else None
    data = rng.standard_normal(shape) + rng.uniform(-0.5, 0.5, (shape[0], 1, 1))
    axes = (0, 1) if kind == "BatchNorm" else (0, 1, 2)
    epsilon = 1e-5 if kind == "BatchNorm" else 1e-6
    f = jax.jit(f)
    for mean in MEANS:
        x = np.float32(mean + data)
        y, stats = f(arrays, place(way, (x, mask)))
        wanted = reference(x, axes, epsilon=epsilon, mask=mask)
        assert np.abs(y - wanted[0]).max() <= BOUND, mean
        if stats is not None:
            # All devices, and all members, have the same.
            of_mean, of_var = (np.asarray(a).reshape(-1, 16) for a in stats)
            exact_mean, exact_var = (a.reshape(1, 16) for a in wanted[1:])
            # The mean itself is one float32.
            assert np.abs(of_mean - exact_mean).max() <= 1.2e-7 * mean + BOUND, mean
            assert np.abs(of_var / exact_var - 1).max() <= BOUND, mean
