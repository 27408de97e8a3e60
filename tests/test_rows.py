"""Rows: the backward pass that is lowered for a CPU takes the gradient of the input and
those of scale and bias apart, any other takes them together."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from .helpers import NORMS, normal, over


row_layers = over(*(case for case in NORMS if case.name in ("LayerNorm", "RMSNorm")))
SHAPE = (6, 5, 8)


@row_layers
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: d.__name__)
def test_constant_rows_of_half_precision(case, dtype):
    """Zero, if the mean is subtracted."""
    layer, _ = case.build(1000, epsilon=1e-6, use_scale=False)
    for value in (1.3, 100.3, 50000.0):
        x = jnp.full((2, 1000), value, dtype)
        y = jax.jit(lambda x: layer(x))(x)
        wanted, rounding = (0, 5e-6) if case.center else (1, 1e-2)
        np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=0, atol=rounding)


@row_layers
@pytest.mark.parametrize("number", [512, 1000])
def test_constant_rows_without_epsilon(case, number):
    """Zero to the bit, if the mean is subtracted, however it is rounded."""
    layer, _ = case.build(number, epsilon=0.0, use_scale=False)
    x = jnp.repeat(jnp.asarray([0.1, 1.3, -77.7, 1e5 / 3, 1e-10])[:, None], number, 1)
    y = jax.jit(lambda x: layer(x))(x)
    np.testing.assert_allclose(y, 0 if case.center else np.sign(x), rtol=1e-6)


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


@row_layers
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_apart_and_together_agree(case, masked, monkeypatch):
    layer, _ = case.build(SHAPE[-1])
    x, *others = (3 + normal(i, SHAPE) for i in range(5))
    mask = jnp.asarray(np.random.default_rng(0).random(SHAPE) < 0.6) if masked else None
    calls = []

    def loss(scale, bias, x):
        return jnp.vdot(others[0], layer(x, mask=mask, scale=scale, bias=bias))

    def as_on_others(*args, default, cpu):
        calls.append(cpu)
        return default(*args)

    # An entry for each feature, and one for each position.
    for terms in ((others[1][0, 0], others[2][0, 0]), (others[1], others[2])):
        args, tangents = (*terms, x), (*(t[::-1] for t in terms), others[3])

        def derivatives(args=args, tangents=tangents):
            jax.clear_caches()
            gradient = jax.grad(loss, (0, 1, 2))
            return jax.jit(lambda *args: jax.jvp(gradient, args, tangents))(*args)

        apart = derivatives()
        with monkeypatch.context() as context:
            context.setattr(lax, "platform_dependent", as_on_others)
            together = derivatives()
        jax.clear_caches()
        for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert calls
