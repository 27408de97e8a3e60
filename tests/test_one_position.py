"""A mean of one position leaves nothing of the input: who refuses it, and who does not."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import eqx_norms as en

from .helpers import normal


InstanceNorm = partial(en.InstanceNorm, 4)
Single = partial(en.GroupNorm, 4, 4)
REFUSE = pytest.mark.parametrize("make", [InstanceNorm, Single], ids=["Instance", "Group"])
MATCH = (
    "^{}: needs more than one position for each mean and variance, got an input of shape"
)


def refused(layer):
    return pytest.raises(ValueError, match=MATCH.format(type(layer).__name__))


@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (1, 1, 4), (0, 1, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@REFUSE
def test_refused(make, masked, shape):
    """A mask makes it no more."""
    layer, x = make(), normal(0, shape)
    mask = jnp.ones((*shape[:-1], 1), bool) if masked else None
    with refused(layer):
        layer(x, mask=mask)
    with refused(layer):
        eqx.filter_eval_shape(layer, x, mask=mask)
    layer = make(batch_axes=())
    with refused(layer):
        jax.vmap(layer)(jnp.ones((3, *shape[1:])))


def test_remedies():
    x = normal(0, (2, 1, 1, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 1, 4\).*Use fewer groups, or leave"):
        Single()(x)
    with pytest.raises(ValueError, match="Give an input of more positions, or leave the"):
        InstanceNorm()(x)
    y = en.GroupNorm(4, 2, epsilon=0.0)(x)
    np.testing.assert_allclose(jnp.abs(y), jnp.ones(x.shape), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 1, 4), (2, 0, 1, 4)], ids=str)
@REFUSE
def test_other_than_one(make, shape):
    x = normal(0, shape)
    y = make()(x)
    if x.size:
        mean, var = np.mean(x, (1, 2), keepdims=True), np.var(x, (1, 2), keepdims=True)
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-6), atol=1e-5)


@REFUSE
def test_members_count(make):
    """Space that is split over a named axis, one position to each member."""
    x = normal(0, (2, 6, 1, 4))

    def over(**kwargs):
        layer = make(axis_name="space", **kwargs)
        return jax.vmap(layer, in_axes=1, out_axes=1, axis_name="space")

    np.testing.assert_allclose(over()(x), make()(x), atol=1e-6)
    groups = [[0, 1, 2], [3, 4, 5]]
    wanted = jnp.concatenate([make()(x[:, :3]), make()(x[:, 3:])], 1)
    np.testing.assert_allclose(over(axis_index_groups=groups)(x), wanted, atol=1e-6)
    with refused(make()):
        over(axis_index_groups=[[i] for i in range(6)])(x)
    with refused(make()):
        over()(x[:, :1])


@REFUSE
def test_symbolic_sizes(make):
    """What may be more than one is not refused."""
    layer = make()
    shape = export.symbolic_shape("b, h, 1, 4")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export.export(jax.jit(lambda x: layer(x)))(x)
    x = normal(0, (2, 3, 1, 4))
    np.testing.assert_allclose(exported.call(x), layer(x), atol=1e-6)
    with refused(layer):
        x = jax.ShapeDtypeStruct((shape[0], 1, 1, 4), jnp.float32)
        export.export(jax.jit(lambda x: layer(x)))(x)


def test_pytorch():
    """It refuses one position in InstanceNorm, and in GroupNorm for one example."""
    torch = pytest.importorskip("torch")
    for module, x in (
        (torch.nn.InstanceNorm2d(4), torch.ones(2, 4, 1, 1)),
        (torch.nn.GroupNorm(4, 4), torch.ones(1, 4, 1, 1)),
    ):
        with pytest.raises(ValueError, match="Expected more than 1 "):
            module(x)
    y = torch.nn.LayerNorm(1)(torch.ones(2, 1))
    np.testing.assert_array_equal(y.detach(), np.zeros((2, 1)))


ONE = [
    (en.LayerNorm(1, bias_init=jax.nn.initializers.ones), jnp.ones_like),
    (en.RMSNorm(1, epsilon=0.0), jnp.sign),
    (lambda x: en.standardize(x), jnp.zeros_like),
]


@pytest.mark.parametrize(("layer", "wanted"), ONE, ids=["Layer", "RMS", "standardize"])
def test_one_feature(layer, wanted):
    """As in Flax and Equinox."""
    x: Any = normal(0, (5, 1))
    np.testing.assert_allclose(layer(x), wanted(x), atol=1e-6)
    for theirs in (nnx.LayerNorm(1, rngs=nnx.Rngs(0)), jax.vmap(eqx.nn.LayerNorm(1))):
        np.testing.assert_allclose(theirs(x), np.zeros(x.shape), atol=1e-6)
