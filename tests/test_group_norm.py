"""`GroupNorm`: which positions share statistics, against float64, PyTorch and Flax."""

import functools as ft
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import (
    along,
    float64,
    make_mesh,
    normal,
    over_space,
    plain,
    randomize,
    reference,
)


jitted = eqx.filter_jit(lambda layer, x, **kwargs: layer(x, **kwargs))


def build(num_features=8, num_groups: int | None = 4, **kwargs):
    return randomize(en.GroupNorm(num_features, num_groups, **kwargs))


def expected(layer, x, axes, feature_axis=-1, mask=None):
    """`axes` are all that the statistics are over, the feature axis among them."""
    feature_axis = feature_axis % x.ndim
    parameters = {
        name: None if value is None else along(value, (feature_axis,), x.ndim)
        for name, value in (("scale", layer.scale), ("bias", layer.bias))
    }
    y, _, _ = reference(
        x,
        axes,
        epsilon=layer.epsilon,
        mask=mask,
        groups=(feature_axis, layer.num_groups),
        scale=parameters["scale"],
        bias=parameters["bias"],
    )
    return y


# Shape, arguments, and all axes that the statistics are over.
LAYOUTS = {
    "channels last": ((2, 5, 4, 8), {}, (1, 2, 3)),
    "channels first": ((2, 8, 5, 4), {"feature_axis": 1}, (1, 2, 3)),
    "counted from the end": ((2, 8, 5, 4), {"feature_axis": -3}, (1, 2, 3)),
    "no space": ((6, 8), {}, (1,)),
    "one example": ((5, 4, 8), {"batch_axes": ()}, (0, 1, 2)),
    "one example, channels first": (
        (8, 5, 4),
        {"batch_axes": (), "feature_axis": 0},
        (0, 1, 2),
    ),
    "one vector": ((8,), {"batch_axes": ()}, (0,)),
    "several batch axes": ((2, 3, 5, 8), {"batch_axes": (0, 1)}, (2, 3)),
    "batch axes apart": ((2, 8, 5, 3), {"batch_axes": [-1, 0], "feature_axis": 1}, (1, 2)),
    "batch last": ((8, 5, 3), {"batch_axes": -1, "feature_axis": 0}, (0, 1)),
    "rows": ((2, 3, 5, 8), {"reduction_axes": (-2, -1)}, (2, 3)),
    "features alone": ((2, 3, 5, 8), {"reduction_axes": -1}, (3,)),
    "in any order": ((2, 3, 5, 8), {"reduction_axes": [-1, 1]}, (1, 3)),
    "rows, channels first": (
        (2, 8, 3, 5),
        {"reduction_axes": (1, 3), "feature_axis": 1},
        (1, 3),
    ),
}

layouts = pytest.mark.parametrize(
    ("shape", "kwargs", "axes"), LAYOUTS.values(), ids=LAYOUTS
)


@layouts
@pytest.mark.parametrize("num_groups", [1, 4])
def test_against_numpy(shape, kwargs, axes, num_groups):
    layer = build(num_groups=num_groups, **kwargs)
    x = 2 + 3 * normal(0, shape)
    y = jitted(layer, x)
    wanted = expected(layer, x, axes, kwargs.get("feature_axis", -1))
    np.testing.assert_allclose(y, wanted, atol=2e-5)


@pytest.mark.parametrize("use_fast_variance", [False, True])
def test_use_fast_variance(use_fast_variance):
    layer = build(use_fast_variance=use_fast_variance)
    x = 1e3 + normal(0, (2, 50, 8))
    np.testing.assert_allclose(layer(x), expected(layer, x, (1, 2)), atol=1e-3)


def test_group_size():
    x = normal(0, (2, 5, 8))
    by_size = randomize(en.GroupNorm(8, None, 2))
    assert by_size.num_groups == 4
    np.testing.assert_array_equal(by_size(x), build()(x))


def test_defaults():
    layer = en.GroupNorm(64)
    assert (layer.num_groups, layer.epsilon, layer.feature_axis) == (32, 1e-6, -1)
    assert layer.batch_axes == (0,)
    assert layer.reduction_axes is None


def test_after_a_convolution():
    """Equinox's are for one example, channels first."""
    conv = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0))
    layer = build(batch_axes=(), feature_axis=0)
    model = eqx.nn.Sequential([conv, eqx.nn.Lambda(layer)])
    x = normal(1, (2, 3, 6, 6))
    wanted = expected(layer, jax.vmap(conv)(x), (1, 2, 3), 1)
    np.testing.assert_allclose(jax.vmap(model)(x), wanted, atol=1e-5)


