"""The same layer in several libraries, each as a function of parameters, state and input.

Input is batched, with features last. Equinox's layers take one example, so they stand
inside a `vmap`, as they would in a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.helpers import Case, clone


class Functional(NamedTuple):
    """`apply(params, state, x)` gives the output and the new state."""

    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Any
    state: Any


def _ours(case: Case, num_features: int, dtype: Any) -> Functional:
    layer, state = case.build(num_features, param_dtype=dtype)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x):
        layer = eqx.combine(params, static)
        return layer(x, clone(state)) if case.stateful else (layer(x), state)

    return Functional(apply, params, state)


def _flax(case: Case, num_features: int, dtype: Any) -> Functional | None:
    from flax import nnx

    make = getattr(nnx, case.name, None)
    if make is None:
        return None
    layer = make(
        num_features, **case.kwargs, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0)
    )
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params, state, x):
        layer = nnx.merge(graph, params, state, copy=True)
        # Flax does not compute under strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            y = layer(x)
        return y, nnx.split(layer, nnx.Param, ...)[2]

    return Functional(apply, params, state)


def _equinox(case: Case, num_features: int, dtype: Any) -> Functional | None:
    makes = {
        "LayerNorm": lambda: eqx.nn.LayerNorm(num_features, dtype=dtype),
        "RMSNorm": lambda: eqx.nn.RMSNorm(num_features, dtype=dtype),
        "BatchNorm": lambda: eqx.nn.BatchNorm(
            num_features, axis_name="batch", mode="batch", dtype=dtype
        ),
    }
    if case.name not in makes:
        return None
    layer, state = eqx.nn.make_with_state(makes[case.name])()
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x):
        layer = eqx.combine(params, static)
        if case.stateful:
            axes = (0, None)
            layer = jax.vmap(layer, axes, axes, axis_name="batch")
        else:
            for _ in range(x.ndim - 1):
                layer = jax.vmap(layer)
        with jax.numpy_dtype_promotion("standard"):
            return layer(x, state) if case.stateful else (layer(x), state)

    return Functional(apply, params, state)


LIBRARIES: dict[str, Callable[[Case, int, Any], Functional | None]] = {
    "eqx_norms": _ours,
    "flax": _flax,
    "equinox": _equinox,
}


def available(
    case: Case, num_features: int, dtype: Any = jnp.float32
) -> dict[str, Functional]:
    """The libraries that have the layer."""
    made = {name: make(case, num_features, dtype) for name, make in LIBRARIES.items()}
    return {name: layer for name, layer in made.items() if layer is not None}
