import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms._checks import Check
from eqx_norms._dtypes import promote, real_dtype

from .helpers import (
    NORMS,
    WRAPPERS,
    Norm,
    all_layers,
    all_norms,
    assert_close,
    call,
    clone,
    every,
    float64,
    normal,
    over,
    raises,
    randomize,
    reference,
    ways,
)


BF16, F16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
C64, C128 = jnp.complex64, jnp.complex128
SHAPE = (3, 4, 8)
DTYPES = [jnp.bool_, jnp.int8, jnp.uint32, BF16, F16]


def data(dtype):
    """Batch, space and eight features; small whole numbers are exact in every dtype."""
    if dtype == jnp.bool_:
        return normal(0, SHAPE) > 0
    x = jnp.round(3 * normal(0, SHAPE)) + 4
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.complex(x, jnp.round(2 * normal(1, SHAPE))).astype(dtype)
    return jnp.abs(x).astype(dtype)


def test_promotion_is_not_the_callers():
    assert promote(BF16, F32) == F32
    assert promote(F16, BF16) == F32
    assert promote(jnp.int32, BF16) == BF16
    assert promote(jnp.int32, C64) == C64


@pytest.mark.parametrize(
    ("dtype", "x", "others", "expected"),
    [
        (None, F32, (F32, None), F32),
        (None, BF16, (F32, F32), F32),
        (None, BF16, (BF16, None), BF16),
        (None, BF16, (None, None), BF16),
        (None, F16, (BF16, None), F32),
        (None, jnp.int32, (BF16, None), BF16),
        (None, jnp.int32, (None, None), F32),
        (None, jnp.bool_, (None, None), F32),
        (None, F32, (C64, None), C64),
        (BF16, F32, (F32, None), BF16),
        (F32, jnp.int8, (None, None), F32),
        (C64, F32, (F32, None), C64),
        ("input", BF16, (F32, None), BF16),
        ("input", F32, (BF16, BF16), F32),
        ("input", F16, (BF16, None), F16),
        ("input", C64, (F32, None), C64),
        ("input", jnp.int32, (BF16, None), F32),
        ("input", jnp.bool_, (None, None), F32),
    ],
    ids=str,
)
def test_result_dtype(dtype, x, others, expected):
    arrays = [None if other is None else jnp.ones(3, other) for other in others]
    if dtype not in (None, "input"):
        dtype = np.dtype(dtype)
    assert Check("Layer").dtype_of(dtype, jnp.ones(3, x), *arrays) == expected


def test_real_dtype():
    with float64():
        for dtype, expected in ((C64, F32), (C128, F64), (F32, F32), (BF16, BF16)):
            assert real_dtype(np.dtype(dtype)) == expected


def test_check_dtype():
    assert Check("Layer").dtype("bfloat16", "dtype") == BF16
    # Without 64 bits there is nothing wider than this.
    assert Check("Layer").dtype(F64, "dtype") == F32
    with float64():
        assert Check("Layer").dtype(F64, "dtype") == F64
    for dtype in (jnp.int32, bool):
        with pytest.raises(
            ValueError, match="Layer: `dtype` must be a floating or complex"
        ):
            Check("Layer").dtype(dtype, "dtype")


def widen(leaf):
    """To float64 or complex128."""
    if not eqx.is_inexact_array(leaf):
        return leaf
    return leaf.astype(C128 if jnp.iscomplexobj(leaf) else F64)


def check(case, x, dtype, param_dtype, result):
    """The right dtype, and one rounding to it from the right number.

    A wrapper's dtypes are those of the weight that the wrapped layer is called with. So it
    is given the identity, which has no say in the result, and shows the weight.
    """
    if not isinstance(case, Norm):
        x = jnp.eye(8, dtype=jnp.int32)
    layer, state = case.build(dtype=dtype, param_dtype=param_dtype)
    layer = randomize(layer)
    learned = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in learned} == {np.dtype(param_dtype)}
    y = eqx.filter_jit(call)(layer, state, x)
    assert y.dtype == result
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(F32)
    with float64():
        expected = np.asarray(case.expected(*jax.tree.map(widen, (layer, state, x))))
    # Half an ulp of the output, and the float32 arithmetic before.
    error = np.abs(np.asarray(y).astype(expected.dtype) - expected)
    arithmetic = 1e-5 if jnp.finfo(result).bits < 64 or result == C64 else 1e-13
    half_ulp = float(jnp.finfo(result).eps) / 2
    assert np.all(error <= half_ulp * np.abs(expected) + arithmetic)


@all_norms
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_input_dtypes(case, dtype):
    check(case, data(dtype), None, F32, F32)


