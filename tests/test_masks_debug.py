"""Under `jax_debug_nans`: what a mask excludes may be anything, and nothing complains."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import all_norms, call, every, normal


@pytest.fixture(autouse=True)
def _debug_nans():
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


WAYS: dict[str, Any] = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),)),
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(f(x)))(x),
    "second": lambda f, x: jax.grad(
        lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x) ** 2))(x))
    )(x),
}


@every(2)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@all_norms
def test_nan_under_the_mask(case, dtype, way):
    layer, state = case.build(8)
    clean = normal(0, (2, 5, 8)).astype(dtype)
    hole = np.zeros((2, 5, 8), bool)
    hole[0, 1, 3] = True
    with jax.debug_nans(False):
        x = jnp.where(hole, jnp.nan, clean)

    def f(x):
        y = call(layer, state, x, mask=jnp.asarray(~hole))
        return jnp.where(hole, 0, y.astype(jnp.float32))

    # Not compiled, where each operation looks at what it made. As with anything else there.
    for a, b in zip(
        jax.tree.leaves(way(f, x)), jax.tree.leaves(way(f, clean)), strict=True
    ):
        a, b = (np.where(hole, 0, np.asarray(v, np.float32)) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-5)
