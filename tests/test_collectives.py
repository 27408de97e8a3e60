"""Statistics over named axes, in every way an axis gets its name.

One problem, in five dimensions, is computed plainly on one device and in many nests of
mapped functions:

- `o`: independent problems, each with a layer and a state of its own;
- `a`, `b`: what the statistics are shared over. BatchNorm has examples there, the other
  layers features;
- `r`: rows, examples too;
- `f`: features.

A way is a nest of levels, the outermost first. Each maps some of `o`, `a` and `b`; those of
`a` and `b` that a level maps are the layer's `axis_name`, what no level maps is left to
the layer as a block.
"""

import functools as ft
import itertools
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import eqx_norms as en

from .helpers import (
    NORMS,
    Norm,
    all_norms,
    assert_close,
    bytes_kept,
    call,
    clone,
    every,
    float64,
    make_mesh,
    normal,
    plain,
    randomize,
    step,
)


SIZES = {"o": 2, "a": 4, "b": 2, "r": 3, "f": 5}
X = "oabrf"
GROUPS = [[0, 3], [2, 1]]
EPSILON = 1e-3
MOMENTUM = 0.8


class Kind:
    """A layer of the table, and the dimensions of scale and bias, and those that the
    statistics are over."""

    def __init__(self, case: Norm):
        self.make, self.center, self.has_bias = case.make, case.center, case.has_bias
        self.params, self.over = ("of", "abr") if case.stateful else ("oabf", "abf")


KINDS = {case.name: Kind(case) for case in NORMS if case.on_vectors}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def kinds_and(*tables):
    """Rows for BatchNorm; one in three, in turn, for the other two too, which take one way
    in the code."""
    rows = [row for table in tables for row in table]
    others = itertools.cycle(("LayerNorm", "RMSNorm"))
    return [("BatchNorm", *row) for row in rows] + [
        (other, *row) for other, row in zip(others, rows[::3], strict=False)
    ]


@dataclass(frozen=True)
class Level:
    """One mapped function: `vmap`, `pmap`, `shard` or `unchecked` (`check_vma=False`)."""

    how: str
    dims: str


Way = tuple[Level, ...]


def way(text: str) -> Way:
    return tuple(Level(*part.split(":")) for part in text.split())


@ft.cache
def mesh(dims):
    return make_mesh(AxisType.Auto, **{d: SIZES[d] for d in dims})


def without(label, dims):
    return "".join(d for d in label if d not in dims)


def mapped(f, levels, ins, outs):
    """`f` inside the levels.

    `ins` and `outs` are the dimensions of the arguments and results, outside all levels.
    A result marked with `+` is a part of a sum over each dimension that it lacks; without,
    it is the same all along that dimension.
    """
    if not levels:
        return f
    level, dims = levels[0], levels[0].dims
    inner_ins = [without(label, dims) for label in ins]
    inner_outs = [without(label, dims) for label in outs]
    inside = mapped(f, levels[1:], inner_ins, inner_outs)
    parts = [label.endswith("+") and set(dims) - set(label) for label in outs]

    if level.how in ("vmap", "pmap"):
        in_axes = tuple(label.index(dims) if dims in label else None for label in ins)
        out_axes = tuple(
            label.index(dims) if dims in label else (0 if part else None)
            for label, part in zip(outs, parts, strict=True)
        )
        transform = eqx.filter_vmap if level.how == "vmap" else eqx.filter_pmap
        run = transform(inside, in_axes=in_axes, out_axes=out_axes, axis_name=dims)

        def summed(*args):
            results = run(*args)
            return tuple(
                jax.tree.map(lambda leaf: jnp.sum(leaf, 0), result) if part else result
                for result, part in zip(results, parts, strict=True)
            )

        return summed

    def spec(label):
        label = label.rstrip("+")
        return PartitionSpec(*(d if d in dims else None for d in label))

    def squeeze(label, tree):
        axes = tuple(i for i, d in enumerate(label) if d in dims)
        return jax.tree.map(lambda leaf: jnp.squeeze(leaf, axes), tree)

    def expand(label, tree):
        axes = tuple(i for i, d in enumerate(label) if d in dims)
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axes), tree)

    def block(*args):
        results = inside(*map(squeeze, ins, args))
        if level.how == "unchecked":
            # With the checks, JAX has already added up the gradients of what is replicated.
            results = tuple(
                lax.psum(result, tuple(without(dims, label))) if part else result
                for result, label, part in zip(results, outs, parts, strict=True)
            )
        return tuple(map(expand, outs, results))

    return jax.shard_map(
        block,
        mesh=mesh(dims),
        in_specs=tuple(map(spec, ins)),
        out_specs=tuple(map(spec, outs)),
        check_vma=level.how == "shard",
    )