@all_layers
@pytest.mark.parametrize(
    ("x", "dtype", "param_dtype", "result"),
    [
        (BF16, None, BF16, BF16),
        (F16, None, F16, F16),
        (jnp.int32, None, BF16, BF16),
        (F32, BF16, F32, BF16),
        (BF16, F32, BF16, F32),
        (jnp.int32, F16, F32, F16),
    ],
    ids=lambda dtype: "none" if dtype is None else np.dtype(dtype).name,
)
def test_result_is_rounded_once(case, x, dtype, param_dtype, result):
    check(case, data(x), dtype, param_dtype, result)


@every(2)
@all_norms
@pytest.mark.parametrize("dtype", [*DTYPES, F32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("param_dtype", [BF16, F32], ids=lambda d: np.dtype(d).name)
def test_as_the_input(case, dtype, param_dtype):
    """Whatever the parameters are, with those of the call too."""
    result = dtype if jnp.issubdtype(dtype, jnp.inexact) else F32
    check(case, data(dtype), "input", param_dtype, result)
    layer, state = case.build(dtype="input", param_dtype=param_dtype)
    assert "dtype='input'" in repr(layer)
    y = call(layer, state, data(dtype), scale=jnp.ones(8, F32), bias=jnp.ones(8, F32))
    assert y.dtype == result


@all_norms
def test_as_the_input_in_other_widths(case):
    with float64():
        check(case, normal(0, SHAPE, F64), "input", F32, F64)
        check(case, normal(0, SHAPE, F32), "input", F64, F32)
        # Integers have no width of their own.
        check(case, data(jnp.int32).astype(jnp.int64), "input", F64, F32)
    layer, state = case.build(dtype="input", param_dtype=C64)
    with pytest.raises(ValueError, match=r"`dtype=input` float32 cannot hold the result"):
        call(layer, state, data(F32))
    assert call(layer, state, data(C64)).dtype == C64


@over(*WRAPPERS)
def test_the_input_of_a_wrapper_is_the_weight(case):
    """The identity it is called with has no say in the result."""
    for param_dtype in (BF16, F32):
        check(case, None, "input", param_dtype, param_dtype)
    layer, state = case.build(dtype="input", param_dtype=F32)
    half = jax.tree.map(
        lambda leaf: leaf.astype(BF16) if eqx.is_inexact_array(leaf) else leaf, layer.layer
    )
    # A scale that is wider does not widen it.
    layer = eqx.tree_at(lambda layer: layer.layer, layer, half)
    assert call(layer, state, jnp.eye(8, dtype=jnp.int32)).dtype == BF16


@all_norms
def test_scan_in_half_precision(case):
    """A carry keeps its dtype: blocks in bfloat16 with norms in float32."""
    layer, state = case.build(dtype="input")
    x = data(BF16)
    y, _ = jax.lax.scan(lambda x, _: (call(layer, state, x), None), x, length=3)
    assert y.dtype == BF16
    layer, state = case.build()
    with pytest.raises(TypeError, match="carry"):
        jax.lax.scan(lambda x, _: (call(layer, state, x), None), x, length=3)


@all_norms
def test_without_parameters(case):
    """The input decides alone."""
    kwargs = {"use_bias": False} if case.has_bias else {}
    layer, state = case.build(use_scale=False, **kwargs)
    assert layer.scale is None
    for dtype, result in ((BF16, BF16), (F16, F16), (F32, F32), (jnp.int32, F32)):
        assert call(layer, state, data(dtype)).dtype == result


@all_layers
def test_float64(case):
    with float64():
        x = normal(0, SHAPE, F64)
        check(case, x, None, F64, F64)
        check(case, x, F32, F32, F32)
        check(case, x.astype(F32), F32, F64, F32)


@all_norms
def test_float64_input(case):
    """As wide as the input, with float32 parameters as well."""
    with float64():
        check(case, normal(0, SHAPE, F64), None, F32, F64)


@all_layers
def test_complex(case):
    check(case, data(C64), None, C64, C64)
    with float64():
        # Against differences, in a random direction.
        layer, state = case.build(param_dtype=C128)
        params, static = eqx.partition(randomize(layer), eqx.is_inexact_array)
        at = params, data(C64).astype(C128)
        weights = normal(2, (2, *SHAPE), F64)
        # Differences see the steps of training, which no gradient flows through.
        kwargs = {} if isinstance(case, Norm) else case.evaluation

        @jax.jit
        def loss(at):
            params, x = at
            y = call(eqx.combine(params, static), state, x, **kwargs)
            return jnp.sum(weights[0] * y.real + weights[1] * y.imag)

        leaves, treedef = jax.tree.flatten(at)
        along = jax.tree.unflatten(
            treedef, [normal(3 + i, leaf.shape, C128) for i, leaf in enumerate(leaves)]
        )
        # JAX's convention: the conjugate of the direction of steepest ascent.
        products = jax.tree.map(
            lambda g, v: jnp.sum((g * v).real), jax.grad(loss)(at), along
        )
        h = 1e-6
        ahead, behind = (
            loss(jax.tree.map(lambda a, v, s=s: a + s * h * v, at, along)) for s in (1, -1)
        )
        slope = sum(jax.tree.leaves(products))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("param_dtype", [BF16, F16, F32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_running_statistics_are_wide(param_dtype, dtype):
    """Whatever else is of half precision: 0.99 of a number is lost in bfloat16."""
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(
        8, dtype=dtype, param_dtype=param_dtype
    )
    x = data(BF16)
    _, state = layer(x, state)
    stats = layer.running_stats(state)
    assert (stats.mean.dtype, stats.var.dtype) == (F32, F32)
    assert stats.count.dtype == jnp.int32
    _, mean, var = reference(x, (0, 1))
    np.testing.assert_allclose(stats.mean, 0.01 * mean[0, 0], rtol=1e-5)
    np.testing.assert_allclose(stats.var, 0.99 + 0.01 * var[0, 0], rtol=1e-5)


def test_evaluation_does_not_round_the_statistics():
    """Flax brings them to `dtype` first: off by 0.12 here."""
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(8, momentum=0.0, dtype=BF16)
    x = 100 + normal(0, (64, 8))
    _, state = layer(x, state)
    y, _ = layer(x, clone(state), use_running_average=True)
    expected, _, _ = reference(x, (0,), epsilon=1e-5)
    assert y.dtype == BF16
    np.testing.assert_allclose(y.astype(F32), expected, rtol=2.0**-8, atol=1e-4)


def test_evaluation_in_other_widths():
    """The input may be wider or narrower than the running statistics, or complex."""
    with float64():
        for param_dtype in (F32, F64):
            layer, state = eqx.nn.make_with_state(en.BatchNorm)(8, param_dtype=param_dtype)
            _, state = layer(data(F32), state)
            for dtype in (BF16, F64, C64):
                x = data(dtype)
                y, _ = layer(x, state, use_running_average=True)
                stats = layer.running_stats(state)
                mean, var = (np.asarray(a, np.float64) for a in (stats.mean, stats.var))
                expected = (np.asarray(x).astype(C128) - mean) / np.sqrt(
                    var + layer.epsilon
                )
                assert y.dtype == promote(dtype, param_dtype)
                tolerance = 1e-13 if y.dtype in (F64, C128) else 1e-5
                np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


# Floats of 8 bits and fewer.


TINY = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn]


def tiny_case(case, tiny, **kwargs):
    """A layer with an input, or a weight, of that dtype; the same with wider values."""
    layer, state = case.build(8, **kwargs)
    x = normal(0, (4, 6, 8))
    if case in NORMS:
        x = x.astype(tiny)
        return (layer, state, x), (layer, state, x.astype(jnp.float32))
    weight = layer.layer.weight.astype(tiny)
    place = lambda weight: eqx.tree_at(  # noqa: E731
        lambda layer: layer.layer.weight, layer, weight
    )
    return (place(weight), state, x), (place(weight.astype(jnp.float32)), state, x)


@every(2)
@all_layers
@pytest.mark.parametrize("dtype", TINY)
@ways
def test_tiny_floats(case, dtype, way):
    """As the same values in float32; gradients have the dtype of what they are of."""
    tiny, wide = tiny_case(case, dtype, dtype=jnp.float32)
    pairs = zip(*map(jax.tree.leaves, (way(call)(*tiny), way(call)(*wide))), strict=True)
    for found, wanted in pairs:
        # One step of rounding, where the float32 numbers differ in their last digits.
        tolerance = jnp.finfo(dtype).eps if found.dtype == dtype else 1e-5
        assert_close(found, wanted.astype(found.dtype), float(tolerance))


@pytest.mark.parametrize("dtype", TINY)
@all_norms
def test_tiny_floats_under_a_mask(case, dtype):
    (layer, state, x), wide = tiny_case(case, dtype, dtype=jnp.float32)
    kwargs = normal(1, (4, 6, 8)) > -0.5
    assert_close(call(layer, state, x, mask=kwargs), call(*wide, mask=kwargs))


@pytest.mark.parametrize("dtype", TINY)
@all_layers
def test_tiny_floats_want_a_dtype(case, dtype):
    tiny, _ = tiny_case(case, dtype)
    match = f"needs a `dtype` for its result.*got .*{dtype.dtype}.*Give one, `dtype=jnp.bf"
    with raises(case.name, match):
        call(*tiny)
