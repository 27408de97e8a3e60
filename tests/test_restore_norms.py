"""Norms of this library, and whole models of them, against those of `equinox.nn` that they
become."""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms import convert

from .helpers import as_pair, assert_close, float64, normal, randomize
from .test_convert_equinox import call, evaluate, forward


KEY = jax.random.key(0)
LAST: dict[str, Any] = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
FIRST: dict[str, Any] = {"feature_axis": 0, "batch_axes": ()}
INSTANCE = {"feature_axes": 0, "batch_axes": ()}
HALF = {"param_dtype": jnp.bfloat16}
BN = {"axis": 0, "axis_name": "batch"}


def linear():
    return eqx.nn.Linear(3, 4, key=KEY)


def conv():
    return eqx.nn.Conv2d(3, 4, 2, key=KEY)


def spectral(layer, **kwargs):
    return en.SpectralNorm(layer, key=KEY, **kwargs)


# What makes the layer, the shape of an example, and what it becomes.
CASES = {
    "LayerNorm": (lambda: en.LayerNorm(5), (5,), "LayerNorm"),
    "LayerNorm, axes": (lambda: en.LayerNorm((3, 5), **LAST), (3, 5), "LayerNorm"),
    "LayerNorm, reduced in another order": (
        lambda: en.LayerNorm((3, 5), reduction_axes=(-1, -2), feature_axes=(-2, -1)),
        (3, 5),
        "LayerNorm",
    ),
    "LayerNorm, no scale": (
        lambda: en.LayerNorm(5, epsilon=1e-2, use_scale=False, dtype="input"),
        (5,),
        "LayerNorm",
    ),
    "LayerNorm, no bias": (
        lambda: en.LayerNorm(5, use_bias=False, dtype=jnp.float32),
        (5,),
        "LayerNorm",
    ),
    "LayerNorm, offset": (lambda: en.LayerNorm(5, scale_offset=1.0), (5,), "LayerNorm"),
    "LayerNorm, plain": (
        lambda: en.LayerNorm(5, scale_offset=1.0, use_scale=False, use_bias=False),
        (5,),
        "LayerNorm",
    ),
    "LayerNorm, half": (lambda: en.LayerNorm(5, dtype="input", **HALF), (5,), "LayerNorm"),
    "RMSNorm": (lambda: en.RMSNorm(5, use_fast_variance=False), (5,), "RMSNorm"),
    "RMSNorm, half, offset": (
        lambda: en.RMSNorm(5, scale_offset=1.0, **HALF),
        (5,),
        "RMSNorm",
    ),
    "RMSNorm, plain": (
        lambda: en.RMSNorm((3, 5), use_scale=False, **LAST),
        (3, 5),
        "RMSNorm",
    ),
    "RMSNorm, bias": (
        lambda: convert.from_equinox(eqx.nn.RMSNorm(5, use_bias=True)),
        (5,),
        "RMSNorm",
    ),
    "GroupNorm": (lambda: en.GroupNorm(6, 2, **FIRST), (6, 3), "GroupNorm"),
    "GroupNorm, sizes": (lambda: en.GroupNorm(6, None, 2, **FIRST), (6, 3, 2), "GroupNorm"),
    "GroupNorm, no bias": (
        lambda: en.GroupNorm(6, 2, use_bias=False, epsilon=1e-2, **FIRST),
        (6,),
        "GroupNorm",
    ),
    "GroupNorm, no scale": (
        lambda: en.GroupNorm(6, 3, use_scale=False, **FIRST),
        (6, 4),
        "GroupNorm",
    ),
    "GroupNorm, plain": (
        lambda: en.GroupNorm(6, 3, use_scale=False, use_bias=False, **FIRST),
        (6, 4),
        "GroupNorm",
    ),
    "InstanceNorm": (lambda: en.InstanceNorm(6, **INSTANCE), (6, 4), "GroupNorm"),
    "InstanceNorm, offset": (
        lambda: en.InstanceNorm((6,), scale_offset=0.5, use_bias=False, **INSTANCE),
        (6, 4, 2),
        "GroupNorm",
    ),
    "BatchNorm": (lambda: en.BatchNorm(4, momentum=0.9, **BN), (4, 3), "BatchNorm"),
    "BatchNorm, frozen": (
        lambda: en.freeze(en.BatchNorm((4,), debias=True, **BN)),
        (4,),
        "BatchNorm",
    ),
    "BatchNorm, half": (lambda: en.BatchNorm(4, **HALF, **BN), (4, 3), "BatchNorm"),
    "BatchNorm, plain": (
        lambda: en.BatchNorm(4, use_scale=False, use_bias=False, dtype="input", **BN),
        (4, 3),
        "BatchNorm",
    ),
    "BatchNorm, no bias": (
        lambda: en.BatchNorm(4, use_bias=False, momentum=None, scale_offset=1.0, **BN),
        (4, 3),
        "BatchNorm",
    ),
    "BatchNorm, no momentum": (
        lambda: en.BatchNorm(4, momentum=0.0, use_unbiased_variance=True, **BN),
        (4, 3),
        "BatchNorm",
    ),
    "BatchNorm, one name of two": (
        lambda: en.BatchNorm(4, axis=0, axis_name=("batch", "x"), use_running_average=True),
        (4, 3),
        "BatchNorm",
    ),
    "WeightNorm": (lambda: en.WeightNorm(linear()), (3,), "WeightNorm"),
    "WeightNorm, conv": (
        lambda: en.WeightNorm(conv(), feature_axes=-3, scale_init="norm"),
        (3, 4, 4),
        "WeightNorm",
    ),
    "WeightNorm, no axis": (
        lambda: en.WeightNorm(conv(), feature_axes=None),
        (3, 4, 4),
        "WeightNorm",
    ),
    "WeightNorm, no scale, large epsilon": (
        lambda: en.WeightNorm(linear(), use_scale=False, epsilon=0.3),
        (3,),
        "WeightNorm",
    ),
    "SpectralNorm": (lambda: spectral(linear(), n_steps=2), (3,), "SpectralNorm"),
    "SpectralNorm, conv": (
        lambda: spectral(conv(), update_stats=False, feature_axes=-4),
        (3, 4, 4),
        "SpectralNorm",
    ),
}
every = pytest.mark.parametrize("name", CASES)


