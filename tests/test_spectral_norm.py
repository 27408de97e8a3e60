"""What is peculiar to SpectralNorm: the singular value it finds, and what it remembers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import eqx_norms as en

from .helpers import clone, float64, make_mesh, normal
from .test_weight_norm import KEY, Model, with_weight, wrapped


def build(layer, **kwargs) -> Any:
    return eqx.nn.make_with_state(en.SpectralNorm)(layer, **{"key": KEY, **kwargs})


@eqx.filter_jit
def apply(norm, state, x, **kwargs) -> tuple[Any, Any]:
    return norm(x, state, **kwargs)


def settle(norm, state, x, calls=20):
    for _ in range(calls):
        _, state = apply(norm, state, x)
    return state


def greatest(weight, axis=0):
    weight = np.moveaxis(np.asarray(weight, np.float64), axis, 0)
    return np.linalg.norm(weight.reshape(weight.shape[0], -1), 2)


@wrapped
def test_converges(make, shape):
    layer, x = make(), normal(1, shape)
    before = np.array(layer.weight)
    norm, state = build(layer, n_steps=5)
    state = settle(norm, state, x)
    (stats,) = norm.spectral_stats(state)
    sigma = greatest(layer.weight)
    np.testing.assert_allclose(stats.sigma, sigma, rtol=1e-5)
    expected = with_weight(layer, before.astype(np.float64) / sigma)(x)
    for f in (norm, eqx.nn.inference_mode(norm)):
        y, _ = apply(f, state, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(norm.layer.weight, before)


@pytest.mark.parametrize("axes", [1, (0, 1)], ids=str)
def test_feature_axes(axes):
    layer = eqx.nn.Conv2d(4, 6, (2, 3), key=KEY)
    norm, state = build(layer, feature_axes=axes, n_steps=30)
    (stats,) = norm.spectral_stats(settle(norm, state, normal(1, (4, 5, 5)), 3))
    rows = (axes,) if isinstance(axes, int) else axes
    others = [a for a in range(4) if a not in rows]
    size = np.prod([layer.weight.shape[a] for a in rows])
    matrix = np.asarray(layer.weight).transpose(*rows, *others).reshape(size, -1)
    np.testing.assert_allclose(stats.sigma, np.linalg.norm(matrix, 2), rtol=1e-5)


def test_of_use_before_the_first_training_call():
    layer = eqx.nn.Linear(5, 4, key=KEY)
    norm, state = build(layer)
    (stats,) = norm.spectral_stats(state)
    np.testing.assert_allclose(stats.sigma, greatest(layer.weight), rtol=0.02)


@pytest.mark.skipif(not hasattr(nnx, "SpectralNorm"), reason="this Flax has none")
def test_step_by_step_as_flax():
    """From the same vector, the same steps. (Flax overwrites its weights, so that its
    second call would start from others: they are put back.)"""
    theirs: Any = nnx.SpectralNorm(
        nnx.Linear(5, 4, rngs=nnx.Rngs(0)), n_steps=2, rngs=nnx.Rngs(1)
    )
    kernel = jnp.array(theirs.layer_instance.kernel[...])
    layer = with_weight(eqx.nn.Linear(5, 4, key=KEY), kernel.T)
    norm, state = build(eqx.tree_at(lambda m: m.bias, layer, jnp.zeros(4)), n_steps=2)
    (path,) = (path for path in theirs.batch_stats if path[-1] == "u")
    u = theirs.batch_stats[path][...]
    (stats,) = norm.spectral_stats(state)
    state = state.set(
        norm.state_index, (en.SpectralStats(u.reshape(4, 1), stats.v, stats.sigma),)
    )
    x = normal(1, (3, 5))
    step = eqx.filter_jit(jax.vmap(norm, (0, None), (0, None)))
    for _ in range(4):
        theirs.layer_instance.kernel[...] = kernel
        expected = theirs(x, update_stats=True)
        y, state = step(x, state)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
        (stats,) = norm.spectral_stats(state)
        sigma = theirs.batch_stats[(*path[:-1], "sigma")][...]
        np.testing.assert_allclose(stats.sigma, sigma, rtol=1e-5)
    assert not np.allclose(theirs.layer_instance.kernel[...], kernel, atol=1e-3)


def test_what_updates_and_what_does_not():
    layer, x = eqx.nn.Linear(5, 4, key=KEY), normal(1, (5,))
    norm, state = build(layer)
    assert norm.inference is False
    assert build(layer, update_stats=False)[0].inference is True
    evaluating = eqx.nn.inference_mode(norm)
    kwargs: dict[str, Any]
    for f, kwargs, same in (
        (norm, {}, False),
        (norm, {"update_stats": False}, True),
        (evaluating, {}, True),
        (evaluating, {"update_stats": True}, False),
    ):
        y, new = f(x, clone(state), **kwargs)
        assert eqx.tree_equal(new, state) == same
        (stats,) = norm.spectral_stats(new)
        # What is divided by is what the vectors say, for the weight as it is now.
        sigma = np.sum(stats.u * layer.weight * stats.v)
        expected = with_weight(layer, layer.weight / sigma)(x)
        np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_gradients():
    """The vectors are constants; the singular value depends on the weight."""
    with float64():
        layer = eqx.nn.Linear(5, 4, key=KEY, dtype=jnp.float64)
        x = normal(1, (5,), jnp.float64)
        norm, state = build(layer)
        (stats,) = norm.spectral_stats(apply(norm, state, x)[1])
        u, v = stats.u[:, 0], stats.v[0]

        def plain(weight):
            sigma = jnp.einsum("i,ij,j->", u, weight, v)
            return jnp.sum(jnp.sin((weight / sigma) @ x + layer.bias))

        @eqx.filter_jit
        @eqx.filter_grad
        def grad(norm):
            return jnp.sum(jnp.sin(norm(x, clone(state))[0]))

        wanted = jax.jit(jax.grad(plain))(layer.weight)
        np.testing.assert_allclose(grad(norm).layer.weight, wanted, rtol=1e-10)


@pytest.mark.parametrize("weight", [0.0, np.nan, np.inf])
def test_bad_weights_never_spoil_the_vectors(weight):
    layer, x = eqx.nn.Linear(5, 4, key=KEY), normal(1, (5,))
    norm, state = build(layer)
    bad = eqx.tree_at(lambda n: n.layer.weight, norm, jnp.full_like(layer.weight, weight))
    y, spoilt = bad(x, clone(state))
    (before,), (after,) = norm.spectral_stats(state), norm.spectral_stats(spoilt)
    assert np.array_equal(before.u, after.u)
    assert np.array_equal(before.v, after.v)
    assert np.isfinite(after.sigma)
    if weight == 0:
        np.testing.assert_array_equal(y, layer.bias)
        grads = eqx.filter_grad(lambda n: jnp.sum(n(x, clone(state))[0]))(bad)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    # And a weight that is made of zeros to begin with can still grow.
    norm, state = build(with_weight(layer, np.zeros((4, 5))))
    norm = eqx.tree_at(lambda n: n.layer.weight, norm, layer.weight)
    (stats,) = norm.spectral_stats(settle(norm, state, x, 40))
    np.testing.assert_allclose(stats.sigma, greatest(layer.weight), rtol=1e-3)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_weights_of_any_size(size):
    """Flax adds epsilon to the squared length: for the small one it is off by far."""
    layer = eqx.nn.Linear(5, 4, key=KEY)
    norm, state = build(with_weight(layer, size * np.asarray(layer.weight)))
    (stats,) = norm.spectral_stats(settle(norm, state, normal(1, (5,)), 40))
    np.testing.assert_allclose(stats.sigma, size * greatest(layer.weight), rtol=1e-5)


def test_dtypes():
    layer = eqx.nn.Linear(5, 4, use_bias=False, key=KEY, dtype=jnp.bfloat16)
    x = normal(1, (5,)).astype(jnp.bfloat16)
    norm, state = build(layer, param_dtype=jnp.bfloat16)
    y, state = apply(norm, state, x)
    assert y.dtype == jnp.bfloat16
    (stats,) = norm.spectral_stats(state)
    assert {a.dtype for a in jax.tree.leaves(stats)} == {np.dtype(np.float32)}
    norm, state = build(layer, dtype=jnp.float32)
    assert apply(norm, state, x.astype(jnp.float32))[0].dtype == jnp.float32
    complex_layer = eqx.nn.Linear(5, 4, key=KEY, dtype=jnp.complex64)
    norm, state = build(complex_layer, n_steps=40)
    (stats,) = norm.spectral_stats(settle(norm, state, x.astype(jnp.complex64), 2))
    sigma = np.linalg.norm(np.asarray(complex_layer.weight), 2)
    np.testing.assert_allclose(stats.sigma, sigma, rtol=1e-5)


@eqx.filter_jit
def over_examples(norm, state, x) -> tuple[Any, Any]:
    return jax.vmap(norm, (0, None), (0, None), axis_name="b")(x, state)


def test_several_weights_and_a_layer_with_a_state():
    make = lambda: en.SpectralNorm(  # noqa: E731
        eqx.nn.Sequential(
            [
                eqx.nn.Linear(3, 3, key=KEY),
                en.BatchNorm(3, axis_name="b"),
                eqx.nn.Linear(3, 3, key=KEY),
            ]
        ),
        n_steps=40,
        key=KEY,
    )
    norm: Any
    norm, state = eqx.nn.make_with_state(make)()
    assert norm.weights == (".layers[0].weight", ".layers[2].weight")
    outer = eqx.nn.Sequential([norm, eqx.nn.Lambda(jax.nn.relu)])
    y, state = over_examples(outer, state, normal(1, (5, 3)))
    assert y.shape == (5, 3)
    assert np.all(norm.layer[1].running_stats(state).count == 1)
    for number, stats in zip((0, 2), norm.spectral_stats(state), strict=True):
        np.testing.assert_allclose(
            stats.sigma, greatest(norm.layer[number].weight), rtol=1e-5
        )


class Block(eqx.Module):
    """The usual way to write a layer with a state: no `StatefulLayer`."""

    linear: eqx.nn.Linear
    norm: en.BatchNorm

    def __init__(self):
        self.linear = eqx.nn.Linear(3, 3, key=KEY)
        self.norm = en.BatchNorm(3, axis_name="b")

    def __call__(self, x, state, *, key=None):
        return self.norm(self.linear(x), state)


def test_around_a_module_with_a_state():
    norm: Any
    norm, state = build(Block(), n_steps=40)
    y, state = over_examples(norm, state, normal(1, (5, 3)))
    assert y.shape == (5, 3)
    assert np.all(norm.layer.norm.running_stats(state).count == 1)
    (stats,) = norm.spectral_stats(state)
    np.testing.assert_allclose(stats.sigma, greatest(norm.layer.linear.weight), rtol=1e-5)


def test_vectors_of_another_weight():
    """Evaluated with the opposite weight, it gives the opposite."""
    norm, state = build(eqx.nn.Linear(5, 4, use_bias=False, key=KEY), update_stats=False)
    x = normal(1, (5,))
    opposite = eqx.tree_at(lambda n: n.layer.weight, norm, -norm.layer.weight)
    y, _ = norm(x, clone(state))
    np.testing.assert_allclose(opposite(x, clone(state))[0], -y, rtol=1e-6)


def test_together_with_weight_norm():
    linear = eqx.nn.Linear(5, 4, use_bias=False, key=KEY)
    with pytest.raises(ValueError, match=r"`WeightNorm\(SpectralNorm\(layer\)\)`"):
        en.SpectralNorm(en.WeightNorm(linear), key=KEY)
    both, state = eqx.nn.make_with_state(
        lambda: en.WeightNorm(en.SpectralNorm(linear, key=KEY), feature_axes=None)
    )()
    assert both.is_stateful()
    y, _ = apply(both, state, normal(1, (5,)))
    assert np.all(np.isfinite(y))


def test_other_arguments_are_the_layers():
    norm, state = build(Model(), where=lambda m: m.first.weight)
    x = normal(1, (3,))
    y, _ = norm(x, clone(state))
    with_key, _ = norm(x, clone(state), 1.0, key=KEY)
    np.testing.assert_allclose(with_key, y + 1, rtol=1e-6)


def test_inside_shard_map():
    mesh = make_mesh(AxisType.Explicit, devices=8)
    norm, state = build(eqx.nn.Linear(5, 4, key=KEY))
    x = normal(1, (16, 5))
    P = jax.sharding.PartitionSpec

    @eqx.filter_jit
    @en.filter_shard_map(
        mesh=mesh, in_specs=(P(), P(), P("devices")), out_specs=(P("devices"), P())
    )
    def sharded(norm, state, x):
        return jax.vmap(norm, (0, None), (0, None))(x, state)

    expected, wanted = over_examples(norm, state, x)
    with jax.set_mesh(mesh):
        y, new = sharded(norm, state, jax.device_put(x, P("devices")))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bad_arguments():
    linear, conv = eqx.nn.Linear(5, 4, key=KEY), eqx.nn.Conv1d(3, 4, 2, key=KEY)
    with pytest.raises(
        ValueError, match=r"SpectralNorm: `n_steps` must be at least 1, got 0"
    ):
        en.SpectralNorm(linear, n_steps=0, key=KEY)
    with pytest.raises(ValueError, match=r"must have two dimensions, got .*\(4, 3, 2\)"):
        en.SpectralNorm(conv, error_on_non_matrix=True, key=KEY)
    en.SpectralNorm(linear, error_on_non_matrix=True, key=KEY)
    with pytest.raises(
        ValueError, match=r"SpectralNorm: needs a `weight` of two dimensions"
    ):
        en.SpectralNorm(eqx.nn.LayerNorm(3), key=KEY)
    norm, state = build(linear)
    with pytest.raises(
        ValueError, match=r"SpectralNorm: this `state` holds nothing for this"
    ):
        norm(jnp.ones(5), eqx.nn.make_with_state(en.BatchNorm)(3)[1])
    assert norm(jnp.ones(5), state)[0].shape == (4,)
    with pytest.raises(
        ValueError, match=r"`feature_axes=\(2,\)` has axis 2, which is out of"
    ):
        en.SpectralNorm(linear, feature_axes=2, key=KEY)


# Vectors that are not those of the weight.


def stored(state, change):
    return jax.tree.map(lambda a: change(a) if eqx.is_inexact_array(a) else a, state)


@pytest.mark.parametrize("length", [1e-15, 0.5, 3.0])
def test_stored_vectors_of_any_length(length):
    """As an average of unit vectors has: only where they point counts."""
    layer, x = eqx.nn.Linear(5, 4, key=KEY), normal(1, (5,))
    norm, state = build(layer, n_steps=2)
    state = settle(norm, state, x)
    other = stored(state, lambda a: length * a)
    for update in (True, False):
        y, new = apply(norm, state, x, update_stats=update)
        z, kept = apply(norm, other, x, update_stats=update)
        np.testing.assert_allclose(z, y, rtol=1e-5)
        if update:
            assert_close(kept, new)
    np.testing.assert_allclose(greatest(en.bake(norm, other)[0].weight), 1, rtol=1e-5)


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def jitted(model, state, **kwargs):
    return eqx.filter_jit(en.converge_spectral_norms)(model, state, **kwargs)


ways = pytest.mark.parametrize(
    "converge", [en.converge_spectral_norms, jitted], ids=["eager", "jitted"]
)


@ways
@pytest.mark.parametrize("axes", [0, (2, 0)], ids=str)
def test_converges_for_the_weights_as_they_are(converge, axes):
    norm, state = build(eqx.nn.Conv2d(4, 6, (2, 3), key=KEY), feature_axes=axes)
    weight = normal(7, norm.layer.weight.shape)
    norm = eqx.tree_at(lambda n: n.layer.weight, eqx.nn.inference_mode(norm), weight)
    before = jax.tree.map(np.array, state)
    new = converge(norm, state)
    assert eqx.tree_equal(jax.tree.map(np.array, state), before)
    (stats,) = norm.spectral_stats(new)
    rows = (0,) if axes == 0 else (0, 2)
    others = [a for a in range(4) if a not in rows]
    size = np.prod([weight.shape[a] for a in rows])
    u, s, v = np.linalg.svd(
        np.asarray(weight, np.float64).transpose(*rows, *others).reshape(size, -1)
    )
    np.testing.assert_allclose(stats.sigma, s[0], rtol=1e-6)
    for found, wanted in ((stats.u, u[:, 0]), (stats.v, v[0])):
        assert abs(np.vdot(np.ravel(found), wanted)) > 1 - 1e-6
    # From the same draw, whatever was stored.
    assert_close(converge(norm, stored(state, jnp.zeros_like)), new, 1e-6)


def test_starts_anew():
    """What is stored is a pair of singular vectors, with nothing left over, but of a
    singular value that is not the greatest."""
    norm, state = build(with_weight(eqx.nn.Linear(3, 3, key=KEY), np.diag([3.0, 1, 1])))
    other = with_weight(norm.layer, np.diag([3.0, 5, 1]))
    norm = eqx.tree_at(lambda n: n.layer, norm, other)
    state = settle(norm, state, normal(1, (3,)), 2)
    (stats,) = norm.spectral_stats(en.converge_spectral_norms(norm, state))
    np.testing.assert_allclose(stats.sigma, 5, rtol=1e-6)


@pytest.mark.parametrize("accuracy", [1e-1, 1e-3, 1e-5])
def test_stops_as_it_says(accuracy):
    """With singular values so near each other that steps are many."""
    weight = np.diag(np.linspace(0.9, 1, 50)) @ np.linalg.qr(normal(3, (50, 50)))[0]
    norm, state = build(with_weight(eqx.nn.Linear(50, 50, key=KEY), 7 * weight))
    weight = np.asarray(norm.layer.weight, np.float64)
    (stats,) = norm.spectral_stats(
        en.converge_spectral_norms(norm, state, accuracy=accuracy)
    )
    u, v = (np.ravel(a).astype(np.float64) for a in (stats.u, stats.v))
    residual = np.linalg.norm(weight.T @ u - stats.sigma * v)
    assert residual <= 1.05 * accuracy * stats.sigma
    np.testing.assert_allclose(weight @ v, stats.sigma * u, atol=1e-5)
    np.testing.assert_allclose(stats.sigma, greatest(weight), rtol=accuracy)


def test_stops_at_last():
    norm, state = build(eqx.nn.Linear(50, 50, key=KEY))
    few, more = (
        norm.spectral_stats(en.converge_spectral_norms(norm, state, max_steps=steps))[0]
        for steps in (10, 20)
    )
    assert few.sigma < more.sigma < greatest(norm.layer.weight) * (1 - 1e-5)


@pytest.mark.parametrize("weight", [0.0, np.nan, np.inf])
def test_converges_to_nothing_bad(weight):
    norm, state = build(eqx.nn.Linear(5, 4, key=KEY))
    bad = eqx.tree_at(lambda n: n.layer.weight, norm, jnp.full((4, 5), weight))
    assert eqx.tree_equal(en.converge_spectral_norms(bad, state), state)


def test_converges_in_every_dtype():
    with float64():
        for dtype, rtol in (
            (jnp.bfloat16, 1e-6),
            (jnp.complex64, 1e-6),
            (jnp.float64, 1e-11),
        ):
            norm, state = build(eqx.nn.Linear(5, 4, key=KEY, dtype=dtype))
            new = en.converge_spectral_norms(norm, state, accuracy=1e-9)
            (stats,), (old,) = norm.spectral_stats(new), norm.spectral_stats(state)
            dtypes = [[a.dtype for a in jax.tree.leaves(t)] for t in (stats, old)]
            assert dtypes[0] == dtypes[1]
            wide = np.complex128 if dtype == jnp.complex64 else np.float64
            sigma = np.linalg.norm(np.asarray(norm.layer.weight).astype(wide), 2)
            np.testing.assert_allclose(stats.sigma, sigma, rtol=rtol)


def nested(layer, **kwargs):
    return en.SpectralNorm(layer, key=KEY, **kwargs)


def linear(seed=0):
    return eqx.nn.Linear(3, 3, key=jax.random.key(seed))


MODELS: dict[str, Any] = {
    "several": lambda: [nested(linear()), {"deep": (nested(linear(1)), en.BatchNorm(3))}],
    "two weights": lambda: nested(eqx.nn.Sequential([linear(), linear(1)])),
    "inside weight norm": lambda: en.WeightNorm(nested(linear()), scale_init="norm"),
    "around weight norm": lambda: nested(
        eqx.nn.Sequential([en.WeightNorm(linear()), linear(1)]),
        where=lambda m: m.layers[1].weight,
    ),
    "twice": lambda: nested(nested(linear())),
    "a stack": lambda: eqx.filter_vmap(lambda seed: nested(linear(seed)))(jnp.arange(4)),
    "shared layer": lambda: eqx.nn.Shared(
        2 * [nested(linear())], lambda p: p[1], lambda p: p[0]
    ),
    "shared weight": lambda: eqx.nn.Shared(
        [nested(linear()), nested(linear(1))],
        lambda p: p[1].layer.weight,
        lambda p: p[0].layer.weight,
    ),
}


def spectral_weights(baked):
    """Of each layer that was within a SpectralNorm alone."""
    is_linear = lambda node: isinstance(node, eqx.nn.Linear)  # noqa: E731
    for layer in jax.tree.leaves(baked, is_leaf=is_linear):
        if is_linear(layer):
            yield from layer.weight.reshape(-1, *layer.weight.shape[-2:])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_converges_in_any_model(make):
    model, state = eqx.nn.make_with_state(make)()
    model = jax.tree.map(
        lambda a: a + normal(5, a.shape) if eqx.is_inexact_array(a) else a, model
    )
    new = en.converge_spectral_norms(model, state)
    untied: Any = model() if isinstance(model, eqx.nn.Shared) else model
    baked, _ = en.bake(untied, new)
    skip = make is MODELS["around weight norm"]
    weights = list(spectral_weights(baked))[skip:]
    assert weights
    for weight in weights:
        np.testing.assert_allclose(greatest(weight), 1, rtol=2e-6)
    before = [greatest(w) for w in list(spectral_weights(en.bake(untied, state)[0]))[skip:]]
    if make is not MODELS["inside weight norm"]:
        assert max(before) > 1.001
    # Nothing but the vectors and singular values.
    markers = lambda tree: tree.tree_flatten()[1]  # noqa: E731
    assert markers(new) == markers(state)
    shapes = lambda tree: list(map(jnp.shape, jax.tree.leaves(tree)))  # noqa: E731
    assert shapes(new) == shapes(state)
    if make is MODELS["several"]:
        bn = untied[1]["deep"][1]
        assert eqx.tree_equal(bn.running_stats(new), bn.running_stats(state))


def test_averages_of_weights():
    """The mean of unit vectors is shorter than one, and the mean weight has others."""
    norm, state = build(eqx.nn.Linear(5, 4, key=KEY))
    x, all_of_them = normal(1, (5,)), []
    for seed in range(20):
        weight = normal(seed, (4, 5)) + 0.5
        norm = eqx.tree_at(lambda n: n.layer.weight, norm, weight)
        state = settle(norm, state, x, 2)
        all_of_them.append((norm, clone(state)))
    mean = lambda *a: sum(a) / len(a) if eqx.is_inexact_array(a[0]) else a[0]  # noqa: E731
    norm, state = jax.tree.map(mean, *all_of_them)
    (stats,) = norm.spectral_stats(state)
    assert jnp.linalg.norm(stats.u) < 0.99
    assert greatest(en.bake(norm, state)[0].weight) < 1.2
    new = en.converge_spectral_norms(norm, state)
    np.testing.assert_allclose(greatest(en.bake(norm, new)[0].weight), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": linear()}, "there is no `eqx_norms.SpectralNorm` in this model"),
        ({"model": nested(linear())}, "holds nothing for this layer"),
        ({"accuracy": -1.0}, "`accuracy` must be from 0 to 1, .* got -1.0 and 10000"),
        ({"max_steps": 0}, "`max_steps` positive, got 1e-05 and 0"),
    ],
)
def test_what_cannot_converge(arguments, message):
    model, state = build(linear())
    with pytest.raises(ValueError, match=message):
        en.converge_spectral_norms(**{"model": model, "state": state, **arguments})
    model(jnp.ones(3), state)
