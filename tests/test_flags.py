"""Flags that became arrays: an error where traced, and none where they have a value."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from .helpers import STATEFUL, assert_close, call, normal, over, raises, step


def replaced(tree, field, value):
    return eqx.tree_at(lambda tree: getattr(tree, field), tree, value)


# From a function of a flag, ways to have it traced.
TRACED = {
    "jit": lambda f: jax.jit(f)(True),
    "device_put": lambda f: eqx.filter_jit(f)(jax.device_put(True)),
    "scan": lambda f: jax.lax.scan(lambda x, _: (x, f(x)), jnp.asarray(True), length=2),
    "vmap": lambda f: jax.vmap(f)(jnp.asarray([True])),
}


# The layer, the flag, and whether it is given at the call.
FLAGS = [
    ("BatchNorm", "frozen", False),
    ("BatchNorm", "inference", False),
    ("BatchNorm", "use_running_average", True),
    ("SpectralNorm", "inference", False),
    ("SpectralNorm", "update_stats", True),
]


@pytest.mark.parametrize("way", TRACED)
@pytest.mark.parametrize(
    ("name", "flag", "at_call"), FLAGS, ids=[f"{row[0]}-{row[1]}" for row in FLAGS]
)
def test_traced_flags(name, flag, at_call, way, request):
    (case,) = (case for case in STATEFUL if case.name == name)
    layer, state = case.build(8)

    def f(value):
        if at_call:
            return call(layer, state, normal(0, (16, 8)), **{flag: value})
        return call(replaced(layer, flag, value), state, normal(0, (16, 8)))

    match = (
        f"`{flag}` must be True or False, got a traced array.*`jax.jit`.*"
        "`eqx.filter_jit` and `eqx.filter_shard`.*`eqx.partition"
    )
    with raises(name, match, request, typed=flag if at_call else None):
        TRACED[way](f)


@over(*STATEFUL)
def test_flags_that_are_arrays_but_have_a_value(case):
    """Outside of any transformation, nothing has to be said."""
    layer, state = case.build(8)
    x = normal(0, (16, 8))
    for inference in (False, True):
        layer = eqx.nn.inference_mode(layer, inference)
        placed = jax.device_put(layer, jax.devices()[0])
        assert eqx.is_array(placed.inference)
        (y, new), (wanted, kept) = step(placed, state, x), step(layer, state, x)
        assert_close((y, new), (wanted, kept))
