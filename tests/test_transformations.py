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

from .helpers import (
    LAYERS,
    WRAPPERS,
    Matrix,
    all_layers,
    all_norms,
    assert_close,
    call,
    clone,
    float64,
    normal,
    over,
    randomize,
    step,
)


# Batch, space and features.
SHAPE = (3, 4, 8)


def loss_of(function):
    """A loss whose every derivative depends on every output."""
    return lambda layer, x: jnp.sum(jnp.sin(function(layer, x)) ** 2)


def library(state):
    return lambda layer, x: call(layer, state, x)


def plain(case, state):
    return lambda layer, x: case.expected(layer, state, x)


def build(case, **kwargs):
    layer, state = case.build(**kwargs)
    return randomize(layer), state


# JAX's transformations. In float64, where a wrong term cannot pass for rounding.


@all_layers
def test_jit(case):
    layer, state = build(case)
    x = 2 + normal(1, SHAPE)
    eager = call(layer, state, x)
    jitted = eqx.filter_jit(call)(layer, state, x)
    assert_close(eager, case.expected(layer, state, x), 1e-6)
    assert_close(jitted, eager, 1e-6)


@all_layers
def test_grad(case):
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        x = 2 + normal(1, SHAPE, jnp.float64)

        def grads(function):
            loss = loss_of(function)
            return jax.grad(lambda p: loss(eqx.combine(p[0], static), p[1]))((params, x))

        params, static = eqx.partition(layer, eqx.is_inexact_array)
        actual = grads(library(state))
        assert_close(actual, eqx.filter_jit(grads)(plain(case, state)), 1e-12)
        jitted = eqx.filter_jit(grads)(library(state))
        assert_close(jitted, actual, 1e-12)


# Of the norms `test_derivatives` has these, and more.


@over(*WRAPPERS)
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

        assert_close(jvp(library(state)), jvp(plain(case, state)), 1e-12)


@over(*WRAPPERS)
def test_hessian(case):
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        x = 2 + normal(1, SHAPE, jnp.float64)

        def hessian(function):
            return jax.jit(jax.hessian(lambda x: loss_of(function)(layer, x)))(x)

        assert_close(hessian(library(state)), hessian(plain(case, state)), 1e-11)


@over(*WRAPPERS)
def test_second_derivatives_of_parameters_too(case):
    """`hessian` is forward over reverse; these are the other two that people write."""
    with float64():
        layer, state = build(case, param_dtype=jnp.float64)
        params, static = eqx.partition(layer, eqx.is_inexact_array)
        at = params, normal(1, SHAPE, jnp.float64)
        v = jax.tree.map(lambda a: normal(2, a.shape, jnp.float64), at)

        @ft.partial(jax.jit, static_argnums=0)
        def products(function):
            loss = lambda at: loss_of(function)(eqx.combine(at[0], static), at[1])  # noqa: E731
            slope = lambda at: jax.jvp(loss, (at,), (v,))[1]  # noqa: E731

            def dot(at):
                pairs = jax.tree.map(lambda a, b: jnp.sum(a * b), jax.grad(loss)(at), v)
                return sum(jax.tree.leaves(pairs))

            return jax.grad(dot)(at), jax.grad(slope)(at), jax.jvp(slope, (at,), (v,))[1]

        assert_close(products(library(state)), products(plain(case, state)), 1e-11)


@all_layers
def test_vmap_over_batches(case):
    """Each batch by itself, as a loop over them would have it; gradients as well."""
    layer, state = build(case)
    xs = normal(1, (2, *SHAPE))

    def value_and_grad(x):
        loss = lambda x: loss_of(library(state))(layer, x)  # noqa: E731
        return call(layer, state, x), jax.grad(loss)(x)

    single = jax.jit(value_and_grad)
    expected = [single(x) for x in xs]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    assert_close(jax.jit(jax.vmap(value_and_grad))(xs), expected, 1e-6)
    # The batched axis elsewhere than in front.
    moved = jax.jit(jax.vmap(value_and_grad, in_axes=2, out_axes=2))
    expected = jax.tree.map(lambda a: np.moveaxis(a, 0, 2), expected)
    assert_close(moved(jnp.moveaxis(xs, 0, 2)), expected, 1e-6)


