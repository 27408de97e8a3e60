"""Derivatives of both modes and their nestings, in float64, against plain code.

With zero variance and `epsilon=0` the layers have no limit: (x - mean) / deviation depends
on how the variance goes to zero. There output and derivatives are zero, by definition, so
that one dead feature does not spoil the rest.
"""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from .helpers import (
    NORMS,
    all_norms,
    call,
    float64,
    normal,
    over,
    plain,
    vector_norms,
)
from .test_collectives import GROUPS, KINDS, SIZES, build, mapped, way, without


SHAPE = (3, 4, 6)
EPSILON = 1e-2


def make_mask():
    mask = np.random.default_rng(0).random(SHAPE) < 0.6
    mask[0] = False
    return jnp.asarray(mask)


class Problem:
    """A layer as a function of input, scale and bias, and the same in plain code.

    `given` is the shape of a scale and a bias that are given at the call. With a mask, what
    is not finite counts as zero. In evaluation the running statistics are random numbers.
    """

    def __init__(
        self,
        case,
        shape=SHAPE,
        *,
        axes=None,
        mask=None,
        vmapped=False,
        given=None,
        evaluation=False,
        **kwargs,
    ):
        self.axes = case.reduction_axes(len(shape)) if axes is None else axes
        if vmapped:
            kwargs.update(case.per_example, axis_name="batch")
        kwargs.setdefault("num_features", shape[-1])
        kwargs.setdefault("param_dtype", jnp.float64)
        kwargs.setdefault("epsilon", EPSILON)
        self.case, self.mask, self.vmapped = case, mask, vmapped
        self.arguments = case.evaluation if evaluation else {}
        self.epsilon, self.offset = kwargs["epsilon"], kwargs.get("scale_offset", 0.0)
        self.layer, self.state = case.build(**kwargs)
        learned = {name: getattr(self.layer, name) for name in ("scale", "bias")}
        self.params = {
            name: 1 + normal(i, leaf.shape, jnp.float64) / 4
            for i, (name, leaf) in enumerate(learned.items())
            if leaf is not None
        }
        if given is not None:
            for seed, name in enumerate(("given scale", "given bias"), 30):
                self.params[name] = normal(seed, given, jnp.float64)
        self.stats = None
        if evaluation:
            stats = self.layer.running_stats(self.state)
            mean = normal(40, stats.mean.shape, stats.mean.dtype)
            var = jnp.exp(normal(41, stats.var.shape, stats.var.dtype))
            self.stats = mean, var
            new = eqx.tree_at(lambda stats: (stats.mean, stats.var), stats, self.stats)
            self.state = self.state.set(self.layer.state_index, new)

    def library(self, x, params):
        layer, arguments = self.layer, {**self.arguments, "mask": self.mask}
        for name, value in params.items():
            if name.startswith("given "):
                arguments[name.removeprefix("given ")] = value
            else:
                layer = eqx.tree_at(lambda tree, n=name: getattr(tree, n), layer, value)
        if self.vmapped:
            f = lambda x: call(layer, self.state, x)  # noqa: E731
            return jax.vmap(f, axis_name="batch")(x)
        return call(layer, self.state, x, **arguments)

    def plain(self, x, params):
        if self.mask is not None:
            x = jnp.where(jnp.isfinite(x), x, 0)
        if self.stats is None:
            formula = self.case.formula
            y = plain(x, self.axes, **formula, epsilon=self.epsilon, mask=self.mask)
        else:
            mean, var = self.stats
            deviation = jnp.sqrt(var + self.epsilon).astype(x.dtype)
            y = (x - mean[None, None]) / deviation[None, None]

        def total(name, start):
            # The feature axes are the last, in order.
            terms = [params[n] for n in (name, f"given {name}") if n in params]
            terms = [t.reshape((1,) * (x.ndim - t.ndim) + t.shape) for t in terms]
            return sum(terms, jnp.full((1,) * x.ndim, start, jnp.float64)).astype(y.dtype)

        has_scale = "scale" in params or "given scale" in params
        return y * total("scale", self.offset if has_scale else 1.0) + total("bias", 0.0)


def scalar(f):
    """Not linear in the output, so that second derivatives of all kinds are there."""

    def loss(x, params):
        y = f(x, params)
        if jnp.iscomplexobj(y):
            return jnp.sum(jnp.sin(y.real) + jnp.cos(2 * y.imag) + y.real * y.imag)
        return jnp.sum(jnp.sin(y) + y**3 / 5)

    return loss


