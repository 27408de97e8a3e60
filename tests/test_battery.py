"""What holds for every layer: the transformations of JAX, and being part of Equinox."""

import dataclasses
import functools as ft
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import eqx_norms as en

from .helpers import LAYERS, call, clone, float64, normal, randomize, vector_layers


SHAPE = (3, 8)


def plain(case, layer, x):
    """The layer on a batch with its features last, written down once more."""
    axes = case.reduction_axes(x.ndim)
    mean = jnp.mean(x, axes, keepdims=True) if case.center else jnp.zeros_like(x)
    var = jnp.mean((x - mean) ** 2, axes, keepdims=True)
    lead = (None,) * (x.ndim - 1)
    y = (x - mean) / jnp.sqrt(var + layer.epsilon)
    if layer.scale is not None:
        y = y * layer.scale[lead]
    if case.has_bias:
        y = y + layer.bias[lead]
    return y


def loss_of(function):
    """A loss whose every derivative depends on every output."""
    return lambda layer, x: jnp.sum(jnp.sin(function(layer, x)) ** 2)


def library(case, state):
    return lambda layer, x: call(layer, state, x)


def build(case, **kwargs):
    layer, state = case.build(**kwargs)
    return randomize(layer), state


def assert_close(actual, expected, tolerance):
    """Within a tolerance of the greatest magnitude of each leaf."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# JAX's transformations. In float64, where a wrong term cannot pass for rounding.


@vector_layers
def test_jit(case):
    layer, state = build(case)
    x = 2 + normal(1, SHAPE)
    eager = call(layer, state, x)
    jitted = eqx.filter_jit(call)(layer, state, x)
    assert_close(eager, plain(case, layer, x), 1e-6)
    assert_close(jitted, eager, 1e-6)


@vector_layers
def test_grad(case):
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        x = 2 + normal(1, SHAPE, jnp.float64)

        def grads(function):
            loss = loss_of(function)
            return jax.grad(lambda p: loss(eqx.combine(p[0], static), p[1]))((params, x))

        params, static = eqx.partition(layer, eqx.is_inexact_array)
        actual = grads(library(case, state))
        assert_close(actual, eqx.filter_jit(grads)(ft.partial(plain, case)), 1e-12)
        jitted = eqx.filter_jit(grads)(library(case, state))
        assert_close(jitted, actual, 1e-12)


@vector_layers
def test_jvp(case):
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        x = 2 + normal(1, SHAPE, jnp.float64)
        params, static = eqx.partition(layer, eqx.is_inexact_array)
        tangents = jax.tree.map(
            lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), params
        )

        @ft.partial(jax.jit, static_argnums=0)
        def jvp(function):
            return jax.jvp(
                lambda p, x: function(eqx.combine(p, static), x),
                (params, x),
                (tangents, normal(2, SHAPE, jnp.float64)),
            )

        assert_close(jvp(library(case, state)), jvp(ft.partial(plain, case)), 1e-12)


@vector_layers
def test_hessian(case):
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        x = 2 + normal(1, SHAPE, jnp.float64)

        def hessian(function):
            return jax.jit(jax.hessian(lambda x: loss_of(function)(layer, x)))(x)

        assert_close(hessian(library(case, state)), hessian(ft.partial(plain, case)), 1e-11)


@vector_layers
def test_second_derivative_in_forward_and_reverse_order(case):
    """`hessian` is forward over reverse; these are the other two that people write."""
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        x, v = (normal(seed, SHAPE, jnp.float64) for seed in (1, 2))

        @ft.partial(jax.jit, static_argnums=0)
        def products(function):
            loss = ft.partial(loss_of(function), layer)
            slope = lambda x: jax.jvp(loss, (x,), (v,))[1]  # noqa: E731
            reverse_over_reverse = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) * v))(x)
            return reverse_over_reverse, jax.grad(slope)(x), jax.jvp(slope, (x,), (v,))[1]

        actual = products(library(case, state))
        assert_close(actual, products(ft.partial(plain, case)), 1e-11)


@vector_layers
def test_vmap_over_batches(case):
    """Each batch by itself, as a loop over them would have it; gradients as well."""
    layer, state = build(case)
    xs = normal(1, (2, *SHAPE))

    def value_and_grad(x):
        loss = lambda x: loss_of(library(case, state))(layer, x)  # noqa: E731
        return call(layer, state, x), jax.grad(loss)(x)

    single = jax.jit(value_and_grad)
    expected = [single(x) for x in xs]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    assert_close(jax.jit(jax.vmap(value_and_grad))(xs), expected, 1e-6)
    # The batched axis elsewhere than in front.
    moved = jax.jit(jax.vmap(value_and_grad, in_axes=2, out_axes=2))
    expected = jax.tree.map(lambda a: np.moveaxis(a, 0, 2), expected)
    assert_close(moved(jnp.moveaxis(xs, 0, 2)), expected, 1e-6)


@vector_layers
def test_vmap_over_examples(case):
    """One example at a time, as Equinox's models are written, is the same as a batch.

    The derivative outside of the inner `jit`, where a name in a derivative rule is lost.
    """
    names = {"axis_name": "batch"} if case.stateful else {}
    batched, _ = build(case)
    layer, state = build(case, **names)
    x = normal(1, SHAPE)

    @jax.jit
    def mapped(x):
        if state is None:
            return jax.vmap(layer)(x), None
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, clone(state)
        )

    y, new_state = mapped(x)
    assert_close(y, plain(case, layer, x), 1e-6)
    loss = lambda y: jnp.sum(jnp.sin(y))  # noqa: E731
    assert_close(
        jax.grad(lambda x: loss(mapped(x)[0]))(x),
        jax.jit(jax.grad(lambda x: loss(plain(case, layer, x))))(x),
        1e-5,
    )
    if case.stateful:
        _, batched_state = batched(x, case.build()[1])
        assert_close(
            layer.running_stats(new_state), batched.running_stats(batched_state), 1e-6
        )


@vector_layers
def test_vmap_of_grad(case):
    """Where the examples share statistics, everyone's gradient is that of the sum."""
    layer, state = build(case, **({"axis_name": "batch"} if case.stateful else {}))
    x = normal(1, SHAPE)
    each = lambda x: jnp.sum(jnp.sin(call(layer, state, x)))  # noqa: E731
    actual = jax.jit(jax.vmap(jax.grad(each), axis_name="batch"))(x)
    expected = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(plain(case, layer, x)))))(x)
    assert_close(actual, expected, 1e-5)


