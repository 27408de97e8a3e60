"""Models of other people, as they are and with their norms replaced. (Each is skipped where
its package is not installed: the extra `models` has them.)"""

import functools
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import every, normal, randomize


KEY = jax.random.key(0)
EQUINOX = (eqx.nn.GroupNorm, eqx.nn.LayerNorm, eqx.nn.RMSNorm)


@pytest.fixture(autouse=True)
def implicit_promotion():
    """They promote dtypes and ranks implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def nodes(model, *kinds):
    is_leaf = lambda node: isinstance(node, kinds)  # noqa: E731
    return [node for node in jax.tree.leaves(model, is_leaf=is_leaf) if is_leaf(node)]


@functools.cache
def made(name, seed) -> Any:
    """Random numbers, without the time it takes to compile their initializers."""

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        size = np.sqrt(np.prod(leaf.shape[1:]))
        return (normal(seed, leaf.shape) / size + (leaf.ndim == 1)).astype(leaf.dtype)

    # Imported before anything is traced: it may make arrays.
    pytest.importorskip("equimo.models.convnext" if name == "equimo" else name)
    return jax.tree.map(fill, eqx.filter_eval_shape(MODELS[name][0]))


def shaken(model):
    return randomize(model, size=0.1)


def mixed(model, *norms):
    """In bfloat16, but for these norms."""
    is_norm = lambda node: isinstance(node, norms)  # noqa: E731

    def cast(leaf):
        return leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(
        lambda node: node if is_norm(node) else cast(node), model, is_leaf=is_norm
    )


@eqx.filter_jit
def outputs(model, x):
    return jax.tree.leaves(jax.vmap(model)(x))


def dtypes(model, x):
    """Of the outputs, and of the gradients of all parameters."""

    def loss(model):
        leaves = outputs(model, x)
        return sum(jnp.mean(leaf.astype(jnp.float32)) for leaf in leaves), leaves

    grad = eqx.filter_grad(loss, has_aux=True)
    grads, y = eqx.filter_eval_shape(grad, model)
    return [leaf.dtype for leaf in y], [leaf.dtype for leaf in jax.tree.leaves(grads)]


def esm() -> Any:
    """Proteins; blocks that a scan goes over, whose carry must keep its dtype."""
    from esm2quinox import ESM2

    return ESM2(
        num_layers=3,
        embed_size=16,
        num_heads=2,
        token_dropout=False,
        key=KEY,
    )


def tokens():
    esm2quinox = pytest.importorskip("esm2quinox")
    return jnp.asarray(esm2quinox.tokenise(["SPIDERMAN", "FL#SH"]))


def unet() -> Any:
    """Fields of partial differential equations, with GroupNorms."""
    from pdequinox.arch import ModernUNet

    return ModernUNet(1, 2, 1, hidden_channels=4, num_levels=1, num_blocks=1, key=KEY)


def convnext() -> Any:
    """Images, with a LayerNorm at the end, and eight norms of the library's own before."""
    convnext = pytest.importorskip("equimo.models.convnext")
    return convnext.ConvNeXt(
        depths=[1, 1, 1, 1],
        dims=[4, 8, 8, 8],
        num_classes=3,
        layer_scale_init_value=1.0,
        key=KEY,
    )


def over_channels(layer):
    """A `LayerNorm2d` of equimo."""
    new = en.LayerNorm(
        layer.weight.size,
        epsilon=layer.eps,
        dtype="input",
        reduction_axes=0,
        feature_axes=0,
    )
    parameters = lambda new: (new.scale, new.bias)  # noqa: E731
    return eqx.tree_at(parameters, new, (layer.weight, layer.bias))


def rules():
    norm = pytest.importorskip("equimo.layers.norm")
    return {norm.LayerNorm2d: over_channels}


MODELS = {
    "esm2quinox": (esm, tokens, lambda: None, 4),
    "pdequinox": (unet, lambda: normal(1, (2, 2, 16)), lambda: None, 9),
    "equimo": (convnext, lambda: normal(1, (2, 3, 32, 32)), rules, 9),
}


