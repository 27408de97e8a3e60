"""Errors against float64, on the data of `tests.benchmarks.accuracy`."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from .benchmarks.accuracy import (
    DTYPES,
    EPSILON,
    HAS_TORCH,
    answer,
    as_dtype,
    error,
    lay_out,
    names,
    pytorch,
)
from .helpers import NORMS, all_norms, call, clone, every, normal, over, reference


# The errors of a sum over columns, which XLA adds up row after row before jax 0.10.
SUM = 1 if jax.__version_info__ >= (0, 10) else 3

# The data is laid out as one row for each statistic, which groups of features are not.
row_layers = over(*(case for case in NORMS if case.groups is None))
compiled_call = eqx.filter_jit(call)
MODES = {"fast": True, "exact": False}
modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


@ft.cache
def build(name, num_features, dtype, fast, epsilon=EPSILON, **kwargs):
    # Cached, as a new state index means a new compilation.
    (case,) = (case for case in NORMS if case.name == name)
    kwargs.update(dtype=dtype, use_fast_variance=fast, epsilon=epsilon)
    return case.build(num_features, **kwargs)


def run(case, x, mode, **kwargs):
    layer, state = build(case.name, x.shape[-1], x.dtype, MODES[mode], **kwargs)
    return np.asarray(compiled_call(layer, state, jnp.asarray(x)))


def at(x, axes, position):
    """One position along each of these axes, and all of the others."""
    starts = [position(axis, n) for axis, n in enumerate(x.shape)]
    return tuple(
        slice(start, start + 1) if axis in axes else slice(None)
        for axis, start in enumerate(starts)
    )


def shift(axis, n):
    """Where the fast mode has its shift from."""
    return 0 if axis == 0 else n // 2


def allowance(case, x, expected, mode):
    """What is due to rounding, for each element, in the precision of the statistics.

    Subtraction, inverse deviation and product are four roundings of the output, whatever
    the mean. The fast mode's variance has about 1 + distance^2 times those
    of a sum, where the distance is that of that position from the mean, in
    deviations.
    """
    axes = case.reduction_axes(x.ndim)
    wide = np.asarray(x, np.float64)
    mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    inverse = 1 / np.sqrt(var + EPSILON)
    largest = np.abs(expected).max()
    allowed = np.full(x.shape, 4 * largest)
    if mode == "fast" and case.center and axes != (x.ndim - 1,):
        distance = (wide[at(x, axes, shift)] - mean) * inverse
        allowed = allowed + 4 * largest * distance**2
    # XLA may take subnormal numbers for zero, before they are scaled up.
    flushed = float(jnp.finfo(jnp.float32).tiny) / np.sqrt(EPSILON)
    return 2.0**-24 * SUM * allowed + flushed


def output_rounding(expected, dtype):
    """Half of the spacing of a half-precision dtype at each element."""
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(expected), float(info.tiny))))
    return 0.5 * float(info.eps) * 2.0**exponent


@every(2)
@row_layers
@modes
@dtypes
def test_error_is_that_of_rounding(case, dtype, mode):
    """One rounding to the output's dtype, and those of float32 statistics."""
    for name in names(dtype):
        if name == "magnitude 1e18":
            continue  # The squares overflow, and may.
        x = lay_out(case, as_dtype(name, dtype))
        expected = answer(case, x)
        allowed = allowance(case, x, expected, mode)
        if dtype is not jnp.float32:
            allowed = allowed + output_rounding(expected, dtype)
        y = run(case, x, mode)
        assert y.dtype == x.dtype
        worst = (np.abs(y.astype(np.float64) - expected) / allowed).max()
        assert worst <= 1, f"{name}: {worst:.2f} times what rounding explains"


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
@row_layers
@modes
@dtypes
def test_no_worse_than_pytorch(case, dtype, mode):
    torch = pytorch(case)
    if torch is None:
        pytest.skip("no such layer in PyTorch")
    for name in names(dtype):
        if name == "magnitude 1e18":
            continue  # The squares overflow, and may.
        x = lay_out(case, as_dtype(name, dtype))
        expected = answer(case, x)
        rounding = allowance(case, x, expected, mode).max()
        if dtype is not jnp.float32:
            rounding += output_rounding(expected, dtype).max()
        assert error(run(case, x, mode), expected) <= max(
            error(torch(x), expected), rounding
        ), name