@vector_layers
def test_scan(case):
    layer, state = build(case)
    xs = normal(1, (3, *SHAPE))

    def step(state, x):
        if state is None:
            return None, layer(x)
        y, state = layer(x, state)
        return state, y

    final, ys = lax.scan(step, clone(state), xs)
    loop, expected = clone(state), []
    for x in xs:
        loop, y = step(loop, x)
        expected.append(y)
    assert_close(ys, np.stack(expected), 1e-6)
    if case.stateful:
        assert_close(final, loop, 1e-6)
        assert np.all(layer.running_stats(final).count == 3)


@vector_layers
def test_checkpoint(case):
    layer, state = build(case)
    x = normal(1, SHAPE)
    loss = lambda x: loss_of(library(case, state))(layer, x)  # noqa: E731
    kept = eqx.filter_checkpoint(loss)
    expected = jax.jit(jax.value_and_grad(loss))(x)
    assert_close(jax.jit(jax.value_and_grad(kept))(x), expected, 1e-6)


@vector_layers
def test_no_second_trace(case):
    layer, state = build(case)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def step(layer, state, x):
        out = layer(x) if state is None else layer(x, state)
        return (out, None) if state is None else out

    for seed in range(3):
        y, state = step(layer, state, normal(seed, SHAPE))
        # New parameters are new values, no new structure.
        layer = randomize(layer, seed)
        assert np.all(np.isfinite(y))


# Equinox.


