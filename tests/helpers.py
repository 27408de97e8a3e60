"""The table of layers that drives each battery, and what the tests have in common."""

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import eqx_norms as en


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, and what a battery has to know of it."""

    name: str
    make: Callable[..., Any]
    stateful: bool = False
    # How many arrays it learns.
    learned: int = 2
    kwargs: dict[str, Any] = field(default_factory=dict)
    # More of them for one example inside `vmap(axis_name="batch")`, and for one whose
    # parameters are drawn at random where it is given a key.
    per_example: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    # For a call that leaves the state as it is.
    evaluation: dict[str, Any] = field(default_factory=dict)

    def create(self, num_features: Any = 8, **kwargs: Any) -> Any:
        """The layer alone; one with a state wants `make_with_state` around this."""
        return self.make(num_features, **{**self.kwargs, **kwargs})

    def build(self, num_features: Any = 8, **kwargs: Any) -> tuple[Any, Any]:
        """The layer, and its state or `None`."""
        if self.stateful:
            return eqx.nn.make_with_state(self.create)(num_features, **kwargs)
        return self.create(num_features, **kwargs), None

    def expected(self, layer: Any, state: Any, x: jax.Array) -> jax.Array:
        """The output for a batch with its features last, in plain code."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Norm(Case):
    """A layer that normalises its input."""

    # The axes of a batched input that the statistics are over; before that, `groups` says
    # which axis is cut into how many parts.
    reduction_axes: Callable[[int], tuple[int, ...]]
    center: bool = True
    has_bias: bool = True
    groups: tuple[int, int] | None = None
    # Arguments for features along the second of three axes, that is to say before space.
    features_first: dict[str, Any]
    # Whether it is for batches of vectors too, or for those with axes of space alone.
    on_vectors: bool = True
    random: dict[str, Any] = field(
        default_factory=lambda: {"scale_init": jax.nn.initializers.normal(1.0)}
    )

    @property
    def formula(self) -> dict[str, Any]:
        """What `reference` and `plain` have to know of it, besides the axes."""
        return {"center": self.center, "groups": self.groups}

    def expected(self, layer: Any, state: Any, x: jax.Array) -> jax.Array:
        lead = (None,) * (x.ndim - 1)
        if self.stateful and layer.inference:
            stats = layer.running_stats(state)
            y = (x - stats.mean[lead]) / jnp.sqrt(stats.var[lead] + layer.epsilon)
        else:
            axes = self.reduction_axes(x.ndim)
            y = plain(x, axes, epsilon=layer.epsilon, **self.formula)
        if layer.scale is not None:
            y = y * layer.scale[lead]
        return y if layer.bias is None else y + layer.bias[lead]


class Matrix(eqx.Module):
    """The least there is to wrap: it takes any number of leading axes."""

    weight: jax.Array

    def __init__(self, num_features: int, dtype: Any, key: jax.Array):
        shape = (num_features, num_features)
        self.weight = jax.random.normal(key, shape, dtype)

    def __call__(self, x: jax.Array, *, key: Any = None) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return x @ self.weight.T


@dataclass(frozen=True, kw_only=True)
class Wrapper(Case):
    """A layer that normalises the weight of another one, here of `Matrix`."""

    # From layer and state, what is used in the place of the weight.
    weight: Callable[[Any, Any], jax.Array]

    def create(
        self,
        num_features: Any = 8,
        *,
        param_dtype: Any = jnp.float32,
        key: Any = None,
        **kwargs: Any,
    ) -> Any:
        key = jax.random.key(99) if key is None else key
        # What the wrapper is to refuse is no key for the layer inside.
        good = isinstance(key, jax.Array) and key.ndim == 0
        wrapped = Matrix(num_features, param_dtype, key if good else jax.random.key(99))
        return super().create(wrapped, param_dtype=param_dtype, key=key, **kwargs)

    def expected(self, layer: Any, state: Any, x: jax.Array) -> jax.Array:
        weight = self.weight(layer, state)
        return eqx.tree_at(lambda wrapped: wrapped.weight, layer.layer, weight)(x)


def _length_given(layer: Any, state: Any) -> jax.Array:
    del state
    v, (g,) = layer.layer.weight, layer.scales
    square = jnp.sum((v * v.conj()).real, 1, keepdims=True)
    return g[:, None] * v / jnp.sqrt(square + layer.epsilon).astype(v.dtype)


def _largest_singular_value_one(layer: Any, state: Any) -> jax.Array:
    (stats,) = layer.spectral_stats(state)
    weight, u, v = layer.layer.weight, stats.u[:, 0], stats.v[0]
    if not layer.inference:
        fixed = jax.lax.stop_gradient(weight)
        for _ in range(layer.n_steps):
            v = fixed.conj().T @ u
            v = v / jnp.linalg.norm(v).astype(v.dtype)
            u = fixed @ v
            u = u / jnp.linalg.norm(u).astype(u.dtype)
    return weight / jnp.real(u.conj() @ weight @ v).astype(weight.dtype)