def made(name, steps=3) -> tuple[Any, Any, Any, type]:
    """A layer, its state after some steps, a batch and what the layer becomes."""
    make, shape, becomes = CASES[name]
    layer, state = eqx.nn.make_with_state(lambda: randomize(make()))()
    x = (2 + 3 * normal(7, (8, *shape))).astype(
        jnp.bfloat16 if "half" in name else jnp.float32
    )
    if not hasattr(layer, "state_index"):
        state = None
    elif "two" not in name:
        for _ in range(steps):
            _, state = call(layer, state, x)
    return layer, state, x, getattr(eqx.nn, becomes)


@every
def test_evaluation(name):
    """And back again, where every bit of a layer is the same. So is its state, but for
    averages, which were multiplied and divided, and the vectors of power iteration, one of
    which is scaled."""
    layer, state, x, becomes = made(name)
    before = jax.tree.leaves((layer, state))
    new, new_state = as_pair(convert.to_equinox(layer, state))
    assert type(new) is becomes
    expected, y = evaluate(layer, state, x), evaluate(new, new_state, x)
    half = "half" in name
    if not (half and becomes is eqx.nn.BatchNorm):  # Whose statistics are float32.
        assert y.dtype == expected.dtype == x.dtype
    assert_close(
        y.astype(jnp.float32), expected.astype(jnp.float32), 1e-2 if half else 2e-5
    )
    back, back_state = as_pair(convert.from_equinox(new, new_state))
    again, again_state = as_pair(convert.to_equinox(back, back_state))
    arrays, others = (
        [jax.tree.leaves(eqx.filter(part, eqx.is_array)) for part in pair]
        for pair in ((again, again_state), (new, new_state))
    )
    assert eqx.tree_equal(arrays[0], others[0])
    for one, other in zip(arrays[1], others[1], strict=True):
        assert_close(one, other, 1e-6)
    # What was given stays as it was.
    for a, b in zip(jax.tree.leaves((layer, state)), before, strict=True):
        assert a is b