def test_mask_of_whole_groups():
    """A group without a counted position is finite; the others do not notice."""
    layer = build(num_groups=2)
    x = normal(0, (2, 5, 8))
    mask = jnp.ones(x.shape, bool).at[0, :, :4].set(False)
    y = layer(jnp.where(mask, x, jnp.inf), mask=mask)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[0, :, 4:], layer(x)[0, :, 4:], atol=1e-6)
    np.testing.assert_allclose(y[1], layer(x)[1], atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", ["channels first", "rows"])
def test_gradients(name, masked):
    shape, kwargs, axes = LAYOUTS[name]
    feature_axis = kwargs.get("feature_axis", -1)
    with float64():
        layer = build(param_dtype=jnp.float64, **kwargs)
        x = 3 + normal(0, shape, jnp.float64)
        mask = normal(1, shape) > -0.5 if masked else None
        arrays, static = eqx.partition(layer, eqx.is_inexact_array)

        def ours(arrays, x):
            return eqx.combine(arrays, static)(x, mask=mask)

        def theirs(arrays, x):
            y = plain(x, axes, epsilon=layer.epsilon, mask=mask, groups=(feature_axis, 4))
            lay = lambda a: jnp.expand_dims(  # noqa: E731
                a, [i for i in range(x.ndim) if i != feature_axis % x.ndim]
            )
            return y * lay(arrays.scale) + lay(arrays.bias)

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


# Several devices, and named axes.


def test_sharded_across_groups():
    """Each device has a part of a group only. (Flax raises for sharded features.)"""
    layer = build(num_groups=2)
    x = 2 + normal(0, (4, 8, 8))
    wanted = expected(layer, x, (1, 2))
    gradient = jax.jit(jax.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), 1))
    wanted_gradient = gradient(layer, x)
    mesh = make_mesh(AxisType.Explicit, data=2, model=4)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(  # noqa: E731
            np.asarray(a), NamedSharding(mesh, P(*spec))
        )
        layer = jax.tree.map(lambda a: put(a, "model"), layer)
        x = put(x, None, None, "model")
        y, dx = eqx.filter_jit(layer)(x), gradient(layer, x)
    for array in (y, dx):
        assert array.sharding.is_equivalent_to(x.sharding, 3)
    np.testing.assert_allclose(np.asarray(y), wanted, atol=1e-5)
    np.testing.assert_allclose(np.asarray(dx), wanted_gradient, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("by", ["vmap", "shard_map"])
def test_space_split_over_a_named_axis(by, masked):
    layer = build(axis_name="space")
    x = 2 + normal(0, (2, 12, 8))
    # Unequal counts: a mean of the means would not do.
    mask = jnp.arange(12)[None, :, None] < jnp.array([3, 11])[:, None, None]
    mask = mask if masked else jnp.ones(mask.shape, bool)
    run = ft.partial(over_space, by, layer, mask=mask)
    y = jax.jit(run)(x)
    np.testing.assert_allclose(
        y, expected(layer, x, (1, 2), mask=mask), rtol=1e-5, atol=2e-5
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(x)))))(x)
    alone = build()
    wanted = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(alone(x, mask=mask)))))(x)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)


def test_axis_index_groups():
    layer = build(axis_name="space", axis_index_groups=[[0, 2], [1, 3]])
    x = normal(0, (4, 2, 3, 8))
    y = jax.jit(jax.vmap(layer, axis_name="space"))(x)
    for pair in ([0, 2], [1, 3]):
        both = np.concatenate(np.asarray(x)[pair], 1)
        wanted = np.split(expected(layer, both, (1, 2)), 2, 1)
        np.testing.assert_allclose(np.asarray(y)[pair], wanted, atol=2e-5)


# Others.