NORMS = [
    Norm(
        name="BatchNorm",
        make=en.BatchNorm,
        stateful=True,
        reduction_axes=lambda ndim: tuple(range(ndim - 1)),
        features_first={"axis": 1},
        per_example={"axis_name": "batch"},
        evaluation={"use_running_average": True},
    ),
    Norm(
        name="LayerNorm",
        make=en.LayerNorm,
        reduction_axes=lambda ndim: (ndim - 1,),
        features_first={"reduction_axes": 1, "feature_axes": 1},
    ),
    Norm(
        name="RMSNorm",
        make=en.RMSNorm,
        learned=1,
        reduction_axes=lambda ndim: (ndim - 1,),
        features_first={"reduction_axes": 1, "feature_axes": 1},
        center=False,
        has_bias=False,
    ),
    Norm(
        name="GroupNorm",
        make=en.GroupNorm,
        reduction_axes=lambda ndim: tuple(range(1, ndim)),
        features_first={"feature_axis": 1},
        groups=(-1, 2),
        on_vectors=False,
        kwargs={"num_groups": 2},
        per_example={"batch_axes": ()},
    ),
    Norm(
        name="InstanceNorm",
        make=en.InstanceNorm,
        reduction_axes=lambda ndim: tuple(range(1, ndim - 1)),
        features_first={"feature_axes": 1},
        on_vectors=False,
        per_example={"batch_axes": ()},
    ),
]

# These look at no data: masks, collectives, accuracy and parity of statistics are not for
# them. What is peculiar to each has a file of its own.
WRAPPERS = [
    Wrapper(name="WeightNorm", make=en.WeightNorm, weight=_length_given),
    Wrapper(
        name="SpectralNorm",
        make=en.SpectralNorm,
        stateful=True,
        learned=1,
        weight=_largest_singular_value_one,
        evaluation={"update_stats": False},
    ),
]

LAYERS = [*NORMS, *WRAPPERS]
STATEFUL = [case for case in LAYERS if case.stateful]
(BATCH_NORM,) = (case for case in NORMS if case.stateful)


