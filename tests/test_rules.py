"""Rules of `replace_norms` for norms as others write them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import normal
from .test_convert_equinox import close, evaluate, forward


class OwnBatchNorm(eqx.nn.StatefulLayer):
    """With its running mean and variance in two entries of the state."""

    mean: eqx.nn.StateIndex
    var: eqx.nn.StateIndex
    weight: jax.Array

    def __init__(self, size):
        self.mean, self.var = (
            eqx.nn.StateIndex(jnp.full(size, n, jnp.float32)) for n in (0, 1)
        )
        self.weight = jnp.ones(size)

    def __call__(self, x, state, *, key=None):
        y = (x - state.get(self.mean)) / jnp.sqrt(state.get(self.var) + 1e-5)
        return y * self.weight, state


def test_a_rule_that_reads_the_state():
    """By closing over it, which leaves it as it is. Two layers keep theirs apart."""
    make = lambda: eqx.nn.Sequential([OwnBatchNorm(3), OwnBatchNorm(3)])  # noqa: E731
    model, state = eqx.nn.make_with_state(make)()
    for i, layer in enumerate(model.layers):
        state = state.set(layer.mean, jnp.arange(3.0) + i).set(
            layer.var, jnp.full(3, 2.0, jnp.float32)
        )
    model = eqx.tree_at(lambda m: m[0].weight, model, jnp.array([1.0, 2.0, 3.0]))

    def renew(layer):
        make = eqx.nn.make_with_state(en.BatchNorm)
        norm, own = make(3, axis=0, axis_name="batch", use_bias=False)
        count = jnp.ones(3, jnp.int32)
        stats = en.RunningStats(state.get(layer.mean), state.get(layer.var), count)
        norm = eqx.tree_at(lambda norm: norm.scale, norm, layer.weight)
        return norm, own.set(norm.state_index, stats)

    new, new_state = en.replace_norms(model, state, rules={OwnBatchNorm: renew})
    x = normal(7, (8, 3))
    close(evaluate(new, new_state, x), evaluate(model, state, x), 1e-5)
    _, after = forward(new, new_state, x)
    first, second = (norm.running_stats(after).mean for norm in new)
    assert not jnp.allclose(first, second)


@pytest.mark.parametrize("size", [64, 1000])
def test_rounding_of_language_models(size):
    """Normalised in float32, rounded to bfloat16, multiplied by the weight then: PyTorch's
    bits but where a rounding is a tie within float32's precision."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(0)
    hidden = torch.tensor(rng.normal(1, 3, (500, size))).to(torch.bfloat16)
    weight = torch.tensor(rng.normal(0.4, 0.2, size)).to(torch.bfloat16)
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (weight * wide.to(torch.bfloat16)).float().numpy()
    x, w = (jnp.asarray(t.float().numpy(), jnp.bfloat16) for t in (hidden, weight))
    y = en.RMSNorm(size, use_scale=False, dtype="input")(x) * w[None]
    assert y.dtype == jnp.bfloat16
    y = np.asarray(y, np.float32)
    different = y != expected
    assert different.mean() < 1e-3
    # Where they do differ, by a bit before the weight and one after it.
    np.testing.assert_allclose(y, expected, rtol=2**-6)
    # Rounded once, after the scale, many are others.
    once = en.RMSNorm(size, scale_init=lambda *_: w, param_dtype=jnp.bfloat16)(x)
    assert (np.asarray(once, np.float32) != expected).mean() > 0.1


def test_spectral_norm_of_a_vector():
    """Divided by its length."""
    linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    layer = en.SpectralNorm(linear, where=lambda m: m.bias, key=jax.random.key(1))
    baked = en.bake(layer)
    close(baked.bias, linear.bias / jnp.linalg.norm(linear.bias))
