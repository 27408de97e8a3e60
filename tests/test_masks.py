"""What a mask excludes reaches no statistic and no gradient, whatever it holds."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from .helpers import all_norms, call, clone, float64, make_mesh, normal, plain, reference


SHAPE = (6, 5, 8)
EPSILON = 1e-3

# Shapes of masks: along the batch, space, features, and some of them together.
mask_shapes = pytest.mark.parametrize(
    "shape",
    [(6, 1, 1), (5, 1), (8,), (6, 1, 8), SHAPE],
    ids=str,
)


def make_mask(shape, seed=0):
    mask = np.random.default_rng(seed).random(shape) < 0.6
    # Something is counted and something is not.
    mask.reshape(-1)[:2] = True, False
    return jnp.asarray(mask)


def with_bad_values(x, mask):
    """NaN, both infinities and a huge number in turn where the mask excludes."""
    bad = np.resize([np.nan, np.inf, -np.inf, 1e30], x.shape)
    return jnp.where(mask, x, jnp.asarray(bad, x.dtype))


def fresh(state):
    """A state for any layer: those without one pass on whatever they are given."""
    return eqx.nn.State(eqx.nn.Identity()) if state is None else clone(state)


def loss(layer, state, x, mask):
    y = call(layer, state, x, mask=mask)
    return jnp.sum(jnp.sin(y))


@ft.cache
def compiled():
    return eqx.filter_jit(call), eqx.filter_jit(
        eqx.filter_grad(lambda lx, state, mask: loss(lx[0], state, lx[1], mask))
    )


def run(layer, state, x, mask):
    """The output and the gradients of layer and input."""
    f, grad = compiled()
    y = f(layer, state, x, mask=mask)
    return y, *grad((layer, x), state, mask)


@all_norms
@mask_shapes
def test_against_plain_code(case, shape):
    """Output against NumPy's float64, gradients against a plain formula."""
    layer, state = case.build(8, epsilon=EPSILON)
    mask = make_mask(shape)
    x = with_bad_values(1 + 3 * normal(0, SHAPE), mask)
    y, _, dx = run(layer, state, x, mask)
    axes = case.reduction_axes(3)
    expected, _, _ = reference(x, axes, **case.formula, epsilon=EPSILON, mask=mask)
    huge = np.abs(expected) > 1e20
    np.testing.assert_allclose(
        np.where(huge, 0, y), np.where(huge, 0, expected), rtol=1e-5, atol=2e-6
    )

    counted = np.broadcast_to(mask, SHAPE)
    f = ft.partial(plain, axes=axes, **case.formula, epsilon=EPSILON, mask=counted)
    # In float64: where few positions are counted, float32 is no reference.
    with float64():
        clean = jnp.where(counted, x, 0).astype(jnp.float64)
        expected = jax.jit(
            jax.grad(lambda x: jnp.sum(jnp.where(counted, jnp.sin(f(x)), 0)))
        )(clean)
    # What is excluded is normalised as well, so it reaches the gradient of the statistics
    # by its output: a loss that leaves these outputs out must not see it at all.
    only = jax.jit(
        jax.grad(
            lambda x: jnp.sum(
                jnp.where(counted, jnp.sin(call(layer, state, x, mask=mask)), 0)
            )
        )
    )(x)
    # Where two positions count, large gradients of opposite sign remain of almost nothing.
    np.testing.assert_allclose(only, expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(dx).all()
    assert (np.asarray(dx)[~np.isfinite(x)] == 0).all()


@all_norms
def test_excluded_values_make_no_difference(case):
    """To the last bit, in the output, the gradients and the running statistics."""
    layer, state = case.build(8, epsilon=EPSILON)
    mask = make_mask(SHAPE)
    x = normal(1, SHAPE)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def grad_and_results(layer_and_x):
        layer, x = layer_and_x
        y, new = layer(x, fresh(state), mask=mask)
        stats = layer.running_stats(new) if case.stateful else None
        y = jnp.where(mask, y, 0)
        return jnp.sum(jnp.sin(y)), (y, stats)

    expected = grad_and_results((layer, x))
    for bad in (np.nan, np.inf, -np.inf, 3e38, 0.0):
        found = grad_and_results((layer, jnp.where(mask, x, bad)))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    dx = np.asarray(expected[0][1])
    assert (dx[~np.asarray(mask)] == 0).all()
    assert (dx[np.asarray(mask)] != 0).any()


@all_norms
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
def test_all_true_is_no_mask(case, fast):
    layer, state = case.build(8, use_fast_variance=fast)
    x = 5 + normal(3, SHAPE)
    y = call(layer, state, x)
    np.testing.assert_allclose(
        call(layer, state, x, mask=jnp.ones(SHAPE, bool)), y, rtol=1e-5, atol=2e-6
    )


@all_norms
@pytest.mark.parametrize("epsilon", [EPSILON, 0.0])
def test_nothing_counted_is_finite(case, epsilon):
    """A row, a feature, and everything."""
    layer, state = case.build(8, epsilon=epsilon)
    masks = [np.ones(SHAPE, bool) for _ in range(3)]
    masks[0][2] = masks[1][..., 3] = masks[2][:] = False
    masks = [jnp.asarray(mask) for mask in masks]
    for mask in masks:
        for x in (normal(4, SHAPE), with_bad_values(normal(4, SHAPE), mask)):
            x = jnp.where(jnp.abs(x) > 1e20, 0, x)
            out = run(layer, state, x, mask)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    if case.stateful:
        _, new = layer(normal(4, SHAPE), clone(state), mask=masks[2])
        jax.tree.map(
            np.testing.assert_array_equal,
            layer.running_stats(new),
            layer.running_stats(state),
        )


@all_norms
def test_second_derivatives_are_finite(case):
    """Of a fully masked row as well, forward over reverse."""
    layer, state = case.build(8, epsilon=EPSILON)
    mask = make_mask(SHAPE).at[1].set(False)
    x = with_bad_values(normal(5, SHAPE), mask)
    x = jnp.where(jnp.abs(x) > 1e20, 0, x)
    grad = jax.grad(lambda x: loss(layer, state, x, mask))
    _, tangent = jax.jit(lambda x: jax.jvp(grad, (x,), (jnp.ones_like(x),)))(x)
    assert np.isfinite(tangent).all()


@all_norms
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_unequal_counts_on_devices(case, fast, axis_types):
    """One device with nothing to count, the others with unequal numbers: not a mean of
    means, and a gradient that is finite everywhere."""
    axes = case.reduction_axes(2)
    if axes != (0,):
        pytest.skip("statistics are not over the batch")
    layer, state = case.build(
        4, axis_name="device", epsilon=EPSILON, use_fast_variance=fast
    )
    counts = np.array([0, 1, 5, 2, 8, 8, 3, 1])
    mask = jnp.asarray((np.arange(8) < counts[:, None]).reshape(64, 1))
    x = with_bad_values(2 + normal(6, (64, 4)), mask)
    x = jnp.where(jnp.abs(x) > 1e20, jnp.nan, x)
    expected, mean, var = reference(x, (0,), epsilon=EPSILON, mask=mask)

    mesh = make_mesh(axis_types, device=8)
    spec = P("device")

    @ft.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, P()), out_specs=(spec, P()))
    def f(x, mask, state):
        y, state = layer(x, state, mask=mask)
        return y, layer.running_stats(state)

    place = ft.partial(jax.device_put, device=jax.NamedSharding(mesh, spec))

    @jax.jit
    def both(x, mask):
        def loss(x):
            y, stats = f(x, mask, clone(state))
            return jnp.sum(jnp.sin(y)), (y, stats)

        return jax.grad(loss, has_aux=True)(x)

    dx, (y, stats) = both(place(x), place(mask))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    assert np.isfinite(dx).all()
    np.testing.assert_allclose(stats.mean, 0.01 * mean[0], rtol=1e-4)
    np.testing.assert_allclose(stats.var, 0.99 + 0.01 * var[0], rtol=1e-4)
    alone, lone_state = case.build(4, epsilon=EPSILON)
    expected = jax.grad(lambda x: loss(alone, lone_state, x, mask))(x)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)
