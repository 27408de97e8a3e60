"""Running statistics take in what is good, feature by feature, and nothing else."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from .helpers import (
    NORMS,
    STATEFUL,
    assert_close,
    clone,
    make_mesh,
    normal,
    over,
    raises,
    reference,
)


stateful = pytest.mark.parametrize(
    "case", [case for case in NORMS if case.stateful], ids=lambda case: case.name
)

# Overflowing squares are finite input with a variance that is not.
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "overflow": 3e38}


def step(layer, state, x, **kwargs):
    y, state = layer(x, clone(state), **kwargs)
    return y, state


def stats_after(layer, state, x, **kwargs):
    return layer.running_stats(step(layer, state, x, **kwargs)[1])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@stateful
@pytest.mark.parametrize("momentum", [0.9, None])
def test_good_batches(case, momentum):
    """Against the formula in NumPy; without a momentum, the average."""
    layer, state = case.build(3, momentum=momentum)
    mean, var = np.zeros(3), np.ones(3)
    for number in range(4):
        x = number + normal(number, (16, 3))
        _, state = step(layer, state, x)
        _, m, v = reference(x, (0,))
        keep = number / (number + 1) if momentum is None else momentum
        mean = keep * mean + (1 - keep) * m[0]
        var = keep * var + (1 - keep) * v[0]
        stats = layer.running_stats(state)
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.var, var, rtol=1e-5)
        np.testing.assert_array_equal(stats.count, number + 1)
    assert layer.running_stats(state).count.dtype == jnp.int32


@stateful
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
def test_bad_values_spoil_their_feature_alone(case, bad, momentum):
    layer, state = case.build(3, momentum=momentum)
    _, state = step(layer, state, normal(0, (16, 3)))
    old = layer.running_stats(state)
    x = 1 + normal(1, (16, 3))
    expected = stats_after(layer, state, x)
    stats = stats_after(layer, state, x.at[5, 1].set(bad))
    assert_same(jax.tree.map(lambda a: a[1], stats), jax.tree.map(lambda a: a[1], old))
    good = np.array([0, 2])
    np.testing.assert_array_equal(stats.count, [2, 1, 2])
    assert_same(
        jax.tree.map(lambda a: a[good], stats), jax.tree.map(lambda a: a[good], expected)
    )


@stateful
@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
def test_empty_batches_say_nothing(case, momentum):
    layer, state = case.build(3, momentum=momentum)
    _, state = step(layer, state, normal(2, (16, 3)))
    old = layer.running_stats(state)
    y, new = step(layer, state, jnp.zeros((0, 3)))
    assert y.shape == (0, 3)
    assert_same(layer.running_stats(new), old)
    y, new = step(layer, state, normal(3, (16, 3)), mask=jnp.zeros((16, 1), bool))
    assert np.isfinite(y).all()
    assert_same(layer.running_stats(new), old)
    # One feature of three is never counted.
    mask = jnp.array([True, False, True])
    stats = stats_after(layer, state, normal(4, (16, 3)), mask=mask)
    np.testing.assert_array_equal(stats.count, [2, 1, 2])
    assert stats.mean[1] == old.mean[1]
    assert stats.var[1] == old.var[1]


@stateful
def test_evaluation_changes_nothing(case):
    layer, state = case.build(3)
    _, state = step(layer, state, normal(5, (16, 3)))
    old = layer.running_stats(state)
    x = normal(6, (16, 3))
    assert_same(stats_after(layer, state, x, use_running_average=True), old)
    assert_same(stats_after(eqx.nn.inference_mode(layer), state, x), old)


@stateful
@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_thousand_batches_one_in_ten_bad(case, momentum):
    """The state is that of the good ones, to the last bit."""
    layer, state = case.build(3, momentum=momentum)
    rng = np.random.default_rng(7)
    x = rng.normal(2, 3, (1000, 16, 3)).astype(np.float32)
    mask = rng.random((1000, 16, 1)) < 0.8
    bad = np.zeros(1000, bool)
    bad[rng.permutation(1000)[:100]] = True
    kinds = [*BAD.values(), "masked"]
    for number in np.flatnonzero(bad):
        kind = kinds[number % len(kinds)]
        if kind == "masked":
            mask[number] = False
        else:
            # One counted position is enough, in each of the features.
            mask[number, 4] = True
            x[number, 4] = kind

    @jax.jit
    def run(state, x, mask):
        def body(state, batch):
            x, mask = batch
            return layer(x, state, mask=mask)[1], None

        return jax.lax.scan(body, state, (x, mask))[0]

    stats = layer.running_stats(run(clone(state), x, mask))
    good = layer.running_stats(run(clone(state), x[~bad], mask[~bad]))
    np.testing.assert_array_equal(stats.count, 900)
    assert_same(stats, good)

    # And what the good ones give is right.
    mean, var = np.zeros(3), np.ones(3)
    for number, (one, counted) in enumerate(zip(x[~bad], mask[~bad], strict=True)):
        _, m, v = reference(one, (0,), mask=counted)
        keep = number / (number + 1) if momentum is None else momentum
        mean = keep * mean + (1 - keep) * m[0]
        var = keep * var + (1 - keep) * v[0]
    np.testing.assert_allclose(good.mean, mean, rtol=2e-5)
    np.testing.assert_allclose(good.var, var, rtol=2e-5)


@stateful
def test_no_gradient_enters_the_state(case):
    layer, state = case.build(3)
    layer = eqx.tree_at(lambda layer: layer.scale, layer, jnp.array([1.0, 2.0, 3.0]))
    x = normal(8, (16, 3))
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def f(params, x, weight):
        layer = eqx.combine(params, static)
        y, new = layer(x, clone(state))
        stats = layer.running_stats(new)
        return jnp.sum(jnp.sin(y)) + weight * (jnp.sum(stats.mean) + jnp.sum(stats.var))

    with_state, without = (jax.grad(f, (0, 1))(params, x, weight) for weight in (1.0, 0.0))
    assert_same(with_state, without)

    # Nor from one step into the next, nor in forward mode.
    def two_steps(x):
        _, first = layer(x, clone(state))
        return layer.running_stats(layer(x, first)[1])

    zero = lambda leaf: not np.any(np.asarray(leaf).astype(float))  # noqa: E731
    _, tangent = jax.jvp(two_steps, (x,), (jnp.ones_like(x),))
    assert zero(tangent.mean)
    assert zero(tangent.var)

    # But in evaluation they are constants, and the input's gradient is what it should be.
    dx = jax.grad(lambda x: jnp.sum(layer(x, clone(state), use_running_average=True)[0]))(x)
    expected = np.broadcast_to(np.array([1.0, 2.0, 3.0]) / np.sqrt(1 + 1e-5), x.shape)
    np.testing.assert_allclose(dx, expected, rtol=1e-6)


@stateful
def test_output_of_a_bad_batch_is_not_hidden(case):
    """What is not finite shows in the output of its feature, and the others are right."""
    layer, state = case.build(3)
    x = normal(9, (16, 3))
    y, _ = step(layer, state, x.at[5, 1].set(jnp.nan))
    assert np.isnan(y[:, 1]).all()
    good, _ = step(layer, state, x)
    np.testing.assert_array_equal(y[:, [0, 2]], good[:, [0, 2]])


# Over devices.

mesh_types = pytest.mark.parametrize(
    "axis_types", [AxisType.Auto, AxisType.Explicit], ids=str
)


def over_devices(layer, axis_types, per_device_out=False):
    mesh = make_mesh(axis_types, device=8)
    out = P("device") if per_device_out else P()

    def f(x, state):
        _, state = layer(x, state)
        stats = layer.running_stats(state)
        if not per_device_out:
            return stats
        return jax.tree.map(lambda leaf: leaf[None], stats)

    f = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(P("device"), P()),
        out_specs=out,
        check_vma=not per_device_out,
    )
    place = jax.NamedSharding(mesh, P("device"))
    return lambda x, state: jax.jit(f)(jax.device_put(x, place), clone(state))


@stateful
@mesh_types
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
def test_all_devices_decide_alike(case, axis_types, fast):
    """One device has a NaN, in one feature: none absorbs that feature."""
    layer, state = case.build(3, axis_name="device", use_fast_variance=fast)
    x = normal(10, (32, 3))
    spoilt = x.at[9, 1].set(jnp.nan)
    # With `check_vma`, that the result is the same on every device is proved by JAX; and
    # without, each device shows what it has.
    stats = over_devices(layer, axis_types)(spoilt, state)
    np.testing.assert_array_equal(stats.count, [1, 0, 1])
    assert stats.mean[1] == 0
    assert stats.var[1] == 1
    _, mean, var = reference(x, (0,))
    good = np.array([0, 2])
    np.testing.assert_allclose(stats.mean[good], 0.01 * mean[0][good], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(stats.var[good], 0.99 + 0.01 * var[0][good], rtol=1e-5)


@stateful
@pytest.mark.parametrize("bad", [None, *BAD.values()], ids=["good", *BAD])
def test_every_device_has_the_same(case, bad):
    layer, state = case.build(3, axis_name="device")
    x = normal(11, (32, 3))
    if bad is not None:
        x = x.at[17, 0].set(bad)
    stats = over_devices(layer, AxisType.Auto, per_device_out=True)(x, state)
    for leaf in jax.tree.leaves(stats):
        assert leaf.shape == (8, 3)
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    np.testing.assert_array_equal(stats.count[0], [int(bad is None), 1, 1])


@stateful
def test_under_vmap(case):
    """The state of a vmapped layer comes out once, not once for each example."""
    layer, state = case.build(3, axis_name="batch")
    f = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    x = normal(12, (16, 3))
    _, new = f(x.at[2, 2].set(jnp.inf), clone(state))
    stats = layer.running_stats(new)
    np.testing.assert_array_equal(stats.count, [1, 1, 0])
    expected = layer.running_stats(f(x, clone(state))[1])
    np.testing.assert_array_equal(stats.mean[:2], expected.mean[:2])


@stateful
def test_groups_average_what_they_counted(case):
    """A bad value in one of two groups spoils the average of both, for its feature."""
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    layer, state = case.build(3, axis_name="batch", axis_index_groups=groups)
    f = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    x = normal(13, (8, 3))
    stats = layer.running_stats(f(x, clone(state))[1])
    parts = [reference(x[:4], (0,)), reference(x[4:], (0,))]
    mean = np.mean([part[1][0] for part in parts], axis=0)
    np.testing.assert_allclose(stats.mean, 0.01 * mean, rtol=1e-4, atol=1e-7)
    stats = layer.running_stats(f(x.at[6, 1].set(jnp.nan), clone(state))[1])
    np.testing.assert_array_equal(stats.count, [1, 0, 1])


def test_bad_batches_in_a_model():
    """Through layers above and below, a bad batch leaves everything as it was."""
    (case, *_) = (case for case in NORMS if case.stateful)

    def make():
        return eqx.nn.Sequential([case.make(3), case.make(3)])

    model, state = eqx.nn.make_with_state(make)()
    _, state = model(normal(14, (16, 3)), state)
    old = [layer.running_stats(state) for layer in model.layers]
    _, new = model(jnp.full((16, 3), jnp.nan), clone(state))
    for layer, stats in zip(model.layers, old, strict=True):
        assert_same(layer.running_stats(new), stats)


# States that somebody cast along with the model.


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@over(*STATEFUL)
def test_state_in_half_precision(case, dtype, jit):
    layer, state = case.build(8)
    x = 3 * normal(0, (16, 8)) + 5
    _, state = step(layer, state, x)
    f = eqx.filter_jit(step) if jit else step
    half = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, state
    )
    match = f"needs a `state` in float32 or wider, .*{dtype.dtype}.*Cast the model alone"
    with raises(case.name, match):
        f(layer, half, x)
    y, kept = f(layer, half, x, **case.evaluation)
    wanted, _ = f(layer, state, x, **case.evaluation)
    assert_close(y, wanted, 0.05)
    for old, new in zip(jax.tree.leaves(half), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(old, new)


@over(*STATEFUL)
def test_model_in_half_precision(case):
    """The remedy: the model is cast, and the state moves on in float32."""
    layer, state = case.build(8)
    layer = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf,
        layer,
    )
    y, new = step(layer, state, normal(0, (16, 8), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    changed = [
        (old != leaf).any()
        for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
    ]
    assert any(changed)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(new))
