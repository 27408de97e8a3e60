"""Invariances, on random shapes, axes, masks and dtypes.

Shapes come from a short list: each new one is a compilation, and takes longer than all
that is done with it.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from .helpers import NORMS, all_norms, call, clone, make_mesh, reference


# With an axis of space, and features that two groups divide.
SHAPES = [(8, 2, 4), (4, 6, 2), (1, 5, 6), (2, 3, 2, 4)]
EPSILON = 1e-5

# The same examples each time, as few as find what there is to be found, and no time limit.
few = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
seeds = st.integers(0, 2**16)
shapes = st.sampled_from(SHAPES)
dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


@ft.cache
def build(name, num_features, **kwargs):
    (case,) = (case for case in NORMS if case.name == name)
    return case.build(num_features, epsilon=EPSILON, **kwargs)


compiled_call = eqx.filter_jit(call)


def run(case, x, *, mask=None, **kwargs):
    layer, state = build(case.name, x.shape[-1], **kwargs)
    return np.asarray(compiled_call(layer, state, jnp.asarray(x), mask=mask), np.float64)


def draw(seed, shape, dtype=np.float32, *, apart=0.0):
    """Normal numbers; `apart` keeps the variance away from zero for two or more."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) + apart * (np.indices(shape).sum(0) % 2)
    return np.asarray(x, jnp.dtype(dtype))


def broadcastable(draw_from, shape):
    """The shape of a mask: some axes of size one, some left out in front."""
    ones = draw_from.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    start = draw_from.draw(st.integers(0, len(shape)))
    return tuple(1 if one else n for n, one in zip(shape, ones, strict=True))[start:]


@all_norms
@few
@given(seed=seeds, shape=shapes, dtype=dtypes, log_size=st.integers(-3, 3))
def test_against_reference(case, seed, shape, dtype, log_size):
    x = (10.0**log_size * (1 + draw(seed, shape).astype(np.float64))).astype(
        jnp.dtype(dtype)
    )
    expected, _, _ = reference(
        x, case.reduction_axes(len(shape)), **case.formula, epsilon=EPSILON
    )
    np.testing.assert_allclose(run(case, x), expected, rtol=1e-4, atol=1e-4)


@all_norms
@few
@given(data=st.data(), seed=seeds, shape=st.sampled_from(SHAPES[1:2]))
def test_any_mask_against_reference(case, data, seed, shape):
    x = draw(seed, shape)
    mask_shape = broadcastable(data, shape)
    mask = np.random.default_rng(seed).random(mask_shape) < data.draw(
        st.sampled_from([0.0, 0.3, 0.8, 1.0])
    )
    axes = case.reduction_axes(len(shape))
    expected, _, var = reference(x, axes, **case.formula, epsilon=EPSILON, mask=mask)
    x = np.where(mask, x, np.where(np.abs(x) < 1, x, np.nan))
    # The reference counts an excluded NaN as zero, and is asked about what remains.
    expected = np.where(np.isnan(x), 0, expected)
    y = run(case, x, mask=jnp.asarray(mask))
    assert np.isfinite(y).all()
    # Excluded positions may be many deviations away: relative to that they are exact.
    tolerance = 1e-5 * (1 + 3 / np.sqrt(var + EPSILON))
    difference = np.where(np.isnan(x), 0, np.abs(y - expected))
    assert (difference <= tolerance * (1 + np.abs(expected))).all()


@all_norms
@few
@given(seed=seeds, shape=st.sampled_from(SHAPES[:2]), shift=st.integers(-1000, 1000))
def test_shift_of_the_input(case, seed, shape, shift):
    """A number added to all that is averaged over changes nothing."""
    if not case.center:
        return
    # On a grid, so that the sum is exact: but for the rounding of the mean.
    x = np.round(64 * draw(seed, shape, apart=2)) / 64
    y, shifted = run(case, x), run(case, x + np.float32(shift))
    atol = 3e-7 * abs(shift) + 2e-5
    np.testing.assert_allclose(shifted, y, rtol=1e-5, atol=atol)


@all_norms
@few
@given(seed=seeds, shape=st.sampled_from(SHAPES[:2]), power=st.integers(-4, 30))
def test_scale_of_the_input(case, seed, shape, power):
    """Without an epsilon a factor does not matter, and by a power of two not one bit."""
    x = draw(seed, shape, apart=2)
    layer, state = zero_epsilon(case.name, shape[-1])
    y = compiled_call(layer, state, jnp.asarray(x))
    scaled = compiled_call(layer, state, jnp.asarray(x * np.float32(2.0**power)))
    np.testing.assert_allclose(scaled, y, rtol=3e-7, atol=1e-7)
    negative = compiled_call(layer, state, jnp.asarray(-x))
    np.testing.assert_allclose(negative, -y, rtol=3e-7, atol=1e-7)


@ft.cache
def zero_epsilon(name, num_features):
    (case,) = (case for case in NORMS if case.name == name)
    return case.build(num_features, epsilon=0.0)


