"""Situations that people are in who use the layers: on their meshes, in their tools. Each
kind has a table, over all layers that it can happen to."""

import contextlib
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import (
    LAYERS,
    NORMS,
    WRAPPERS,
    all_layers,
    all_norms,
    call,
    clone,
    normal,
    over,
    randomize,
    reference,
    step,
)


SHAPE = 8, 6, 16
STATEFUL = [case for case in LAYERS if case.stateful]
(BATCH_NORM,) = (case for case in STATEFUL if case in NORMS)


def with_gradients(f):
    """The output as it is without differentiation, and with, which are two programs; and
    the gradients of the input and of all that is learned."""

    def of_f(layer, state, x, **kwargs):
        def loss(layer_and_x):
            layer, x = layer_and_x
            y = f(layer, state, x, **kwargs)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        (dlayer, dx), y = eqx.filter_grad(loss, has_aux=True)((layer, x))
        return f(layer, state, x, **kwargs), y, dx, dlayer

    return of_f


# Of a function of layer, state and input. The cache saves compiling what is wanted anew for
# each way of sharding.
WAYS = {
    "eager": lambda f: f,
    "jit of grad": functools.cache(lambda f: eqx.filter_jit(with_gradients(f))),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def assert_close(found, wanted, tolerance=1e-5):
    for one, other in zip(arrays(found), arrays(wanted), strict=True):
        one, other = (np.asarray(a).astype(np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def without_name(kwargs):
    return {key: value for key, value in kwargs.items() if key != "axis_name"}


def replaced(tree, field, value):
    return eqx.tree_at(lambda tree: getattr(tree, field), tree, value)


@contextlib.contextmanager
def raises(layer, match, request: Any = None, typed=None):
    """An error of the layer's own; of the argument `typed` jaxtyping complains first,
    where it checks."""
    error, match = ValueError, f"(?s)^{layer}: .*{match}"
    if typed and request.config.getoption("--jaxtyping-packages"):
        error, match = jaxtyping.TypeCheckError, f"typechecking parameter '{typed}'"
    with pytest.raises(error, match=match):
        yield


# Explicit meshes, without `jax.set_mesh`. `test_sharding` has the plain calls.


@functools.cache
def mesh():
    # Its axes are Explicit by default.
    return jax.make_mesh((4, 2), ("data", "model"))


def put(tree, *spec):
    def place(leaf):
        if not eqx.is_array(leaf):
            return leaf
        own = spec[max(0, len(spec) - leaf.ndim) :]
        fits = [
            axis if axis and n % mesh().shape[axis] == 0 else None
            for axis, n in zip(own, leaf.shape, strict=True)
        ]
        return jax.device_put(np.asarray(leaf), NamedSharding(mesh(), P(*fits)))

    return jax.tree.map(place, tree)


def assert_sharded(found, wanted):
    """The output, or both outputs and the gradient of the input."""
    for array in found[:3] if isinstance(found, tuple) else [found]:
        got = tuple(array.sharding.spec)
        assert (*got, *[None] * (array.ndim - len(got))) == wanted


PLACEMENTS = {
    "batch": ("data", None, None),
    "nothing": (None, None, None),
    "features": (None, None, "model"),
    "both": ("data", None, "model"),
}
CALLS = {
    "mask": {"mask": normal(1, SHAPE) > -0.5},
    "row mask": {"mask": normal(1, (SHAPE[0], 1, 1)) > -2},
    "affine": {"scale": normal(2, (16,)), "bias": normal(3, (16,))},
    "affine of each example": {"scale": normal(2, (8, 1, 16)), "bias": normal(3, SHAPE)},
}


@ways
@pytest.mark.parametrize("given", CALLS)
@pytest.mark.parametrize("placement", ["batch", "both"])
@all_norms
def test_call_on_an_explicit_mesh(case, placement, given, way):
    layer, state = case.build(16)
    layer, x, kwargs = randomize(layer), 3 * normal(0, SHAPE) + 1, CALLS[given]
    wanted = way(call)(layer, state, x, **kwargs)
    of_x = PLACEMENTS[placement]
    found = way(call)(
        put(layer, None), put(state, None), put(x, *of_x), **put(kwargs, *of_x)
    )
    assert_close(found, wanted)
    assert_sharded(found, of_x)


@ways
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_groups_on_sharded_features(num_groups, affine, way):
    """As many groups as shards, more, fewer, and a number that does not fit."""
    layer = en.GroupNorm(12, num_groups, use_scale=affine, use_bias=affine)
    x = 3 * normal(0, (8, 6, 12)) + 1
    of_x = PLACEMENTS["both"]
    wanted = way(call)(layer, None, x)
    found = way(call)(put(layer, "model"), None, put(x, *of_x))
    assert_close(found, wanted)
    assert_sharded(found, of_x)


def over_examples(layer, state, x):
    """One at a time, with its features last, where the layer allows for it."""
    return jax.vmap(lambda x: step(layer, state, x))(x)[0]


def over_named_examples(layer, state, x):
    one = lambda x: step(layer, state, x)  # noqa: E731
    return jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)[0]


@ways
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@all_layers
def test_vmap_on_an_explicit_mesh(case, placement, named, way):
    kwargs, of_x = without_name(case.per_example), PLACEMENTS[placement]
    if named:
        kwargs = {**kwargs, "axis_name": "batch"}
    if case not in NORMS:
        # A product with a weight says itself how it is sharded.
        kwargs, of_x = {}, (*of_x[:2], None)
    layer, state = case.build(16, **kwargs)
    layer, x = randomize(layer), 3 * normal(0, SHAPE) + 1
    f = way(over_named_examples if named else over_examples)
    wanted = f(layer, state, x)
    found = f(put(layer, None, None), put(state, None, None), put(x, *of_x))
    assert_close(found, wanted)
    assert_sharded(found, of_x)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_recalibration_on_an_explicit_mesh(placement, jit):
    layer, state = BATCH_NORM.build(16)
    forward = lambda layer, state, x: layer(x, state)  # noqa: E731
    forward = eqx.filter_jit(forward) if jit else forward
    batches = [normal(seed, SHAPE) + seed for seed in range(3)]
    wanted = en.recalibrate(layer, state, batches, forward)
    placed = [put(batch, *PLACEMENTS[placement]) for batch in batches]
    found = en.recalibrate(put(layer, None), put(state, None), placed, forward)
    assert_close(layer.running_stats(found), layer.running_stats(wanted))


# Symbolic sizes of `jax.export`.


SYMBOLS = {
    "nothing": {},
    "mask": {"mask": "b, s, 8"},
    "row mask": {"mask": "b, 1, 1"},
    "short mask": {"mask": "s, 1"},
    "affine": {"scale": "8", "bias": "8"},
    "affine of each example": {"scale": "b, 1, 8", "bias": "b, s, 8"},
    "all": {"mask": "b, s, 1", "scale": "1, s, 8", "bias": "b, 1, 8"},
}


def exported(f, x, kwargs):
    """What is exported for any sizes, at these."""
    symbols = {"x": "b, s, 8", **kwargs}
    scope = jax.export.SymbolicScope()
    sizes = {
        name: jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(shape, scope=scope),
            jnp.bool_ if name == "mask" else jnp.float32,
        )
        for name, shape in symbols.items()
    }
    run = lambda arrays: eqx.filter(f(**arrays), eqx.is_array)  # noqa: E731
    export = jax.export.export(jax.jit(lambda arrays: jax.tree.leaves(run(arrays))))(sizes)
    known = {"b": x.shape[0], "s": x.shape[1]}
    given: dict[str, Any] = {"x": x}
    for seed, (name, shape) in enumerate(kwargs.items()):
        concrete = tuple(known.get(n) or int(n) for n in shape.split(", "))
        array = normal(seed + 1, concrete)
        given[name] = array > -0.5 if name == "mask" else array
    return export.call(given), run(given)


@pytest.mark.parametrize(
    ("case", "given"),
    [(case, given) for case in NORMS for given in SYMBOLS]
    + [(case, "nothing") for case in WRAPPERS],
    ids=lambda value: getattr(value, "name", value),
)
def test_symbolic_sizes(case, given):
    layer, state = case.build(8)
    f = functools.partial(with_gradients(call), layer, state)
    found, wanted = exported(f, normal(0, (4, 6, 8)), SYMBOLS[given])
    assert_close(found, wanted)


@pytest.mark.parametrize("given", ["nothing", "mask", "affine of each example"])
@all_norms
def test_symbolic_sizes_under_vmap(case, given):
    """Over examples, without a name: JAX has no `axis_size` for a symbolic one."""
    layer, state = case.build(8, **without_name(case.per_example))

    def f(x, **kwargs):
        return jax.vmap(lambda x, kwargs: call(layer, state, x, **kwargs))(x, kwargs)

    found, wanted = exported(f, normal(0, (4, 6, 8)), SYMBOLS[given])
    assert_close(found, wanted)


# States that somebody cast along with the model.


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@over(*STATEFUL)
def test_state_in_half_precision(case, dtype, jit):
    layer, state = case.build(8)
    x = 3 * normal(0, (16, 8)) + 5
    _, state = step(layer, state, x)
    f = eqx.filter_jit(step) if jit else step
    half = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, state
    )
    match = f"needs a `state` in float32 or wider, .*{dtype.dtype}.*Cast the model alone"
    with raises(case.name, match):
        f(layer, half, x)
    y, kept = f(layer, half, x, **case.evaluation)
    wanted, _ = f(layer, state, x, **case.evaluation)
    assert_close(y, wanted, 0.05)
    for old, new in zip(jax.tree.leaves(half), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(old, new)


@over(*STATEFUL)
def test_model_in_half_precision(case):
    """The remedy: the model is cast, and the state moves on in float32."""
    layer, state = case.build(8)
    layer = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf,
        layer,
    )
    y, new = step(layer, state, normal(0, (16, 8), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    changed = [
        (old != leaf).any()
        for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
    ]
    assert any(changed)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(new))


# Flags that became arrays, and are traced.


# From a function of a flag, ways to have it traced.
TRACED = {
    "jit": lambda f: jax.jit(f)(True),
    "device_put": lambda f: eqx.filter_jit(f)(jax.device_put(True)),
    "scan": lambda f: jax.lax.scan(lambda x, _: (x, f(x)), jnp.asarray(True), length=2),
    "vmap": lambda f: jax.vmap(f)(jnp.asarray([True])),
}
# The layer, the flag, and whether it is given at the call.
FLAGS = [
    ("BatchNorm", "frozen", False),
    ("BatchNorm", "inference", False),
    ("BatchNorm", "use_running_average", True),
    ("SpectralNorm", "inference", False),
    ("SpectralNorm", "update_stats", True),
]


@pytest.mark.parametrize("way", TRACED)
@pytest.mark.parametrize(
    ("name", "flag", "at_call"), FLAGS, ids=[f"{row[0]}-{row[1]}" for row in FLAGS]
)
def test_traced_flags(name, flag, at_call, way, request):
    (case,) = (case for case in STATEFUL if case.name == name)
    layer, state = case.build(8)

    def f(value):
        if at_call:
            return call(layer, state, normal(0, (16, 8)), **{flag: value})
        return call(replaced(layer, flag, value), state, normal(0, (16, 8)))

    match = (
        f"`{flag}` must be True or False, got a traced array.*`jax.jit`.*"
        "`eqx.filter_jit` and `eqx.filter_shard`.*`eqx.partition"
    )
    with raises(name, match, request, typed=flag if at_call else None):
        TRACED[way](f)


@over(*STATEFUL)
def test_flags_that_are_arrays_but_have_a_value(case):
    """Outside of any transformation, nothing has to be said."""
    layer, state = case.build(8)
    x = normal(0, (16, 8))
    for inference in (False, True):
        layer = eqx.nn.inference_mode(layer, inference)
        placed = jax.device_put(layer, jax.devices()[0])
        assert eqx.is_array(placed.inference)
        (y, new), (wanted, kept) = step(placed, state, x), step(layer, state, x)
        assert_close((y, new), (wanted, kept))


# A batch of one position.


ONE = [
    ("a vector", {}, (1, 8), None),
    ("an image of one pixel", {}, (1, 1, 1, 8), None),
    ("one example of a vmap", {"axis_name": "batch"}, (1, 8), "batch"),
    (
        "groups of one member",
        {"axis_name": "batch", "axis_index_groups": [[0], [1]]},
        (2, 8),
        "batch",
    ),
]


def over_batch(layer, state, x, name, **kwargs):
    if name is None:
        return step(layer, state, x, **kwargs)
    one = lambda x, kwargs: step(layer, state, x, **kwargs)  # noqa: E731
    return jax.vmap(one, out_axes=(0, None), axis_name=name)(x, kwargs)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("kwargs", "shape", "name"), [row[1:] for row in ONE], ids=[row[0] for row in ONE]
)
def test_one_position(kwargs, shape, name, jit):
    layer, state = BATCH_NORM.build(8, **kwargs)
    f = eqx.filter_jit(over_batch) if jit else over_batch
    x = 3 * normal(0, shape) + 5
    with raises("BatchNorm", "needs more than one position for each mean"):
        f(layer, state, x, name)
    # A mask may leave that many or none, from batch to batch: the statistics stay.
    mask = jnp.ones((*shape[:-1], 1), bool)
    y, new = f(layer, state, x, name, mask=mask)
    assert np.all(y == 0)
    assert_close(new, state, 0)
    # Evaluation has no need of any batch.
    y, _ = f(eqx.nn.inference_mode(layer), state, x, name)
    assert_close(y, x / np.sqrt(1 + 1e-5))