@vector_layers
def test_input_unchanged(case):
    layer, state = build(case)
    x = normal(1, SHAPE)
    mask = normal(2, SHAPE) > -1
    before = jax.tree.map(np.array, (layer, state, x, mask))
    if case.stateful:
        _, new = layer(x, clone(state), mask=mask)
        assert not np.array_equal(
            layer.running_stats(new).mean, layer.running_stats(state).mean
        )
    else:
        layer(x, mask=mask)
    assert eqx.tree_equal(before, jax.tree.map(np.array, (layer, state, x, mask)))


@vector_layers
def test_immutable(case):
    layer, _ = case.build()
    for field in dataclasses.fields(layer):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"'{field.name}'"):
            setattr(layer, field.name, getattr(layer, field.name))


@vector_layers
def test_hashable_structure(case):
    """All that is static can be compared and hashed, or nothing could be jitted."""
    layer, state = case.build(epsilon=1e-3, dtype=jnp.float32)
    same, same_state = case.build(epsilon=1e-3, dtype=jnp.float32)
    other, _ = case.build(epsilon=1e-4, dtype=jnp.float32)
    assert hash(jax.tree.structure((layer, state))) == hash(
        jax.tree.structure((same, same_state))
    )
    assert jax.tree.structure(layer) != jax.tree.structure(other)


@vector_layers
def test_serialise(case):
    layer, state = build(case)
    if case.stateful:
        _, state = layer(normal(1, SHAPE), state)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (layer, state))
    file.seek(0)
    fresh = case.build()
    assert not eqx.tree_equal(fresh, (layer, state))
    loaded, loaded_state = eqx.tree_deserialise_leaves(file, fresh)
    assert eqx.tree_equal(loaded, layer)
    kwargs = {"use_running_average": True} if case.stateful else {}
    x = normal(2, SHAPE)
    assert np.array_equal(
        call(loaded, loaded_state, x, **kwargs), call(layer, state, x, **kwargs)
    )
    if case.stateful:
        stats = loaded.running_stats(loaded_state)
        assert eqx.tree_equal(stats, layer.running_stats(state))


@vector_layers
def test_filter_jit_and_filter_grad(case):
    """A step of training as users write it; a flag is no parameter and gets no gradient."""
    layer, state = build(case)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(layer, state, x):
        out = layer(x, state)
        return jnp.mean((out[0] - 1) ** 2), out[1]

    (value, new_state), grads = loss(layer, clone(state), normal(1, SHAPE))
    arrays = jax.tree.leaves(eqx.filter(grads, eqx.is_array))
    assert len(arrays) == 1 + case.has_bias
    stepped = eqx.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, grads))
    (better, _), _ = loss(stepped, clone(state), normal(1, SHAPE))
    assert better < value
    if case.stateful:
        assert np.all(layer.running_stats(new_state).count == 1)


@vector_layers
def test_ensemble(case):
    """Several layers made, and called, under `filter_vmap`."""
    init = lambda key, shape, dtype: 1 + jax.random.normal(key, shape, dtype)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    x = normal(1, SHAPE)
    layers, states = eqx.filter_vmap(lambda key: case.build(scale_init=init, key=key))(keys)
    assert layers.scale.shape == (3, 8)
    assert np.unique(layers.scale).size == 24

    apply = lambda layer, state: layer(x) if state is None else layer(x, state)  # noqa: E731
    out = eqx.filter_jit(eqx.filter_vmap(apply))(layers, states)
    y, states = out if case.stateful else (out, None)
    for number in range(3):
        layer = jax.tree.map(lambda a, n=number: a[n] if eqx.is_array(a) else a, layers)
        assert_close(y[number], plain(case, layer, x), 1e-6)
    if case.stateful:
        assert layers.running_stats(states).mean.shape == (3, 8)


@vector_layers
def test_partition_combine_and_tree_at(case):
    layer, state = build(case)
    x = normal(1, SHAPE)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    assert len(jax.tree.leaves(params)) == 1 + case.has_bias
    y = call(eqx.combine(params, static), state, x)
    assert np.array_equal(y, call(layer, state, x))
    doubled = eqx.tree_at(lambda layer: layer.scale, layer, 2 * layer.scale)
    assert_close(call(doubled, state, x), plain(case, doubled, x), 1e-6)


