"""What the layers become: primitives, what is kept and sent, how often they are traced; and
how exact they are, in every way they are called."""

import functools as ft
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import (
    NORMS,
    Norm,
    all_norms,
    bytes_kept,
    call,
    count,
    normal,
    over,
    reference,
    step,
)


forms = pytest.mark.parametrize("fast", [True, False], ids=["fast", "exact"])


def mesh(devices: int = 8) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))


# `f(arrays, examples)`, each part of the examples on a device of its own, or one by one.


def sharded(f: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jax.shard_map(f, mesh=mesh(), **specs, **kwargs)


def vmapped(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(f, in_axes=(None, 0), axis_name="a")


@dataclass(frozen=True)
class Way:
    """How examples reach a layer: under these names, through these transformations."""

    names: tuple[str, ...]
    transform: Callable[..., Any]
    # Whether a layer gets several examples at once, and whether they lie on devices.
    batched: bool = True
    placed: bool = False


WAYS = {
    "batch": Way((), lambda f: f),
    "vmap": Way(("a",), vmapped, batched=False),
    "pmap": Way(
        ("d",),
        lambda f: jax.pmap(f, in_axes=(None, 0), axis_name="d"),
        batched=False,
    ),
    "shard_map": Way(("d",), sharded),
    "shard_map, unchecked": Way(("d",), lambda f: sharded(f, check_vma=False)),
    "vmap in shard_map": Way(("d", "a"), lambda f: sharded(vmapped(f)), batched=False),
    "jit over shards": Way((), lambda f: f, placed=True),
}


# Primitives.


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
    """None but JAX's, and no branch; one for a platform is gone before the program runs."""
    found = list(equations(jax.make_jaxpr(f)(*args).jaxpr))
    assert "rsqrt" in {equation.primitive.name for equation in found}
    for equation in found:
        assert equation.primitive in primitives_of_jax(), equation
        for_platforms = equation.params.get("branches_platforms") is not None
        assert equation.primitive.name != "cond" or for_platforms, equation


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


# Batch, space and features.
SHAPE = (4, 8, 8)


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
    of the result's than the square, that with `inv` and, where `inv * scale` is not small,
    that with `scale`."""
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
        assert products == (3 if case.name in ("LayerNorm", "RMSNorm") else 2)


# What is kept for the backward pass. Only shapes are computed with, so they may be large.

LARGE = (8, 4096, 1024)
dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)


@all_norms
@dtypes
@pytest.mark.parametrize("way", ["batch", "shard_map", "shard_map, unchecked"])
def test_keeps_the_input_of_each_layer(case, dtype, way):
    """Of one, and of each of four, one after the other: once, and little more."""
    x = jax.ShapeDtypeStruct(LARGE, dtype)
    size = x.size * x.dtype.itemsize
    kwargs: dict[str, Any] = {"dtype": dtype}
    if case.stateful:
        kwargs["axis_name"] = WAYS[way].names
    for number in (1, 4):
        built = [case.build(LARGE[-1], **kwargs) for _ in range(number)]
        arrays, static = eqx.partition([layer for layer, _ in built], eqx.is_array)

        def local(arrays, x, static=static, built=built):
            layers = eqx.combine(arrays, static)
            for layer, (_, state) in zip(layers, built, strict=True):
                x = x + call(layer, state, x)
            return x

        kept = bytes_kept(WAYS[way].transform(local), arrays, x)
        assert number * size <= kept <= 1.02 * number * size, number


# What the devices tell each other.

OTHERS = (
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
    "ragged-all-to-all",
)
# Statistics over examples and rows; of LayerNorm over features as well.
KINDS = {
    "BatchNorm": lambda ndim, **kwargs: eqx.nn.make_with_state(en.BatchNorm)(
        16, momentum=0.0, **kwargs
    ),
    "LayerNorm": lambda ndim, **kwargs: (
        en.LayerNorm(16, reduction_axes=tuple(range(ndim)), **kwargs),
        None,
    ),
    "RMSNorm": lambda ndim, **kwargs: (
        en.RMSNorm(16, reduction_axes=tuple(range(ndim)), **kwargs),
        None,
    ),
}
all_ways = pytest.mark.parametrize("way", WAYS)


def in_a_way(kind: str, way: str, **kwargs: Any) -> tuple[Any, Any]:
    """A layer's arrays, and a function of them, and of examples and their mask.

    It returns the output and, of BatchNorm, mean and variance of the batch: one row of them
    for each example or device.
    """
    names, batched = WAYS[way].names, WAYS[way].batched
    layer, state = KINDS[kind](3 if batched else 2, axis_name=names, **kwargs)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def f(arrays, examples):
        x, mask = examples
        layer = eqx.combine(arrays, static)
        y, new = step(layer, state, x, mask=mask)
        if new is None:
            return y, None
        stats = layer.running_stats(new)
        lead = (lambda a: a[None]) if batched else (lambda a: a)
        return y, jax.tree.map(lead, (stats.mean, stats.var))

    return arrays, WAYS[way].transform(f)


def place(way: str, examples: Any) -> Any:
    """Where they lie in that way."""
    sharding = NamedSharding(mesh(), P("d"))
    return jax.device_put(examples, sharding) if WAYS[way].placed else examples


@pytest.mark.parametrize("how", ["fast", "exact", "mask"])
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("BatchNorm", "shard_map"),
        ("BatchNorm", "pmap"),
        ("BatchNorm", "jit over shards"),
        ("LayerNorm", "shard_map"),
        ("RMSNorm", "shard_map"),
    ],
)
def test_all_reduces(kind, way, how):
    """Two for the statistics and one for the gradients, and nothing else whatever the data:
    no other collective, no conditional."""
    arrays, f = in_a_way(kind, way, use_fast_variance=how != "exact")
    x = normal(0, (8, 6, 16))
    mask = normal(1, x.shape) < 1 if how == "mask" else None
    x, mask = place(way, (x, mask))

    def forward(arrays, x):
        return f(arrays, (x, mask))

    def backward(arrays, x):
        def loss(arrays, x):
            y, stats = forward(arrays, x)
            return jnp.sum(y * jax.lax.stop_gradient(jnp.sin(x))), (y, stats)

        # Nobody asks for the value of the loss, so the compiler leaves its sum out.
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, x)

    # Without a mean there is one of them for the statistics.
    number = 1 if kind == "RMSNorm" else 2
    for g, wanted in ((forward, number), (backward, number + 1)):
        check_primitives(g, arrays, x)
        text = jax.jit(g).lower(arrays, x).compile().as_text()
        assert text is not None
        assert count(text) == wanted, g
        assert not any(count(text, op) for op in (*OTHERS, "conditional")), g


# How often it is traced and compiled.


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


# Accuracy.

# Before jax 0.10 XLA's code for a CPU adds columns up one row after the other.
SLOPE = 3e-7 if jax.__version_info__ >= (0, 10) else 5e-7
MEANS = (0.0, 10.0, 1e3, 1e4, 1e5)


def bound(mean: float) -> float:
    """Of the error, for data of this mean and deviation one in single precision."""
    return SLOPE * mean + 2e-5


@forms
@pytest.mark.parametrize("training", [False, True], ids=["output", "under vjp"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@all_norms
def test_accuracy_of_a_batch(case, masked, training, fast):
    """Where a backward pass is to follow, the statistics may take another form."""
    layer, state = case.build(16, use_fast_variance=fast)
    mask = jnp.asarray(np.random.default_rng(1).random((16, 24, 16)) < 0.6)

    @jax.jit
    def f(x):
        def apply(x):
            return call(layer, state, x, mask=mask if masked else None)

        return jax.vjp(apply, x)[0] if training else apply(x)

    for mean in MEANS:
        x = mean + normal(0, mask.shape)
        wanted, _, _ = reference(
            x,
            case.reduction_axes(3),
            **case.formula,
            epsilon=layer.epsilon,
            mask=mask if masked else None,
        )
        assert np.abs(f(x) - wanted).max() <= bound(mean), mean


@pytest.mark.parametrize("training", [False, True], ids=["output", "under vjp"])
@pytest.mark.parametrize(("axes", "deviation"), [(-1, 1e16), ((0, 1), 1e15)])
def test_large_numbers(axes, deviation, training):
    """Their squares do not overflow, but that of the sum of their deviations does."""
    x = deviation * (3 + normal(0, (512, 4096)))
    x = x.at[0, 2048:2056].set(0).at[256, 2048:2056].set(0)
    wanted, _, _ = reference(x, axes, epsilon=1e-6)

    @jax.jit
    def f(x):
        apply = ft.partial(en.standardize, axes=axes)
        return jax.vjp(apply, x)[0] if training else apply(x)

    assert np.abs(f(x) - wanted).max() <= 1e-4


@pytest.mark.parametrize("vmapped", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_outliers_among_the_features(kind, vmapped):
    """In a large model one feature may be a thousand deviations away from the others, in
    all examples: in training that one may be among those that the shift is made of."""
    (case,) = (case for case in NORMS if case.name == kind)
    layer, state = case.build(1024)
    norm = ft.partial(call, layer, state)
    norm = jax.vmap(norm) if vmapped else norm
    f = jax.jit(lambda x: jax.vjp(norm, x)[0])
    for at in range(0, 1024, 31):
        x = normal(0, (64, 1024)).at[:, at].add(1000.0)
        wanted, _, _ = reference(x, (-1,), **case.formula, epsilon=layer.epsilon)
        assert np.abs(f(x) / wanted - 1)[:, at].max() <= 5e-6, at
        others = np.arange(1024) != at
        assert np.abs(f(x) - wanted)[:, others].max() <= 5e-7, at


@forms
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@all_ways
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm"])
def test_accuracy_in_every_way(kind, way, masked, fast):
    """From the first batch on, that is to say with nothing known of the mean before; and
    where devices differ in what they count and in their means."""
    arrays, f = in_a_way(kind, way, use_fast_variance=fast)
    shape = (8, 24, 16) if way == "pmap" else (16, 24, 16)
    rng = np.random.default_rng(2)
    share = rng.uniform(0.2, 1.0, (shape[0], 1, 1))
    mask = rng.random(shape) < share if masked else None
    data = rng.standard_normal(shape) + rng.uniform(-0.5, 0.5, (shape[0], 1, 1))
    axes = (0, 1) if kind == "BatchNorm" else (0, 1, 2)
    epsilon = 1e-5 if kind == "BatchNorm" else 1e-6
    f = jax.jit(f)
    for mean in MEANS:
        x = np.float32(mean + data)
        y, stats = f(arrays, place(way, (x, mask)))
        wanted = reference(x, axes, epsilon=epsilon, mask=mask)
        assert np.abs(y - wanted[0]).max() <= bound(mean), mean
        if stats is not None:
            # All devices, and all members, have the same.
            of_mean, of_var = (np.asarray(a).reshape(-1, 16) for a in stats)
            exact_mean, exact_var = (a.reshape(1, 16) for a in wanted[1:])
            assert np.abs(of_mean - exact_mean).max() <= bound(mean), mean
            assert np.abs(of_var / exact_var - 1).max() <= bound(mean), mean
