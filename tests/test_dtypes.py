import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms._dtypes import check_dtype, promote, real_dtype, result_dtype

from .helpers import call, clone, float64, normal, randomize, reference, vector_layers


BF16, F16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
C64, C128 = jnp.complex64, jnp.complex128
DTYPES = [jnp.bool_, jnp.int8, jnp.uint32, BF16, F16]


def data(dtype):
    """Six batches of eight features; small whole numbers are exact in every dtype."""
    if dtype == jnp.bool_:
        return normal(0, (6, 8)) > 0
    x = jnp.round(3 * normal(0, (6, 8))) + 4
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.complex(x, jnp.round(2 * normal(1, (6, 8)))).astype(dtype)
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
    ],
    ids=str,
)
def test_result_dtype(dtype, x, others, expected):
    arrays = [None if other is None else jnp.ones(3, other) for other in others]
    dtype = None if dtype is None else np.dtype(dtype)
    assert result_dtype(dtype, jnp.ones(3, x), *arrays, layer="Layer") == expected


def test_real_dtype():
    with float64():
        for dtype, expected in ((C64, F32), (C128, F64), (F32, F32), (BF16, BF16)):
            assert real_dtype(np.dtype(dtype)) == expected


def test_check_dtype():
    assert check_dtype("bfloat16", layer="Layer", argument="dtype") == BF16
    # Without 64 bits there is nothing wider than this.
    assert check_dtype(F64, layer="Layer", argument="dtype") == F32
    with float64():
        assert check_dtype(F64, layer="Layer", argument="dtype") == F64
    for dtype in (jnp.int32, bool):
        with pytest.raises(
            ValueError, match="Layer: `dtype` must be a floating or complex"
        ):
            check_dtype(dtype, layer="Layer", argument="dtype")


def expected_output(case, layer, x):
    scale, bias = (None if p is None else p[None] for p in (layer.scale, layer.bias))
    axes = case.reduction_axes(2)
    y, _, _ = reference(
        x, axes, center=case.center, epsilon=layer.epsilon, scale=scale, bias=bias
    )
    return y


def check(case, x, dtype, param_dtype, result):
    """The right dtype, and one rounding to it from the right number."""
    layer, state = case.build(dtype=dtype, param_dtype=param_dtype)
    layer = randomize(layer)
    assert layer.scale.dtype == param_dtype
    y = eqx.filter_jit(call)(layer, state, x)
    assert y.dtype == result
    expected = expected_output(case, layer, x)
    # Half an ulp of the output, and the float32 arithmetic before.
    error = np.abs(np.asarray(y).astype(expected.dtype) - expected)
    arithmetic = 1e-5 if jnp.finfo(result).bits < 64 or result == C64 else 1e-13
    half_ulp = float(jnp.finfo(result).eps) / 2
    assert np.all(error <= half_ulp * np.abs(expected) + arithmetic)


@vector_layers
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_input_dtypes(case, dtype):
    check(case, data(dtype), None, F32, F32)


@vector_layers
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


@vector_layers
def test_without_parameters(case):
    """The input decides alone."""
    kwargs = {"use_bias": False} if case.has_bias else {}
    layer, state = case.build(use_scale=False, **kwargs)
    assert layer.scale is None
    for dtype, result in ((BF16, BF16), (F16, F16), (F32, F32), (jnp.int32, F32)):
        assert call(layer, state, data(dtype)).dtype == result


@vector_layers
def test_float64(case):
    with float64():
        x = normal(0, (6, 8), F64)
        check(case, x, None, F64, F64)
        # As wide as the input, with float32 parameters as well, and in evaluation.
        check(case, x, None, F32, F64)
        check(case, x, F32, F32, F32)
        check(case, x.astype(F32), F32, F64, F32)


@vector_layers
def test_complex(case):
    x = data(C64)
    check(case, x, None, C64, C64)
    weights = normal(2, (2, *x.shape))
    loss = lambda y: jnp.sum(weights[0] * y.real + weights[1] * y.imag)  # noqa: E731
    with float64():
        # Against differences, in a random direction.
        layer, state = case.build(param_dtype=C128)
        x, weights = x.astype(C128), weights.astype(F64)
        v = jax.lax.complex(normal(3, x.shape, F64), normal(4, x.shape, F64))
        loss_at = jax.jit(lambda x: loss(call(layer, state, x)))
        gradient = jax.grad(loss_at)(x)
        # JAX's convention: the conjugate of the direction of steepest ascent.
        slope = jnp.sum((gradient * v).real)
        h = 1e-6
        ahead, behind = (loss_at(x + s * h * v) for s in (1, -1))
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
    _, mean, var = reference(x, (0,))
    np.testing.assert_allclose(stats.mean, 0.01 * mean[0], rtol=1e-5)
    np.testing.assert_allclose(stats.var, 0.99 + 0.01 * var[0], rtol=1e-5)


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