def over(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# One in so many of the combinations of a test's parameters: `pick` in `conftest.py`.
every = pytest.mark.every

all_layers = over(*LAYERS)
all_norms = over(*NORMS)
# Where a battery gives the layers vectors, or the same axes to each.
vector_norms = over(*(case for case in NORMS if case.on_vectors))


def over_space(by: str, layer: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
    """The layer with four parts of the second axis along the name `space`."""

    def one(x, mask):
        return layer(x, mask=mask)

    if by == "vmap":
        parts = lambda a: a.reshape(a.shape[0], 4, -1, a.shape[-1])  # noqa: E731
        run = jax.vmap(one, 1, 1, axis_name="space")
        return run(parts(x), parts(mask)).reshape(x.shape)
    spec = P(None, "space")
    run = jax.shard_map(one, mesh=make_mesh(space=4), in_specs=(spec, spec), out_specs=spec)
    return run(x, mask)


def clone(tree: Any) -> Any:
    """A state that may be used once more: setting a state makes the old one unusable."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(tree))


def step(layer: Any, state: Any, x: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The output, and the new state or `None`; the old state stays usable."""
    if state is None:
        return layer(x, **kwargs), None
    return layer(x, clone(state), **kwargs)


def call(layer: Any, state: Any, x: Any, **kwargs: Any) -> Any:
    return step(layer, state, x, **kwargs)[0]


def as_pair(converted: Any) -> tuple[Any, Any]:
    """What a converter returned: a layer, and its state or `None`."""
    return converted if isinstance(converted, tuple) else (converted, None)


def reference(
    x: Any,
    axes: tuple[int, ...],
    *,
    center: bool = True,
    epsilon: float = 1e-6,
    mask: Any = None,
    scale: Any = None,
    bias: Any = None,
    groups: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, mean and variance in float64 (complex128), written as plainly as it goes.

    `groups` is an axis, one of `axes`, and into how many parts it is cut first.
    """
    x = np.asarray(x)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    counted = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    if groups is not None:
        axis, number = groups
        parts = [
            reference(part, axes, center=center, epsilon=epsilon, mask=counts)
            for part, counts in zip(
                np.split(x, number, axis), np.split(counted, number, axis), strict=True
            )
        ]
        y, mean, var = (np.concatenate(p, axis) for p in zip(*parts, strict=True))
        if scale is not None:
            y = y * np.asarray(scale).astype(x.dtype)
        if bias is not None:
            y = y + np.asarray(bias).astype(x.dtype)
        return y, mean, var
    x = np.where(counted | np.isfinite(x), x, 0)
    number = np.maximum(counted.sum(axes, keepdims=True), 1)
    mean = np.where(counted, x, 0).sum(axes, keepdims=True) / number
    if not center:
        mean = np.zeros_like(mean)
    square = np.where(counted, np.abs(x - mean) ** 2, 0)
    var = square.sum(axes, keepdims=True) / number
    with np.errstate(divide="ignore"):
        inverse = np.where(var + epsilon > 0, 1 / np.sqrt(var + epsilon), 0)
    inverse = np.where(counted.any(axes, keepdims=True), inverse, 0)
    y = (x - mean) * inverse
    if scale is not None:
        y = y * np.asarray(scale).astype(x.dtype)
    if bias is not None:
        y = y + np.asarray(bias).astype(x.dtype)
    return y, mean, var


def plain(
    x: jax.Array,
    axes: tuple[int, ...],
    *,
    center: bool = True,
    epsilon: float = 1e-6,
    mask: Any = None,
    groups: tuple[int, int] | None = None,
) -> jax.Array:
    """The formula in the input's dtype, for JAX to differentiate as it stands.

    Must not be given anything that is not finite, under the mask neither.
    """
    counted = jnp.broadcast_to(True if mask is None else mask, x.shape)
    if groups is not None:
        axis, number = groups
        pieces = zip(
            jnp.split(x, number, axis), jnp.split(counted, number, axis), strict=True
        )
        return jnp.concatenate(
            [plain(p, axes, center=center, epsilon=epsilon, mask=m) for p, m in pieces],
            axis,
        )
    number = jnp.maximum(jnp.sum(counted, axes, keepdims=True), 1).astype(x.dtype)
    if center:
        x = x - jnp.sum(jnp.where(counted, x, 0), axes, keepdims=True) / number
    square = x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x**2
    var = jnp.sum(jnp.where(counted, square, 0), axes, keepdims=True) / number.real
    return x / jnp.sqrt(var + epsilon).astype(x.dtype)


def along(array: Any, axes: tuple[int, ...], ndim: int) -> np.ndarray:
    """An array with one axis for each of `axes`, in that order, laid out in `ndim`
    dimensions: element by element, to be as unlike the library as can be."""
    array = np.asarray(array)
    shape = [1] * ndim
    for axis, size in zip(axes, array.shape, strict=True):
        shape[axis] = size
    out = np.empty(shape, array.dtype)
    for position in np.ndindex(array.shape):
        where = [0] * ndim
        for axis, index in zip(axes, position, strict=True):
            where[axis] = index
        out[tuple(where)] = array[position]
    return out


def randomize(layer: Any, seed: int = 0, size: float = 0.25) -> Any:
    """What it learns, moved at random: ones and zeros hide mistakes."""
    rng = np.random.default_rng(seed)

    def move(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return leaf + jnp.asarray(rng.normal(0, size, leaf.shape), leaf.dtype)

    return jax.tree.map(move, layer)


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Made by NumPy, as `jax.random` would compile a program for each shape."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = (x + 1j * rng.standard_normal(shape)) / np.sqrt(2)
    return jnp.asarray(x, dtype)


def make_mesh(kind: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    """`make_mesh(data=4, model=2)` has so many devices along each axis."""
    kinds = (kind,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def assert_close(
    found: Any,
    wanted: Any,
    tolerance: float = 1e-5,
    *,
    same_dtype: bool = True,
    what: str = "",
) -> None:
    """The arrays of two trees are the same in shape and dtype, and each differs by at most
    a tolerance of the greatest magnitude that is wanted, or of one."""
    found, wanted = (
        [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
        for tree in (found, wanted)
    )
    assert len(found) == len(wanted) > 0, what
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape, what
        assert one.dtype == other.dtype or not same_dtype, what
        one, other = (np.asarray(a).astype(np.complex128) for a in (one, other))
        atol = tolerance * max(1.0, np.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=what)


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
# each that it is compared with.
WAYS = {
    "eager": lambda f: f,
    "jit of grad": functools.cache(lambda f: eqx.filter_jit(with_gradients(f))),
}

ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@contextlib.contextmanager
def raises(layer, match, request: Any = None, typed=None):
    """An error of the layer's own; of the argument `typed` jaxtyping complains first,
    where it checks."""
    error, match = ValueError, f"(?s)^{layer}: .*{match}"
    if typed and request.config.getoption("--jaxtyping-packages"):
        error, match = jaxtyping.TypeCheckError, f"typechecking parameter '{typed}'"
    with pytest.raises(error, match=match):
        yield


@contextlib.contextmanager
def float64():
    with jax.enable_x64(True):
        yield


def bytes_kept(f: Callable[..., Any], *args: Any) -> int:
    """What `jax.vjp` under `jit` keeps for the backward pass, parameters included."""
    _, backward = jax.eval_shape(jax.jit(lambda *args: jax.vjp(f, *args)), *args)
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(backward)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def hlo(f: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """The compiled program: what runs whatever the data, and branches of conditionals."""
    text = jax.jit(f).lower(*args).compile().as_text()
    assert text is not None
    branch = r"(?:true_computation=|false_computation=|branch_computations=\{)([^}\n]*)"
    named = set(re.findall(r"%([\w.-]+)", " ".join(re.findall(branch, text))))
    parts = ["", ""]
    for computation in text.split("\n\n"):
        name = computation.strip().partition(" ")[0].removeprefix("%")
        parts[name in named] += computation
    return parts[0], parts[1]


def count(text: str, op: str = "all-reduce") -> int:
    return text.count(f" {op}(") + text.count(f" {op}-start(")


def count_in_hlo(f: Callable[..., Any], *args: Any) -> int:
    """How many all-reduces run in the compiled program, whatever the data."""
    return count(hlo(f, *args)[0])