@all_layers
def test_vmap_over_examples(case):
    """One example at a time, as Equinox's models are written, is the same as a batch.

    The derivative outside of the inner `jit`, where a name in a derivative rule is lost.
    """
    layer, state = build(case, **case.per_example)
    x = normal(1, SHAPE)

    @jax.jit
    def mapped(x):
        each = jax.vmap(
            ft.partial(step, layer, state), out_axes=(0, None), axis_name="batch"
        )
        return each(x)

    y, new_state = mapped(x)
    assert_close(y, case.expected(layer, state, x), 1e-6)
    loss = lambda y: jnp.sum(jnp.sin(y))  # noqa: E731
    assert_close(
        jax.grad(lambda x: loss(mapped(x)[0]))(x),
        jax.jit(jax.grad(lambda x: loss(case.expected(layer, state, x))))(x),
        1e-5,
    )
    if case.stateful:
        _, batched_state = step(*build(case), x)
        assert_close(new_state, batched_state, 1e-6)


@all_layers
def test_vmap_of_grad(case):
    """Where the examples share statistics, everyone's gradient is that of the sum."""
    layer, state = build(case, **case.per_example)
    x = normal(1, SHAPE)
    each = lambda x: jnp.sum(jnp.sin(call(layer, state, x)))  # noqa: E731
    actual = jax.jit(jax.vmap(jax.grad(each), axis_name="batch"))(x)
    total = lambda x: jnp.sum(jnp.sin(case.expected(layer, state, x)))  # noqa: E731
    expected = jax.jit(jax.grad(total))(x)
    assert_close(actual, expected, 1e-5)


@all_layers
def test_scan(case):
    layer, state = build(case)
    xs = normal(1, (3, *SHAPE))

    def one(state, x):
        y, state = step(layer, state, x)
        return state, y

    final, ys = lax.scan(one, clone(state), xs)
    loop, expected = state, []
    for x in xs:
        loop, y = one(loop, x)
        expected.append(y)
    assert_close(ys, np.stack(expected), 1e-6)
    if case.stateful:
        assert_close(final, loop, 1e-6)
        assert not eqx.tree_equal(final, state)


@all_layers
def test_checkpoint(case):
    layer, state = build(case)
    x = normal(1, SHAPE)
    loss = lambda x: loss_of(library(state))(layer, x)  # noqa: E731
    kept = eqx.filter_checkpoint(loss)
    expected = jax.jit(jax.value_and_grad(loss))(x)
    assert_close(jax.jit(jax.value_and_grad(kept))(x), expected, 1e-6)


@all_layers
def test_no_second_trace(case):
    layer, state = build(case)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def compiled(layer, state, x):
        return step(layer, state, x)

    for seed in range(3):
        y, state = compiled(layer, state, normal(seed, SHAPE))
        # New parameters are new values, no new structure.
        layer = randomize(layer, seed)
        assert np.all(np.isfinite(y))


# Equinox.


@all_layers
def test_input_unchanged(case):
    layer, state = build(case)
    x = normal(1, SHAPE)
    before = jax.tree.map(np.array, (layer, state, x))
    _, new = step(layer, state, x)
    if case.stateful:
        assert not eqx.tree_equal(new, state)
    assert eqx.tree_equal(before, jax.tree.map(np.array, (layer, state, x)))


@all_layers
def test_immutable(case):
    layer, _ = case.build()
    for field in dataclasses.fields(layer):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"'{field.name}'"):
            setattr(layer, field.name, getattr(layer, field.name))


@all_layers
def test_hashable_structure(case):
    """All that is static can be compared and hashed, or nothing could be jitted."""
    layer, state = case.build(epsilon=1e-3, dtype=jnp.float32)
    same, same_state = case.build(epsilon=1e-3, dtype=jnp.float32)
    other, _ = case.build(epsilon=1e-4, dtype=jnp.float32)
    assert hash(jax.tree.structure((layer, state))) == hash(
        jax.tree.structure((same, same_state))
    )
    assert jax.tree.structure(layer) != jax.tree.structure(other)


@all_norms
def test_averaged_as_a_whole(case):
    """As some do for a moving average of the parameters: flags become numbers."""
    layer, state = build(case)
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, layer, layer)
    x = normal(1, SHAPE)
    assert_close(call(average, state, x), call(layer, state, x))


@all_layers
def test_serialise(case):
    layer, state = build(case)
    _, state = step(layer, state, normal(1, SHAPE))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (layer, state))
    file.seek(0)
    fresh = case.build()
    assert not eqx.tree_equal(fresh, (layer, state))
    loaded, loaded_state = eqx.tree_deserialise_leaves(file, fresh)
    assert eqx.tree_equal(loaded, layer)
    assert eqx.tree_equal(loaded_state, state) or not case.stateful
    x = normal(2, SHAPE)
    y = call(layer, state, x, **case.evaluation)
    assert np.array_equal(call(loaded, loaded_state, x, **case.evaluation), y)


