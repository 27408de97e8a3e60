"""Rows on a CPU, which are done without their moments being kept: as they are elsewhere."""

import math
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .helpers import (
    NORMS,
    bytes_kept,
    count_in_hlo,
    elsewhere,
    normal,
    over,
)


row_layers = over(*(case for case in NORMS if case.name in ("LayerNorm", "RMSNorm")))
SHAPE = (6, 5, 8)


def functions(case, **kwargs):
    """The layer as a function of its parameters and an input, and its parameters."""
    layer, _ = case.build(SHAPE[-1], **kwargs)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    return lambda params, x: eqx.combine(params, static)(x), params


@row_layers
def test_keeps_input_and_scale_to_the_byte(case):
    f, params = functions(case)
    x = normal(0, SHAPE)
    assert bytes_kept(f, params, x) == x.nbytes + params.scale.nbytes
    with elsewhere():
        assert bytes_kept(f, params, x) > x.nbytes + params.scale.nbytes


@row_layers
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_constant_rows_of_half_precision(case, dtype, epsilon):
    """Zero to the bit, if the mean is subtracted, though float32 has it not to the bit."""
    layer, _ = case.build(1000, epsilon=epsilon, use_scale=False)
    for value in (1.3, 100.3, 50000.0):
        x = jnp.full((2, 1000), value, dtype)
        y = jax.jit(lambda x: layer(x))(x)
        assert (y == (0 if case.center else 1)).all(), value


@row_layers
@pytest.mark.parametrize("size", [200, 1024])
def test_large_numbers_fit(case, size):
    """Where the squares do, if not the sum of these. That must too, if no mean is
    subtracted from half precision; short rows have room for a sixteenth of the largest."""
    layer, _ = case.build(size)
    signs = 1.0 - 2 * (np.arange(size) % 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        magnitude = 1.5e19 if case.center or size > 256 else 1e18
        if dtype == jnp.bfloat16 and not case.center:
            magnitude = 1.8e19 / math.sqrt(size)
        y = jax.jit(lambda x: layer(x))(jnp.asarray(magnitude * signs, dtype))
        np.testing.assert_allclose(y, signs, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_tracing_starts_no_backend():
    """Devices can be configured after the shapes of a model have been looked at."""
    script = """
import equinox as eqx, jax, jax.numpy as jnp
import eqx_norms as en

x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
eqx.filter_eval_shape(lambda x: en.RMSNorm(8, use_scale=False)(x), x)
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_what_is_private_in_jax():
    script = """
import jax._src.xla_bridge
del jax._src.xla_bridge.backends_are_initialized

import jax, jax.numpy as jnp
import eqx_norms as en

x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
assert jax.eval_shape(en.RMSNorm(8, use_scale=False), x).shape == (2, 8)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@row_layers
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_derivatives_are_those_of_elsewhere(case, masked):
    layer, _ = case.build(SHAPE[-1])
    x, *others = (3 + normal(i, SHAPE) for i in range(5))
    mask = jnp.asarray(np.random.default_rng(0).random(SHAPE) < 0.6) if masked else None

    def loss(scale, bias, x):
        return jnp.vdot(others[0], layer(x, mask=mask, scale=scale, bias=bias))

    # An entry for each feature, and one for each position.
    for terms in ((others[1][0, 0], others[2][0, 0]), (others[1], others[2])):
        args, tangents = (*terms, x), (*(t[::-1] for t in terms), others[3])

        def derivatives(args=args, tangents=tangents):
            gradient = jax.grad(loss, (0, 1, 2))
            return jax.jit(lambda *args: jax.jvp(gradient, args, tangents))(*args)

        here = derivatives()
        with elsewhere():
            there = derivatives()
        for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@row_layers
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_communicates_no_more_than_elsewhere(case, kind):
    """Rows that are split over devices keep their moments, which it took to add them up."""
    f, params = functions(case)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    x = jax.device_put(normal(0, SHAPE), NamedSharding(mesh, P(None, None, "d")))

    def number():
        # The backward pass by itself, as in the backward pass of a scan.
        y, backward = jax.vjp(f, params, x)
        return count_in_hlo(backward, y)

    with jax.set_mesh(mesh):
        here = number()
        with elsewhere():
            assert 0 < here == number()
