"""Baked layers against the wrappers in evaluation."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import WRAPPERS, assert_close, call, clone, float64, normal, over, randomize


KEY = jax.random.key(0)
BF16, F32 = jnp.bfloat16, jnp.float32


def linear(inputs=3, outputs=4, **kwargs) -> Any:
    return eqx.nn.Linear(inputs, outputs, key=KEY, **kwargs)


def weight_norm(layer, **kwargs) -> Any:
    return en.WeightNorm(layer, **kwargs)


def spectral_norm(layer, **kwargs) -> Any:
    return en.SpectralNorm(layer, key=KEY, **kwargs)


def classes_in(tree):
    """The names of the modules that the nodes of a tree come from."""
    found = set()

    def visit(node):
        found.add(type(node).__module__.partition(".")[0])
        return False

    jax.tree.leaves(tree, is_leaf=visit)
    return found


def evaluate(layer, state, *args):
    """The output, whether or not the layer wants a state."""
    layer = eqx.nn.inference_mode(layer)
    if state is None or not layer.is_stateful():
        return layer(*args)
    return layer(*args, clone(state))[0]


@over(*WRAPPERS)
@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [(F32, None), (BF16, None), (F32, BF16), (BF16, F32), (BF16, "input"),
     (jnp.complex64, None)],
    ids=str,
)  # fmt: skip
def test_as_evaluation(case, param_dtype, dtype):
    layer, state = case.build(param_dtype=param_dtype, dtype=dtype)
    # Steps of power iteration that have not come to rest: the vectors are used as they are.
    layer = randomize(layer)
    x = jnp.eye(8, dtype=jnp.int32)
    expected = call(eqx.nn.inference_mode(layer), state, x)
    if case.stateful:
        baked, new_state = en.bake(layer, state)
        assert jax.tree.leaves(new_state) == []
    else:
        baked = en.bake(layer)
    assert type(baked) is type(layer.layer)
    assert baked.weight.dtype == expected.dtype
    assert_close(baked(x), expected, 1e-6)


@over(*WRAPPERS)
def test_float64(case):
    with float64():
        layer, state = case.build(param_dtype=jnp.float64)
        layer = eqx.nn.inference_mode(randomize(layer))
        baked = en.bake(layer, state)[0] if case.stateful else en.bake(layer)
        x = normal(1, (8,), jnp.float64)
        assert_close(baked(x), call(layer, state, x), 1e-14)


def test_the_state_that_is_stored():
    """Not the largest singular value, but what the stored vectors take for it."""
    layer, state = eqx.nn.make_with_state(lambda: spectral_norm(linear()))()
    stats = en.SpectralStats(
        jnp.array([[1.0], [0], [0], [0]]), jnp.array([[0.0, 1, 0]]), jnp.ones(())
    )
    state = state.set(layer.state_index, (stats,))
    baked, _ = en.bake(layer, state)
    weight = np.asarray(layer.layer.weight)
    assert_close(baked.weight, weight / abs(weight[0, 1]), 1e-6)
    # Given was a state that can be used again.
    state.get(layer.state_index)


def nested(layer):
    return weight_norm(spectral_norm(layer), scale_init="norm")


def inside(layer):
    """A wrapper of a part of what another one wraps."""
    where = lambda pair: pair[1].weight  # noqa: E731
    return spectral_norm(eqx.nn.Sequential([weight_norm(layer), linear(4, 2)]), where=where)


def attention() -> Any:
    attention = eqx.nn.MultiheadAttention(2, 4, key=KEY)
    return weight_norm(attention, scale_init="norm")


MODELS = {
    "nested": (lambda: nested(linear()), (3,)),
    "nested the same": (lambda: weight_norm(weight_norm(linear())), (3,)),
    "inside another": (lambda: inside(linear()), (3,)),
    "conv": (lambda: nested(eqx.nn.Conv2d(2, 3, 2, key=KEY)), (2, 4, 4)),
    "no scale": (lambda: weight_norm(linear(), use_scale=False), (3,)),
    "other axes": (lambda: weight_norm(linear(), feature_axes=1), (3,)),
    "one length": (lambda: weight_norm(linear(), feature_axes=None), (3,)),
    "batch norm within": (
        lambda: weight_norm(eqx.nn.Sequential([linear(), en.BatchNorm(4)])), (3,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, shape = MODELS[name]
    layer, state = eqx.nn.make_with_state(make)()
    layer = randomize(layer)
    baked, new_state = en.bake(layer, state)
    # Nothing of this library is left, but in what is no wrapper.
    if "batch" not in name:
        assert "eqx_norms" not in classes_in((baked, new_state))
    x = normal(1, shape)
    stateful = isinstance(baked, eqx.nn.StatefulLayer) and baked.is_stateful()
    y = evaluate(baked, new_state, x) if stateful else baked(x)
    assert_close(y, evaluate(layer, state, x), 1e-6)


def test_several_weights():
    layer: Any = randomize(attention())
    baked: Any = en.bake(layer)
    assert type(baked) is eqx.nn.MultiheadAttention
    x = normal(1, (5, 4))
    assert_close(baked(x, x, x), layer(x, x, x), 1e-6)


class Net(eqx.Module):
    """Wrappers next to other states, in a list, a dictionary and a stack of blocks."""

    blocks: Any
    parts: dict[str, Any]
    first: eqx.nn.Sequential

    def __init__(self, key):
        make = lambda key: weight_norm(  # noqa: E731
            eqx.nn.Linear(4, 4, key=key), use_scale=False
        )
        self.blocks = eqx.filter_vmap(make)(jax.random.split(key, 3))
        self.parts = {"a": [weight_norm(linear(4, 4), scale_init="norm")]}
        self.first = eqx.nn.Sequential(
            [
                spectral_norm(linear(3, 4)),
                en.BatchNorm(4, axis_name="batch"),
                eqx.nn.Lambda(jax.nn.relu),
                nested(linear(4, 4)),
            ]
        )

    def __call__(self, x, state):
        x, state = self.first(x, state)
        x = self.parts["a"][0](x)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, arrays):
            return eqx.combine(arrays, static)(x), None

        return jax.lax.scan(step, x, arrays)[0], state


@eqx.filter_jit
def batched(model, state, x):
    forward = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return forward(x, clone(state))


def test_a_whole_model():
    model, state = eqx.nn.make_with_state(Net)(KEY)
    x = normal(1, (5, 3))
    _, state = batched(model, state, x)
    model = eqx.nn.inference_mode(randomize(model))
    # Plain and compiled.
    baked, new_state = en.bake(model, state)
    compiled, compiled_state = eqx.filter_jit(en.bake)(model, state)
    expected, _ = batched(model, state, x)
    assert_close(batched(baked, new_state, x)[0], expected, 1e-6)
    assert_close(batched(compiled, compiled_state, x)[0], expected, 1e-6)
    # What is left of the state goes on in training.
    assert len(jax.tree.leaves(new_state)) == 3
    training = eqx.nn.inference_mode(baked, False)
    _, after = batched(training, new_state, x)
    norm = training.first[1]
    np.testing.assert_array_equal(norm.running_stats(after).count, [2] * 4)
    # Nothing was changed.
    assert_close(batched(model, state, x)[0], expected, 1e-6)


def test_made_under_vmap():
    """Each is baked for itself, state and all."""
    keys = jax.random.split(KEY, 3)

    def make(key):
        wrapped = en.SpectralNorm(eqx.nn.Linear(3, 4, key=key), key=key)
        return weight_norm(wrapped, feature_axes=-1, scale_init="norm")

    layers, states = eqx.filter_vmap(eqx.nn.make_with_state(make))(keys)
    layers = eqx.nn.inference_mode(randomize(layers))
    baked, _ = en.bake(layers, states)
    x = normal(1, (3,))
    apply: Any = eqx.filter_jit(eqx.filter_vmap(lambda layer, state: layer(x, state)[0]))
    expected = apply(layers, states)
    assert_close(eqx.filter_vmap(lambda layer: layer(x))(baked), expected, 1e-6)
    # Under it comes to the same.
    again, _ = eqx.filter_vmap(en.bake)(layers, states)
    assert_close(again.weight, baked.weight, 1e-6)


def test_before_there_is_a_state():
    layer = randomize(nested(linear()))
    x = normal(1, (3,))
    fixed, state = eqx.nn.make_with_state(lambda: layer)()
    assert_close(en.bake(layer)(x), evaluate(fixed, state, x), 1e-6)


def test_shared():
    """Whole layers can be tied; what is tied inside a wrapper cannot be found any more."""
    layer = weight_norm(linear(3, 3), scale_init="norm")
    pair = [layer, layer]
    first, second = en.bake(eqx.nn.Shared(pair, lambda p: p[1], lambda p: p[0]))()
    assert type(first) is eqx.nn.Linear
    assert second.weight is first.weight
    ties = [
        (lambda p: p[1].layer.weight, lambda p: p[0].layer.weight),
        (lambda p: p[1].layer, lambda p: p[0].layer),
        (lambda p: p[1].scales, lambda p: p[0].scales),
    ]
    for where, get in ties:
        tied = eqx.nn.Shared(pair, where, get)
        with pytest.raises(ValueError, match=r"at model\['a'\] ties what is in"):
            en.bake({"a": tied})
        first, second = en.bake(tied())
        assert_close(first.weight, second.weight, 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        linear,
        lambda: eqx.nn.WeightNorm(linear()),
        lambda: en.LayerNorm(3),
        list,
        lambda: None,
    ],
)
def test_nothing_to_bake(make):
    with pytest.raises(ValueError, match=r"bake: there is no .* by `eqx_norms.replace_n"):
        en.bake(make())


def test_no_state():
    model, state = eqx.nn.make_with_state(lambda: [nested(linear())])()
    with pytest.raises(ValueError, match=r"Give it too: `bake\(model, state\)`"):
        en.bake(model)
    _, foreign = eqx.nn.make_with_state(lambda: {"a": nested(linear())})()
    with pytest.raises(ValueError, match="holds nothing for this layer"):
        en.bake(model, foreign)
    en.bake(model, state)
