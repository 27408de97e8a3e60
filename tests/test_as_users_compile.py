"""Derivatives, masks and collectives with all of XLA's optimisations, as users compile:
the other tests of them go without most."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import all_norms, assert_close, call, float64, normal, plain, reference
from .test_collectives import KINDS, check
from .test_derivatives import SHAPE, Problem, compare, derivatives


@all_norms
def test_derivatives(case):
    with float64():
        x = 3 + normal(0, SHAPE, jnp.float64)
        compare(Problem(case, scale_offset=0.5), x, of=derivatives)


@all_norms
def test_masks(case):
    """In float32, with values that must reach nothing where the mask excludes."""
    layer, state = case.build(8)
    x = 1 + 3 * normal(0, (6, 5, 8))
    mask = normal(1, x.shape) > -0.5
    axes, formula = case.reduction_axes(3), {**case.formula, "epsilon": layer.epsilon}

    def f(x):
        return call(layer, state, x, mask=mask)

    @jax.jit
    def both(x):
        dx = jax.grad(lambda x: jnp.sum(jnp.where(mask, jnp.sin(f(x)), 0)))(x)
        return f(x), dx

    y, dx = both(jnp.where(mask, x, jnp.nan))
    wanted, _, _ = reference(np.where(mask, x, 0), axes, **formula, mask=mask)
    assert_close(jnp.where(mask, y, 0), jnp.where(mask, wanted, 0).astype(x.dtype))

    def loss(x):
        y = plain(x, axes, **formula, mask=mask)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0))

    with float64():
        wanted = jax.grad(loss)(jnp.where(mask, x, 0).astype(jnp.float64))
    assert_close(dx, wanted, same_dtype=False)


@pytest.mark.parametrize(
    ("levels", "grouped"),
    [("vmap:a", False), ("shard:a vmap:b", False), ("shard:a", True)],
    ids=["vmap", "vmap in shard_map", "groups in shard_map"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_collectives(kind, levels, grouped):
    check(kind, levels, grouped, masked="unequal")


@all_norms
def test_bfloat16(case):
    """One rounding of what the plain code gives in float64, compiled with its gradient."""
    layer, state = case.build(8, dtype="input")
    x = (3 + normal(0, (6, 5, 8))).astype(jnp.bfloat16)
    y = eqx.filter_jit(lambda x: jax.vjp(lambda x: call(layer, state, x), x)[0])(x)
    assert y.dtype == jnp.bfloat16
    wanted, _, _ = reference(
        x, case.reduction_axes(3), **case.formula, epsilon=layer.epsilon
    )
    assert_close(y, wanted, 2.0**-8, same_dtype=False)