def directions(args, seed):
    leaves, treedef = jax.tree.flatten(args)
    return jax.tree.unflatten(
        treedef, [normal(seed + i, a.shape, a.dtype) for i, a in enumerate(leaves)]
    )


def forward_over(f, args, seed=10):
    return jax.jvp(f, args, directions(args, seed))


def derivatives(f, x, params):
    """The output, and of a loss first derivatives, and second ones mixed among all
    arguments."""
    gradient = jax.grad(scalar(f), argnums=(0, 1))
    first, second = forward_over(gradient, (x, params))
    return {"output": f(x, params), "reverse": first, "forward over reverse": second}


def of_both_modes(f, x, params):
    """These, and those of forward mode and of reverse mode twice, with less to compile."""
    args = x, params
    gradient = jax.grad(scalar(f), argnums=(0, 1))
    first, second = jax.linearize(gradient, *args)
    along = directions(args, 10)
    return {
        "forward": forward_over(f, args)[1],
        "reverse": first,
        "forward over reverse": second(*along),
        "reverse over reverse": jax.linear_transpose(second, *args)(along),
    }


def every_derivative(f, x, params):
    """And those that follow from the others by JAX's own rules."""
    args = x, params
    along = lambda g, seed: lambda *args: forward_over(g, args, seed)[1]  # noqa: E731
    slope = along(scalar(f), 10)
    return {
        **of_both_modes(f, x, params),
        "reverse over forward": jax.grad(slope, argnums=(0, 1))(*args),
        "forward over forward": along(along(f, 10), 20)(*args),
    }


class Shared:
    """The same for a layer over named axes, in the dimensions of `test_collectives`."""

    def __init__(self, kind, levels, *, grouped=False, masked=False, dtype=jnp.float64):
        self.kind, self.levels = KINDS[kind], way(levels)
        self.groups = GROUPS if grouped else [[*range(SIZES["a"])]]
        self.dims = "".join(level.dims for level in self.levels)
        names = tuple(self.dims)
        self.layer, self.state = build(
            kind,
            without("abrf", self.dims),
            axis_name=names[0] if len(names) == 1 else names,
            axis_index_groups=GROUPS if grouped else None,
            epsilon=EPSILON,
            param_dtype=dtype,
        )
        self.mask = None
        if masked:
            # Members count differently, and one of them nothing.
            mask = np.random.default_rng(0).random([SIZES[d] for d in "abrf"]) < 0.6
            mask[2] = False
            self.mask = jnp.asarray(mask)
        names = ["scale", "bias"] if self.kind.has_bias else ["scale"]
        shape = tuple(SIZES[d] for d in without(self.kind.params, "o"))
        self.params = {
            name: 1 + normal(i, shape, dtype) / 4 for i, name in enumerate(names)
        }

    def data(self) -> jax.Array:
        """Members differ in their means, and in the phases of these."""
        dtype = self.params["scale"].dtype
        shape = tuple(SIZES[d] for d in "abrf")
        return normal(2, shape, dtype) + 2 * normal(3, (*shape[:2], 1, 1), dtype)

    def library(self, x, params):
        label = without(self.kind.params, "o")

        def apply(params, x, mask):
            layer = eqx.tree_at(
                lambda layer: [getattr(layer, name) for name in params],
                self.layer,
                list(params.values()),
            )
            return (call(layer, self.state, x, mask=mask),)

        f = mapped(apply, self.levels, [label, "abrf", "abrf"], ["abrf"])
        return f(params, x, self.mask)[0]

    def plain(self, x, params):
        axes = tuple("abrf".index(d) for d in self.kind.over)
        parts = [
            plain(
                x[np.array(group)],
                axes,
                center=self.kind.center,
                epsilon=EPSILON,
                mask=None if self.mask is None else self.mask[np.array(group)],
            )
            for group in self.groups
        ]
        y = jnp.concatenate(parts)[np.argsort(np.concatenate(self.groups))]
        lay = tuple(i for i, d in enumerate("abrf") if d not in self.kind.params)
        y = y * jnp.expand_dims(params["scale"], lay)
        return y + jnp.expand_dims(params["bias"], lay) if "bias" in params else y


