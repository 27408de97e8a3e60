"""The table of layers that drives each battery, and what the tests have in common."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en


@dataclass(frozen=True)
class Case:
    """A layer, and what a battery has to know of it."""

    name: str
    make: Callable[..., Any]
    # The axes of a batched input that the statistics are over; before that, `groups` says
    # which axis is cut into how many parts.
    reduction_axes: Callable[[int], tuple[int, ...]]
    center: bool = True
    has_bias: bool = True
    stateful: bool = False
    groups: tuple[int, int] | None = None
    # Whether it is for batches of vectors too, or for those with axes of space alone.
    on_vectors: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)
    # More of them for one example inside `vmap(axis_name="batch")`.
    per_example: dict[str, Any] = field(default_factory=dict)

    @property
    def formula(self) -> dict[str, Any]:
        """What `reference` and `plain` have to know of it, besides the axes."""
        return {"center": self.center, "groups": self.groups}

    def build(self, num_features: Any = 8, **kwargs: Any) -> tuple[Any, Any]:
        """The layer, and its state or `None`."""
        make = lambda: self.make(num_features, **{**self.kwargs, **kwargs})  # noqa: E731
        if self.stateful:
            return eqx.nn.make_with_state(make)()
        return make(), None


LAYERS = [
    Case(
        "BatchNorm",
        en.BatchNorm,
        lambda ndim: tuple(range(ndim - 1)),
        stateful=True,
        per_example={"axis_name": "batch"},
    ),
    Case("LayerNorm", en.LayerNorm, lambda ndim: (ndim - 1,)),
    Case("RMSNorm", en.RMSNorm, lambda ndim: (ndim - 1,), center=False, has_bias=False),
    Case(
        "GroupNorm",
        en.GroupNorm,
        lambda ndim: tuple(range(1, ndim)),
        groups=(-1, 2),
        on_vectors=False,
        kwargs={"num_groups": 2},
        per_example={"batch_axes": ()},
    ),
    Case(
        "InstanceNorm",
        en.InstanceNorm,
        lambda ndim: tuple(range(1, ndim - 1)),
        on_vectors=False,
        per_example={"batch_axes": ()},
    ),
]


def over(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_layers = over(*LAYERS)
# Where a battery gives the layers vectors, or the same axes to each.
vector_layers = over(*(case for case in LAYERS if case.on_vectors))


def clone(tree: Any) -> Any:
    """A state that may be used once more: setting a state makes the old one unusable."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(tree))


def call(layer: Any, state: Any, x: Any, **kwargs: Any) -> Any:
    """The output alone, whether or not the layer has a state; the state stays usable."""
    if state is None:
        return layer(x, **kwargs)
    return layer(x, clone(state), **kwargs)[0]


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


def randomize(layer: Any, seed: int = 0) -> Any:
    """Scale and bias drawn at random, where they exist: ones and zeros hide mistakes."""
    for number, name in enumerate(("scale", "bias")):
        old = getattr(layer, name, None)
        if old is not None:
            new = 1 + normal(1000 * seed + number, old.shape).astype(old.dtype) / 4
            layer = eqx.tree_at(lambda tree, name=name: getattr(tree, name), layer, new)
    return layer


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@contextlib.contextmanager
def float64():
    with jax.enable_x64(True):
        yield


def bytes_kept(f: Callable[..., Any], *args: Any) -> int:
    """What `jax.vjp` under `jit` keeps for the backward pass, parameters included."""
    _, backward = jax.eval_shape(jax.jit(lambda *args: jax.vjp(f, *args)), *args)
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(backward)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def count_in_hlo(f: Callable[..., Any], *args: Any, op: str = "all-reduce") -> int:
    """How often an operation stands in the compiled program."""
    text = jax.jit(f).lower(*args).compile().as_text()
    assert text is not None
    return text.count(f" {op}(") + text.count(f" {op}-start(")