@ft.cache
def data(masked=None):
    """Input, mask, and the weights of a loss.

    `masked` is `None`, "unequal" (along `a`, one with nothing to count), "one group" (of
    the two nothing counts in the other) or "nothing".
    """
    rng = np.random.default_rng(0)
    shape = tuple(SIZES[d] for d in X)
    x = rng.normal(1.0, 2.0, shape) + rng.normal(0.0, 3.0, (*shape[:2], 1, 1, 1))
    mask = None
    if masked is not None:
        mask = np.zeros(shape, bool)
        if masked == "one group":
            mask[:, GROUPS[0]] = True
        if masked == "unequal":
            mask = rng.random(shape) < 0.6
            # Both groups count something everywhere.
            mask[:, :2, 0, 0] = True
            mask[:, 0] = True
            mask[:, 2] = False
        # Whatever stands where the mask is `False`.
        x = np.where(mask, x, np.where(rng.random(shape) < 0.5, 4 * x, np.nan))
    return x, mask, rng.normal(size=shape)


@ft.cache
def parameters(kind):
    rng = np.random.default_rng(1)
    shape = tuple(SIZES[d] for d in KINDS[kind].params)
    scale, bias = rng.normal(1.0, 0.5, shape), rng.normal(size=shape)
    return (scale, bias) if KINDS[kind].has_bias else (scale,)


@ft.cache
def old_stats():
    rng = np.random.default_rng(2)
    shape = SIZES["o"], SIZES["f"]
    return rng.normal(size=shape), rng.uniform(0.5, 2.0, shape), np.full(shape, 7)


@ft.cache
def expected(kind, grouped, masked):
    """Output, running statistics, and gradients of parameters and input, by the textbook.

    The loss is `sum(sin(y) * weights)`.
    """
    k = KINDS[kind]
    axes = tuple(X.index(d) for d in k.over)
    lay = tuple(i for i, d in enumerate(X) if d not in k.params)
    scale, bias = (*(np.expand_dims(p, lay) for p in parameters(kind)), 0.0)[:2]
    x, mask, weights = data(masked)
    mask = np.ones(x.shape, bool) if mask is None else mask
    finite = np.isfinite(x)
    x = np.where(finite, x, 0)
    z, y, dy, dx = (np.zeros_like(x) for _ in range(4))
    counts, means, variances = [], [], []
    for group in GROUPS if grouped else [[*range(SIZES["a"])]]:
        at = np.s_[:, np.array(group)]
        own = lambda p, at=at: np.broadcast_to(p, x.shape)[at]  # noqa: E731

        def total(values):
            return np.sum(values, axes, keepdims=True)

        n = np.maximum(total(mask[at]), 1)
        mean = total(np.where(mask[at], x[at], 0)) / n * k.center
        d = x[at] - mean
        var = total(np.where(mask[at], d, 0) ** 2) / n
        inverse = 1 / np.sqrt(var + EPSILON)
        z[at] = d * inverse
        y[at] = z[at] * own(scale) + own(bias)
        dy[at] = np.cos(y[at]) * weights[at]
        dz = dy[at] * own(scale)
        dmean = -total(dz * inverse) * k.center
        dvar = -total(dz * z[at] * inverse**2) / 2
        dx[at] = np.where(finite[at], dz * inverse, 0)
        dx[at] += np.where(mask[at], (dmean + 2 * d * dvar) / n, 0)
        counts.append(np.squeeze(total(mask[at]), axes))
        means.append(np.squeeze(mean, axes))
        variances.append(np.squeeze(var, axes))
    dparams = (np.sum(dy * z, lay), np.sum(dy, lay))[: 1 + k.has_bias]
    if kind != "BatchNorm":
        return y, None, dparams, dx
    old_mean, old_var, old_count = old_stats()
    if not np.any(counts):
        return y, old_stats(), dparams, dx
    share = np.stack(counts) / sum(counts)
    stats = (
        MOMENTUM * old_mean + (1 - MOMENTUM) * np.sum(share * np.stack(means), 0),
        MOMENTUM * old_var + (1 - MOMENTUM) * np.sum(share * np.stack(variances), 0),
        old_count + 1,
    )
    return y, stats, dparams, dx


