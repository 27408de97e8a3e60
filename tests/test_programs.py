"""What the layers are traced and compiled to: primitives of JAX and no conditional, no
product that is too large, one trace for equal layers, and no second one."""

import functools as ft
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from .helpers import NORMS, Norm, all_norms, call, normal, over, step


# Batch, space and features.
SHAPE = (4, 8, 8)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr, and of all jaxprs within."""

    def is_jaxpr(leaf: Any) -> bool:
        return hasattr(leaf, "eqns")

    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(leaf):
                yield from equations(leaf)


@ft.cache
def primitives_of_jax() -> frozenset[Primitive]:
    return frozenset(
        value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "jax"
        for value in vars(module).values()
        if isinstance(value, Primitive)
    )


def check_primitives(f: Callable[..., Any], *args: Any) -> None:
    """None but JAX's, and no branch."""
    found = list(equations(jax.make_jaxpr(f)(*args).jaxpr))
    assert "rsqrt" in {equation.primitive.name for equation in found}
    for equation in found:
        assert equation.primitive in primitives_of_jax(), equation
        assert equation.primitive.name != "cond", equation


def options(case: Norm) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of a layer and of its call."""
    mask = normal(1, SHAPE) < 1
    for fast in (True, False):
        yield {"use_fast_variance": fast}, {}
        yield {"use_fast_variance": fast}, {"mask": mask}
    yield case.features_first, {}
    yield {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}, {}
    yield {"use_scale": False}, {"scale": normal(2, SHAPE), "bias": normal(3, (8,))}
    if case.stateful:
        yield {}, case.evaluation
        yield {}, {**case.evaluation, "mask": mask}


@all_norms
def test_primitives_of_jax_and_no_conditional(case):
    """So that what walks through a jaxpr gets through it, and no accelerator waits."""
    for kwargs, arguments in options(case):
        layer, state = case.build(**kwargs)

        params, static = eqx.partition(layer, eqx.is_inexact_array)
        args = params, normal(0, SHAPE)

        def training(params, x, static=static, state=state, arguments=arguments):
            y, new = step(eqx.combine(params, static), state, x, **arguments)
            return jnp.sum(jnp.sin(y)), new

        def gradient(*args, f=training):
            return jax.grad(f, argnums=(0, 1), has_aux=True)(*args)

        def second(*args, f=gradient):
            return jax.jvp(lambda *args: f(*args)[0], args, args)

        for f in (training, gradient, second):
            check_primitives(f, *args)


@all_norms
@pytest.mark.parametrize("vmapped", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize("tangent", [False, True], ids=["result", "tangent"])
def test_products(case: Norm, tangent: bool, vmapped: bool) -> None:
    """No product of two small arrays has the size of `x`: where `inv * scale` had, XLA
    compiled RMSNorm in a `vmap` to three kernels for an H200; now to one. Nor has any more
    of the result's than the square, that with `inv`, where `inv * scale` is not small that
    with `scale`, and where the shift is the mean of all that with `1 / n`."""
    layer, state = case.build(SHAPE[-1], **case.per_example if vmapped else {})
    f = ft.partial(call, layer, state)
    if vmapped:
        f = jax.vmap(f, axis_name="batch")
    # One example is a vector, where it can be.
    x = normal(0, SHAPE[1:] if vmapped and case.on_vectors else SHAPE)
    g = (lambda x: jax.jvp(f, (x,), (x,))) if tangent else f
    spread, products = {"broadcast_in_dim", "reshape", "convert_element_type"}, 0
    of_small: set[Any] = set()
    for equation in equations(jax.make_jaxpr(g)(x).jaxpr):
        (out, *_), name = equation.outvars, equation.primitive.name
        if getattr(out.aval, "size", 0) != x.size:
            continue
        # A number in the program is small; it cannot be hashed.
        small = [v.aval.size < x.size or v in of_small for v in equation.invars]
        if name in spread and all(small):
            of_small.add(out)
        elif name == "mul":
            products += 1
            assert not all(small), equation
    if not tangent:
        assert products == {"LayerNorm": 4, "RMSNorm": 3}.get(case.name, 2)


@over(*(case for case in NORMS if not case.stateful))
def test_equal_layers_are_traced_once(case):
    """So twenty-four of them, with their gradients, make a program for one and a line or
    two for each of the others."""
    layers = [case.build(**case.per_example)[0] for _ in range(24)]
    params, static = eqx.partition(layers, eqx.is_inexact_array)

    def loss(params, xs):
        def one(x):
            for layer in eqx.combine(params, static):
                x = x + layer(x)
            return x

        return jnp.sum(jnp.sin(jax.vmap(one)(xs)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    text = gradient.lower(params, normal(0, SHAPE)).as_text()
    assert 1 <= text.count("stablehlo.rsqrt") <= 8
    assert len(text.splitlines()) <= 1000


@all_norms
def test_a_second_call_outside_jit_compiles_nothing(case, caplog):
    """Of the same layer, batched and one example at a time, and of its equal."""
    layer, state = case.build(8)
    example, own = case.build(8, **case.per_example)
    mask = normal(1, SHAPE) < 1

    def calls(layer, state, x):
        step(layer, state, x)
        step(layer, state, x, mask=mask)
        step(layer, state, x, **case.evaluation)
        one = ft.partial(step, example, own)
        jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)

    calls(layer, state, normal(0, SHAPE))
    other = jax.tree.map(lambda a: 2 * a if eqx.is_inexact_array(a) else a, layer)
    x = normal(2, SHAPE)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        calls(other, state, x)
    assert "Compiling" not in caplog.text


@all_norms
def test_an_eager_call_computes_the_result_alone(case):
    """One program, with one output: a GPU makes one kernel of rows whose statistics are no
    output, and else five."""
    layer, state = case.build()
    f = ft.partial(call, layer, state, **case.evaluation)
    jaxpr = jax.make_jaxpr(f)(normal(0, SHAPE))
    (program,) = (e for e in jaxpr.eqns if e.params.get("name") == "compute")
    assert [v.aval.shape for v in program.outvars] == [SHAPE]
