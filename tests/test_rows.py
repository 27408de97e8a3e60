"""Rows that are constant, in half precision and without epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import NORMS, over


row_layers = over(*(case for case in NORMS if case.name in ("LayerNorm", "RMSNorm")))


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