@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_equals_pytorch(num_groups):
    torch = pytest.importorskip("torch")
    x = np.asarray(2 + 3 * normal(0, (3, 8, 5, 4)))
    theirs = torch.nn.GroupNorm(num_groups, 8, eps=1e-5)
    ours = build(num_groups=num_groups, epsilon=1e-5, feature_axis=1)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(ours.scale)))
        theirs.bias.copy_(torch.tensor(np.asarray(ours.bias)))
    wanted = theirs(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(jitted(ours, jnp.asarray(x)), wanted, atol=2e-5)


def flax_layer(layer, *args, **kwargs):
    nnx = pytest.importorskip("flax.nnx")
    theirs = nnx.GroupNorm(*args, rngs=nnx.Rngs(0), **kwargs)
    theirs.scale[...], theirs.bias[...] = layer.scale, layer.bias
    return theirs


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ((3, 5, 4, 8), {}),
        ((3, 5, 8), {"reduction_axes": (-2, -1)}),
        ((3, 8), {}),
        ((3, 5, 8), {"use_fast_variance": False, "epsilon": 1e-3}),
    ],
    ids=str,
)
def test_equals_flax(shape, kwargs):
    x = normal(0, shape)
    ours = build(**kwargs)
    theirs = flax_layer(ours, 8, 4, **kwargs)
    np.testing.assert_allclose(jitted(ours, x), theirs(x), atol=2e-5)
    mask = normal(1, shape) > -1
    np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "ours", "theirs"),
    [
        # It repeats the statistics along the second axis, so that is as long as features.
        ((2, 8, 5, 8), {"reduction_axes": (-2, -1)}, {"reduction_axes": (-2, -1)}),
        # The first of these is not the batch.
        ((5, 4, 8), {"batch_axes": ()}, {}),
    ],
    ids=["rows", "one example"],
)
def test_flax_is_wrong(shape, ours, theirs):
    """Silently: what this library gives in its place is checked against NumPy above."""
    layer = build(**ours)
    other = flax_layer(layer, 8, 4, **theirs)
    x = normal(0, shape)
    assert not np.allclose(layer(x), other(x), atol=1e-2)


def test_flax_raises_where_this_does_not():
    """A mask along space; in Flax it has to be as wide as the features."""
    layer = build()
    x, mask = normal(0, (2, 5, 8)), jnp.arange(5)[:, None] < 4
    mask = jnp.broadcast_to(mask, (2, 5, 1))
    with pytest.raises(TypeError, match="reshape"):
        flax_layer(layer, 8, 4)(x, mask=mask)
    wanted = expected(layer, x, (1, 2), mask=mask)
    np.testing.assert_allclose(layer(x, mask=mask), wanted, atol=2e-5)


# Errors.


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((8, 3), "num_features=8.* cannot be divided evenly by `num_groups=3`"),
        ((8, None, 3), "cannot be divided evenly by .* `group_size=3`"),
        ((8, 0), "cannot be divided evenly by `num_groups=0`"),
        ((8, -2), "cannot be divided evenly by `num_groups=-2`"),
        ((8, None, 0), "cannot be divided evenly by .* `group_size=0`"),
        ((8,), "cannot be divided evenly by `num_groups=32`"),
        ((8, None), "give `num_groups`, or `group_size` and `num_groups=None`"),
        ((8, 4, 2), "give `num_groups`, or .* got `num_groups=4` and `group_size=2`"),
        ((0, 1), "`num_features` must be positive"),
    ],
    ids=str,
)
def test_wrong_groups(args, match):
    with pytest.raises(ValueError, match=f"GroupNorm.*{match}"):
        en.GroupNorm(*args)


@pytest.mark.parametrize("argument", ["batch_axes", "reduction_axes"])
def test_an_axis_twice(argument):
    with pytest.raises(ValueError, match=f"`{argument}=.* more than once"):
        build(**cast(Any, {argument: (1, 1)}))
    with pytest.raises(ValueError, match=f"`{argument}=.* more than once"):
        build(**cast(Any, {argument: (1, -3)}))(normal(0, (2, 4, 4, 8)))


@pytest.mark.parametrize(
    ("shape", "kwargs", "match"),
    [
        ((2, 5, 8), {"batch_axes": (0, 2)}, "among both the batch axes .* feature axes"),
        ((8,), {}, "For one example, as inside `jax.vmap`, use `batch_axes=\\(\\)`"),
        (
            (8, 5),
            {"feature_axis": 0},
            "For one example, as inside `jax.vmap`, use `batch_axes=\\(\\)`",
        ),
        ((2, 5, 8), {"reduction_axes": (0, 1)}, "must have the `feature_axis=-1` among"),
        ((2, 5, 8), {"reduction_axes": (1, 3)}, "has axis 3, which is out of range"),
        ((2, 5, 8), {"batch_axes": 3}, "has axis 3, which is out of range"),
        ((2, 5, 8), {"feature_axis": 3}, "has axis 3, which is out of range"),
        ((2, 8, 5), {}, r"expected features of shape \(8,\) .* got \(5,\)"),
    ],
    ids=str,
)
def test_wrong_input(shape, kwargs, match):
    layer = build(**kwargs)
    with pytest.raises(ValueError, match=f"GroupNorm.*{match}"):
        layer(normal(0, shape))


def test_empty():
    """No examples, no space: nothing to be wrong about, and nothing to divide by."""
    layer = build()
    for shape in ((0, 5, 8), (2, 0, 8)):
        y = layer(jnp.zeros(shape))
        assert y.shape == shape
        gradient = jax.grad(lambda layer, x: jnp.sum(layer(x)))(layer, jnp.zeros(shape))
        assert np.isfinite(gradient.scale).all()
