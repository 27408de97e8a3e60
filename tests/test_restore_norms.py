"""Norms of this library, and whole models of them, against those of `equinox.nn` that they
become."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms import convert

from .helpers import normal
from .test_convert_equinox import close, evaluate, forward, shaken


KEY = jax.random.key(0)
LAST = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
FIRST = {"feature_axis": 0, "batch_axes": ()}
INSTANCE = {"feature_axes": 0, "batch_axes": ()}
HALF = {"param_dtype": jnp.bfloat16}
BN = {"axis": 0, "axis_name": "batch"}


def linear():
    return eqx.nn.Linear(3, 4, key=KEY)


def conv():
    return eqx.nn.Conv2d(3, 4, 2, key=KEY)


def spectral(layer, **kwargs):
    return en.SpectralNorm(layer, key=KEY, **kwargs)


# What makes the layer, the shape of an example, and what it becomes.
CASES = {
    "LayerNorm": (lambda: en.LayerNorm(5), (5,), "LayerNorm"),
    "LayerNorm, axes": (lambda: en.LayerNorm((3, 5), **LAST), (3, 5), "LayerNorm"),
    "LayerNorm, reduced in another order": (
        lambda: en.LayerNorm((3, 5), reduction_axes=(-1, -2), feature_axes=(-2, -1)),
        (3, 5),
        "LayerNorm",
    ),
    "LayerNorm, no scale": (
        lambda: en.LayerNorm(5, epsilon=1e-2, use_scale=False, dtype="input"),
        (5,),
        "LayerNorm",
    ),
    "LayerNorm, no bias": (
        lambda: en.LayerNorm(5, use_bias=False, dtype=jnp.float32),
        (5,),
        "LayerNorm",
    ),
    "LayerNorm, offset": (lambda: en.LayerNorm(5, scale_offset=1.0), (5,), "LayerNorm"),
    "LayerNorm, plain": (
        lambda: en.LayerNorm(5, scale_offset=1.0, use_scale=False, use_bias=False),
        (5,),
        "LayerNorm",
    ),
    "LayerNorm, half": (lambda: en.LayerNorm(5, dtype="input", **HALF), (5,), "LayerNorm"),
    "RMSNorm": (lambda: en.RMSNorm(5, use_fast_variance=False), (5,), "RMSNorm"),
    "RMSNorm, half, offset": (
        lambda: en.RMSNorm(5, scale_offset=1.0, **HALF),
        (5,),
        "RMSNorm",
    ),
    "RMSNorm, plain": (
        lambda: en.RMSNorm((3, 5), use_scale=False, **LAST),
        (3, 5),
        "RMSNorm",
    ),
    "RMSNorm, bias": (
        lambda: convert.from_equinox(eqx.nn.RMSNorm(5, use_bias=True)),
        (5,),
        "RMSNorm",
    ),
    "GroupNorm": (lambda: en.GroupNorm(6, 2, **FIRST), (6, 3), "GroupNorm"),
    "GroupNorm, sizes": (lambda: en.GroupNorm(6, None, 2, **FIRST), (6, 3, 2), "GroupNorm"),
    "GroupNorm, no bias": (
        lambda: en.GroupNorm(6, 2, use_bias=False, epsilon=1e-2, **FIRST),
        (6,),
        "GroupNorm",
    ),
    "GroupNorm, no scale": (
        lambda: en.GroupNorm(6, 3, use_scale=False, **FIRST),
        (6, 4),
        "GroupNorm",
    ),
    "GroupNorm, plain": (
        lambda: en.GroupNorm(6, 3, use_scale=False, use_bias=False, **FIRST),
        (6, 4),
        "GroupNorm",
    ),
    "InstanceNorm": (lambda: en.InstanceNorm(6, **INSTANCE), (6, 4), "GroupNorm"),
    "InstanceNorm, offset": (
        lambda: en.InstanceNorm((6,), scale_offset=0.5, use_bias=False, **INSTANCE),
        (6, 4, 2),
        "GroupNorm",
    ),
    "BatchNorm": (lambda: en.BatchNorm(4, momentum=0.9, **BN), (4, 3), "BatchNorm"),
    "BatchNorm, frozen": (
        lambda: en.freeze(en.BatchNorm((4,), debias=True, **BN)),
        (4,),
        "BatchNorm",
    ),
    "BatchNorm, half": (lambda: en.BatchNorm(4, **HALF, **BN), (4, 3), "BatchNorm"),
    "BatchNorm, plain": (
        lambda: en.BatchNorm(4, use_scale=False, use_bias=False, dtype="input", **BN),
        (4, 3),
        "BatchNorm",
    ),
    "BatchNorm, no bias": (
        lambda: en.BatchNorm(4, use_bias=False, momentum=None, scale_offset=1.0, **BN),
        (4, 3),
        "BatchNorm",
    ),
    "BatchNorm, no momentum": (
        lambda: en.BatchNorm(4, momentum=0.0, use_unbiased_variance=True, **BN),
        (4, 3),
        "BatchNorm",
    ),
    "BatchNorm, one name of two": (
        lambda: en.BatchNorm(4, axis=0, axis_name=("batch", "x"), use_running_average=True),
        (4, 3),
        "BatchNorm",
    ),
    "WeightNorm": (lambda: en.WeightNorm(linear()), (3,), "WeightNorm"),
    "WeightNorm, conv": (
        lambda: en.WeightNorm(conv(), feature_axes=-3, scale_init="norm"),
        (3, 4, 4),
        "WeightNorm",
    ),
    "WeightNorm, no axis": (
        lambda: en.WeightNorm(conv(), feature_axes=None),
        (3, 4, 4),
        "WeightNorm",
    ),
    "WeightNorm, no scale, large epsilon": (
        lambda: en.WeightNorm(linear(), use_scale=False, epsilon=0.3),
        (3,),
        "WeightNorm",
    ),
    "SpectralNorm": (lambda: spectral(linear(), n_steps=2), (3,), "SpectralNorm"),
    "SpectralNorm, conv": (
        lambda: spectral(conv(), update_stats=False, feature_axes=-4),
        (3, 4, 4),
        "SpectralNorm",
    ),
}
every = pytest.mark.parametrize("name", CASES)


def made(name, steps=3) -> tuple[Any, Any, Any, type]:
    """A layer, its state after some steps, a batch and what the layer becomes."""
    make, shape, becomes = CASES[name]
    layer, state = eqx.nn.make_with_state(lambda: shaken(make()))()
    x = (2 + 3 * normal(7, (8, *shape))).astype(
        jnp.bfloat16 if "half" in name else jnp.float32
    )
    if not hasattr(layer, "state_index"):
        state = None
    elif "two" not in name:
        for _ in range(steps):
            _, state = forward(layer, state, x)
    return layer, state, x, getattr(eqx.nn, becomes)


def as_pair(converted):
    return converted if isinstance(converted, tuple) else (converted, None)


@every
def test_evaluation(name):
    """And back again, where every bit is the same."""
    layer, state, x, becomes = made(name)
    before = jax.tree.leaves((layer, state))
    new, new_state = as_pair(convert.to_equinox(layer, state))
    assert type(new) is becomes
    expected, y = evaluate(layer, state, x), evaluate(new, new_state, x)
    half = "half" in name
    if not (half and becomes is eqx.nn.BatchNorm):  # Whose statistics are float32.
        assert y.dtype == expected.dtype == x.dtype
    close(y.astype(jnp.float32), expected.astype(jnp.float32), 1e-2 if half else 2e-5)
    back, back_state = as_pair(convert.from_equinox(new, new_state))
    again, again_state = as_pair(convert.to_equinox(back, back_state))
    arrays = jax.tree.leaves(eqx.filter((new, new_state), eqx.is_array))
    assert eqx.tree_equal(
        arrays, jax.tree.leaves(eqx.filter((again, again_state), eqx.is_array))
    )
    # What was given stays as it was.
    for a, b in zip(jax.tree.leaves((layer, state)), before, strict=True):
        assert a is b


@every
def test_initial_state(name):
    """Before `make_with_state` the state is in the layer."""
    make, _, becomes = CASES[name]
    new = en.restore_norms([make()])[0]
    assert type(new) is getattr(eqx.nn, becomes)
    whole, state = as_pair(convert.to_equinox(make()))
    if state is not None:
        new, other = eqx.nn.make_with_state(lambda: new)()
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
    assert eqx.tree_equal(eqx.filter(whole, eqx.is_array), eqx.filter(new, eqx.is_array))