def compare(problem, *inputs, of=derivatives):
    ours, plain = (jax.jit(ft.partial(of, f)) for f in (problem.library, problem.plain))
    for x in inputs:
        found, expected = ours(x, problem.params), plain(x, problem.params)
        for name, value in expected.items():
            close = ft.partial(
                np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=name
            )
            jax.tree.map(close, found[name], value)


@all_norms
def test_against_plain_code(case):
    """On data with and, as the epsilon leaves nothing to avoid, without variance."""
    with float64():
        constant = jnp.full(SHAPE, 3.0 if case.center else 0.0, jnp.float64)
        x = 3 + normal(0, SHAPE, jnp.float64)
        compare(Problem(case, scale_offset=0.5), x, constant, of=every_derivative)


@vector_norms
def test_several_axes_and_a_mask(case):
    """Features along the last two axes, and statistics over more than one."""
    shape = (2, 3, 4, 5)
    with float64():
        x = 3 + normal(2, shape, jnp.float64)
        mask = jnp.asarray(np.random.default_rng(1).random(shape) < 0.6).at[0, 1].set(False)
        if case.stateful:
            kwargs: dict[str, Any] = {"axis": (-2, -1), "axes": (0, 1)}
        else:
            kwargs = {"reduction_axes": (1, -1), "feature_axes": (-2, -1), "axes": (1, 3)}
        compare(Problem(case, shape, num_features=(4, 5), mask=mask, **kwargs), x)


@all_norms
def test_complex(case):
    """And centred first, not shifted by a guess."""
    with float64():
        x = 1 + 2j + normal(3, SHAPE, jnp.complex128)
        compare(Problem(case, param_dtype=jnp.complex128, use_fast_variance=False), x)


@over(*(case for case in NORMS if case.name in ("BatchNorm", "RMSNorm")))
def test_complex_and_masked(case):
    with float64():
        mask = make_mask()
        x = jnp.where(mask, 1 + 2j + normal(3, SHAPE, jnp.complex128), jnp.nan)
        compare(Problem(case, param_dtype=jnp.complex128, mask=mask), x)


# The shape of scale and bias at the call, and what the layer has besides.
GIVEN = [
    ("BatchNorm", SHAPE, {"scale_offset": 0.5}),
    ("LayerNorm", SHAPE, {}),
    ("RMSNorm", SHAPE, {"use_scale": False, "scale_offset": 1.0}),
    ("GroupNorm", SHAPE, {"use_bias": False}),
    ("InstanceNorm", SHAPE, {"use_scale": False}),
    ("LayerNorm", SHAPE[-1:], {"scale_offset": 0.5}),
    ("GroupNorm", (3, 1, 6), {}),
]


@pytest.mark.parametrize(("name", "given", "kwargs"), GIVEN)
def test_scale_and_bias_given_at_the_call(name, given, kwargs):
    """Of full size, where no product with them is small, too; and with an offset."""
    (case,) = (case for case in NORMS if case.name == name)
    with float64():
        problem = Problem(case, given=given, **kwargs)
        compare(problem, 3 + normal(0, SHAPE, jnp.float64))


@pytest.mark.parametrize(
    ("masked", "given", "dtype"),
    [
        (True, None, jnp.float64),
        (False, SHAPE, jnp.float64),
        (True, SHAPE[-1:], jnp.complex128),
    ],
)
@over(*(case for case in NORMS if case.stateful))
def test_evaluation(case, masked, given, dtype):
    """Also where a mask hides what is not finite."""
    with float64():
        mask = make_mask() if masked else None
        x = 1 + normal(0, SHAPE, dtype)
        if mask is not None:
            bad = jnp.asarray(np.resize([np.nan, np.inf, 2.0, -np.inf], SHAPE), dtype)
            x = jnp.where(mask, x, bad)
        problem = Problem(
            case,
            mask=mask,
            given=given,
            evaluation=True,
            param_dtype=dtype,
            scale_offset=1.0,
        )
        compare(problem, x)