def test_one_position_of_one_of_the_groups():
    """The group that has more says it all."""
    groups = [[0, 1], [2, 3]]
    layer, state = BATCH_NORM.build(
        8, axis_name="batch", axis_index_groups=groups, momentum=0.0
    )
    x = normal(0, (4, 8))
    mask = jnp.asarray([True, True, True, False])[:, None]
    _, new = over_batch(layer, state, x, "batch", mask=mask)
    stats = layer.running_stats(new)
    _, mean, var = reference(x[:2], (0,))
    assert_close((stats.mean, stats.var), (jnp.asarray(mean[0]), jnp.asarray(var[0])))


# Statistics over two axes of a mesh, with an input that is split along one of them.


def over_the_batch_too(case):
    """What makes a layer take its statistics over the batch as well."""
    if case.name == "BatchNorm":
        return {}
    return case.per_example or {"reduction_axes": (0, -1)}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("split", ["d", "m", None])
@all_norms
def test_axes_that_vary_in_part(case, split, masked):
    """As on one device, where the statistics are over the whole batch."""
    kwargs = {"mask": normal(1, (4, 6, 1)) > -0.5} if masked else {}
    x, weights = 3 * normal(0, (4, 6, 8)) + 1, normal(2, (4, 6, 8))
    alone, state = case.build(8, **over_the_batch_too(case))
    split_up, _ = case.build(8, **over_the_batch_too(case), axis_name=("d", "m"))
    alone, split_up = randomize(alone), randomize(split_up)
    devices = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)

    def on_one_device(x):
        return call(alone, state, x, **kwargs)

    def on_all(x):
        return jax.shard_map(
            lambda x, kwargs: call(split_up, state, x, **kwargs),
            mesh=devices,
            in_specs=(P(split), P(split)),
            out_specs=P(split),
        )(x, kwargs)

    def with_gradient(f):
        def loss(x):
            y = f(x)
            return jnp.sum(jnp.sin(y) * weights), y

        return jax.jit(lambda x: (f(x), jax.grad(loss, has_aux=True)(x)))

    assert_close(with_gradient(on_all)(x), with_gradient(on_one_device)(x), 3e-5)