@every
def test_initial_state(name):
    """Before `make_with_state` the state is in the layer."""
    make, _, becomes = CASES[name]
    new = en.restore_norms([make()])[0]
    assert type(new) is getattr(eqx.nn, becomes)
    whole, state = as_pair(convert.to_equinox(make()))
    if state is not None:
        new, other = eqx.nn.make_with_state(lambda: new)()
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
    assert eqx.tree_equal(eqx.filter(whole, eqx.is_array), eqx.filter(new, eqx.is_array))


# -- What has no counterpart.


def stacked(make):
    return eqx.filter_vmap(lambda key: make(eqx.nn.Linear(3, 4, key=key)))(
        jax.random.split(KEY, 2)
    )


def zero(layer):
    return eqx.tree_at(lambda layer: layer.weight, layer, jnp.zeros_like(layer.weight))


class Own(en.LayerNorm):
    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


LEFT = {
    "features out of order": (
        lambda: en.LayerNorm((5, 3), reduction_axes=(-2, -1), feature_axes=(-1, -2)),
        r"needs `feature_axes=\(-2, -1\)`.* has `feature_axes=\(-1, -2\)`",
    ),
    "fewer reduced": (
        lambda: en.LayerNorm((3, 5), reduction_axes=-1, feature_axes=(-2, -1)),
        "reduction_axes",
    ),
    "more reduced": (lambda: en.RMSNorm(5, reduction_axes=(-2, -1)), "reduction_axes"),
    "first axis": (lambda: en.LayerNorm(5, reduction_axes=0, feature_axes=0), "feature_ax"),
    "members": (lambda: en.LayerNorm(5, axis_name="x"), r"`axis_name=None`.*\('x',\)"),
    "members, groups": (lambda: en.GroupNorm(4, 2, axis_name="x", **FIRST), "axis_name"),
    "members, instances": (lambda: en.InstanceNorm(4, axis_name="x", **INSTANCE), "axis_n"),
    "batch of groups": (lambda: en.GroupNorm(4, 2, feature_axis=1), r"`batch_axes=\(\)`"),
    "batch of instances": (lambda: en.InstanceNorm(4, feature_axes=1), "batch_axes"),
    "several features": (
        lambda: en.InstanceNorm((4, 5), feature_axes=(0, 1)),
        "feature_ax",
    ),
    "reduction of groups": (
        lambda: en.GroupNorm(4, 2, reduction_axes=(0, 1), **FIRST),
        "reduction_axes=None",
    ),
    "batch": (lambda: en.BatchNorm(4, axis=1), r"needs `axis=\(0,\)`"),
    "groups of members": (
        lambda: en.BatchNorm(4, axis_index_groups=[[0, 1]], **BN),
        "`axis_index_groups=None`",
    ),
    "average over all": (lambda: en.BatchNorm(4, momentum=1.0, **BN), "divides by zero"),
    "dtype": (lambda: en.LayerNorm(5, dtype=jnp.bfloat16), "bfloat16 for float32"),
    "dtype of statistics": (
        lambda: en.BatchNorm(4, dtype=jnp.bfloat16, **HALF, **BN),
        "bfloat16 for float32",
    ),
    "tiny": (lambda: en.LayerNorm(5, param_dtype=jnp.float8_e5m2), "needs a `dtype`"),
    "complex": (lambda: en.RMSNorm(5, param_dtype=jnp.complex64), "mean of squares"),
    "own class": (lambda: Own(5), "a `__call__` of its own"),  # pyright: ignore
    "two axes": (lambda: en.WeightNorm(conv(), feature_axes=(0, 1)), "one feature axis"),
    "two weights": (lambda: en.WeightNorm([linear(), conv()]), r"one weight.*\[0\]"),
    "deep weight": (lambda: en.WeightNorm([linear()]), r"one weight, a field"),
    "weights of a stack": (lambda: stacked(en.WeightNorm), "filter_vmap"),
    "dtype of weights": (
        lambda: en.WeightNorm(linear(), dtype=jnp.bfloat16),
        "bfloat16 for float32",
    ),
    "zero": (lambda: en.WeightNorm(zero(linear())), "a length of zero"),
    "zero, spectral": (lambda: spectral(zero(linear())), "singular value of zero"),
    "columns": (lambda: spectral(linear(), feature_axes=1), "rows along axis 0"),
    "half, spectral": (
        lambda: spectral(eqx.nn.Linear(3, 4, dtype=jnp.bfloat16, key=KEY)),
        "bfloat16 for bfloat16, .* float32",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    """Listed in one warning; an error for one layer alone."""
    make, match = LEFT[name]
    model = {"left": make(), "replaced": en.LayerNorm(3)}
    with pytest.warns(UserWarning, match=rf"(?s)^restore_norms: not .*'left'\]: .*{match}"):
        new = en.restore_norms(model)
    assert type(new["left"]) is type(model["left"])
    for a, b in zip(*map(jax.tree.leaves, (new["left"], model["left"])), strict=True):
        assert a is b
    assert type(new["replaced"]) is eqx.nn.LayerNorm
    with pytest.raises(ValueError, match=match if name != "own class" else "counterpart"):
        convert.to_equinox(model["left"])


# -- Whole models.


class Counter(eqx.nn.StatefulLayer):
    index: eqx.nn.StateIndex

    def __init__(self):
        self.index = eqx.nn.StateIndex(jnp.array(41))

    def __call__(self, x, state, *, key=None):
        return x, state.set(self.index, state.get(self.index) + 1)


def mixed():
    return eqx.nn.Sequential(
        [
            Counter(),
            eqx.nn.BatchNorm(3, "batch", mode="batch"),
            eqx.nn.Sequential(
                [
                    eqx.nn.LayerNorm(3),
                    eqx.nn.BatchNorm(3, "batch", channelwise_affine=False, mode="batch"),
                ]
            ),
            eqx.nn.WeightNorm(eqx.nn.Linear(3, 3, key=KEY)),
            eqx.nn.SpectralNorm(eqx.nn.Linear(3, 3, key=KEY), "weight", key=KEY),
            eqx.nn.GroupNorm(1, 3),
            eqx.nn.RMSNorm(3),
        ]
    )


# (Vectors that were never of length one are normalised here, and not in Equinox.)
@pytest.mark.parametrize("steps", [1, 3])
def test_there_and_back(steps):
    """A model of Equinox, to this library and back, in evaluation up to the rounding of its
    debiased averages. A file of the restored model loads into the one that was there."""
    x = 2 + normal(7, (8, 3))
    model, state = eqx.nn.make_with_state(lambda: randomize(mixed()))()
    for _ in range(steps):
        _, state = call(model, state, x)
    there, own = en.restore_norms(*en.replace_norms(model, state))
    back = there, own
    assert jax.tree.structure(eqx.filter(back, eqx.is_array)) == jax.tree.structure(
        eqx.filter((model, state), eqx.is_array)
    )
    assert_close(evaluate(there, own, x), evaluate(model, state, x))
    again = en.restore_norms(*en.replace_norms(there, own))
    assert_close(again, back)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, back)
    file.seek(0)
    loaded: Any = eqx.tree_deserialise_leaves(file, (model, state))
    one, one_state = loaded
    np.testing.assert_array_equal(evaluate(one, one_state, x), evaluate(there, own, x))
    # Training goes on.
    _, after = call(there, own, x)
    assert after.get(there[0].index) == 42 + steps


def test_shared_state():
    """Layers that share their state go on to share it."""
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(3, **BN)
    model, state = en.restore_norms([layer, layer], state)
    assert len(jax.tree.leaves(state)) == 3
    x = normal(7, (8, 3))
    _, state = call(model[0], state, x)
    np.testing.assert_array_equal(
        evaluate(model[1], state, x), evaluate(model[0], state, x)
    )


def test_tied_weights():
    norms = [en.RMSNorm(3), en.RMSNorm(3)]
    tied = eqx.nn.Shared(norms, lambda m: m[0].scale, lambda m: m[1].scale)
    with pytest.warns(UserWarning, match=r"Shared around it refers to fields by names"):
        new = en.restore_norms([tied, en.RMSNorm(3)])
    assert type(new[0]()[0]) is en.RMSNorm
    assert type(new[1]) is eqx.nn.RMSNorm


def test_stacked_layers():
    """Layers made by `vmap`, for a scan over them or an ensemble."""
    make = lambda key: (en.LayerNorm(4), en.BatchNorm(4, **BN))  # noqa: E731
    old, state = eqx.filter_vmap(eqx.nn.make_with_state(make))(jax.random.split(KEY, 3))
    old = randomize(old)
    x = normal(7, (8, 4))

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), eqx.if_array(0)))
    def step(model, state):
        return forward(model[1], state, forward(model[0], None, x)[0])[1]

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), eqx.if_array(0)))
    def both(model, state):
        norm, batch_norm = eqx.nn.inference_mode(model)
        return forward(batch_norm, state, forward(norm, None, x)[0])[0]

    for _ in range(2):
        new, new_state = en.restore_norms(old, state)
        assert_close(both(new, new_state), both(old, state), 1e-5)
        state = step(old, state)


