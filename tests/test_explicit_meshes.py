"""On Explicit meshes, without `jax.set_mesh`: `test_sharding` has the plain calls."""

import contextlib
import functools

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import (
    BATCH_NORM,
    NORMS,
    all_layers,
    all_norms,
    assert_close,
    call,
    every,
    make_mesh,
    normal,
    randomize,
    reference,
    step,
    ways,
)


SHAPE = 8, 6, 16


def without_name(kwargs):
    return {key: value for key, value in kwargs.items() if key != "axis_name"}


@functools.cache
def mesh():
    return make_mesh(AxisType.Explicit, data=4, model=2)


def put(tree, *spec):
    def place(leaf):
        if not eqx.is_array(leaf):
            return leaf
        own = spec[max(0, len(spec) - leaf.ndim) :]
        fits = [
            axis if axis and n % mesh().shape[axis] == 0 else None
            for axis, n in zip(own, leaf.shape, strict=True)
        ]
        return jax.device_put(np.asarray(leaf), NamedSharding(mesh(), P(*fits)))

    return jax.tree.map(place, tree)


def assert_sharded(found, wanted):
    """The output, or both outputs and the gradient of the input."""
    for array in found[:3] if isinstance(found, tuple) else [found]:
        got = tuple(array.sharding.spec)
        assert (*got, *[None] * (array.ndim - len(got))) == wanted


PLACEMENTS = {
    "batch": ("data", None, None),
    "nothing": (None, None, None),
    "features": (None, None, "model"),
    "both": ("data", None, "model"),
}


CALLS = {
    "mask": {"mask": normal(1, SHAPE) > -0.5},
    "row mask": {"mask": normal(1, (SHAPE[0], 1, 1)) > -2},
    "affine": {"scale": normal(2, (16,)), "bias": normal(3, (16,))},
    "affine of each example": {"scale": normal(2, (8, 1, 16)), "bias": normal(3, SHAPE)},
}


@every(3)
@ways
@pytest.mark.parametrize("given", CALLS)
@pytest.mark.parametrize("placement", ["batch", "both"])
@all_norms
def test_call_on_an_explicit_mesh(case, placement, given, way):
    layer, state = case.build(16)
    layer, x, kwargs = randomize(layer), 3 * normal(0, SHAPE) + 1, CALLS[given]
    wanted = way(call)(layer, state, x, **kwargs)
    of_x = PLACEMENTS[placement]
    found = way(call)(
        put(layer, None), put(state, None), put(x, *of_x), **put(kwargs, *of_x)
    )
    assert_close(found, wanted)
    assert_sharded(found, of_x)


@ways
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_groups_on_sharded_features(num_groups, affine, way):
    """As many groups as shards, more, fewer, and a number that does not fit."""
    layer = en.GroupNorm(12, num_groups, use_scale=affine, use_bias=affine)
    x = 3 * normal(0, (8, 6, 12)) + 1
    of_x = PLACEMENTS["both"]
    wanted = way(call)(layer, None, x)
    found = way(call)(put(layer, "model"), None, put(x, *of_x))
    assert_close(found, wanted)
    assert_sharded(found, of_x)


def over_examples(layer, state, x):
    """One at a time, with its features last, where the layer allows for it."""
    return jax.vmap(lambda x: step(layer, state, x))(x)[0]


def over_named_examples(layer, state, x):
    one = lambda x: step(layer, state, x)  # noqa: E731
    return jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)[0]


@every(3)
@ways
@pytest.mark.parametrize("name", ["named", "unnamed"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@all_layers
def test_vmap_on_an_explicit_mesh(case, placement, name, way):
    named = name == "named"
    kwargs, of_x = without_name(case.per_example), PLACEMENTS[placement]
    if named:
        kwargs = {**kwargs, "axis_name": "batch"}
    if case not in NORMS:
        # A product with a weight says itself how it is sharded.
        kwargs, of_x = {}, (*of_x[:2], None)
    layer, state = case.build(16, **kwargs)
    layer, x = randomize(layer), 3 * normal(0, SHAPE) + 1
    f = way(over_named_examples if named else over_examples)
    wanted = f(layer, state, x)
    found = f(put(layer, None, None), put(state, None, None), put(x, *of_x))
    assert_close(found, wanted)
    assert_sharded(found, of_x)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_recalibration_on_an_explicit_mesh(placement, jit):
    layer, state = BATCH_NORM.build(16)
    forward = lambda layer, state, x: layer(x, state)  # noqa: E731
    forward = eqx.filter_jit(forward) if jit else forward
    batches = [normal(seed, SHAPE) + seed for seed in range(3)]
    wanted = en.recalibrate(layer, state, batches, forward)
    placed = [put(batch, *PLACEMENTS[placement]) for batch in batches]
    found = en.recalibrate(put(layer, None), put(state, None), placed, forward)
    assert_close(layer.running_stats(found), layer.running_stats(wanted))


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
def test_groups_of_a_vmapped_axis_on_an_explicit_mesh(is_set):
    mesh = make_mesh(AxisType.Explicit, d=4)
    x = np.asarray(normal(0, (8, 3, 4))) + np.arange(8, dtype=np.float32)[:, None, None]
    placed = jax.device_put(x, NamedSharding(mesh, P("d")))
    groups = [[0, 3, 4, 6], [1, 2, 5, 7]]

    def f(x):
        each = functools.partial(
            en.standardize, axes=0, axis_name="i", axis_index_groups=groups
        )
        return jax.vmap(each, axis_name="i")(x)

    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        y = jax.jit(f)(placed)
    assert y.sharding.spec[0] == "d"
    for group in groups:
        wanted, _, _ = reference(x[np.array(group)], (0, 1))
        np.testing.assert_allclose(np.asarray(y)[np.array(group)], wanted, atol=1e-5)


def test_a_second_call_in_a_vmap_on_an_explicit_mesh_compiles_nothing(caplog):
    mesh = make_mesh(AxisType.Explicit, d=4)
    x = jax.device_put(normal(0, (8, 3)), NamedSharding(mesh, P("d")))

    def f():
        each = functools.partial(en.standardize, axes=(), axis_name="i")
        return jax.vmap(each, axis_name="i")(x)

    f()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        f()
    assert "Compiling" not in caplog.text
