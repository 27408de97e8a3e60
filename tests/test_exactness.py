"""As exact at any mean as at zero: float32 data of deviation 1, and data that is constant,
in every layer and in every way of calling it, beside plain float64 formulas."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import clone, every


MEANS = (0.0, 30.0, -1e3, 1e4, 1e6)
CONSTANTS = (200.7, 1000.3, 10000.1, 1e6 + 0.3, -12345.67)
# Examples, space, features. No size of a statistic is a power of two: there a division is
# exact, and compilers may do with it what they like.
SHAPE = (24, 6, 48)
EPSILON = 1e-6


class Kind(NamedTuple):
    make: Callable[..., Any]
    axes: tuple[int, ...]
    groups: int = 1
    # Arguments for one example inside a `vmap`; `None` where it is not called so.
    per_example: dict[str, Any] | None = None


def batch_norm(**kwargs):
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(48, epsilon=EPSILON, **kwargs)
    return lambda x, **arrays: layer(x, clone(state), **arrays)[0]


def group_norm(**kwargs):
    return en.GroupNorm(48, 4, **kwargs)


def standardize(**kwargs):
    return ft.partial(en.standardize, axes=1, **kwargs)


KINDS = {
    "BatchNorm": Kind(batch_norm, (0, 1), per_example={"axis_name": "batch"}),
    "LayerNorm": Kind(ft.partial(en.LayerNorm, 48), (2,), per_example={}),
    "GroupNorm": Kind(group_norm, (1, 2), groups=4, per_example={"batch_axes": ()}),
    "InstanceNorm": Kind(
        ft.partial(en.InstanceNorm, 4), (1,), per_example={"batch_axes": ()}
    ),
    "standardize": Kind(standardize, (1,)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
forms = pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])


def shape_of(kind):
    # So long that it is reduced over dozens of positions.
    return (24, 96, 4) if KINDS[kind].axes == (1,) else SHAPE


def build(kind, fast, **kwargs):
    return KINDS[kind].make(use_fast_variance=fast, **kwargs)


class Data(NamedTuple):
    """An input, and arrays to differentiate with."""

    x: np.ndarray
    mask: np.ndarray | None
    tangent: np.ndarray
    cotangent: np.ndarray


def draw(kind, masked, mean=None, constant=None):
    rng = np.random.default_rng(0)
    shape = shape_of(kind)
    tangent, cotangent, data = rng.normal(size=(3, *shape)).astype(np.float32)
    x = (np.full(shape, constant) if mean is None else data + mean).astype(np.float32)
    mask = rng.random(shape) < 0.8 if masked else None
    return Data(x, mask, tangent, cotangent)


def answers(kind, data):
    """The result, its tangent and its gradient, in float64."""
    _, axes, groups, _ = KINDS[kind]
    if groups > 1:
        cut = [
            data._replace(x=x, mask=mask, tangent=t, cotangent=c)
            for x, mask, t, c in zip(
                *(
                    [None] * groups if part is None else np.split(part, groups, -1)
                    for part in data
                ),
                strict=True,
            )
        ]
        parts = zip(*(_answers(axes, part) for part in cut), strict=True)
        return tuple(np.concatenate(part, -1) for part in parts)
    return _answers(axes, data)


def _answers(axes, data):
    x, t, c = (np.float64(part) for part in (data.x, data.tangent, data.cotangent))
    counts = np.ones(x.shape, bool) if data.mask is None else data.mask
    number = counts.sum(axes, keepdims=True)

    def mean(values):
        return np.where(counts, values, 0).sum(axes, keepdims=True) / number

    d = x - mean(x)
    inv = 1 / np.sqrt(mean(d**2) + EPSILON)
    z = d * inv
    dy = inv * (t - mean(t) - z * mean(z * t))
    # Every position is normalised, and counts for the statistics if the mask says so.
    a = c.sum(axes, keepdims=True) / number
    b = (c * z).sum(axes, keepdims=True) / number
    dx = inv * (c - np.where(counts, a + z * b, 0))
    return z, dy, dx


def evaluated(f):
    return lambda x, mask, t, c: f(x, mask)


def differentiated(f):
    def run(x, mask, t, c):
        y, pullback = jax.vjp(lambda x: f(x, mask), x)
        return y, jax.jvp(lambda x: f(x, mask), (x,), (t,))[1], pullback(c)[0]

    return run


def masked_call(layer):
    return lambda x, mask: layer(x) if mask is None else layer(x, mask=mask)


def on_devices(f, axis_type):
    """On a mesh, with the examples split over eight devices."""
    mesh = jax.make_mesh((8,), ("device",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("device"))

    def run(*arrays):
        return jax.jit(f)(
            *(a if a is None else jax.device_put(a, sharding) for a in arrays)
        )

    return run


def in_shard_map(f):
    mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("device"), out_specs=P("device")))


def check(kind, run, masked):
    """Every mean and every constant."""
    for mean in MEANS:
        data = draw(kind, masked, mean=mean)
        found, wanted = run(*data), answers(kind, data)
        found = found if isinstance(found, tuple) else (found,)
        for name, bound, a, b in zip(
            ("result", "tangent", "gradient"),
            (1e-5, 2e-5, 2e-5),
            found,
            wanted,
            strict=False,
        ):
            error = np.abs(np.float64(a) - b).max()
            assert error <= bound, f"{name} at a mean of {mean}: off by {error:.1e}"
    for constant in CONSTANTS:
        found = run(*draw(kind, masked, constant=constant))
        y = found[0] if isinstance(found, tuple) else found
        error = np.abs(y).max()
        # All of them below 5e-6 in fact, so that no two ways differ by more than 1e-5.
        assert error <= 5e-6, f"constant {constant}: {error:.1e} in place of 0"


@forms
@masks
@kinds
def test_one_device(kind, masked, fast):
    f = masked_call(build(kind, fast))
    check(kind, jax.jit(evaluated(f)), masked)
    check(kind, jax.jit(differentiated(f)), masked)


@every(2)
@forms
@masks
@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k].per_example is not None])
def test_one_example_in_a_vmap(kind, masked, fast):
    f = masked_call(build(kind, fast, **(KINDS[kind].per_example or {})))
    f = jax.vmap(f, in_axes=(0, 0 if masked else None), axis_name="batch")
    check(kind, jax.jit(evaluated(f)), masked)
    check(kind, jax.jit(differentiated(f)), masked)


@every(2)
@masks
@kinds
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_examples_split_over_a_mesh(kind, masked, axis_type):
    f = masked_call(build(kind, fast=True))
    check(kind, on_devices(evaluated(f), axis_type), masked)
    check(kind, on_devices(differentiated(f), axis_type), masked)


@every(2)
@forms
@masks
@kinds
def test_shard_map(kind, masked, fast):
    kwargs = {"axis_name": "device"} if kind == "BatchNorm" else {}
    f = masked_call(build(kind, fast, **kwargs))
    check(kind, in_shard_map(evaluated(f)), masked)
    check(kind, in_shard_map(differentiated(f)), masked)


@every(2)
@forms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@kinds
def test_half_precision(kind, dtype, fast):
    """One rounding of the result, at any mean that the dtype can hold."""
    f = masked_call(build(kind, fast, dtype=dtype))
    run = jax.jit(lambda x: (f(x, None), jax.vjp(lambda x: f(x, None), x)[0]))
    for mean in (0.0, 300.0, -1e4, 6e4):
        # What a half-precision array of this mean holds: spacings of the dtype.
        spacing = float(jnp.finfo(dtype).eps) * max(abs(mean), 1)
        data = draw(kind, False, mean=0.0)
        x = jnp.asarray(data.x * 2 * spacing + mean, dtype)
        z, _, _ = answers(kind, data._replace(x=np.asarray(x, np.float64)))
        for y in run(x):
            assert y.dtype == dtype
            half = 0.5 * float(jnp.finfo(dtype).eps) * np.maximum(np.abs(z), 1e-4)
            assert (np.abs(np.float64(y) - z) <= half * 1.001 + 2e-6).all(), mean


@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_evaluation_of_batch_norm(mean):
    """The running mean is one float32, and so as exact as that."""
    data = draw("BatchNorm", False, mean=mean)
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(48, momentum=0.0, epsilon=EPSILON)
    _, state = layer(jnp.asarray(data.x), state)
    y, _ = layer(jnp.asarray(data.x), state, use_running_average=True)
    error = np.abs(np.float64(y) - answers("BatchNorm", data)[0]).max()
    assert error <= 3e-7 * mean + 1e-5


def test_deviations_of_one_rounding_without_epsilon():
    """What is left of data whose deviation is half a unit at a mean of 1e6 is exact."""
    for mean, deviation in ((1e6, 0.5), (1e4, 0.01)):
        x = np.float32(mean + deviation * np.random.default_rng(0).normal(size=(4, 768)))
        wide = np.float64(x)
        wanted = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
        for y in (
            jax.jit(lambda x: en.standardize(x, epsilon=0.0))(x),
            jax.jit(lambda x: jax.vjp(lambda x: en.standardize(x, epsilon=0.0), x)[0])(x),
        ):
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
