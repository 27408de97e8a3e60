"""What is peculiar to WeightNorm: the weights it makes, and the layer it leaves alone."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eqx_norms as en

from .helpers import WRAPPERS, call, float64, normal, over


KEY = jax.random.key(0)
WRAPPED = {
    "linear": (lambda: eqx.nn.Linear(5, 4, key=KEY), (5,)),
    "conv1d": (lambda: eqx.nn.Conv1d(4, 6, 3, key=KEY), (4, 7)),
    "conv2d with groups": (lambda: eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY), (4, 5, 5)),
    "conv transpose": (lambda: eqx.nn.ConvTranspose2d(4, 6, 3, key=KEY), (4, 3, 3)),
}
wrapped = pytest.mark.parametrize(("make", "shape"), WRAPPED.values(), ids=WRAPPED)


def directions(weight, axes=(0,), epsilon=0.0):
    weight = np.asarray(weight, np.float64)
    others = tuple(a for a in range(weight.ndim) if a not in axes)
    return weight / np.sqrt((weight**2).sum(others, keepdims=True) + epsilon)


def with_weight(layer, weight):
    return eqx.tree_at(lambda tree: tree.weight, layer, jnp.asarray(weight, jnp.float32))


@wrapped
def test_weights_of_length_one(make, shape):
    layer, x = make(), normal(1, shape)
    before = np.array(layer.weight)
    norm = en.WeightNorm(layer)
    expected = with_weight(layer, directions(layer.weight))(x)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        en.WeightNorm(layer, use_scale=False)(x), expected, rtol=1e-5, atol=1e-6
    )
    # The wrapped layer is the very same, bit for bit.
    assert np.array_equal(norm.layer.weight, before)
    assert np.array_equal(layer.weight, before)


@wrapped
def test_starts_as_the_layer_itself(make, shape):
    layer, x = make(), normal(1, shape)
    norm = en.WeightNorm(layer, scale_init="norm")
    np.testing.assert_allclose(norm(x), layer(x), rtol=1e-5, atol=1e-6)
    # As equinox.nn's, and after a step of training too.
    theirs = eqx.nn.WeightNorm(layer)
    other = normal(2, layer.weight.shape)
    norm = eqx.tree_at(lambda n: n.layer.weight, norm, other)
    theirs = eqx.tree_at(lambda n: n.layer.weight, theirs, other)
    np.testing.assert_allclose(norm(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature_axes", [0, 1, -1, (0, 2), (2, 0), None], ids=str)
def test_feature_axes(feature_axes):
    layer = eqx.nn.Conv2d(4, 6, (2, 3), key=KEY)
    norm: Any = en.WeightNorm(layer, feature_axes=feature_axes)
    axes = {None: (), 0: (0,), 1: (1,), -1: (3,)}.get(feature_axes, feature_axes)
    shape = tuple(layer.weight.shape[a] for a in axes)
    (scale,) = norm.scales
    assert scale.shape == shape
    assert np.all(scale == 1)
    scale = 1 + normal(3, shape) / 4
    norm = eqx.tree_at(lambda n: n.scales, norm, (scale,))
    laid_out = np.asarray(scale)
    if feature_axes == (2, 0):
        laid_out = laid_out.T
    laid_out = laid_out.reshape([n if a in axes else 1 for a, n in enumerate((6, 4, 2, 3))])
    x = normal(1, (4, 5, 5))
    expected = with_weight(layer, directions(layer.weight, axes) * laid_out)
    np.testing.assert_allclose(norm(x), expected(x), rtol=1e-5, atol=1e-5)
    matching = en.WeightNorm(layer, feature_axes=feature_axes, scale_init="norm")
    np.testing.assert_allclose(matching(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(nnx, "WeightNorm"), reason="this Flax has no WeightNorm")
@pytest.mark.parametrize("axes", [(0, 1), (1,)], ids=str)
def test_parity_with_flax(axes):
    """Their kernel is (in, out), their default the last axis."""
    theirs: Any = nnx.WeightNorm(
        nnx.Linear(5, 4, rngs=nnx.Rngs(0)),
        feature_axes=None if len(axes) == 2 else -1,
        epsilon=1e-2,
        rngs=nnx.Rngs(0),
    )
    kernel = np.array(theirs.layer_instance.kernel[...])
    ours = en.WeightNorm(
        with_weight(eqx.nn.Linear(5, 4, key=KEY), kernel.T),
        feature_axes=None if len(axes) == 2 else 0,
        epsilon=1e-2,
    )
    ours = eqx.tree_at(lambda n: n.layer.bias, ours, jnp.zeros(4))
    x = normal(1, (3, 5))
    np.testing.assert_allclose(jax.vmap(ours)(x), theirs(x), rtol=1e-5, atol=1e-6)
    # What Flax has done to its layer meanwhile.
    assert not np.allclose(theirs.layer_instance.kernel[...], kernel, atol=1e-3)


def test_gradients():
    """Those of the formula as it stands, scales and directions alike."""
    with float64():
        layer = eqx.nn.Linear(5, 4, key=KEY, dtype=jnp.float64)
        norm = en.WeightNorm(layer, scale_init="norm", param_dtype=jnp.float64)
        x = normal(1, (5,), jnp.float64)

        def loss(norm):
            return jnp.sum(jnp.sin(norm(x)))

        def plain(norm):
            v = norm.layer.weight
            g = norm.scales[0][:, None]
            length = jnp.sqrt(jnp.sum(v**2, 1, keepdims=True) + norm.epsilon)
            return jnp.sum(jnp.sin((g * v / length) @ x + norm.layer.bias))

        found, wanted = eqx.filter_grad(loss)(norm), eqx.filter_grad(plain)(norm)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        assert len(jax.tree.leaves(found)) == 3
        # A length of its own: the gradient is at right angles to the direction.
        along = jnp.sum(found.layer.weight * layer.weight, 1)
        np.testing.assert_allclose(along, 0, atol=1e-10)


@pytest.mark.parametrize("epsilon", [1e-12, 0.0])
@pytest.mark.parametrize(
    "scale_init", ["norm", jax.nn.initializers.ones], ids=["norm", "1"]
)
def test_a_row_of_zeros(epsilon, scale_init):
    layer = eqx.nn.Linear(5, 4, key=KEY)
    layer = with_weight(layer, np.asarray(layer.weight) * [[1], [0], [1], [1]])
    norm = en.WeightNorm(layer, epsilon=epsilon, scale_init=scale_init)

    @eqx.filter_value_and_grad
    def loss(norm, x):
        return jnp.sum(jnp.sin(norm(x)))

    value, grads = loss(norm, normal(1, (5,)))
    assert np.isfinite(value)
    for grad in jax.tree.leaves(grads):
        assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e15])
def test_weights_of_any_size(size):
    layer = eqx.nn.Linear(5, 4, key=KEY)
    layer = with_weight(layer, size * np.asarray(layer.weight))
    norm = en.WeightNorm(layer, epsilon=0.0)
    weight = np.asarray(norm.layer.weight, np.float64)
    if size == 1e-25:  # the squares are zero in float32: such rows count as zeros
        weight = 0 * weight
        expected = weight
    else:
        expected = directions(weight)
    made = norm(jnp.eye(5)[0]) - layer.bias
    np.testing.assert_allclose(made, expected[:, 0], rtol=1e-5, atol=1e-6)


def test_dtypes():
    layer = eqx.nn.Linear(64, 4, key=KEY, dtype=jnp.bfloat16)
    x = normal(1, (64,)).astype(jnp.bfloat16)
    norm: Any = en.WeightNorm(layer, param_dtype=jnp.bfloat16)
    assert norm.scales[0].dtype == jnp.bfloat16
    assert norm(x).dtype == jnp.bfloat16
    wide: Any = en.WeightNorm(layer)
    assert wide.scales[0].dtype == jnp.float32
    # The length is found in float32: rounded once.
    captured = []
    seen = lambda layer, x: captured.append(layer.weight)  # noqa: E731

    class Probe(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            seen(self, x)
            return x

    for dtype in (None, jnp.float32):
        en.WeightNorm(Probe(layer.weight), dtype=dtype, param_dtype=jnp.bfloat16)(x)
    half, full = captured
    assert (half.dtype, full.dtype) == (jnp.bfloat16, jnp.float32)
    expected = directions(layer.weight.astype(jnp.float32), epsilon=1e-12)
    np.testing.assert_allclose(full, expected, rtol=1e-6)
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


class Model(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    last: list

    def __init__(self):
        self.first = eqx.nn.Linear(3, 4, key=KEY)
        self.norm = eqx.nn.LayerNorm(4)
        self.last = [eqx.nn.Linear(4, 2, key=KEY)]

    def __call__(self, x, y=0.0, *, key=None):
        return self.last[0](self.norm(self.first(x))) + y


def test_which_weights():
    model, x = Model(), normal(1, (3,))
    both = en.WeightNorm(model)
    assert both.weights == (".first.weight", ".last[0].weight")
    one = en.WeightNorm(model, where=lambda m: m.first.weight)
    assert one.weights == (".first.weight",)
    two = en.WeightNorm(model, where=lambda m: (m.last[0].weight, m.first.weight))
    assert two.weights == (".last[0].weight", ".first.weight")
    np.testing.assert_allclose(two(x), both(x), rtol=1e-6)
    expected = eqx.tree_at(
        lambda m: m.first, model, with_weight(model.first, directions(model.first.weight))
    )
    np.testing.assert_allclose(one(x), expected(x), rtol=1e-5)
    # Other arguments are the layer's.
    assert np.array_equal(one(x, 1.0, key=KEY), one(x, y=1.0))


def test_made_alike_is_equal():
    """A function in a static field would make each of them a stranger to the others."""
    a, b = (en.WeightNorm(Model(), where=lambda m: m.first.weight) for _ in range(2))
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_around_a_layer_with_a_state():
    make = lambda: en.WeightNorm(  # noqa: E731
        eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=KEY), en.BatchNorm(4, axis_name="b")])
    )
    layer, state = eqx.nn.make_with_state(make)()
    assert layer.is_stateful()
    assert not en.WeightNorm(Model()).is_stateful()
    outer = eqx.nn.Sequential([layer, eqx.nn.Lambda(jax.nn.relu)])
    apply = jax.vmap(outer, (0, None), (0, None), axis_name="b")
    y, state = apply(normal(1, (5, 3)), state)
    assert y.shape == (5, 4)
    bn: Any = layer.layer[1]
    assert np.all(bn.running_stats(state).count == 1)


def test_initializers_and_keys():
    noise = lambda key, shape, dtype: jax.random.normal(key, shape, dtype)  # noqa: E731
    norm: Any = en.WeightNorm(Model(), scale_init=noise, key=KEY)
    assert [s.shape for s in norm.scales] == [(4,), (2,)]
    assert not np.array_equal(norm.scales[0][:2], norm.scales[1])
    with pytest.raises(
        ValueError, match=r"WeightNorm: `scale_init` failed without a random"
    ):
        en.WeightNorm(Model(), scale_init=noise)


def test_a_layer_with_other_weights():
    norm = en.WeightNorm(eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=KEY)]))
    other = eqx.tree_at(lambda n: n.layer, norm, eqx.nn.Linear(3, 4, key=KEY))
    with pytest.raises(ValueError, match=r"WeightNorm: the weights .* are \['.layers\[0\]"):
        other(jnp.ones(3))


def test_bad_arguments():
    linear = eqx.nn.Linear(3, 4, key=KEY)
    with pytest.raises(
        ValueError, match="must be an initializer, or with `use_scale=True`"
    ):
        en.WeightNorm(linear, scale_init="norm", use_scale=False)
    with pytest.raises(
        ValueError, match=r"WeightNorm: needs a `weight` of two dim.*LayerNorm"
    ):
        en.WeightNorm(eqx.nn.LayerNorm(3))
    with pytest.raises(
        ValueError, match=r"WeightNorm: needs floating-point arrays for `where`"
    ):
        en.WeightNorm(Model(), where=lambda m: m.norm.shape)
    with pytest.raises(
        ValueError, match=r"shape \(4,\) has no axis left to take its length"
    ):
        en.WeightNorm(linear, where=lambda m: m.bias)
    with pytest.raises(ValueError, match=r"no axis left.*`feature_axes=\(0, 1\)`"):
        en.WeightNorm(linear, feature_axes=(0, 1))
    with pytest.raises(
        ValueError, match=r"`feature_axes=\(2,\)` has axis 2, which is out of"
    ):
        en.WeightNorm(linear, feature_axes=2)
    with pytest.raises(
        ValueError, match=r"`feature_axes=\(0, 0\)` names an axis more than once"
    ):
        en.WeightNorm(linear, feature_axes=(0, 0))
    with pytest.raises(
        ValueError, match=r"WeightNorm: `epsilon` must be finite and not neg"
    ):
        en.WeightNorm(linear, epsilon=-1.0)
    with pytest.raises(
        ValueError, match=r"WeightNorm: `dtype` must be a floating or complex"
    ):
        en.WeightNorm(linear, dtype=jnp.int32)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"feature_axes": None}, {"scale_init": "norm"}])
def test_a_weight_of_size_zero(shape, settings):
    layer = eqx.nn.Linear(shape[0], shape[1], key=KEY)
    norm = en.WeightNorm(layer, **settings)
    x = jnp.ones(shape[0])
    np.testing.assert_array_equal(norm(x), layer.bias)
    grads = eqx.filter_grad(lambda norm: jnp.sum(norm(x)))(norm)
    assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(grads))


@over(*WRAPPERS)
def test_numpy_leaves(case):
    """As some checkpoints give them back."""
    layer, state = case.build(4)
    x = normal(1, (4,))
    there = jax.tree.map(lambda a: np.asarray(a) if eqx.is_array(a) else a, (layer, state))
    np.testing.assert_allclose(
        call(there[0], there[1], x), call(layer, state, x), rtol=1e-6
    )
    baked, expected = (en.bake(*both) for both in (there, (layer, state)))
    if state is not None:
        (baked, _), (expected, _) = baked, expected
    np.testing.assert_allclose(baked.weight, expected.weight, rtol=1e-6)
