"""`InstanceNorm`: each feature of each example alone, against float64, PyTorch and Flax."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import (
    along,
    float64,
    normal,
    over_space,
    plain,
    randomize,
    reference,
)


jitted = eqx.filter_jit(lambda layer, x, **kwargs: layer(x, **kwargs))


def build(num_features=8, **kwargs):
    return randomize(en.InstanceNorm(num_features, **kwargs))


def expected(layer, x, axes, mask=None):
    feature_axes = tuple(axis % x.ndim for axis in layer.feature_axes)
    scale, bias = (along(a, feature_axes, x.ndim) for a in (layer.scale, layer.bias))
    return reference(x, axes, epsilon=layer.epsilon, mask=mask, scale=scale, bias=bias)[0]


# Shape, arguments, and the axes that the statistics are over.
LAYOUTS = {
    "channels last": ((2, 5, 4, 8), {}, (1, 2)),
    "channels first": ((2, 8, 5, 4), {"feature_axes": 1}, (2, 3)),
    "one example": ((5, 4, 8), {"batch_axes": ()}, (0, 1)),
    "one example, channels first": (
        (8, 5, 4),
        {"batch_axes": (), "feature_axes": 0},
        (1, 2),
    ),
    "several batch axes": ((2, 3, 5, 8), {"batch_axes": (0, 1)}, (2,)),
    "batch last": ((8, 5, 3), {"batch_axes": -1, "feature_axes": 0}, (1,)),
    "several feature axes": (
        (2, 3, 5, 8),
        {"num_features": (3, 8), "feature_axes": (1, 3)},
        (2,),
    ),
    "in swapped order": (
        (2, 3, 5, 8),
        {"num_features": (8, 3), "feature_axes": [-1, 1]},
        (2,),
    ),
}

layouts = pytest.mark.parametrize(
    ("shape", "kwargs", "axes"), LAYOUTS.values(), ids=LAYOUTS
)


@layouts
def test_against_numpy(shape, kwargs, axes):
    layer = build(**kwargs)
    x = 2 + 3 * normal(0, shape)
    np.testing.assert_allclose(jitted(layer, x), expected(layer, x, axes), atol=2e-5)


def test_defaults():
    layer = en.InstanceNorm(8)
    assert (layer.epsilon, layer.feature_axes, layer.batch_axes) == (1e-6, (-1,), (0,))


def test_vmapped_examples_are_a_batch():
    """As Equinox's convolutions give them: channels first."""
    one, batched = build(batch_axes=(), feature_axes=0), build(feature_axes=1)
    x = normal(0, (3, 8, 5, 4))
    y = jitted(batched, x)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x), y, atol=1e-6)


def test_is_group_norm_with_a_group_for_each_feature():
    x = normal(0, (2, 5, 8))
    groups = randomize(en.GroupNorm(8, 8))
    np.testing.assert_allclose(build()(x), groups(x), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradients(masked):
    with float64():
        layer = build(param_dtype=jnp.float64, feature_axes=1)
        x = 3 + normal(0, (2, 8, 5, 3), jnp.float64)
        mask = normal(1, x.shape) > -0.5 if masked else None
        arrays, static = eqx.partition(layer, eqx.is_inexact_array)

        def ours(arrays, x):
            return eqx.combine(arrays, static)(x, mask=mask)

        def theirs(arrays, x):
            y = plain(x, (2, 3), epsilon=layer.epsilon, mask=mask)
            scale, bias = (a[None, :, None, None] for a in (arrays.scale, arrays.bias))
            return y * scale + bias

        found, wanted = (
            jax.jit(jax.grad(lambda a, x, f=f: jnp.sum(jnp.sin(f(a, x))), (0, 1)))(
                arrays, x
            )
            for f in (ours, theirs)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
            found,
            wanted,
        )


@pytest.mark.parametrize("by", ["vmap", "shard_map"])
def test_space_split_over_a_named_axis(by):
    layer = build(axis_name="space")
    x = 2 + normal(0, (2, 12, 8))
    # Unequal counts: a mean of the means would not do.
    mask = jnp.arange(12)[None, :, None] < jnp.array([2, 11])[:, None, None]
    run = ft.partial(over_space, by, layer, mask=mask)
    y = jax.jit(run)(x)
    np.testing.assert_allclose(y, expected(layer, x, (1,), mask=mask), rtol=1e-4, atol=1e-4)


def test_named_axis_alone():
    """One position of space for each member: the named axis is all there is."""
    layer = build(batch_axes=(), axis_name="space")
    x = normal(0, (6, 8))
    y = jax.vmap(layer, axis_name="space")(x)
    np.testing.assert_allclose(y, expected(layer, x, (0,)), atol=2e-5)


def test_equals_pytorch():
    torch = pytest.importorskip("torch")
    ours = build(epsilon=1e-5, feature_axes=1)
    theirs = torch.nn.InstanceNorm2d(8, eps=1e-5, affine=True)
    x = np.asarray(2 + 3 * normal(0, (3, 8, 5, 4)))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(ours.scale)))
        theirs.bias.copy_(torch.tensor(np.asarray(ours.bias)))
    wanted = theirs(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(jitted(ours, jnp.asarray(x)), wanted, atol=2e-5)


@pytest.mark.parametrize("shape", [(3, 5, 4, 8), (3, 5, 8)], ids=str)
def test_equals_flax(shape):
    nnx = pytest.importorskip("flax.nnx")
    ours = build()
    theirs = nnx.InstanceNorm(8, rngs=nnx.Rngs(0))
    theirs.scale[...], theirs.bias[...] = ours.scale, ours.bias
    x = normal(0, shape)
    np.testing.assert_allclose(jitted(ours, x), theirs(x), atol=2e-5)
    mask = normal(1, (*shape[:-1], 1)) > -1
    wanted = theirs(x, mask=mask)
    np.testing.assert_allclose(jitted(ours, x, mask=mask), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "kwargs", "match"),
    [
        (
            (6, 8),
            {},
            "no axis left .* For one example, .*, use `batch_axes=\\(\\)`",
        ),
        ((8,), {"batch_axes": ()}, "no axis left to take statistics over"),
        ((2, 3, 8), {"batch_axes": (0, 1)}, "no axis left to take statistics over"),
        ((8, 5), {"feature_axes": 0}, "among both the batch axes .* feature axes"),
        ((2, 5, 8), {"batch_axes": (0, 2)}, "among both the batch axes .* feature axes"),
        ((2, 5, 8), {"batch_axes": 3}, "`batch_axes=.* has axis 3, which is out of range"),
        ((2, 5, 8), {"feature_axes": 3}, "`feature_axes=.* has axis 3"),
        ((2, 8, 5), {}, r"expected features of shape \(8,\) .* got \(5,\)"),
    ],
    ids=str,
)
def test_wrong_input(shape, kwargs, match):
    layer = build(**kwargs)
    with pytest.raises(ValueError, match=f"InstanceNorm.*{match}"):
        layer(normal(0, shape))


@pytest.mark.parametrize(
    ("num_features", "kwargs", "match"),
    [
        (8, {"feature_axes": (1, 2)}, "one size for each feature axis"),
        (8, {"batch_axes": (0, 0)}, "`batch_axes=.* more than once"),
        ((8, 8), {"feature_axes": (1, 1)}, "`feature_axes=.* more than once"),
    ],
    ids=str,
)
def test_wrong_axes(num_features, kwargs, match):
    with pytest.raises(ValueError, match=f"InstanceNorm: .*{match}"):
        en.InstanceNorm(num_features, **kwargs)