@all_norms
@few
@given(seed=seeds, shape=st.sampled_from(SHAPES[:2]))
def test_permutation_of_what_is_averaged_over(case, seed, shape):
    """The order does not matter, though the fast mode looks at certain positions."""
    x = draw(seed, shape, apart=2)
    rng = np.random.default_rng(seed)
    axes = case.reduction_axes(x.ndim)
    # Not over the features of several groups.
    axes = axes if case.groups is None else axes[:-1]
    order = {axis: rng.permutation(shape[axis]) for axis in axes}

    def permute(a):
        for axis, permutation in order.items():
            a = np.take(a, permutation, axis)
        return a

    np.testing.assert_allclose(
        run(case, permute(x)), permute(run(case, x)), rtol=1e-5, atol=1e-5
    )


@all_norms
@few
@given(seed=seeds, fast=st.booleans(), weights=st.sampled_from([None, 0.3, 0.8]))
def test_batched_against_per_example(case, seed, fast, weights):
    """One example at a time under `vmap`, with what is averaged over split as well."""
    x = jnp.asarray(draw(seed, (8, 3, 4), apart=2))
    mask = None
    if weights is not None:
        mask = jnp.asarray(np.random.default_rng(seed).random((8, 3, 4)) < weights)
    layer, state = build(case.name, 4, use_fast_variance=fast, **case.per_example)
    y = per_example(layer, state, x, mask)
    np.testing.assert_allclose(
        y, run(case, x, mask=mask, use_fast_variance=fast), rtol=1e-4, atol=1e-4
    )


@eqx.filter_jit
def per_example(layer, state, x, mask):
    def f(x, mask):
        return call(layer, state, x, mask=mask)

    return jax.vmap(f, in_axes=(0, None if mask is None else 0), axis_name="batch")(x, mask)


@ft.cache
def over_devices(name, fast, masked):
    (case,) = (case for case in NORMS if case.name == name)
    kwargs = {"axis_name": "device"} if 0 in case.reduction_axes(3) else {}
    layer, state = build(name, 4, use_fast_variance=fast, **kwargs)
    mesh = make_mesh(device=8)
    in_specs = (P("device"), P("device" if masked else None), P())

    @jax.jit
    @ft.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=(P("device"), P()))
    def f(x, mask, state):
        if not case.stateful:
            return layer(x, mask=mask), None
        y, state = layer(x, state, mask=mask)
        return y, layer.running_stats(state)

    return f, state


@all_norms
@few
@given(seed=seeds, fast=st.booleans(), masked=st.booleans())
def test_splitting_a_batch_over_devices(case, seed, fast, masked):
    """Output and running statistics are those of the whole batch on one device."""
    x = jnp.asarray(draw(seed, (16, 3, 4), apart=2))
    mask = None
    if masked:
        mask = jnp.asarray(np.random.default_rng(seed).random((16, 3, 1)) < 0.5)
    f, state = over_devices(case.name, fast, masked)
    y, stats = f(x, mask, None if state is None else clone(state))
    layer, state = build(case.name, 4, use_fast_variance=fast)
    np.testing.assert_allclose(
        y, run(case, x, mask=mask, use_fast_variance=fast), rtol=1e-4, atol=1e-4
    )
    if not case.stateful:
        return
    _, new = eqx.filter_jit(layer)(x, clone(state), mask=mask)
    expected = layer.running_stats(new)
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats.var, expected.var, rtol=1e-5)
    np.testing.assert_array_equal(stats.count, expected.count)


@few
@given(data=st.data(), seed=seeds)
def test_any_axes(data, seed):
    """The layers that let one choose, on axes in any order, counted from either end."""
    shape = (3, 2, 4)
    names = [case.name for case in NORMS if case.name in ("LayerNorm", "RMSNorm")]
    name = data.draw(st.sampled_from(names))
    (case,) = (case for case in NORMS if case.name == name)
    choices = [(-1,), (0, 2), (2, 0), (-2, -1), (1,), (0, 1, 2)]
    axes = data.draw(st.sampled_from(choices))
    feature_axes = data.draw(st.sampled_from(choices[:-1]))
    layer, _ = case.build(
        tuple(shape[axis] for axis in feature_axes),
        reduction_axes=axes,
        feature_axes=feature_axes,
        epsilon=EPSILON,
        use_scale=False,
        **({"use_bias": False} if case.has_bias else {}),
    )
    x = draw(seed, shape, apart=2)
    canonical = tuple(axis % 3 for axis in axes)
    expected, _, _ = reference(x, canonical, **case.formula, epsilon=EPSILON)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


@few
@given(data=st.data(), seed=seeds, momentum=st.sampled_from([0.9, None]))
def test_running_statistics_take_the_good_features(data, seed, momentum):
    for case in (case for case in NORMS if case.stateful):
        layer, state = build(case.name, 4, momentum=momentum)
        bad = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
        x = draw(seed, (8, 4))
        spoilt = x.copy()
        spoilt[seed % 8, bad] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        f = compiled_update
        old = layer.running_stats(state)
        good, stats = (f(layer, jnp.asarray(a), clone(state)) for a in (x, spoilt))
        for a, b, c in zip(*map(jax.tree.leaves, (stats, good, old)), strict=True):
            np.testing.assert_array_equal(a, np.where(bad, c, b))


@eqx.filter_jit
def compiled_update(layer, x, state):
    return layer.running_stats(layer(x, state)[1])
