"""What the converters have in common: kinds of layers, entries, parameters and state."""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from equinox.nn import State, StateIndex
from jaxtyping import Array

from .._batch_norm import BatchNorm
from .._checks import as_tuple
from .._dtypes import cast, promote, real_dtype
from .._layer import AbstractNorm
from .._rms_norm import RMSNorm
from .._running import RunningStats
from .._trees import type_name
from .._types import Shape


T = TypeVar("T", bound=AbstractNorm)


def check_entries(
    found: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], source: str
):
    """Raises unless the arrays in `found` have these names and shapes."""
    shapes = {name: tuple(np.shape(value)) for name, value in found.items()}
    if shapes != dict(expected):
        raise ValueError(
            f"{source}: expected entries of the shapes {dict(expected)}, found {shapes}: "
            f"missing {sorted(expected.keys() - shapes)}, unexpected "
            f"{sorted(shapes.keys() - expected)}, of another shape "
            f"{sorted(n for n in shapes.keys() & expected if shapes[n] != expected[n])}."
        )


def check_scale_offset(layer: AbstractNorm, source: str):
    if layer.scale_offset != 0:
        raise ValueError(
            f"{source}: `scale_offset={layer.scale_offset}` has no counterpart. Use "
            "a layer without, whose scale is the sum of both."
        )


def as_num_features(shape: Shape) -> int | Shape:
    """As one would give it to a constructor."""
    return shape[0] if len(shape) == 1 else shape


def feature_axes(layer: AbstractNorm) -> tuple[int, ...]:
    return layer._layout()[1]


def axes_order(axes: tuple[int, ...], source: str) -> list[int]:
    """How to transpose from the order of `axes` to that of the input, which is the order
    of features in Flax and PyTorch."""
    if len({axis < 0 for axis in axes}) > 1:
        raise ValueError(
            f"{source}: cannot tell the order of the feature axes {axes} without the "
            "input's rank. Make the layer with all of them negative, or none."
        )
    return np.argsort(axes).tolist()


def feature_shape(layer: AbstractNorm, source: str) -> Shape:
    """In the order of the input's axes."""
    order = axes_order(feature_axes(layer), source)
    shape = as_tuple(layer.num_features)
    return tuple(shape[i] for i in order)


def running_stats(mean: Array, var: Array, count: Array) -> RunningStats:
    """In the precision that `BatchNorm` requires; one `count` is that of all features."""
    dtype = promote(mean.dtype, jnp.float32)
    count = jnp.broadcast_to(count[..., None].astype(jnp.int32), mean.shape)
    return RunningStats(mean.astype(dtype), cast(var, real_dtype(dtype)), count)


def with_parameters(layer: T, scale: Array | None, bias: Array | None) -> T:
    return eqx.tree_at(
        lambda layer: (layer.scale, layer.bias),
        layer,
        (scale, bias),
        is_leaf=lambda leaf: leaf is None,
    )


def with_init(layer: Any, value: Any) -> Any:
    """A layer with another initial state."""
    return eqx.tree_at(
        lambda layer: layer.state_index.init,
        layer,
        value,
        is_leaf=lambda leaf: leaf is layer.state_index.init,
    )


def with_state(layer: Any) -> Any:
    """A layer as its maker returns it: `(layer, state)` if it has one. If it was in a model
    the state is a part of that model's: `model_state.update(state)`."""
    own = [value for value in vars(layer).values() if isinstance(value, StateIndex)]
    if not own:
        return layer
    if isinstance(own[0].marker, str):
        # The name that `make_with_state` gave it there. Again, it would give another.
        return eqx.nn.delete_init_state(layer), State(layer)
    return eqx.nn.make_with_state(lambda: layer)()


def contents(layer: Any, state: State | None, source: str) -> dict[str, Array]:
    """All arrays of a layer and its state, in the order of the input's axes."""
    if not isinstance(layer, AbstractNorm):
        raise ValueError(
            f"{source}: needs a `BatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm` or "
            f"`InstanceNorm` of eqx_norms, got {type_name(layer)}."
        )
    check_scale_offset(layer, source)
    if isinstance(layer, RMSNorm) and layer.bias is not None:
        raise ValueError(f"{source}: there an RMSNorm has no bias, and this one has.")
    arrays: dict[str, Array | None] = {"scale": layer.scale, "bias": layer.bias}
    if isinstance(layer, BatchNorm):
        if state is None:
            raise ValueError(
                f"{source}: a BatchNorm has its statistics in the model's "
                f"`equinox.nn.State`. Give it too: `{source}(layer, state)`."
            )
        stats = layer.running_stats(state)
        arrays |= {"mean": stats.mean, "var": stats.var, "count": stats.count}
    order = axes_order(feature_axes(layer), source)
    return {
        name: jnp.transpose(array, order)
        for name, array in arrays.items()
        if array is not None
    }
