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
    # The axes of a batched input that the statistics are over.
    reduction_axes: Callable[[int], tuple[int, ...]]
    center: bool = True
    has_bias: bool = True
    stateful: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

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
    ),
    Case("LayerNorm", en.LayerNorm, lambda ndim: (ndim - 1,)),
    Case("RMSNorm", en.RMSNorm, lambda ndim: (ndim - 1,), center=False, has_bias=False),
]

all_layers = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, mean and variance in float64 (complex128), written as plainly as it goes."""
    x = np.asarray(x)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    counted = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    x = np.where(counted | np.isfinite(x), x, 0)
    number = np.maximum(counted.sum(axes, keepdims=True), 1)
    mean = np.where(counted, x, 0).sum(axes, keepdims=True) / number
    if not center:
        mean = np.zeros_like(mean)
    square = np.where(counted, np.abs(x - mean) ** 2, 0)
    var = square.sum(axes, keepdims=True) / number
    with np.errstate(divide="ignore"):
        inverse = np.where(var + epsilon > 0, 1 / np.sqrt(var + epsilon), 0)
    y = (x - mean) * inverse
    if scale is not None:
        y = y * np.asarray(scale, np.float64)
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    return y, mean, var


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
    return text.count(f" {op}(") + text.count(f" {op}-start(")