def test_norms_within_a_wrapped_layer():
    """What is wrapped is restored too; where the wrapper is left, within it."""
    inner = eqx.nn.Sequential([eqx.nn.Linear(3, 3, key=KEY), en.RMSNorm(3)])
    with pytest.warns(UserWarning, match=r"WeightNorm at model.*one weight"):
        new = en.restore_norms(en.WeightNorm(inner))
    assert type(new) is en.WeightNorm
    assert type(new.layer[1]) is eqx.nn.RMSNorm
    assert_close(new(jnp.ones(3)), en.WeightNorm(inner)(jnp.ones(3)))


def test_under_jit():
    new = eqx.filter_jit(en.restore_norms)([en.LayerNorm(3), en.WeightNorm(linear())])
    assert type(new[1]) is eqx.nn.WeightNorm


def test_in_float64():
    with float64():
        layer, state = eqx.nn.make_with_state(en.BatchNorm)(
            3, param_dtype=jnp.float64, **BN
        )
        x = normal(7, (8, 3), jnp.float64)
        _, state = call(layer, state, x)
        new, new_state = convert.to_equinox(layer, state)
        assert_close(evaluate(new, new_state, x), evaluate(layer, state, x), 1e-12)
        call(new, new_state, x)


def test_missing_state():
    layer, _ = eqx.nn.make_with_state(en.BatchNorm)(3, **BN)
    for restore in (convert.to_equinox, en.restore_norms):
        with pytest.raises(ValueError, match=r"took it out .* `to_equinox\(layer, state"):
            restore(layer)
        _, other = eqx.nn.make_with_state(Counter)()
        with pytest.raises(ValueError, match=r"holds nothing for this layer"):
            restore(layer, other)


def test_nothing_to_restore():
    with pytest.raises(ValueError, match=r"no norm to replace .*`eqx_norms` are: B"):
        en.restore_norms([eqx.nn.LayerNorm(3), linear()])
    with pytest.raises(ValueError, match=r"no counterpart for equinox.nn.LayerNorm"):
        convert.to_equinox(eqx.nn.LayerNorm(3))


@pytest.mark.parametrize("steps", [0, 3])
def test_training_goes_on(steps):
    """Of Equinox's layer there and back, and of a debiased one of this library, as if it
    had stayed what it was."""
    x = 5 + normal(7, (3, 8, 3))
    theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    ours = eqx.nn.make_with_state(en.BatchNorm)(3, debias=True, **BN)
    away, home = convert.from_equinox, convert.to_equinox
    for (layer, state), there, back in ((theirs, away, home), (ours, home, away)):
        for _ in range(steps):
            _, state = call(layer, state, x[0])
        other, other_state = back(*there(layer, state))
        for batch in x[1:] if steps else ():
            _, state = call(layer, state, batch)
            _, other_state = call(other, other_state, batch)
        assert_close(other_state, state, 1e-5)
