"""The fast mode on one CPU: sums about zero, and anew where that is too far."""

import logging
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import (
    NORMS,
    call,
    count_in_hlo,
    elsewhere,
    normal,
    over,
    plain,
    reference,
    step,
)


# Those that are not done in rows; of groups, one for each feature.
column_layers = over(
    *(
        replace(case, kwargs={"num_groups": 8}, groups=(-1, 8)) if case.groups else case
        for case in NORMS
        if case.name not in ("LayerNorm", "RMSNorm")
    )
)
# A batch of images, channels last.
SHAPE = (6, 4, 4, 8)
# What each feature is multiplied by, and what is added. After the first two all are too
# far: one in deviations, a constant, and two whose squares overflow.
FACTORS = np.array([1, 0, 1, 1e-3, 0, 1e19, 1e18, 1], np.float32)
LEVELS = np.array([1, 0, 1e4, 10, 3, 0, 1e19, -1], np.float32)


def data(features=slice(None)):
    """Eight of these features, from the first again after the last."""
    bounded = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
    chosen = np.resize(np.arange(8)[features], 8)
    return jnp.asarray(bounded * FACTORS[chosen] + LEVELS[chosen])


def count_branches(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count(" cond[")


def check(case, y, x):
    expected, _, _ = reference(x, case.reduction_axes(x.ndim), **case.formula, epsilon=1e-6)
    # The square of a mean at two deviations is 4 times the variance.
    limit = (4 + 16) * 2.0**-24 * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=limit)


@column_layers
@pytest.mark.parametrize("features", [slice(0, 2), slice(2, 4), slice(None)], ids=str)
def test_far_and_near_features(case, features):
    """Each comes out right, whatever the others hold."""
    x = data(features)
    layer, state = case.build(8, epsilon=1e-6)
    y = jax.jit(lambda x: call(layer, state, x))(x)
    check(case, y, np.asarray(x))


def test_running_statistics_of_far_and_near_features():
    x = data(slice(0, 5))
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(8, momentum=0.0)
    _, state = step(bn, state, x)
    stats = bn.running_stats(state)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats.mean, exact.mean((0, 1, 2)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats.var, exact.var((0, 1, 2)), rtol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_leaves_the_others(value):
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(8)
    x = np.array(data())
    y, _ = step(bn, state, jnp.asarray(x))
    x[0, 0, 0, 2] = value
    with_bad, _ = step(bn, state, jnp.asarray(x))
    others = np.arange(8) != 2
    np.testing.assert_allclose(with_bad[..., others], y[..., others], rtol=1e-6, atol=1e-6)
    assert not np.isfinite(with_bad[..., 2]).any()


@column_layers
def test_vmap_leaves_one_branch(case):
    """On a batch of conditions `lax.cond` would do both."""
    kwargs = dict(case.per_example, **({"axis_name": "batch"} if case.stateful else {}))
    layer, state = case.build(8, **kwargs)

    def f(x):
        return jax.vmap(lambda x: call(layer, state, x), axis_name="batch")(x)

    near, far = data(slice(0, 2)), data()
    assert count_branches(f, near) == 1
    with elsewhere():
        assert count_branches(lambda x: f(x), near) == 0
    # Nor does one of these need what the others do.
    vmapped = jax.jit(f)
    batched, state = case.build(8)
    for x in (near, far):
        np.testing.assert_allclose(
            vmapped(x),
            jax.jit(lambda x: call(batched, state, x))(x),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_call_outside_jit_compiles_once(caplog):
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(8)
    x, other = data(), data(slice(0, 2))
    step(bn, state, x)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        step(bn, state, other)
    assert "Compiling" not in caplog.text


@pytest.mark.parametrize("vmapped", [False, True], ids=["batch", "vmap"])
def test_squares_fit_and_their_sum_does_not(vmapped):
    x = 1.5e19 * jnp.where(jnp.arange(1024) % 2, 1.0, -1.0)[:, None]
    name = "batch" if vmapped else None
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(1, axis_name=name)
    f = lambda x: call(bn, state, x)  # noqa: E731
    y = jax.jit(jax.vmap(f, axis_name="batch") if vmapped else f)(x)
    np.testing.assert_allclose(y, np.sign(x), rtol=1e-5)


@column_layers
@pytest.mark.parametrize("kind", ["near", "mixed"])
def test_derivatives(case, kind):
    """Of both modes, together, against those of plain code; and elsewhere."""
    shape = (4, 6, 8)
    level = np.float32(0 if kind == "near" else 10) * np.arange(8, dtype=np.float32)
    x, t, w = (normal(seed, shape) for seed in range(3))
    x = jnp.asarray(np.asarray(x) + level)
    layer, state = case.build(8, epsilon=1e-3)

    def derivatives(f):
        gradient = jax.grad(lambda x: jnp.sum(w * jnp.sin(f(x))))
        return jax.jit(lambda x, t: jax.jvp(gradient, (x,), (t,)))(x, t)

    ours = derivatives(lambda x: call(layer, state, x))
    axes = case.reduction_axes(3)
    expected = derivatives(lambda x: plain(x, axes, **case.formula, epsilon=1e-3))
    with elsewhere():
        theirs = derivatives(lambda x: call(layer, state, x))
    for a, b, c in zip(ours, theirs, expected, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@column_layers
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_devices_do_not_ask_each_other_how_far_it_is(case, kind):
    """Of a batch that is split over them, where each has its own statistics."""
    if case.stateful:
        pytest.skip("statistics are over the batch")
    layer, state = case.build(8)
    example, _ = case.build(8, **case.per_example)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    x = jax.device_put(normal(0, (8, 3, 8)), NamedSharding(mesh, P("d")))
    with jax.set_mesh(mesh):
        assert count_in_hlo(lambda x: call(layer, state, x), x) == 0
        assert count_in_hlo(jax.vmap(lambda x: call(example, state, x)), x) == 0
