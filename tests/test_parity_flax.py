"""Agreement with `flax.nnx`: outputs, gradients, running statistics.

Each row of a table is one Flax layer and one of ours, run on the same numbers. Flax adds up
E|x - mean|^2 only with `use_fast_variance=False`; that is what it is asked for here, and
our layers are asked for both. Where Flax is wrong, `reference` judges, in other files.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eqx_norms as en

from .helpers import assert_close, every, normal


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
# Half precision: one rounding to the neighbouring number.
TOLERANCE = {F32: 1e-5, BF16: 2.0**-7, F16: 2.0**-10}


def lenient():
    """Flax promotes dtypes implicitly."""
    return jax.numpy_dtype_promotion("standard")


def close(actual, expected, tolerance, what):
    """Where this library has several feature axes, Flax has one."""
    assert_close(actual.reshape(expected.shape), expected, tolerance, what=what)


def representable(array, dtype):
    """Rounded to half precision, so that no later cast to it can be what differs."""
    return array.astype(BF16).astype(F16).astype(dtype)


def data(shape, dtype):
    """Mean 2 and deviation 1: where statistics in half precision would show."""
    return representable(2 + normal(0, shape), dtype)


def parameters(size, param_dtype):
    scale, bias = (1 + normal(seed, (size,)) / 2 for seed in (1, 2))
    return representable(scale, param_dtype), representable(bias, param_dtype)


def given(value):
    """An initializer that returns this value, for either library."""
    return lambda key, shape, dtype: value.reshape(shape)


def options(kwargs, scale, bias):
    """Constructor arguments that Flax and this library share."""
    out = dict(kwargs)
    if out.get("use_scale", True):
        out["scale_init"] = given(scale)
    if out.get("use_bias", True):
        out["bias_init"] = given(bias)
    return out


def prepared(shape, num_features, kwargs, dtype, param_dtype):
    x = data(shape, dtype)
    scale, bias = parameters(int(np.prod(num_features)), param_dtype)
    weights = representable(normal(3, shape), F32)
    return x, scale, bias, weights, dict(kwargs, param_dtype=param_dtype)


def weighted(y, weights):
    return jnp.sum(y.astype(F32) * weights)


# LayerNorm and RMSNorm.

EXAMPLE_LAYERS = [
    # shape, num_features, arguments
    ((5, 8), 8, {}),
    ((2, 3, 8), 8, {"epsilon": 1e-1}),
    ((2, 3, 8), 8, {"reduction_axes": (-2, -1)}),
    ((2, 3, 4), (3, 4), {"reduction_axes": (1, 2), "feature_axes": (1, 2)}),
    ((2, 8, 3), 8, {"reduction_axes": 1, "feature_axes": 1}),
    ((2, 8, 3), 8, {"reduction_axes": 2, "feature_axes": 1}),
    ((2, 3, 8), 8, {"reduction_axes": (0, 1), "feature_axes": 2, "use_scale": False}),
]
DTYPES = [
    # x, dtype, param_dtype
    (F32, None, F32),
    (BF16, None, F32),
    (F16, None, F16),
    (BF16, None, BF16),
    (F32, BF16, F32),
    (BF16, F32, BF16),
]


def run_example_layers(ours, flax, case, dtypes, *, use_fast_variance, mask=None):
    shape, num_features, kwargs = case
    dtype, out_dtype, param_dtype = dtypes
    x, scale, bias, weights, kwargs = prepared(
        shape, num_features, dict(kwargs, dtype=out_dtype), dtype, param_dtype
    )
    if ours is en.RMSNorm:
        kwargs["use_bias"] = False

    def run(make, size, fast):
        def loss(x, scale, bias):
            arguments = options(kwargs, scale, bias)
            arguments = {k: v for k, v in arguments.items() if k != "use_bias"} | (
                {} if ours is en.RMSNorm else {"use_bias": kwargs.get("use_bias", True)}
            )
            y = make(size, use_fast_variance=fast, **arguments)(x, mask=mask)
            return weighted(y, weights), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, *grads

    actual = jax.jit(lambda: run(ours, num_features, use_fast_variance))()
    with lenient():
        size = int(np.prod(num_features))
        make = lambda n, **kw: flax(n, rngs=nnx.Rngs(0), **kw)  # noqa: E731
        expected = jax.jit(lambda: run(make, size, False))()
    names = ("output", "gradient of x", "gradient of scale", "gradient of bias")
    for name, a, e in zip(names, actual, expected, strict=True):
        # A gradient has been rounded like the output, and to its own dtype.
        roundings = (actual[0].dtype.type, a.dtype.type)
        close(a, e, max(TOLERANCE[dtype] for dtype in roundings), name)


PAIRS = {
    "LayerNorm": (en.LayerNorm, nnx.LayerNorm),
    "RMSNorm": (en.RMSNorm, nnx.RMSNorm),
}
pairs = pytest.mark.parametrize(("ours", "flax"), PAIRS.values(), ids=PAIRS)


@every(2)
@pairs
@pytest.mark.parametrize("use_fast_variance", [False, True])
@pytest.mark.parametrize("case", EXAMPLE_LAYERS, ids=str)
def test_arguments(ours, flax, case, use_fast_variance):
    dtypes = (F32, None, F32)
    run_example_layers(ours, flax, case, dtypes, use_fast_variance=use_fast_variance)


@pairs
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=lambda d: "-".join(map(name_of, d)))
def test_dtypes(ours, flax, dtypes):
    run_example_layers(ours, flax, EXAMPLE_LAYERS[0], dtypes, use_fast_variance=False)


def name_of(dtype):
    return "none" if dtype is None else jnp.dtype(dtype).name


@pairs
def test_without_bias_and_with_mask(ours, flax):
    case = ((5, 8), 8, {"use_bias": False})
    mask = jnp.arange(8) != 3
    run_example_layers(
        ours, flax, case, (F32, None, F32), use_fast_variance=False, mask=mask[None]
    )


# BatchNorm: three steps of training, then evaluation. Flax cannot have several axes.

BATCH_LAYERS = [
    # shape, num_features, arguments
    ((6, 4), 4, {}),
    ((6, 4), 4, {"momentum": 0.5, "epsilon": 1e-1, "use_bias": False}),
    ((2, 3, 3, 4), 4, {"momentum": 0.9, "use_scale": False}),
    ((3, 4, 5), 4, {"axis": 1, "momentum": 0.0}),
    ((3, 4, 5), 4, {"axis": -2, "momentum": 1.0}),
]


def steps_of_ours(num_features, arguments, xs, weights, mask, scale, bias):
    arguments = options(arguments, scale, bias)
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(num_features, **arguments)
    stats = []
    loss, ys = 0.0, []
    for x in xs:
        y, state = layer(x, state, mask=mask)
        stats.append((layer.running_stats(state).mean, layer.running_stats(state).var))
        ys.append(y)
        loss = loss + weighted(y, weights)
    y, _ = layer(xs[0], state, use_running_average=True)
    return loss + weighted(y, weights), ([*ys, y], stats)


def steps_of_flax(num_features, arguments, xs, weights, mask, scale, bias):
    arguments = options(arguments, scale, bias)
    size = int(np.prod(num_features))
    layer = nnx.BatchNorm(size, rngs=nnx.Rngs(0), **arguments)
    stats = []
    loss, ys = 0.0, []
    for x in xs:
        y = layer(x, mask=mask)
        # Ours never lets gradients into what is stored, Flax only in some of its modes.
        layer.mean[...] = jax.lax.stop_gradient(layer.mean[...])
        layer.var[...] = jax.lax.stop_gradient(layer.var[...])
        stats.append((layer.mean[...], layer.var[...]))
        ys.append(y)
        loss = loss + weighted(y, weights)
    y = layer(xs[0], use_running_average=True)
    return loss + weighted(y, weights), ([*ys, y], stats)


def run_batch_norm(case, dtypes, *, fast, mask=None):
    shape, num_features, kwargs = case
    dtype, out_dtype, param_dtype = dtypes
    x, scale, bias, weights, kwargs = prepared(
        shape, num_features, dict(kwargs, dtype=out_dtype), dtype, param_dtype
    )
    xs = [x, representable(3 - 2 * x.astype(F32), dtype), -x]

    def run(steps, fast):
        def loss(xs, scale, bias):
            arguments = dict(kwargs, use_fast_variance=fast)
            return steps(num_features, arguments, xs, weights, mask, scale, bias)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(xs, scale, bias)

    (_, (ys, stats)), grads = run(steps_of_ours, fast)
    with lenient():
        (_, (flax_ys, flax_stats)), flax_grads = run(steps_of_flax, False)

    tolerance = TOLERANCE[ys[0].dtype.type]
    for number, (a, e) in enumerate(zip(ys, flax_ys, strict=True)):
        close(a, e, tolerance, f"output {number}")
    for number, (a, e) in enumerate(zip(stats, flax_stats, strict=True)):
        # The statistics are float32 whatever the output is.
        close(a[0], e[0], 1e-5, f"running mean {number}")
        close(a[1], e[1], 1e-5, f"running variance {number}")
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(flax_grads), strict=True)
    for number, (a, e) in enumerate(leaves):
        close(a, e, max(tolerance, TOLERANCE[a.dtype.type]), f"gradient {number}")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("case", BATCH_LAYERS, ids=str)
def test_batch_norm(case, fast):
    run_batch_norm(case, (F32, None, F32), fast=fast)


# Half precision throughout is left out: with a `dtype` Flax rounds the statistics to it in
# evaluation, and without one it makes the output as wide as the statistics.
@pytest.mark.parametrize(
    "dtypes",
    [(BF16, None, F32), (F16, F32, F16), (BF16, F32, BF16)],
    ids=lambda d: "-".join(map(name_of, d)),
)
def test_batch_norm_dtypes(dtypes):
    run_batch_norm(((6, 4), 4, {"momentum": 0.5}), dtypes, fast=False)


def test_batch_norm_mask():
    mask = (jnp.arange(24).reshape(6, 4) % 3) != 0
    run_batch_norm(((6, 4), 4, {"momentum": 0.5}), (F32, None, F32), fast=False, mask=mask)


def test_batch_norm_under_vmap():
    """One example at a time, Flax and ours with the same name of the batch axis."""
    x = data((6, 2, 4), F32)

    def flax(x):
        layer = nnx.BatchNorm(
            4, axis_name="batch", use_fast_variance=False, rngs=nnx.Rngs(0)
        )
        return layer(x), layer.mean[...], layer.var[...]

    def ours(x):
        layer, state = eqx.nn.make_with_state(en.BatchNorm)(4, axis_name="batch")
        y, state = layer(x, state)
        stats = layer.running_stats(state)
        return y, stats.mean, stats.var

    with lenient():
        expected = jax.vmap(flax, axis_name="batch", out_axes=(0, None, None))(x)
    actual = jax.vmap(ours, axis_name="batch", out_axes=(0, None, None))(x)
    for name, a, e in zip(("output", "mean", "variance"), actual, expected, strict=True):
        close(a, e, 1e-5, name)
