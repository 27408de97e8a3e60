"""Accuracy with a large mean, over devices.

The shards differ, so that what one device guesses of the mean does not fit the others.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import clone, float64, plain, reference
from .test_collectives import KINDS, SIZES, mapped, way, without


DEVICES = ["vmap:a", "pmap:a", "shard:a", "unchecked:a vmap:b"]


def far(kind, levels, mean, **kwargs):
    """The error of the output for data of this mean and deviation one."""
    dims = "".join(level.dims for level in way(levels))
    rng = np.random.default_rng(3)
    shape = tuple({**SIZES, "r": 32, "f": 16}[d] for d in "abrf")
    x = rng.normal(size=shape) + mean
    x = np.float32(x + rng.normal(0.0, 0.5, (*shape[:2], 1, 1)))
    names = tuple(dims)
    make = KINDS[kind].make
    block = without("abrf", dims)
    over = tuple("abrf".index(d) for d in KINDS[kind].over)
    state = None
    if kind == "BatchNorm":
        layer, state = eqx.nn.make_with_state(make)(16, axis_name=names, **kwargs)
    else:
        axes = tuple(i for i, d in enumerate(block) if d in KINDS[kind].over)
        sizes = tuple(shape["abrf".index(d)] for d in block if d in KINDS[kind].over)
        layer = make(
            sizes,
            axis_name=names,
            reduction_axes=axes,
            feature_axes=axes,
            use_scale=False,
            use_bias=False,
            **kwargs,
        )

    def apply(x, state):
        return (layer(x), None) if state is None else layer(x, clone(state))

    run = jax.jit(mapped(apply, way(levels), ["abrf", "f"], ["abrf", "f"]))
    y, _ = run(x, state)
    wanted, _, _ = reference(x, over, epsilon=layer.epsilon)
    return np.max(np.abs(y - wanted))


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "centred"])
@pytest.mark.parametrize("levels", DEVICES)
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm"])
def test_from_the_first_step(kind, levels, fast):
    for mean in (1e3, 1e6):
        error = far(kind, levels, mean, use_fast_variance=fast)
        assert error <= 1e-5, mean


def over_devices(x, inside=lambda layer: layer):
    """Batch norm of the rows on four devices, and of the columns on two."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    spec = P("d", *(None,) * (x.ndim - 2), "m")

    def local(x):
        layer, state = eqx.nn.make_with_state(en.BatchNorm)(
            x.shape[-1], axis_name="d", use_scale=False, use_bias=False
        )
        return inside(lambda x: layer(x, clone(state))[0])(x)

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)


# The first half of the columns is far from zero, and the second near it.
COLUMNS = np.array([1000, 1000, 1000, 0, 0, 0], np.float32)
BOUND = 1e-5


def test_devices_with_near_and_with_far_data():
    """Each feature is as exact as its own data allows."""
    x = np.random.default_rng(0).normal(size=(8, 6)) + COLUMNS
    x = x.astype(np.float32)
    expected, _, _ = reference(x, (0,), epsilon=1e-5)
    assert (np.abs(jax.jit(over_devices)(x) - expected) <= BOUND).all()

    def gradients(f, x):
        def gradient(x):
            return jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)

        return gradient(x), jax.grad(lambda x: jnp.sum(gradient(x) ** 2))(x)

    found = jax.jit(lambda x: gradients(over_devices, x))(x)
    with float64():
        x = jnp.asarray(x, jnp.float64)
        wanted = gradients(lambda x: plain(x, (0,), epsilon=1e-5), x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_members_of_another_vmap_with_near_and_with_far_data(outside):
    x = np.random.default_rng(0).normal(size=(8, 3, 6)) + COLUMNS
    levels = np.array([0, 1e5, 0])[:, None]
    x = np.float32(x + levels)
    if outside:
        y = jax.jit(jax.vmap(over_devices, 1, 1))(x)
    else:
        y = jax.jit(lambda x: over_devices(x, inside=lambda f: jax.vmap(f, 1, 1)))(x)
    expected, _, _ = reference(x, (0,), epsilon=1e-5)
    assert (np.abs(y - expected) <= BOUND).all()


def test_constant_data():
    x = np.full((8, 6), 12345.678, np.float32)
    assert (jax.jit(over_devices)(x) == 0).all()