def single(tree):
    """In single precision, as the layers get it."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else None), tree
    )


def build(kind, block, **kwargs):
    """The layer for blocks of these dimensions, and its state, without old statistics."""
    k = KINDS[kind]
    kwargs = {"epsilon": EPSILON, **kwargs}
    if kind == "BatchNorm":
        make = eqx.nn.make_with_state(en.BatchNorm)
        return make(SIZES["f"], momentum=MOMENTUM, **kwargs)
    axes = tuple(i - len(block) for i, d in enumerate(block) if d in k.over)
    sizes = tuple(SIZES[d] for d in block if d in k.over)
    return k.make(sizes, reduction_axes=axes, feature_axes=axes, **kwargs), None


def actual(arrays, kind, levels, grouped, *, depth=0, closed=False, context=None, **kwargs):
    """What `expected` gives, from the layer inside the levels, with the derivative taken
    inside the first `depth` of them.

    `arrays` are those of `data`, `parameters` and `old_stats`. With `closed` the state is
    closed over. `context` wraps the layer, and what is differentiated.
    """
    k = KINDS[kind]
    dims = "".join(level.dims for level in levels)
    names = tuple(without(dims, "o"))
    alone = "o" not in dims
    fit = (lambda label: without(label, "o")) if alone else (lambda label: label)
    layer, state = build(
        kind,
        without(fit(X), dims),
        axis_name=names[0] if len(names) == 1 else names,
        axis_index_groups=GROUPS if grouped else None,
        **kwargs,
    )
    if alone:
        arrays = jax.tree.map(lambda a: a[0], arrays)
    (x, mask, weights), params, stats = arrays
    if state is not None:
        state = jax.tree.unflatten(jax.tree.structure(state), stats)
    outside = state
    wrap = context or (lambda f: f)

    def apply(params, x, mask, state):
        own = eqx.tree_at(lambda m: (m.scale, m.bias)[: 1 + k.has_bias], layer, params)
        if outside is None:
            return own(x, mask=mask), None
        return own(x, clone(outside if closed else state), mask=mask)

    label, of_params, of_state = fit(X), fit(k.params), fit("of")
    outer, inner = levels[:depth], levels[depth:]
    took = "".join(level.dims for level in outer)
    shared = mapped(
        wrap(apply),
        inner,
        [without(d, took) for d in (of_params, label, label, of_state)],
        [without(d, took) for d in (label, of_state)],
    )

    def value_and_grad(params, x, mask, weights, state):
        def loss(params, x):
            y, new = wrap(shared)(params, x, mask, state)
            return jnp.sum(jnp.sin(y) * weights), (y, new)

        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, (y, new)), grads = both(params, x)
        return y, new, *grads

    run = mapped(
        value_and_grad,
        outer,
        [of_params, label, label, label, of_state],
        [label, of_state, of_params + "+", label],
    )
    y, new, dparams, dx = run(params, x, mask, weights, None if closed else state)
    out = (y, None if state is None else tuple(jax.tree.leaves(new)), dparams, dx)
    return jax.tree.map(lambda a: a[None], out) if alone else out


def both(kind, levels, grouped, *, masked=None, jit=jax.jit, **kwargs):
    arrays = single((data(masked), parameters(kind), old_stats()))
    found = jit(lambda arrays: actual(arrays, kind, way(levels), grouped, **kwargs))(arrays)
    wanted = expected(kind, grouped, masked)
    if "o" not in levels:
        wanted = jax.tree.map(lambda a: a[:1], wanted)
    return found, wanted


def close(found, wanted, name):
    """Nothing where a layer has no statistics."""
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert_close(found, wanted, 5e-5, same_dtype=False, what=name)


def check(kind, levels, grouped, **kwargs):
    found, wanted = both(kind, levels, grouped, **kwargs)
    names = ("output", "statistics", "gradient of parameters", "gradient of input")
    for f, w, name in zip(found, wanted, names, strict=True):
        close(f, w, name)


# The ways, and the depths at which the derivative is taken: 0 is outside all levels, and
# `vmap:a` at 1 is `vmap(grad(f), axis_name="a")`.
NO_GROUPS = {
    "vmap:a": (0, 1),
    "pmap:a": (0, 1),
    "pmap:a vmap:b": (0, 2),
    "shard:a": (0, 1),
    "unchecked:a": (0, 1),
    "shard:a vmap:b": (0, 1, 2),
    "unchecked:a vmap:b": (0, 2),
    # A mesh with two axes: names of both, names of one.
    "shard:ab": (0,),
    "unchecked:ab": (0,),
    "shard:oa": (0, 1),
    # An ensemble: a `vmap` that the layer knows nothing of.
    "vmap:o vmap:a": (0,),
    "vmap:a vmap:o": (0,),
    "vmap:o shard:a": (0,),
    "shard:a vmap:o": (0,),
}
# Groups are along one name.
IN_GROUPS = {
    "vmap:a": (0, 1),
    "pmap:a": (0, 1),
    "pmap:o vmap:a": (0, 2),
    "shard:a": (0, 1),
    "unchecked:a": (0, 1),
    "shard:o vmap:a": (0, 2),
    "unchecked:o vmap:a": (0,),
    "shard:oa": (0,),
    "vmap:o vmap:a": (0,),
    "vmap:a vmap:o": (0,),
    "vmap:o shard:a": (0,),
    "shard:a vmap:o": (0,),
    "pmap:a vmap:o": (0,),
}


@pytest.mark.parametrize(
    ("kind", "levels", "grouped", "depth"),
    kinds_and(
        [
            (levels, grouped, depth)
            for grouped, table in ((False, NO_GROUPS), (True, IN_GROUPS))
            for levels, depths in table.items()
            for depth in depths
        ]
    ),
)
def test_equals_one_device(kind, levels, grouped, depth):
    check(kind, levels, grouped, depth=depth)


def scanned(f):
    """Two steps: the output of the second, and the state after the first."""

    def run(*args):
        def step(state, _):
            y, new = f(*args[:-1], state)
            return new, (y, new)

        _, (y, new) = lax.scan(step, args[-1], None, length=2)
        return y[1], jax.tree.map(lambda leaf: leaf[0], new)

    return run


CONTEXTS = {
    "filter_jit": eqx.filter_jit,
    "scan": scanned,
    "filter_checkpoint": eqx.filter_checkpoint,
}


@pytest.mark.parametrize(
    ("kind", "levels", "grouped", "context"),
    kinds_and(
        [("shard:a vmap:b", False, context) for context in CONTEXTS],
        [("shard:o vmap:a", True, context) for context in CONTEXTS],
    ),
)
def test_derivative_outside_a_context(kind, levels, grouped, context):
    # Both around the layer and around what is mapped.
    check(kind, levels, grouped, context=CONTEXTS[context])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("grouped", [False, True], ids=["no groups", "groups"])
def test_derivative_outside_a_context_in_vmap(grouped, context):
    check("BatchNorm", "vmap:a", grouped, context=CONTEXTS[context])


def test_without_jit():
    check("BatchNorm", "vmap:a", False, jit=lambda f: f)


MASKED = [
    ("vmap:a", False),
    ("pmap:a", False),
    ("unchecked:a", False),
    ("shard:a vmap:b", False),
    ("vmap:a", True),
    ("pmap:a", True),
    ("shard:a", True),
]


@pytest.mark.parametrize(("kind", "levels", "grouped"), kinds_and(MASKED))
def test_unequal_masks(kind, levels, grouped):
    check(kind, levels, grouped, masked="unequal")


@pytest.mark.parametrize("levels", ["vmap:a", "shard:a"])
@all_kinds
def test_nothing_to_count(kind, levels):
    found, (_, stats, _, _) = both(kind, levels, False, masked="nothing")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    close(found[1], stats, "statistics")


@pytest.mark.parametrize("levels", ["vmap:a", "shard:a"])
@all_kinds
def test_nothing_to_count_in_one_group(kind, levels):
    found, wanted = both(kind, levels, True, masked="one group")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    counted = np.array(GROUPS[0])
    close(found[0][:, counted], wanted[0][:, counted], "output")
    close(found[1], wanted[1], "statistics")
    close(found[3][:, counted], wanted[3][:, counted], "gradient of input")


CLOSED = [
    ("vmap:a", False),
    ("pmap:a", False),
    ("shard:a", False),
    ("unchecked:a", False),
    ("shard:a vmap:b", False),
    ("vmap:a", True),
    ("pmap:a", True),
    ("shard:a", True),
    ("unchecked:a", True),
]


@pytest.mark.parametrize(("levels", "grouped"), CLOSED)
def test_state_closed_over(levels, grouped):
    check("BatchNorm", levels, grouped, closed=True)


@pytest.mark.parametrize(
    ("levels", "grouped"), [("shard:a vmap:b", False), ("shard:a", True)]
)
@all_kinds
def test_centred_first(kind, levels, grouped):
    check(kind, levels, grouped, use_fast_variance=False)


@pytest.mark.parametrize("grouped", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("levels", ["vmap:a", "pmap:a", "shard:a", "unchecked:a"])
def test_bad_batch_on_one_device(levels, grouped):
    x = data()[0][0].copy()
    x[2, 1, 0, 3] = np.nan
    groups = GROUPS if grouped else None
    layer, state = build("BatchNorm", "brf", axis_name="a", axis_index_groups=groups)
    stats = [a[0] for a in old_stats()]
    state = jax.tree.unflatten(jax.tree.structure(state), single(stats))
    # What each device has, laid side by side.
    run = mapped(
        lambda x, s: layer(x, clone(s)), way(levels), ["abrf", "f"], ["abrf", "af"]
    )
    _, new = jax.jit(run)(single(x), state)
    wanted = expected("BatchNorm", grouped, None)[1]
    assert wanted is not None
    for found, old, good in zip(jax.tree.leaves(new), stats, wanted, strict=True):
        good = np.where(np.arange(SIZES["f"]) == 3, old, good[0])
        np.testing.assert_allclose(found[0], good, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found, np.broadcast_to(found[0], found.shape))


# What is the same for all members of a `vmap`, and what is not: input and mask.
SAME = [(False, None), (False, False), (False, True), (True, False)]


@pytest.mark.parametrize(("own_x", "own_mask"), SAME)
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm"])
def test_the_same_for_all_members(kind, own_x, own_mask):
    """As if each had a copy: output, running statistics and gradient."""
    members, shape = 4, (6, 5)
    axes = (0, 1) if kind == "BatchNorm" else (0, 1, 2)
    with float64():
        if kind == "BatchNorm":
            layer, state = eqx.nn.make_with_state(en.BatchNorm)(
                5,
                axis_name="a",
                momentum=0.0,
                use_unbiased_variance=True,
                param_dtype=jnp.float64,
            )
        else:
            layer, state = en.LayerNorm(5, reduction_axes=(0, 1), axis_name="a"), None

        def stack(own):
            return (members, *shape) if own else shape

        x = 2 + normal(0, stack(own_x), jnp.float64)
        weights = normal(1, (members, *shape), jnp.float64)
        mask = None
        if own_mask is not None:
            mask = np.random.default_rng(0).random(stack(own_mask)) < 0.6
            mask[..., :2, :] = True
            mask = jnp.asarray(mask)

        def library(x):
            return eqx.filter_vmap(
                lambda x, mask: step(layer, state, x, mask=mask),
                in_axes=(0 if own_x else None, 0 if own_mask else None),
                out_axes=(0, None),
                axis_name="a",
                axis_size=members,
            )(x, mask)

        def copies(array):
            return jnp.broadcast_to(array, weights.shape)

        def expected(x):
            counted = True if mask is None else copies(mask)
            return plain(copies(x), axes, epsilon=layer.epsilon, mask=counted), None

        def value_and_grad(f):
            def loss(x):
                y, new = f(x)
                return jnp.sum(jnp.sin(y) * weights), (y, new)

            return jax.jit(jax.grad(loss, has_aux=True))(x)

        dx, (y, new) = value_and_grad(library)
        wanted_dx, (wanted, _) = value_and_grad(expected)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose(dx, wanted_dx, rtol=0, atol=1e-12)
        if isinstance(layer, en.BatchNorm):
            stats = layer.running_stats(new)
            data = np.ma.array(copies(x), mask=False if mask is None else ~copies(mask))
            np.testing.assert_allclose(stats.mean, data.mean((0, 1)), rtol=1e-12)
            np.testing.assert_allclose(stats.var, data.var((0, 1), ddof=1), rtol=1e-12)


# What is kept for the backward pass.


@pytest.mark.parametrize(("kind", "levels", "grouped"), kinds_and(CLOSED))
def test_keeps_the_input_alone(kind, levels, grouped):
    """Through all that maps: the input as it is, in its own dtype, and little more."""
    sizes = {**SIZES, "r": 4096, "f": 2048}
    dims = "".join(level.dims for level in way(levels))
    kwargs = {
        "axis_name": tuple(dims),
        "axis_index_groups": GROUPS if grouped else None,
        "dtype": jnp.bfloat16,
    }
    state = None
    if kind == "BatchNorm":
        layer, state = eqx.nn.make_with_state(en.BatchNorm)(2048, **kwargs)
    else:
        layer = KINDS[kind].make(2048, reduction_axes=-1, **kwargs)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    run = mapped(
        lambda params, x, mask: (call(eqx.combine(params, static), state, x, mask=mask),),
        way(levels),
        ["f", "abrf", "abrf"],
        ["abrf"],
    )
    x = jax.ShapeDtypeStruct([sizes[d] for d in "abrf"], jnp.bfloat16)
    kept = bytes_kept(lambda params, x: run(params, x, None), params, x)
    size = x.size * x.dtype.itemsize
    assert size <= kept <= 1.1 * size
    mask = jax.ShapeDtypeStruct(x.shape, bool)
    assert bytes_kept(run, params, x, mask) <= 1.1 * size + mask.size


# Bad input. What a constructor refuses, and what has to wait for the axis.


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (
            {"axis_index_groups": [[0, 1, 2], [3]]},
            "must be groups of equal size, .* not supp",
        ),
        ({"axis_index_groups": []}, "must be groups of equal size"),
        ({"axis_index_groups": [[], []]}, "must be groups of equal size"),
        ({"axis_name": ("a", "b")}, "Give the one name that the groups divide"),
        ({"axis_name": None}, "Give the one name that the groups divide"),
        ({"axis_name": ("a", "a")}, "a name more than once. Give each once"),
    ],
)
@all_norms
def test_bad_names_and_groups(case, kwargs, match):
    with pytest.raises(ValueError, match=f"{case.name}: .*{match}"):
        case.build(**{"axis_name": "a", "axis_index_groups": GROUPS, **kwargs})


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ([[0, 1], [1, 2]], "each index of axis 'a', 0 to 3, in exactly one group"),
        ([[0, 1], [2, 4]], "each index of axis 'a', 0 to 3, in exactly one group"),
        ([[0, 1], [2, -1]], "each index of axis 'a', 0 to 3, in exactly one group"),
        ([[0, 1]], "each index of axis 'a', 0 to 3, in exactly one group"),
        (
            [[0], [1], [2], [3], [4]],
            "must have each index of axis 'a', 0 to 3, in exactly one group",
        ),
    ],
)
@pytest.mark.parametrize("levels", ["vmap:a", "shard:a"])
@all_norms
def test_groups_that_do_not_fit_the_axis(case, levels, groups, match):
    layer, state = case.build(axis_name="a", axis_index_groups=groups)
    run = mapped(lambda x: (call(layer, state, x),), way(levels), ["arf"], ["arf"])
    with pytest.raises(ValueError, match=f"{case.name}: .*{match}"):
        run(jnp.ones((4, 3, 8)))


@pytest.mark.parametrize("levels", ["", "vmap:a", "pmap:a", "shard:a", "unchecked:a"])
@all_norms
def test_a_name_that_is_bound_nowhere(case, levels):
    layer, state = case.build(axis_name=("a", "b") if levels else "b")
    run = mapped(lambda x: (call(layer, state, x),), way(levels), ["arf"], ["arf"])
    match = f"{case.name}: .* name 'b', which is not bound here. .*axis_name='b'.* leave"
    with pytest.raises(NameError, match=match):
        run(jnp.ones((4, 3, 8)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@all_norms
def test_a_mesh_alone_binds_no_name(case, axis_type):
    layer, state = case.build(axis_name="a")
    with (
        jax.set_mesh(make_mesh(axis_type, a=4)),
        pytest.raises(
            NameError, match=f"{case.name}: .* name 'a', which is not bound here"
        ),
    ):
        eqx.filter_jit(call)(layer, state, jnp.ones((4, 3, 8)))


# Statistics over two axes of a mesh, with an input that is split along one of them.


def over_the_batch_too(case):
    """What makes a layer take its statistics over the batch as well."""
    if case.name == "BatchNorm":
        return {}
    return case.per_example or {"reduction_axes": (0, -1)}


@every(2)
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
    devices = make_mesh(d=2, m=2)

    def on_one_device(x):
        return call(alone, state, x, **kwargs)

    def on_all(x):
        return jax.shard_map(
            lambda x, kwargs: call(split_up, state, x, **kwargs),
            mesh=devices,
            in_specs=(PartitionSpec(split), PartitionSpec(split)),
            out_specs=PartitionSpec(split),
        )(x, kwargs)

    def with_gradient(f):
        def loss(x):
            y = f(x)
            return jnp.sum(jnp.sin(y) * weights), y

        return jax.jit(lambda x: (f(x), jax.grad(loss, has_aux=True)(x)))

    assert_close(with_gradient(on_all)(x), with_gradient(on_one_device)(x), 3e-5)