@every(2)
@row_layers
@modes
@dtypes
def test_finite_without_epsilon(case, dtype, mode):
    """Where the float64 answer is finite, and with no epsilon to hide behind."""
    for name in names(dtype):
        x = lay_out(case, as_dtype(name, dtype))
        y = run(case, x, mode, epsilon=0.0)
        assert np.isfinite(y.astype(np.float64)).all(), name


@row_layers
@modes
@dtypes
def test_squares_that_overflow_come_out_as_zero(case, dtype, mode):
    if "magnitude 1e18" not in names(dtype):
        pytest.skip("cannot hold such data")
    x = np.float32(100) * lay_out(case, as_dtype("magnitude 1e18", dtype))
    assert (run(case, x, mode) == 0).all()


@row_layers
@modes
@pytest.mark.parametrize("spread", [0.0, 0.1], ids=["constant", "not"])
def test_numbers_whose_sum_overflows(case, spread, mode):
    """Evaluated, and differentiated, as where their squares alone overflow."""
    data = 1e36 * (1 + spread * np.random.default_rng(0).standard_normal((32, 512)))
    x = jnp.asarray(lay_out(case, data.astype(np.float32)))
    layer, state = build(case.name, x.shape[-1], x.dtype, MODES[mode])

    @jax.jit
    def f(x):
        y, pull = jax.vjp(ft.partial(call, layer, state), x)
        return call(layer, state, x), y, pull(x / 1e36)[0]

    if spread or not case.center:
        assert all(not array.any() for array in f(x))
    else:
        assert all(np.isfinite(array).all() for array in f(x))
        assert not f(x)[0].any()


@row_layers
def test_fast_variance_with_a_shift_far_from_the_mean(case):
    """That position is an outlier, as far from the mean as one of 512 can be: the variance
    has lost at most as many roundings as there are positions."""
    if not case.center:
        pytest.skip("subtracts no mean")
    data = np.random.default_rng(1).standard_normal((32, 512)).astype(np.float32)
    x = lay_out(case, data)
    x[at(x, case.reduction_axes(3), shift)] = 1e4
    expected = answer(case, x)
    for mode in MODES:
        allowed = allowance(case, x, expected, mode)
        assert (np.abs(run(case, x, mode) - expected) <= allowed).all(), mode


@every(2)
@row_layers
@modes
@pytest.mark.parametrize("value", [0.0, 300.0])
@pytest.mark.parametrize("vmapped", [False, True], ids=["batch", "vmap"])
def test_an_outlier_at_the_first_position(case, vmapped, value, mode):
    """As padding and first tokens are: no ordinary position is less exact for it. In
    training, where statistics over the last axis alone have a shift too."""
    mean = 100.0 if value == 0 else 0.0
    data = mean + np.random.default_rng(1).standard_normal((32, 512)).astype(np.float32)
    x = lay_out(case, data)
    first = at(x, case.reduction_axes(3), lambda axis, n: 0)
    x[first] = value
    kwargs = case.per_example if vmapped else {}
    layer, state = build(case.name, x.shape[-1], x.dtype, MODES[mode], **kwargs)
    f = ft.partial(call, layer, state)
    if vmapped:
        # One example is a vector, where the statistics are over the last axis alone.
        vector = case.reduction_axes(3) == (2,)
        f = jax.vmap(jax.vmap(f) if vector else f, axis_name="batch")
    y = jax.jit(lambda x: jax.vjp(f, x)[0])(x)
    difference = np.abs(np.asarray(y) - answer(case, x))
    difference[first] = 0
    assert difference.max() <= 1e-5


# Half precision.


def one_rounding(y, expected):
    """Of the result, besides those of float32."""
    slack = 4 * 2.0**-24 * np.abs(expected).max()
    y = np.asarray(y)
    difference = np.abs(y.astype(np.float64) - expected)
    return (difference <= output_rounding(expected, y.dtype) + slack).all()


half_dtypes = pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__
)