# Floats of 8 bits and fewer.


TINY = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn]


def tiny_case(case, tiny, **kwargs):
    """A layer with an input, or a weight, of that dtype; the same with wider values."""
    layer, state = case.build(8, **kwargs)
    x = normal(0, (4, 6, 8))
    if case in NORMS:
        x = x.astype(tiny)
        return (layer, state, x), (layer, state, x.astype(jnp.float32))
    weight = layer.layer.weight.astype(tiny)
    place = lambda weight: eqx.tree_at(  # noqa: E731
        lambda layer: layer.layer.weight, layer, weight
    )
    return (place(weight), state, x), (place(weight.astype(jnp.float32)), state, x)


@ways
@pytest.mark.parametrize("dtype", TINY)
@all_layers
def test_tiny_floats(case, dtype, way):
    """As the same values in float32; gradients have the dtype of what they are of."""
    tiny, wide = tiny_case(case, dtype, dtype=jnp.float32)
    pairs = zip(arrays(way(call)(*tiny)), arrays(way(call)(*wide)), strict=True)
    for found, wanted in pairs:
        # One step of rounding, where the float32 numbers differ in their last digits.
        tolerance = jnp.finfo(dtype).eps if found.dtype == dtype else 1e-5
        assert_close(found, wanted.astype(found.dtype), float(tolerance))


