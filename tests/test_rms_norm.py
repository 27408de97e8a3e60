"""`RMSNorm`, as far as it differs from `LayerNorm`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import normal, randomize, reference


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-2, 1.0])
def test_epsilon(epsilon):
    x = (1 + normal(0, (4, 8))) / 10
    expected, _, _ = reference(x, (1,), center=False, epsilon=epsilon)
    np.testing.assert_allclose(en.RMSNorm(8, epsilon=epsilon)(x), expected, atol=1e-5)


def test_default_epsilon():
    assert en.RMSNorm(8).epsilon == 1e-6


def test_no_mean_and_no_bias():
    """The parameters are those of `LayerNorm`, but for the bias."""
    theirs = inspect.signature(en.LayerNorm).parameters
    ours = inspect.signature(en.RMSNorm).parameters
    assert list(ours) == [name for name in theirs if "bias" not in name]
    y = en.RMSNorm(8)(jnp.full((2, 8), 3.0))
    np.testing.assert_allclose(y, 1, atol=1e-6)


@pytest.mark.parametrize("use_fast_variance", [False, True])
def test_use_fast_variance(use_fast_variance):
    """No mean is subtracted, so nothing cancels, whatever the mean."""
    x = 1e4 + normal(0, (4, 32))
    expected, _, _ = reference(x, (1,), center=False)
    y = en.RMSNorm(32, use_fast_variance=use_fast_variance)(x)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (4, 1)])
def test_mask(shape):
    x = 2 + normal(0, (4, 8))
    mask = normal(1, shape) > -0.5
    layer = randomize(en.RMSNorm(8))
    y = layer(x, mask=mask)
    expected, _, _ = reference(x, (1,), center=False, mask=mask, scale=layer.scale)
    # A row without any counted position has only epsilon to be divided by.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_axis_name():
    x = 2 + normal(0, (4, 8))
    layer = en.RMSNorm(4, axis_name="parts")
    y = jax.vmap(layer, axis_name="parts")(jnp.stack(jnp.split(x, 2, axis=1)))
    expected, _, _ = reference(x, (1,), center=False)
    np.testing.assert_allclose(jnp.concatenate(list(y), 1), expected, atol=1e-5)