@all_norms
@half_dtypes
def test_half_precision_with_parameters(case, dtype):
    """Scale and bias join in float32, before the one cast."""
    rng = np.random.default_rng(4)
    x = (100 + rng.standard_normal((6, 8, 16))).astype(jnp.dtype(dtype))
    scale = rng.uniform(0.5, 1.5, 16).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32)
    layer, state = case.build(16, dtype=dtype, epsilon=EPSILON)
    layer = eqx.tree_at(lambda layer: layer.scale, layer, jnp.asarray(scale))
    if case.has_bias:
        layer = eqx.tree_at(lambda layer: layer.bias, layer, jnp.asarray(bias))
    expected, _, _ = reference(
        x,
        case.reduction_axes(3),
        **case.formula,
        epsilon=EPSILON,
        scale=scale,
        bias=bias if case.has_bias else None,
    )
    y = call(layer, state, jnp.asarray(x))
    assert y.dtype == dtype
    assert one_rounding(y, expected)


@all_norms
@half_dtypes
def test_half_precision_in_evaluation(case, dtype):
    """The running statistics stay float32: in half precision the mean would be off by a
    quarter of a deviation."""
    if not case.stateful:
        pytest.skip("has no running statistics")
    rng = np.random.default_rng(5)
    x = (100 + rng.standard_normal((6, 8, 16))).astype(jnp.dtype(dtype))
    mean = rng.uniform(99, 101, 16).astype(np.float32)
    var = rng.uniform(0.5, 1.5, 16).astype(np.float32)
    layer, state = case.build(16, dtype=dtype, use_running_average=True, epsilon=EPSILON)
    stats = layer.running_stats(state)
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    stats = eqx.tree_at(lambda s: (s.mean, s.var), stats, (mean, var), is_leaf=eqx.is_array)
    state = clone(state).set(layer.state_index, jax.tree.map(jnp.asarray, stats))
    y = call(layer, state, jnp.asarray(x))
    expected = (x.astype(np.float64) - mean) / np.sqrt(var.astype(np.float64) + EPSILON)
    assert y.dtype == dtype
    assert one_rounding(y, expected)


@all_norms
def test_half_precision_running_statistics(case):
    if not case.stateful:
        pytest.skip("has no running statistics")
    x = (100 + np.random.default_rng(6).standard_normal((64, 4))).astype(jnp.bfloat16)
    layer, state = case.build(4, dtype=jnp.bfloat16, momentum=0.0)
    _, state = layer(jnp.asarray(x), state)
    stats = layer.running_stats(state)
    _, mean, var = reference(x, (0,))
    np.testing.assert_allclose(stats.mean, mean[0], rtol=1e-6)
    np.testing.assert_allclose(stats.var, var[0], rtol=1e-6)


# Over devices.


def over_devices(case, **kwargs):
    """The layer with its statistics over a mesh axis too, and that axis of the input."""
    axis = case.reduction_axes(3)[0]
    shape = tuple(64 if a == axis else 4 for a in range(3))
    layer, state = case.build(shape[-1], axis_name="device", epsilon=EPSILON, **kwargs)
    spec = P(*["device" if a == axis else None for a in range(3)])
    # Parameters along a split axis would have to be split as well.
    parameters = spec[-1:] if axis == 2 else P()
    specs = jax.tree.map(lambda leaf: P(*parameters), eqx.filter(layer, eqx.is_array))
    arrays, static = eqx.partition(layer, eqx.is_array)

    def f(arrays, x):
        return call(eqx.combine(arrays, static), state, x)

    mesh = jax.make_mesh((8,), ("device",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=(specs, spec), out_specs=spec)
    return jax.jit(ft.partial(sharded, arrays)), shape


@all_norms
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])
def test_half_precision_over_devices(case, fast):
    """What travels is float32."""
    f, shape = over_devices(case, use_fast_variance=fast, dtype=jnp.bfloat16)
    x = (3 + normal(8, shape)).astype(jnp.bfloat16)
    axes = case.reduction_axes(3)
    expected, _, _ = reference(x, axes, **case.formula, epsilon=EPSILON)
    assert one_rounding(f(x), expected)
    text = f.lower(x).as_text()
    sums = [line for line in text.splitlines() if "all_reduce" in line]
    assert sums
    results = [line for line in text.splitlines() if "stablehlo.return" in line]
    assert "bf16" not in "".join(results)
