"""What the backward pass keeps, and what a compiled stack of layers needs at once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from .benchmarks.hlo import count
from .benchmarks.memory import WIDTH, temporary
from .benchmarks.rivals import available, count_bytes
from .helpers import (
    WRAPPERS,
    all_norms,
    bytes_kept,
    call,
    every,
    make_mesh,
    over,
    vector_norms,
)


# Only shapes are computed with, so they may be large. Rows of 512 however one looks at it.
SHAPE = (4, 512, 512)
LIMIT = 1.05

dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)


def kept(layer, state, x, **kwargs):
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def f(params, x):
        return call(eqx.combine(params, static), state, x, **kwargs)

    return bytes_kept(f, params, x)


def options(case):
    yield {}
    yield {"use_scale": False}
    if case.has_bias:
        yield {"use_bias": False}
        yield {"use_scale": False, "use_bias": False}
    yield {"use_fast_variance": False}
    yield case.features_first
    if case.stateful:
        yield {"use_running_average": True}


@all_norms
@dtypes
@pytest.mark.parametrize("result", ["dtype of the input", "promoted"])
def test_keeps_the_input_alone(case, dtype, result):
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    size = x.size * x.dtype.itemsize
    for option in options(case):
        if result == "dtype of the input":
            option = {**option, "dtype": dtype}
        layer, state = case.build(SHAPE[-1], **option)
        assert size <= kept(layer, state, x) <= LIMIT * size, option


@every(2)
@all_norms
@dtypes
@pytest.mark.parametrize("shape", [SHAPE, (4, 512, 1), (4, 1, 1), (512,)], ids=str)
def test_keeps_the_input_and_the_mask(case, dtype, shape):
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    size = x.size * x.dtype.itemsize
    mask = jnp.ones(shape, bool)
    for option in options(case):
        layer, state = case.build(SHAPE[-1], **option)
        assert kept(layer, state, x, mask=mask) <= LIMIT * size + mask.nbytes, option


@all_norms
@dtypes
def test_keeps_the_input_alone_under_vmap(case, dtype):
    x = jax.ShapeDtypeStruct((3, *SHAPE), dtype)
    size = x.size * x.dtype.itemsize
    layer, state = case.build(SHAPE[-1])
    assert bytes_kept(jax.vmap(lambda x: call(layer, state, x)), x) <= LIMIT * size
    # One example at a time, with statistics over all of them.
    layer, state = case.build(SHAPE[-1], axis_name="batch")
    f = jax.vmap(lambda x: call(layer, state, x), axis_name="batch")
    assert bytes_kept(f, x) <= LIMIT * size


@all_norms
@dtypes
def test_given_parameters_are_kept_apart(case, dtype):
    """The input, a given scale as large as that, and nothing else of this size: not their
    sum with the learned ones, and no bias."""
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    size = x.size * x.dtype.itemsize
    layer, state = case.build(SHAPE[-1])
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def f(params, x, scale, bias):
        layer = eqx.combine(params, static)
        return call(layer, state, x, scale=scale, bias=bias)

    assert 2 * size <= bytes_kept(f, params, x, x, x) <= 2 * LIMIT * size
    one = jax.ShapeDtypeStruct((SHAPE[0], 1, SHAPE[-1]), dtype)
    assert size <= bytes_kept(f, params, x, one, one) <= LIMIT * size


@all_norms
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_keeps_the_input_of_each_layer_on_devices(case, checked):
    """Of each of four, one after the other, once, and little more."""
    x = jax.ShapeDtypeStruct((8, *SHAPE), jnp.bfloat16)
    size = x.size * x.dtype.itemsize
    kwargs = {"dtype": jnp.bfloat16, **({"axis_name": "d"} if case.stateful else {})}
    built = [case.build(SHAPE[-1], **kwargs) for _ in range(4)]
    params, static = eqx.partition([layer for layer, _ in built], eqx.is_inexact_array)

    def local(params, x):
        for layer, (_, state) in zip(eqx.combine(params, static), built, strict=True):
            x = x + call(layer, state, x)
        return x

    f = jax.shard_map(
        local,
        mesh=make_mesh(d=8),
        in_specs=(P(), P("d")),
        out_specs=P("d"),
        check_vma=checked,
    )
    assert 4 * size <= bytes_kept(f, params, x) <= 4 * LIMIT * size


@over(*WRAPPERS)
@dtypes
@pytest.mark.parametrize(
    "param_dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: f"of {dtype.__name__}"
)
@pytest.mark.parametrize("result", ["dtype of the input", "promoted"])
def test_keeps_the_weight_twice(case, dtype, param_dtype, result):
    """As it is and as it is used, besides what the wrapped layer keeps of its input."""
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    option = {"dtype": dtype} if result == "dtype of the input" else {}
    layer, state = case.build(SHAPE[-1], param_dtype=param_dtype, **option)
    weight = layer.layer.weight
    used = jnp.dtype(option.get("dtype", param_dtype)).itemsize * weight.size
    size = x.size * x.dtype.itemsize + weight.nbytes + used
    assert size <= kept(layer, state, x) <= LIMIT * size


@every(2)
@vector_norms
@dtypes
def test_scan_over_blocks(case, dtype):
    """Twelve blocks, compiled with their gradient: the peak is below that of the others."""
    layers = available(case, WIDTH, dtype)
    peak = {name: temporary(f, dtype, scanned=True) for name, f in layers.items()}
    ours = peak.pop("eqx_norms")
    assert peak
    assert ours < min(peak.values()), peak


@every(2)
@vector_norms
@dtypes
def test_unrolled_blocks(case, dtype):
    """Without the barrier of a loop XLA is free to keep what it likes."""
    layers = available(case, WIDTH, dtype)
    ours = temporary(layers["eqx_norms"], dtype, scanned=False, blocks=4)
    flax = temporary(layers["flax"], dtype, scanned=False, blocks=4)
    # In float32 it is the same with Flax's batch norm, up to small arrays. Before jax 0.10
    # XLA puts off the gradients of scale and bias, and keeps what they are made of.
    limit = 1.03 if jax.__version_info__ >= (0, 10) else 1.1
    assert ours <= limit * flax


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="has no such kernels for a CPU"
)
@vector_norms
@dtypes
def test_rows_in_evaluation_are_read_once_on_a_cpu(case, dtype):
    """All of `LayerNorm` is one kernel: `abs`, `select` or `clamp` between its sums made it
    several, with `x - shift` in memory between them, and took up to three times as long."""
    if case.stateful:
        pytest.skip("not of rows")
    layer, state = case.build(1024, param_dtype=dtype)
    x = jax.ShapeDtypeStruct((8192, 1024), dtype)

    def f(x):
        return call(layer, state, x)

    text = jax.jit(f).lower(x).compile().as_text() or ""
    units = count(text).nbytes / count_bytes(x)
    assert units <= 2.1
