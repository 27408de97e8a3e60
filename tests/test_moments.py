"""Moments that `standardize` and `moments` return, and moments given to `standardize`:
beside NumPy in float64, under masks, names and devices, and differentiated."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import every, float64, normal


SHAPE = (16, 6, 5)
MASK = np.random.default_rng(0).random(SHAPE) < 0.7
# The smallest and the largest count differ by device: a mean of means would be wrong.
MASK[:4] = False
MASK[4] = True


def data(mean: float = 100.0) -> np.ndarray:
    return (mean + np.random.default_rng(1).normal(size=SHAPE)).astype(np.float32)


def wanted(x, axes, mask=None):
    x = np.float64(x)
    counts = np.broadcast_to(True if mask is None else mask, x.shape)
    number = counts.sum(axes, keepdims=True)
    mean = np.where(counts, x, 0).sum(axes, keepdims=True) / np.maximum(number, 1)
    square = np.where(counts, x - mean, 0) ** 2
    return mean, square.sum(axes, keepdims=True) / np.maximum(number, 1), number


def returned(x, axes, **kwargs):
    return en.standardize(x, axes, return_moments=True, **kwargs)[1]


sources = pytest.mark.parametrize(
    "source", [en.moments, returned], ids=lambda f: f.__name__
)
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])


def alone(source, axes):
    return lambda x, mask: source(x, axes, mask=mask)


def in_vmap(source, axes):
    inner = tuple(axis - 1 for axis in axes if axis > 0)
    f = ft.partial(source, axes=inner, axis_name="a")

    def one(x, mask):
        return f(x) if mask is None else f(x, mask=mask)

    def run(x, mask):
        found = jax.vmap(one, (0, None if mask is None else 0), axis_name="a")(x, mask)
        # The same for each member.
        for part in found:
            np.testing.assert_array_equal(part, jnp.broadcast_to(part[:1], part.shape))
        return en.Moments(*(part[:1] for part in found))

    return run


def in_shard_map(check):
    def way(source, axes):
        mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

        def one(x, mask):
            return source(x, axes, mask=mask, axis_name="a")

        return jax.jit(
            jax.shard_map(one, mesh=mesh, in_specs=P("a"), out_specs=P(), check_vma=check)
        )

    return way


WAYS = {
    "alone": alone,
    "vmap": in_vmap,
    "shard_map": in_shard_map(True),
    "unchecked": in_shard_map(False),
}


@every(2)
@sources
@masks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axes", [(0,), (0, 1), (2, 0)], ids=str)
def test_as_numpy(source, way, axes, mask):
    x = data()
    found = WAYS[way](source, axes)(x, mask)
    for name, a, b in zip(found._fields, found, wanted(x, axes, mask), strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


@sources
def test_groups_of_members(source):
    x, groups = data(), [[0, 3], [1, 2]]
    members = x[:4]
    f = ft.partial(source, axes=1, axis_name="a", axis_index_groups=groups)
    found = jax.vmap(f, axis_name="a")(members)
    for group in groups:
        mean, var, number = wanted(members[group], (0, 2))
        for member in group:
            np.testing.assert_allclose(found.mean[member], mean[0], rtol=1e-6)
            np.testing.assert_allclose(found.var[member], var[0], rtol=1e-5)
            np.testing.assert_array_equal(found.positions[member], number[0])


@sources
def test_a_mean_square_where_no_mean_is_subtracted(source):
    if source is en.moments:
        pytest.skip("always subtracts the mean")
    x = data(1.0)
    found = returned(x, (0, 1), subtract_mean=False)
    assert (found.mean == 0).all()
    square = (np.float64(x) ** 2).mean((0, 1), keepdims=True)
    np.testing.assert_allclose(found.var, square, rtol=1e-6)


def test_kinds_of_arrays():
    """Integers are counted in float32, complex data has a real variance, and nothing to
    count gives zeros."""
    found = en.moments(np.arange(12).reshape(3, 4))
    np.testing.assert_allclose(found.mean[:, 0], [1.5, 5.5, 9.5])
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.complex64)
    x.imag = 3 + x.real[:, ::-1]
    mean, var, _ = en.moments(x, 0)
    np.testing.assert_allclose(mean, x.mean(0, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(var, x.var(0, keepdims=True), rtol=1e-5)
    assert not jnp.iscomplexobj(var)
    for part in en.moments(np.ones((3, 4)), mask=np.zeros((3, 4), bool)):
        assert (part == 0).all()
    assert en.moments(jnp.ones(4, jnp.bfloat16)).mean.dtype == jnp.float32
    with float64():
        assert en.moments(np.ones(4)).var.dtype == np.float64


def composed(x, axes, mask):
    found = en.moments(x, axes, mask=mask)
    return en.standardize(x, axes, mask=mask, mean=found.mean, var=found.var)


@masks
@pytest.mark.parametrize("axes", [(0, 1), (2,)], ids=str)
def test_moments_of_the_array_itself_make_the_same_function(axes, mask):
    """With all its derivatives, of first and second order, forwards and backwards."""
    if mask is not None:
        # Where nothing counts, moments that are given would be those of something else.
        mask = mask | (np.arange(5) < 1)
    with float64():
        x, t, c = (normal(i, SHAPE, jnp.float64) for i in range(3))

        def derivatives(f):
            def loss(x):
                return jnp.vdot(c, jnp.sin(f(x)))

            gradient = jax.grad(loss)
            tangent = jax.jvp(f, (x,), (t,))[1]
            second = jax.jvp(gradient, (x,), (t,))[1]
            return f(x), tangent, gradient(x), second, jax.vjp(gradient, x)[1](t)[0]

        found = derivatives(lambda x: composed(x, axes, mask))
        expected = derivatives(lambda x: en.standardize(x, axes, mask=mask))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@sources
@masks
@pytest.mark.parametrize("way", WAYS)
def test_derivatives_of_moments(source, way, mask):
    """Of a mean the weights, of a variance twice the deviations with them."""
    x, t = data(1.0), np.float32(np.random.default_rng(2).normal(size=SHAPE))
    run = WAYS[way](source, (0, 1))
    mean, _, number = wanted(x, (0, 1), mask)
    weights = (True if mask is None else mask) / number * np.ones(SHAPE)
    if way != "vmap":  # which looks at values
        _, tangent = jax.jvp(lambda x: run(x, mask), (x,), (t,))
        found = tangent.mean, tangent.var
        dmean = (weights * t).sum((0, 1), keepdims=True)
        dvar = 2 * (weights * (x - mean) * t).sum((0, 1), keepdims=True)
        for a, b in zip(found, (dmean, dvar), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

        def loss(x):
            found = run(x, mask)
            return jnp.sum(2 * found.mean + 3 * found.var)

        expected = weights * (2 + 6 * (x - mean))
        np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-6)


def test_moments_given():
    """Of another array, of fewer dimensions, zeros in the place of a mean, a variance with
    an epsilon that is an array."""
    x, other = data(3.0), data(5.0)
    mean, var, _ = wanted(other, (0, 1))
    y = en.standardize(x, (0, 1), mean=mean[0, 0], var=var, epsilon=1e-3)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), rtol=1e-5, atol=1e-5)
    mean, var, _ = wanted(x, (2,))
    y = en.standardize(x, mean=np.zeros_like(mean), var=var)
    np.testing.assert_allclose(y, x / np.sqrt(var + 1e-6), rtol=1e-5)

    def with_epsilon(epsilon):
        found = en.moments(x)
        return en.standardize(x, mean=found.mean, var=found.var + epsilon, epsilon=0.0)

    epsilon = jnp.full((1, 1, 1), 0.1)
    y, dy = jax.jit(lambda e: jax.jvp(with_epsilon, (e,), (jnp.ones_like(e),)))(epsilon)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 0.1), rtol=1e-4, atol=1e-5)
    slope = -(x - mean) / 2 / (var + 0.1) ** 1.5
    np.testing.assert_allclose(dy, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 5e-3), (3e3, 1e-3)])
def test_an_epsilon_in_the_variance_far_from_zero(mean, deviation):
    """It is not taken for rounding; the mean that is given has its own."""
    x = (mean + deviation * np.random.default_rng(0).normal(size=(64, 4))).astype("f4")
    found, wide = en.moments(x, 0), np.float64(x)
    y = en.standardize(x, 0, mean=found.mean, var=found.var + 1e-5, epsilon=0.0)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    rounding = 6e-8 * mean / np.sqrt(wide.var(0).min() + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=rounding + 1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_moments_given_in_half_precision(dtype):
    """Are computed with in the precision of the rest, and differentiated."""
    x = data(1.0).astype(dtype)
    mean, var = jnp.full((1, 1, 5), 1.5, jnp.bfloat16), jnp.full((1, 1, 5), 2, jnp.bfloat16)

    def f(mean, var):
        return en.standardize(x, (0, 1), mean=mean, var=var, epsilon=2.0)

    y, dy = jax.jvp(f, (mean, var), (jnp.ones_like(mean), jnp.ones_like(var)))
    np.testing.assert_allclose(y, (x - 1.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(dy, -1 / 2 - (x - 1.5) / 16, rtol=1e-6)


def test_moments_given_have_gradients():
    x = data(1.0)
    mean, var, _ = wanted(x, (0, 1))
    mean, var = jnp.float32(mean), jnp.float32(var)

    def loss(mean, var):
        return jnp.sum(en.standardize(x, (0, 1), mean=mean, var=var, epsilon=0.0) ** 3)

    with float64():

        def plain(mean, var):
            return jnp.sum(((jnp.asarray(x, jnp.float64) - mean) / jnp.sqrt(var)) ** 3)

        expected = jax.grad(plain, (0, 1))(np.float64(mean), np.float64(var))
    for a, b in zip(jax.grad(loss, (0, 1))(mean, var), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_complex_data_without_a_mean():
    x = (data(0.0) + 1j * data(2.0)).astype(np.complex64)
    y = en.standardize(x, mean=np.zeros((16, 6, 1)), var=np.ones((16, 6, 1)), epsilon=0.0)
    np.testing.assert_allclose(y, x)


ONE, ROW = np.ones((1, 1, 5), np.float32), np.ones((16, 6), np.float32)
MISTAKES = [
    ({"mean": ONE}, r"`mean` and `var` go together, got no `var`.*give ones"),
    ({"var": ONE}, r"`mean` and `var` go together, got no `mean`.*give zeros"),
    ({"mean": ROW, "var": ONE}, r"`mean` of shape \(16, 6\) does not broadcast.*None"),
    ({"mean": ONE, "var": np.ones(SHAPE)}, r"`var` of shape.* size 1 .*keepdims=True"),
    ({"mean": ONE, "var": ONE + 1j}, r"`var` must be real.*complex.*`var.real`"),
    ({"mean": ONE + 1j, "var": ONE}, r"`mean` must be real.*`mean.real`"),
    ({"mean": "no", "var": ONE}, r"`mean` must be an array"),
    (
        {"mean": ONE, "var": ONE, "return_moments": True},
        r"`return_moments` is for the moments of `x`.*eqx_norms.moments",
    ),
    ({"return_moments": "yes"}, r"`return_moments` must be True or False"),
]


@pytest.mark.parametrize(("kwargs", "match"), MISTAKES, ids=str)
def test_mistakes(kwargs, match, request):
    typed = any(isinstance(value, str) for value in kwargs.values())
    if typed and request.config.getoption("--jaxtyping-packages"):
        pytest.skip("jaxtyping checks types here")
    with pytest.raises(ValueError, match=f"^standardize: {match}"):
        en.standardize(data(), (0, 1), **kwargs)


def test_moments_know_their_name():
    with pytest.raises(ValueError, match=r"^moments: no axis left.*Name one in `axes`"):
        en.moments(data(), ())
    with pytest.raises(NameError, match=r"^moments: `axis_name` has the name 'nowhere'"):
        en.moments(data(), axis_name="nowhere")
