"""The same layer in several libraries, each as a function of parameters, state and input.

Input is batched, in one of the layouts below. Equinox's layers take one example, so they
stand inside a `vmap`, as they would in a model. A library that lacks the layer, or the
layer in this layout, is left out.
"""

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp

from tests.helpers import Norm, clone


# Vectors; images with their channels last, and first.
LAYOUTS = ("NC", "NHWC", "NCHW")


class Functional(NamedTuple):
    """`apply(params, state, x)` gives the output and the new state, which are arrays."""

    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Any
    state: Any

    def both(self, params: Any, state: Any, x: Any, dy: Any) -> tuple[Any, ...]:
        """The output, the gradients of input and parameters, and the new state."""
        y, backward, new = jax.vjp(
            lambda x, params: self.apply(params, state, x), x, params, has_aux=True
        )
        return y, *backward(dy), new


def count_bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


class Passes(NamedTuple):
    """Functions, each with the arguments that it takes, and the bytes that are kept for the
    backward pass, without the parameters."""

    inference: tuple[Any, ...]
    forward: tuple[Any, ...]
    backward: tuple[Any, ...]
    kept: int


def passes(layer: Functional, x: Any) -> Passes:
    def training(params, state, x):
        return jax.vjp(
            lambda x, params: layer.apply(params, state, x), x, params, has_aux=True
        )

    args = (layer.params, layer.state, x)
    jaxpr, shapes = jax.make_jaxpr(training, return_shape=True)(*args)
    y, vjp, _ = shapes
    leaves, structure = jax.tree.flatten(vjp)
    # A variable's name is the number of its first place: the order of arguments, on which
    # the compiled program depends a little, is then the same in each run.
    invars, outvars = jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
    places = [id(variable) for variable in (*invars, *outvars)]
    inputs = range(len(invars))
    results = [places.index(id(variable)) for variable in outvars]
    # The output comes first, then what is kept.
    kept = results[1 : 1 + len(leaves)]

    def without_inputs(values):
        """An argument that is kept is not written once more."""
        values = zip(results, values, strict=True)
        return {name: value for name, value in values if name not in inputs}

    def forward(*args):
        evaluate = jax.extend.core.jaxpr_as_fun(jaxpr)
        return without_inputs(evaluate(*jax.tree.leaves(args)))

    def backward(args, made, dy):
        known = dict(zip(inputs, jax.tree.leaves(args), strict=True)) | made
        return jax.tree.unflatten(structure, [known[name] for name in kept])(dy)

    sizes = dict(zip(kept, map(count_bytes, leaves), strict=True))
    return Passes(
        (layer.apply, *args),
        (forward, *args),
        (backward, args, without_inputs(jax.tree.leaves(shapes)), y),
        sum(nbytes for name, nbytes in sizes.items() if name not in inputs[:-1]),
    )


def _functional(apply: Callable[..., Any], params: Any, state: Any) -> Functional:
    arrays, static = eqx.partition(state, eqx.is_array)

    def apply_to_arrays(params, arrays, x):
        y, new = apply(params, eqx.combine(arrays, static), x)
        return y, eqx.filter(new, eqx.is_array)

    return Functional(apply_to_arrays, params, arrays)


def _batched(layer: Any, *, stateful: bool) -> Any:
    axes = (0, None)
    return jax.vmap(layer, axes, axes, axis_name="batch") if stateful else jax.vmap(layer)


def ours(
    case: Norm, num_features: int, dtype: Any, layout: str, *, per_example: bool = False
) -> Functional:
    kwargs = dict(case.features_first) if layout == "NCHW" else {}
    if per_example:
        kwargs = {name: axis - 1 for name, axis in kwargs.items()} | case.per_example
    layer, state = case.build(num_features, param_dtype=dtype, **kwargs)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x):
        layer = eqx.combine(params, static)
        if per_example:
            layer = _batched(layer, stateful=case.stateful)
        return layer(x, clone(state)) if case.stateful else (layer(x), state)

    return _functional(apply, params, state)


def _flax(case: Norm, num_features: int, dtype: Any, layout: str) -> Functional | None:
    from flax import nnx

    kwargs = dict(case.kwargs)
    if layout == "NCHW":
        if case.name == "GroupNorm":
            return None
        kwargs |= case.features_first
    make = getattr(nnx, case.name)
    layer = make(num_features, **kwargs, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params, state, x):
        layer = nnx.merge(graph, params, state, copy=True)
        # Flax does not compute under strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            y = layer(x)
        return y, nnx.split(layer, nnx.Param, ...)[2]

    return _functional(apply, params, state)


def _equinox(case: Norm, num_features: int, dtype: Any, layout: str) -> Functional | None:
    n = num_features

    def batch_norm():
        return eqx.nn.BatchNorm(n, **case.per_example, mode="batch", dtype=dtype)

    makes = {
        "NC": {
            "LayerNorm": lambda: eqx.nn.LayerNorm(n, dtype=dtype),
            "RMSNorm": lambda: eqx.nn.RMSNorm(n, use_bias=False, dtype=dtype),
            "BatchNorm": batch_norm,
        },
        "NHWC": {},
        "NCHW": {
            "GroupNorm": lambda: eqx.nn.GroupNorm(
                case.kwargs["num_groups"], n, dtype=dtype
            ),
            # What a user of Equinox takes for it.
            "InstanceNorm": lambda: eqx.nn.GroupNorm(n, n, dtype=dtype),
            "BatchNorm": batch_norm,
        },
    }[layout]
    if case.name not in makes:
        return None
    layer, state = eqx.nn.make_with_state(makes[case.name])()
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x):
        layer = _batched(eqx.combine(params, static), stateful=case.stateful)
        for _ in range(x.ndim - 2 if layout == "NC" else 0):
            layer = jax.vmap(layer)
        with jax.numpy_dtype_promotion("standard"):
            return layer(x, state) if case.stateful else (layer(x), state)

    return _functional(apply, params, state)


LIBRARIES: dict[str, Callable[[Norm, int, Any, str], Functional | None]] = {
    "eqx_norms": ours,
    "flax": _flax,
    "equinox": _equinox,
}


def available(
    case: Norm, num_features: int, dtype: Any = jnp.float32, layout: str = "NC"
) -> dict[str, Functional]:
    made = {
        name: make(case, num_features, dtype, layout) for name, make in LIBRARIES.items()
    }
    return {name: layer for name, layer in made.items() if layer is not None}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Python's and theirs; `None` for those that are not installed."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {
        package: version(package) for package in packages
    }


def pytorch(
    case: Norm, num_features: int, dtype: Any, layout: str, *, device: str
) -> Any | None:
    """A module in training mode. Its images have channels second; those of `"NHWC"` lie in
    memory with channels last all the same."""
    from torch import nn

    n = num_features
    kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
    makes = {
        "LayerNorm": lambda: nn.LayerNorm(n, **kwargs),
        "RMSNorm": lambda: nn.RMSNorm(n, **kwargs),
        "BatchNorm": lambda: (nn.BatchNorm1d if layout == "NC" else nn.BatchNorm2d)(
            n, **kwargs
        ),
        "GroupNorm": lambda: nn.GroupNorm(case.kwargs["num_groups"], n, **kwargs),
        "InstanceNorm": lambda: nn.InstanceNorm2d(n, affine=True, **kwargs),
    }
    return makes[case.name]() if case.name in makes else None