@pytest.mark.parametrize("dtype", TINY)
@all_norms
def test_tiny_floats_under_a_mask(case, dtype):
    (layer, state, x), wide = tiny_case(case, dtype, dtype=jnp.float32)
    kwargs = CALLS["mask"]["mask"][:4, :, :8]
    assert_close(call(layer, state, x, mask=kwargs), call(*wide, mask=kwargs))


@pytest.mark.parametrize("dtype", TINY)
@all_layers
def test_tiny_floats_want_a_dtype(case, dtype):
    tiny, _ = tiny_case(case, dtype)
    match = f"needs a `dtype` for its result.*got .*{dtype.dtype}.*Give one, `dtype=jnp.bf"
    with raises(case.name, match):
        call(*tiny)


# Ways in that miss an error.


@over(*STATEFUL)
def test_input_by_keyword_without_a_state(case):
    layer: Any = case.build(8)[0]
    with raises(case.name, r"needs the model's `equinox.nn.State`.*got none.*make_with_st"):
        layer(x=normal(0, (16, 8)))


@pytest.mark.parametrize("donate", ["all", "all-except-first"])
def test_recalibration_with_donation(donate):
    layer, state = BATCH_NORM.build(8)

    @functools.partial(eqx.filter_jit, donate=donate)
    def forward(layer, state, x):
        return layer(x, state)

    batches = [normal(seed, (16, 8)) for seed in range(3)]
    match = r"`forward` must leave the model and the state.*donated.*`eqx.filter_jit\(forw"
    with raises("recalibrate", match):
        en.recalibrate(layer, clone(state), batches, forward)