@vector_layers
def test_tree_pformat(case):
    layer, _ = case.build()
    text = eqx.tree_pformat(layer)
    for part in (f"{case.name}(", "scale=f32[8]", f"epsilon={layer.epsilon}", "axis_name="):
        assert part in text


@vector_layers
def test_called_with_state(case):
    """A model that passes a state through can hold any of the layers."""
    layer, state = build(case)
    x = normal(1, SHAPE)
    if not case.stateful:
        state = object.__new__(eqx.nn.State)
        y, out = layer(x, state)
        assert out is state
        assert np.array_equal(y, layer(x))
        assert isinstance(layer(x, None), jax.Array)
    else:
        y, out = layer(x, state, key=jax.random.key(0))
        assert isinstance(out, eqx.nn.State)
        assert_close(y, plain(case, layer, x), 1e-6)


@vector_layers
def test_inference_mode(case):
    layer, state = build(case)
    x = 3 + normal(1, SHAPE)
    evaluating = eqx.nn.inference_mode(layer)
    if not case.stateful:
        assert np.array_equal(evaluating(x), layer(x))
        return
    assert layer.inference is False
    assert evaluating.inference is True
    _, state = layer(x, state)
    y, same = evaluating(x, state)
    assert eqx.tree_equal(same, state)
    assert np.array_equal(y, layer(x, state, use_running_average=True)[0])
    assert not np.allclose(y, plain(case, layer, x), atol=1e-2)
    # The call's argument wins over the field, both ways.
    y, _ = evaluating(x, clone(state), use_running_average=False)
    assert_close(y, plain(case, layer, x), 1e-6)
    back = eqx.nn.inference_mode(evaluating, value=False)
    assert_close(call(back, state, x), plain(case, layer, x), 1e-6)


@vector_layers
def test_in_a_sequential(case):
    """Between layers with a state and without, one example at a time, training the lot."""
    key = jax.random.key(0)

    def make():
        layer = case.make(8, **case.kwargs)
        if case.stateful:
            layer = case.make(8, axis_name="batch", **case.kwargs)
        return eqx.nn.Sequential(
            [
                eqx.nn.Linear(4, 8, key=key),
                en.BatchNorm(8, axis_name="batch", momentum=0.5),
                layer,
                eqx.nn.Lambda(jax.nn.relu),
                en.RMSNorm(8),
            ]
        )

    model, state = eqx.nn.make_with_state(make)()
    x = normal(1, (5, 4))

    def apply(model, state, x):
        mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return mapped(x, state)

    y, new_state = eqx.filter_jit(apply)(model, clone(state), x)
    hidden = jax.vmap(model[0])(x)
    cases = {case.name: case for case in LAYERS}
    expected = plain(case, model[2], plain(cases["BatchNorm"], model[1], hidden))
    expected = plain(cases["RMSNorm"], model[4], jax.nn.relu(expected))
    assert_close(y, expected, 1e-5)
    norm = model[1]
    assert isinstance(norm, en.BatchNorm)
    stats = norm.running_stats(new_state)
    assert_close(stats.mean, 0.5 * hidden.mean(0), 1e-5)

    # Evaluation needs no name, and leaves the state as it is.
    evaluating = eqx.nn.inference_mode(model)
    out, same = jax.vmap(evaluating, in_axes=(0, None), out_axes=(0, None))(x, new_state)
    assert eqx.tree_equal(same, new_state)
    assert not np.allclose(out, y, atol=1e-2)


def test_state_of_several_layers():
    """Each layer finds its own statistics in the one state of the model."""

    class Model(eqx.Module):
        norms: list

        def __init__(self):
            self.norms = [en.BatchNorm(8, momentum=m) for m in (0.0, 0.5)]

        def __call__(self, x, state):
            for norm in self.norms:
                x, state = norm(x + 1, state)
            return x, state

    model, state = eqx.nn.make_with_state(Model)()
    x = normal(0, (64, 8))
    _, state = model(x, state)
    first, second = (norm.running_stats(state).mean for norm in model.norms)
    assert_close(first, 1 + jnp.mean(x, 0), 1e-5)
    assert_close(second, jnp.full(8, 0.5), 1e-5)
