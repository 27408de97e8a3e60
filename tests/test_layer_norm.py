"""`LayerNorm`, parameter by parameter, against float64. Axes, dtypes, scale and bias, and
what all layers have in common, have files of their own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import normal, randomize, reference


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-2, 1.0])
def test_epsilon(epsilon):
    # A variance of about 1e-2, which each of them but the smallest changes.
    x = 1 + normal(0, (4, 8)) / 10
    expected, _, _ = reference(x, (1,), epsilon=epsilon)
    np.testing.assert_allclose(en.LayerNorm(8, epsilon=epsilon)(x), expected, atol=1e-5)


def test_default_epsilon():
    """Flax's, which is not that of `BatchNorm`."""
    x = normal(0, (4, 8)) / 1000
    expected, _, _ = reference(x, (1,), epsilon=1e-6)
    np.testing.assert_allclose(en.LayerNorm(8)(x), expected, atol=1e-5)
    assert en.LayerNorm(8).epsilon == 1e-6


@pytest.mark.parametrize("use_fast_variance", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_use_fast_variance(use_fast_variance, mean):
    x = mean + normal(0, (4, 32))
    expected, _, _ = reference(x, (1,))
    y = en.LayerNorm(32, use_fast_variance=use_fast_variance)(x)
    # A mean of 100 costs what its rounding in float32 is to the deviation.
    np.testing.assert_allclose(y, expected, atol=2e-6 if mean == 0 else 5e-5)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (4, 1)])
def test_mask(shape):
    x = 2 + normal(0, (4, 8))
    mask = normal(1, shape) > -0.5
    layer = randomize(en.LayerNorm(8))
    expected, _, _ = reference(x, (1,), mask=mask, scale=layer.scale, bias=layer.bias)
    np.testing.assert_allclose(layer(x, mask=mask), expected, atol=1e-5)


def test_axis_name():
    """Features split over a named axis are normalised as if they were together."""
    x = 2 + normal(0, (4, 8))
    layer = en.LayerNorm(4, axis_name="parts")
    parts = jnp.stack(jnp.split(x, 2, axis=1))
    y = jax.vmap(layer, axis_name="parts")(parts)
    expected, _, _ = reference(x, (1,))
    np.testing.assert_allclose(jnp.concatenate(list(y), 1), expected, atol=1e-5)


def test_axis_index_groups():
    x = 2 + normal(0, (4, 3, 8))
    groups = [[0, 3], [1, 2]]
    layer = en.LayerNorm(8, axis_name="parts", axis_index_groups=groups)
    y = jax.vmap(layer, axis_name="parts")(x)
    for group in groups:
        together = np.concatenate([x[index] for index in group], axis=1)
        expected, _, _ = reference(together, (1,))
        actual = np.concatenate([y[index] for index in group], axis=1)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_of_any_rank():
    layer = randomize(en.LayerNorm(8))
    x = normal(0, (2, 3, 4, 8))
    apply = eqx.filter_jit(layer)
    y = np.asarray(apply(x))
    np.testing.assert_allclose(y[1, 2, 3], apply(x[1, 2, 3]), atol=1e-6)
    np.testing.assert_allclose(y[1], apply(x[1]), atol=1e-6)