# What a strict reviewer tried, with and without runtime checks of types.


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
def test_groups_of_a_vmapped_axis_on_an_explicit_mesh(is_set):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    x = np.asarray(normal(0, (8, 3, 4))) + np.arange(8, dtype=np.float32)[:, None, None]
    placed = jax.device_put(x, NamedSharding(mesh, P("d")))
    groups = [[0, 3, 4, 6], [1, 2, 5, 7]]

    def f(x):
        each = functools.partial(
            en.standardize, axes=0, axis_name="i", axis_index_groups=groups
        )
        return jax.vmap(each, axis_name="i")(x)

    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        y = jax.jit(f)(placed)
    assert y.sharding.spec[0] == "d"
    for group in groups:
        wanted, _, _ = reference(x[np.array(group)], (0, 1))
        np.testing.assert_allclose(np.asarray(y)[np.array(group)], wanted, atol=1e-5)


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_complex_data_without_epsilon(subtract_mean):
    x = np.array(normal(0, (6, 4), jnp.complex64))
    x[2] = 3 + 1j
    y = en.standardize(x, epsilon=0.0, subtract_mean=subtract_mean)
    wanted, _, _ = reference(x, (-1,), center=subtract_mean, epsilon=0.0)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_lists_are_arrays(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x: Any = [[1.0, 2.0, 4.0]] * 2
    scale: Any = [1.0, 2.0, 3.0]
    mask: Any = [True, True, False]
    bias: Any = tuple(scale)
    y = en.standardize(x, scale=scale, bias=bias, mask=mask)
    wanted, _, _ = reference(x, (-1,), scale=scale, bias=scale, mask=np.array(mask))
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    layer = en.LayerNorm(3)
    array = np.array(x, np.float32)
    np.testing.assert_allclose(layer(x, scale=scale), layer(array, scale=scale))


@pytest.mark.parametrize("groups", [3, [[0, 1.5], [2, 3]], [[0.9, 1.2]], [0, 1]], ids=str)
def test_groups_are_lists_of_integers(groups, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="must be a list of groups, each a list of int"):
        en.LayerNorm(4, axis_name="i", axis_index_groups=groups)


def test_epsilon_is_known_before_tracing(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    epsilon: Any
    for epsilon in (10**400, None):
        with pytest.raises(ValueError, match="a Python number, known before tracing"):
            en.standardize(jnp.ones(4), epsilon=epsilon)
    with pytest.raises(ValueError, match="a Python number, known before tracing"):
        jax.jit(lambda epsilon: en.standardize(jnp.ones(4), epsilon=epsilon))(1e-6)


def test_a_second_call_in_a_vmap_on_an_explicit_mesh_compiles_nothing(caplog):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(normal(0, (8, 3)), NamedSharding(mesh, P("d")))

    def f():
        each = functools.partial(en.standardize, axes=(), axis_name="i")
        return jax.vmap(each, axis_name="i")(x)

    f()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        f()
    assert "Compiling" not in caplog.text