@all_norms
def test_statistics_over_a_vmapped_axis(case):
    """Outside an inner `jit` too, where a collective in a custom rule has no name."""
    with float64():
        x = 3 + normal(4, SHAPE, jnp.float64)
        axes = tuple(sorted({0, *case.reduction_axes(3)}))
        problem = Problem(case, vmapped=True, axes=axes)
        compare(problem, x)
        inner = jax.jit(lambda x: call(problem.layer, problem.state, x))
        ones = jax.tree.map(jnp.ones_like, problem.params)
        if "bias" in ones:
            ones["bias"] = jnp.zeros_like(ones["bias"])
        found, expected = (
            jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x)
            for f in (
                jax.vmap(inner, axis_name="batch"),
                lambda x: problem.plain(x, ones),
            )
        )
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# Levels, groups, mask, and whether data is complex.
NAMED = [
    ("BatchNorm", "shard:a", False, True, False),
    ("BatchNorm", "unchecked:a", True, False, False),
    ("BatchNorm", "vmap:a", True, True, False),
    ("LayerNorm", "shard:a", True, False, False),
    ("RMSNorm", "unchecked:a vmap:b", False, True, False),
    ("BatchNorm", "shard:a", True, False, True),
    ("BatchNorm", "pmap:a", False, True, True),
    ("LayerNorm", "vmap:a", False, True, True),
]


@pytest.mark.parametrize(("kind", "levels", "grouped", "masked", "complex"), NAMED)
def test_over_named_axes(kind, levels, grouped, masked, complex):
    dtype = jnp.complex128 if complex else jnp.float64
    with float64():
        problem = Shared(kind, levels, grouped=grouped, masked=masked, dtype=dtype)
        compare(problem, problem.data(), of=derivatives if complex else of_both_modes)


@all_norms
def test_finite_differences(case):
    """What JAX's derivatives of the plain code are compared with once."""
    with float64():
        x = 1 + normal(5, SHAPE, jnp.float64)
        problem = Problem(case)
        f = jax.jit(problem.library)
        check_grads(f, (x, problem.params), order=2, modes=("fwd", "rev"), rtol=1e-3)


@all_norms
@pytest.mark.parametrize("vmapped", [False, True], ids=["batched", "per example"])
def test_zero_variance_without_epsilon(case, vmapped):
    """Output and derivatives are zero where there is no variance, and right elsewhere."""
    with float64():
        if vmapped:
            axes = tuple(sorted({0, *case.reduction_axes(3)}))
        else:
            axes = case.reduction_axes(3)
        problem = Problem(case, vmapped=vmapped, axes=axes, epsilon=0.0)
        x = 1 + normal(6, SHAPE, jnp.float64)
        # One of the statistics has nothing to scale up, and the others have.
        dead = tuple(slice(None) if axis in axes else 0 for axis in range(3))
        constant = 2.0 if case.center else 0.0
        x = x.at[dead].set(constant)
        alive = np.ones(SHAPE, bool)
        alive[dead] = False

        ones = {name: jnp.ones_like(p) for name, p in problem.params.items()}
        if "bias" in ones:
            ones["bias"] = jnp.zeros_like(ones["bias"])
        found = jax.jit(ft.partial(derivatives, problem.library))(x, ones)
        y = problem.library(x, ones)
        assert (np.asarray(y)[~alive] == 0).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        grad = found["reverse"][0]
        assert (np.asarray(grad)[~alive] == 0).all()

        # Elsewhere a dead neighbour makes no difference.
        if alive.any():
            clean = x.at[dead].set(normal(7, SHAPE, jnp.float64)[dead])
            expected = jax.jit(jax.grad(scalar(problem.plain)))(clean, ones)
            np.testing.assert_allclose(
                np.asarray(grad)[alive], np.asarray(expected)[alive], rtol=1e-9, atol=1e-9
            )


# A group has more positions than one, and others refuse a single one.
@over(*(case for case in NORMS if case.name == "LayerNorm"))
def test_one_position_a_statistic(case):
    """A single position is its own mean: the limit is zero, and finite, also without an
    epsilon."""
    with float64():
        shape = tuple(1 if a in case.reduction_axes(3) else n for a, n in enumerate(SHAPE))
        problem = Problem(case, shape, epsilon=0.0)
        x = normal(8, shape, jnp.float64)
        params = {**problem.params, "bias": jnp.zeros_like(problem.params["bias"])}
        found = jax.jit(ft.partial(every_derivative, problem.library))(x, params)
        for name in ("forward", "forward over forward"):
            tangent = directions((x, params), 10)[1]["bias"]
            expected = jnp.broadcast_to(tangent.reshape(1, 1, -1), shape)
            expected = expected if name == "forward" else jnp.zeros(shape)
            np.testing.assert_allclose(found[name], expected, atol=1e-12)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
