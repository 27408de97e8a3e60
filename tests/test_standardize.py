"""The function that the layers are made of: against float64, and against the layers."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import every, make_mesh, normal, reference


SHAPE = (6, 5, 8)
AXES = [-1, 0, (0, 1), (2, 0), [1, -1], (0, 1, 2)]
all_axes = pytest.mark.parametrize("axes", AXES, ids=str)


def as_tuple(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)


@every(2)
@all_axes
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_against_float64(axes, subtract_mean, fast, masked):
    x = 3 + normal(0, SHAPE)
    mask = np.random.default_rng(0).random((6, 1, 8)) < 0.6 if masked else None
    scale, bias = normal(1, (5, 1)), normal(2, (8,))
    y = en.standardize(
        x,
        axes,
        mask=mask,
        scale=scale,
        bias=bias,
        scale_offset=1.0,
        epsilon=1e-3,
        subtract_mean=subtract_mean,
        use_fast_variance=fast,
    )
    wanted, _, _ = reference(
        x,
        as_tuple(axes),
        center=subtract_mean,
        epsilon=1e-3,
        mask=mask,
        scale=np.asarray(scale, np.float64) + 1,
        bias=bias,
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("make", [en.LayerNorm, en.RMSNorm])
def test_is_what_the_layers_are_made_of(make):
    """To the bit, output and gradients."""
    layer, x = make(8), normal(0, SHAPE)
    scale, bias = normal(1, (8,)), None if make is en.RMSNorm else normal(2, (8,))
    subtract_mean = make is en.LayerNorm
    layer = layer.__class__(
        8, scale_init=lambda *_: scale, **({} if bias is None else {"use_bias": True})
    )

    def of_layer(x):
        return layer(x, bias=bias)

    def of_function(x):
        return en.standardize(x, scale=scale, bias=bias, subtract_mean=subtract_mean)

    for f in (lambda f: f, lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))):
        np.testing.assert_array_equal(f(of_layer)(x), f(of_function)(x))


@pytest.mark.parametrize(
    ("x", "kwargs", "wanted"),
    [
        (jnp.bfloat16, {}, jnp.bfloat16),
        (jnp.bfloat16, {"scale": jnp.ones(8)}, jnp.float32),
        (jnp.bfloat16, {"scale": jnp.ones(8), "dtype": "input"}, jnp.bfloat16),
        (jnp.float32, {"dtype": jnp.float16}, jnp.float16),
        (jnp.int32, {}, jnp.float32),
        (jnp.int32, {"dtype": "input"}, jnp.float32),
        (jnp.complex64, {}, jnp.complex64),
    ],
    ids=str,
)
def test_dtype(x, kwargs, wanted):
    y = en.standardize(jnp.arange(16).reshape(2, 8).astype(x), **kwargs)
    assert y.dtype == wanted


@pytest.mark.parametrize("groups", [None, [[0, 3, 5], [1, 2, 4]]], ids=["all", "groups"])
@pytest.mark.parametrize("axes", [0, ()], ids=str)
def test_over_a_vmapped_axis(axes, groups):
    x = 3 + normal(0, SHAPE)
    f = ft.partial(en.standardize, axes=axes, axis_name="i", axis_index_groups=groups)
    y = np.asarray(jax.vmap(f, axis_name="i")(x))
    over = (0,) if axes == () else (0, 1)
    for group in [list(range(6))] if groups is None else groups:
        wanted, _, _ = reference(x[np.array(group)], over)
        np.testing.assert_allclose(y[np.array(group)], wanted, atol=2e-5)


def test_over_devices():
    mesh = make_mesh(d=2)
    x = 3 + normal(0, SHAPE)
    f = ft.partial(en.standardize, axes=0, axis_name="d")
    y = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x)
    np.testing.assert_allclose(y, reference(x, (0,))[0], atol=2e-5)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"axes": 3}, r"`axes=.* has axis 3, which is out of range for .* 3 dimensions"),
        ({"axes": (0, 0)}, r"`axes=.* names an axis more than once"),
        ({"axes": (0, -3)}, r"`axes=.* names an axis more than once for an input"),
        (
            {"axes": ()},
            r"no axis left to take statistics over .* \(6, 5, 8\). Name one in `axes`",
        ),
        ({"scale": jnp.ones(5)}, r"`scale` of shape \(5,\) does not broadcast to .*8\)"),
        ({"bias": jnp.ones((1, 6, 5, 8))}, "`bias` of shape .* does not broadcast"),
        ({"mask": jnp.ones((6, 5), bool)}, "`mask` of shape .* does not broadcast"),
        ({"epsilon": -1.0}, "`epsilon` must be finite and not negative, got -1"),
        ({"scale_offset": float("nan")}, "`scale_offset` must be finite, got nan"),
        ({"dtype": jnp.int32}, "`dtype` must be a floating or complex dtype"),
        ({"axis_index_groups": [[0]]}, "Give the one name that the groups divide"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value))),
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=f"^standardize: .*{match}"):
        en.standardize(normal(0, SHAPE), **kwargs)


def test_keys_for_input():
    with pytest.raises(ValueError, match=r"^standardize: `x` must be an array of numbers"):
        en.standardize(jax.random.split(jax.random.key(0), 8))


def test_a_name_that_is_bound_nowhere():
    with pytest.raises(NameError, match=r"^standardize: .* name 'i', which is not bound"):
        en.standardize(normal(0, SHAPE), axis_name="i")


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_complex_data_without_epsilon(subtract_mean):
    x = np.array(normal(0, (6, 4), jnp.complex64))
    x[2] = 3 + 1j
    y = en.standardize(x, epsilon=0.0, subtract_mean=subtract_mean)
    wanted, _, _ = reference(x, (-1,), center=subtract_mean, epsilon=0.0)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_lists_are_arrays(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x: Any = [[1.0, 2.0, 4.0]] * 2
    scale: Any = [1.0, 2.0, 3.0]
    mask: Any = [True, True, False]
    bias: Any = tuple(scale)
    y = en.standardize(x, scale=scale, bias=bias, mask=mask)
    wanted, _, _ = reference(x, (-1,), scale=scale, bias=scale, mask=np.array(mask))
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    layer = en.LayerNorm(3)
    array = np.array(x, np.float32)
    np.testing.assert_allclose(layer(x, scale=scale), layer(array, scale=scale))


def test_epsilon_is_known_before_tracing(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    epsilon: Any
    for epsilon in (10**400, None):
        with pytest.raises(ValueError, match="a Python number, known before tracing"):
            en.standardize(jnp.ones(4), epsilon=epsilon)
    with pytest.raises(ValueError, match="a Python number, known before tracing"):
        jax.jit(lambda epsilon: en.standardize(jnp.ones(4), epsilon=epsilon))(1e-6)
