import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from eqx_norms._checks import Check
from eqx_norms._layer import init_affine

from .helpers import NORMS, all_norms, call, every, normal, over, randomize, reference


CHECK = Check("Layer")
# Batch, space and features.
SHAPE = (3, 4, 8)
with_bias = over(*(case for case in NORMS if case.has_bias))


def lead(parameter):
    return None if parameter is None else np.asarray(parameter)[None, None]


def expected(case, layer, x, scale, bias):
    y, _, _ = reference(
        x,
        case.reduction_axes(x.ndim),
        **case.formula,
        epsilon=layer.epsilon,
        scale=scale,
        bias=bias,
    )
    return y


def noise(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


def test_num_features():
    assert CHECK.num_features(3, (-1,)) == (3,)
    assert CHECK.num_features((3, 4), (2, 0)) == (3, 4)
    assert CHECK.num_features((), ()) == ()
    for sizes in ((3, 4), ()):
        with pytest.raises(ValueError, match="Layer: `num_features` must have one size"):
            CHECK.num_features(sizes, (-1,))
    with pytest.raises(ValueError, match="Layer: `num_features` must be positive, got -3"):
        CHECK.num_features(-3, (-1,))


@all_norms
def test_defaults(case):
    layer, _ = case.build()
    assert np.all(layer.scale == 1)
    assert layer.scale.dtype == jnp.float32
    if case.has_bias:
        assert np.all(layer.bias == 0)
        assert layer.bias.dtype == jnp.float32


@all_norms
def test_use_scale_and_use_bias(case):
    x = 2 + normal(0, SHAPE)
    for kwargs in ({"use_scale": False}, {"use_bias": False} if case.has_bias else {}):
        layer, state = case.build(**kwargs)
        layer = randomize(layer)
        assert (layer.scale is None) == ("use_scale" in kwargs)
        if case.has_bias:
            assert (layer.bias is None) == ("use_bias" in kwargs)
        y = call(layer, state, x)
        want = expected(case, layer, x, lead(layer.scale), lead(layer.bias))
        np.testing.assert_allclose(y, want, atol=1e-5)


@all_norms
def test_initializers(case):
    """They get a key, the feature shape and the dtype, as those of JAX do."""
    seen = []

    def init(key, shape, dtype):
        seen.append((key, shape, dtype))
        return jnp.full(shape, len(seen), dtype)

    names = ["scale_init", "bias_init"][: 1 + case.has_bias]
    key = jax.random.key(0)
    layer, _ = case.build(param_dtype=jnp.float16, key=key, **dict.fromkeys(names, init))
    assert np.all(layer.scale == 1)
    if case.has_bias:
        assert np.all(layer.bias == 2)
    assert len(seen) == 1 + case.has_bias
    for key_given, shape, dtype in seen:
        assert jnp.issubdtype(key_given.dtype, jax.dtypes.prng_key)
        assert shape == (8,)
        assert dtype == jnp.float16


@with_bias
def test_random_initializers(case):
    """Reproducible, and scale and bias not the same numbers."""
    first, again, other = (
        case.build(scale_init=noise, bias_init=noise, key=jax.random.key(seed))[0]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first.scale, again.scale)
    assert np.array_equal(first.bias, again.bias)
    assert not np.array_equal(first.scale, other.scale)
    assert np.all(first.scale != first.bias)


def test_what_an_initializer_raises_with_a_key_is_its_own():
    def broken(key, shape, dtype):
        raise RuntimeError("my own trouble")

    arguments = {"scale_init": broken, "bias_init": None, "check": CHECK}
    with pytest.raises(RuntimeError, match="my own trouble"):
        init_affine((3,), jnp.float32, jax.random.key(0), **arguments)
    with pytest.raises(ValueError, match="Layer: `scale_init` failed") as caught:
        init_affine((3,), jnp.float32, None, **arguments)
    # Without a key, what happened is not lost.
    assert isinstance(caught.value.__cause__, RuntimeError)


@all_norms
def test_initializer_may_return_numpy(case):
    layer, _ = case.build(scale_init=lambda key, shape, dtype: np.full(shape, 2, dtype))
    assert isinstance(layer.scale, jax.Array)
    assert np.all(layer.scale == 2)


@all_norms
def test_scale_offset(case):
    """Added in the precision of the statistics: a bfloat16 scale keeps its small part."""
    x = 2 + normal(0, SHAPE)
    tiny = lambda key, shape, dtype: jnp.full(shape, 2.0**-10, dtype)  # noqa: E731
    layer, state = case.build(scale_init=tiny, scale_offset=1.0, param_dtype=jnp.bfloat16)
    y = call(layer, state, x)
    want = expected(case, layer, x, lead(np.full(8, 1 + 2.0**-10)), None)
    np.testing.assert_allclose(y, want, atol=2e-6)


# Scale and bias given at the call: per feature, or broadcasting to the input.


GIVEN = {
    "per feature": (8,),
    "per example": (3, 1, 8),
    "per position": (3, 4, 1),
    "full size": SHAPE,
    "from space on": (4, 8),
    "a number": (),
}


@every(2)
@all_norms
@pytest.mark.parametrize("shape", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("first", [False, True], ids=["features last", "features first"])
def test_given_at_the_call(case, shape, first):
    x = 2 + normal(0, SHAPE)
    layer, state = case.build(**(case.features_first if first else {}))
    layer = randomize(layer)
    scale, bias = normal(1, shape), normal(2, shape)

    def move(a):
        """Of a shape per feature, and of a number, there is but one form."""
        return a if a.ndim < 2 or not first else jnp.moveaxis(a, -1, -2)

    y = call(layer, state, move(x), scale=move(scale), bias=move(bias))
    learned = 0.0 if layer.bias is None else lead(layer.bias)
    want = expected(
        case,
        layer,
        x,
        lead(layer.scale) + np.asarray(scale),
        learned + np.asarray(bias),
    )
    np.testing.assert_allclose(y, move(jnp.asarray(want)), atol=2e-5)


@all_norms
def test_given_alone(case):
    """Where the layer has none of its own, what is given is all there is."""
    x = 2 + normal(0, SHAPE)
    kwargs = {"use_bias": False} if case.has_bias else {}
    layer, state = case.build(use_scale=False, **kwargs)
    scale, bias = normal(1, SHAPE), normal(2, SHAPE)
    y = call(layer, state, x, scale=scale, bias=bias)
    np.testing.assert_allclose(y, expected(case, layer, x, scale, bias), atol=1e-5)
    np.testing.assert_allclose(
        call(layer, state, x, scale=scale), expected(case, layer, x, scale, None), atol=1e-5
    )
    # A gradient for each of them, as for the learned ones.
    grads = jax.grad(lambda s, b: jnp.sum(call(layer, state, x, scale=s, bias=b)), (0, 1))(
        scale, bias
    )
    np.testing.assert_allclose(grads[0], expected(case, layer, x, None, None), atol=1e-5)
    np.testing.assert_allclose(grads[1], np.ones(SHAPE))


@all_norms
def test_given_decides_the_dtype_too(case):
    x = normal(0, SHAPE).astype(jnp.bfloat16)
    layer, state = case.build(param_dtype=jnp.bfloat16)
    assert call(layer, state, x).dtype == jnp.bfloat16
    given = jnp.ones(8, jnp.float32)
    assert call(layer, state, x, scale=given).dtype == jnp.float32
    assert call(layer, state, x, bias=given).dtype == jnp.float32


@all_norms
def test_given_as_a_python_number(case, monkeypatch):
    """Without type checks it does as well; as everywhere in JAX, it has no say in the
    dtype."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x = normal(0, SHAPE).astype(jnp.bfloat16)
    layer, state = case.build(param_dtype=jnp.bfloat16)
    y = call(layer, state, x, scale=0.5, bias=1.0)
    assert y.dtype == jnp.bfloat16
    want = expected(case, layer, x, 1.5, 1.0)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2.0**-8, atol=1e-5)