@every(2)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_replaced(name, half):
    _, data, rules, number = MODELS[name]
    model, x, rules = made(name, 0), data(), rules()
    if half:
        model = mixed(model, *EQUINOX, *(rules or {}))
        x = x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
    new = en.replace_norms(model, rules=rules)
    assert nodes(new, *EQUINOX) == []
    assert len(nodes(new, en.AbstractNorm)) == number
    assert dtypes(new, x) == dtypes(model, x)
    for a, b in zip(outputs(model, x), outputs(new, x), strict=True):
        assert b.dtype == (jnp.bfloat16 if half else jnp.float32)
        a, b = (np.asarray(leaf, np.float32) for leaf in (a, b))
        tolerance = (2e-2 if half else 1e-5) * np.abs(a).max()
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint(name):
    """That of the model as it was loads into what becomes of another one."""
    make, _, rules, _ = MODELS[name]
    old, rules = made(name, 0), rules()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, old)
    for skeleton in (
        en.replace_norms(made(name, 1), rules=rules),
        eqx.filter_eval_shape(lambda: en.replace_norms(make(), rules=rules)),
    ):
        file.seek(0)
        loaded = eqx.tree_deserialise_leaves(file, skeleton)
        wanted = en.replace_norms(old, rules=rules)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
            if eqx.is_array(a):
                np.testing.assert_array_equal(a, b)


def test_norms_of_a_librarys_own_are_listed():
    model = made("equimo", 0)
    with pytest.warns(UserWarning, match="not every norm was replaced") as record:
        new = en.replace_norms(model)
    (warning,) = record
    lines = str(warning.message).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("- equimo.layers.norm.LayerNorm2d at model.blocks[0].")
    assert lines[1].count("model.") == 8
    assert len(nodes(new, en.AbstractNorm)) == 1


def test_batch_norms_of_a_librarys_own():
    """noxton's have a state of their own, and 0.1 is the weight of the new statistics."""
    noxton = pytest.importorskip("noxton.nn")
    resnet = pytest.importorskip("noxton.models.resnet.resnet")

    def make():
        return resnet.ResNet(
            resnet.BasicBlock, [1, 1, 1, 1], 3, False, 1, 64, None, key=KEY
        )

    old, state = eqx.nn.make_with_state(make)()
    old = shaken(old)
    x = normal(1, (4, 3, 32, 32))

    @eqx.filter_jit
    def call(model, state):
        batched = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return batched(x, state)

    for _ in range(3):
        _, state = call(old, state)

    def renew(layer):
        new, own = eqx.nn.make_with_state(en.BatchNorm)(
            layer.size,
            axis=0,
            momentum=1 - layer.momentum,
            epsilon=layer.eps,
            axis_name=layer.axis_name,
            use_unbiased_variance=True,
        )
        stats = en.RunningStats(
            state.get(layer.running_mean),
            state.get(layer.running_var),
            jnp.full(layer.size, state.get(layer.num_batches_tracked)),
        )
        parameters = lambda new: (new.scale, new.bias)  # noqa: E731
        new = eqx.tree_at(parameters, new, (layer.weight, layer.bias))
        return new, own.set(new.state_index, stats)

    new, new_state = en.replace_norms(old, state, rules={noxton.BatchNorm: renew})
    assert len(nodes(new, en.BatchNorm)) == 12
    for inference in (True, False):
        old, new = (eqx.nn.inference_mode(model, inference) for model in (old, new))
        (expected, after), (found, new_after) = call(old, state), call(new, new_state)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    stats = new.bn.running_stats(new_after)
    np.testing.assert_allclose(stats.mean, after.get(old.bn.running_mean), 1e-4, 1e-5)
    np.testing.assert_allclose(stats.var, after.get(old.bn.running_var), 1e-4, 1e-5)