@all_layers
def test_filter_jit_and_filter_grad(case):
    """A step of training as users write it; a flag is no parameter and gets no gradient."""
    layer, state = build(case)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(layer, state, x):
        y, state = step(layer, state, x)
        return jnp.mean((y - 1) ** 2), state

    x = normal(1, SHAPE)
    (value, new_state), grads = loss(layer, state, x)
    assert len(jax.tree.leaves(eqx.filter(grads, eqx.is_array))) == case.learned
    stepped = eqx.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, grads))
    (better, _), _ = loss(stepped, state, x)
    assert better < value
    if case.stateful:
        assert_close(new_state, step(layer, state, x)[1], 1e-5)


@all_layers
def test_ensemble(case):
    """Several layers made, and called, under `filter_vmap`."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = normal(1, SHAPE)
    make = lambda key: case.build(**case.random, key=key)  # noqa: E731
    layers, states = eqx.filter_vmap(make)(keys)
    apply = eqx.filter_vmap(lambda layer, state: step(layer, state, x))
    y, new = eqx.filter_jit(apply)(layers, states)
    outputs = []
    for number in range(3):
        one = lambda a, n=number: a[n] if eqx.is_array(a) else a  # noqa: E731
        layer, state = jax.tree.map(one, (layers, states))
        outputs.append(case.expected(layer, state, x))
        if case.stateful:
            assert_close(jax.tree.map(one, new), step(layer, state, x)[1], 1e-5)
    assert_close(y, np.stack(outputs), 1e-5)
    # Each drew its own.
    assert not np.allclose(outputs[0], outputs[1], atol=0.1)


@all_layers
def test_partition_combine_and_tree_at(case):
    layer, state = build(case)
    x = normal(1, SHAPE)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    assert len(jax.tree.leaves(params)) == case.learned
    y = call(eqx.combine(params, static), state, x)
    assert np.array_equal(y, call(layer, state, x))
    first = lambda layer: jax.tree.leaves(layer)[0]  # noqa: E731
    other = eqx.tree_at(first, layer, replace_fn=lambda a: 2 * a + 1)
    assert_close(call(other, state, x), case.expected(other, state, x), 1e-5)


@all_layers
def test_tree_pformat(case):
    """The whole of it, and of the arrays their shape alone."""
    layer, _ = case.build()
    text = eqx.tree_pformat(layer)
    assert text.startswith(f"{case.name}(")
    assert f"epsilon={layer.epsilon}" in text
    assert text.count("f32[") == case.learned


@all_norms
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
        y, out = layer(x, clone(state), key=jax.random.key(0))
        assert isinstance(out, eqx.nn.State)
        assert_close(y, case.expected(layer, state, x), 1e-6)


@all_layers
def test_inference_mode(case):
    layer, state = build(case)
    x = 3 + normal(1, SHAPE)
    evaluating = eqx.nn.inference_mode(layer)
    if not case.stateful:
        assert np.array_equal(evaluating(x), layer(x))
        return
    assert layer.inference is False
    assert evaluating.inference is True
    y, same = step(evaluating, state, x)
    assert eqx.tree_equal(same, state)
    assert np.array_equal(y, call(layer, state, x, **case.evaluation))
    assert_close(y, case.expected(evaluating, state, x), 1e-6)
    trained = case.expected(layer, state, x)
    assert not np.allclose(y, trained, atol=1e-2)
    # The call's argument wins over the field, both ways.
    training = {name: not value for name, value in case.evaluation.items()}
    assert_close(call(evaluating, state, x, **training), trained, 1e-6)
    back = eqx.nn.inference_mode(evaluating, value=False)
    assert_close(call(back, state, x), trained, 1e-6)


@all_layers
def test_in_a_sequential(case):
    """Between layers with a state and without, one example at a time, training the lot."""
    names = {case.name: case for case in LAYERS}

    def make():
        return eqx.nn.Sequential(
            [
                Matrix(8, jnp.float32, jax.random.key(0)),
                case.create(**case.per_example),
                en.BatchNorm(8, axis_name="batch", momentum=0.5),
                eqx.nn.Lambda(jax.nn.relu),
                en.RMSNorm(8),
            ]
        )

    model, state = eqx.nn.make_with_state(make)()
    model = randomize(model)
    x = normal(1, SHAPE)

    def apply(model, state, x):
        mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return mapped(x, state)

    y, new_state = eqx.filter_jit(apply)(model, clone(state), x)
    hidden = case.expected(model[1], state, model[0](x))
    expected = names["BatchNorm"].expected(model[2], state, hidden)
    expected = names["RMSNorm"].expected(model[4], state, jax.nn.relu(expected))
    assert_close(y, expected, 1e-5)
    norm = model[2]
    assert isinstance(norm, en.BatchNorm)
    stats = norm.running_stats(new_state)
    np.testing.assert_allclose(stats.mean, 0.5 * hidden.mean((0, 1)), atol=1e-5)

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
