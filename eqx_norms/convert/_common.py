"""What the converters have in common: kinds of layers, entries, parameters and state."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from equinox.nn import State, StateIndex
from jaxtyping import Array

from .._axes import to_feature_order, to_input_order
from .._batch_norm import BatchNorm
from .._checks import Check, as_tuple
from .._dtypes import ResultDType, cast, promote, real_dtype
from .._kinds import type_name
from .._layer import AbstractExampleNorm, AbstractNorm
from .._rms_norm import RMSNorm
from .._running import RunningStats
from .._trees import with_fields
from .._types import Shape


T = TypeVar("T", bound=AbstractNorm)
# Of a user's own class nobody knows which axes the features are along.
LAYERS = (BatchNorm, AbstractExampleNorm)


def check_entries(
    found: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], check: Check
):
    """Raises unless the arrays in `found` have these names and shapes."""
    shapes = {name: tuple(np.shape(value)) for name, value in found.items()}
    if shapes != dict(expected):
        raise check.error(
            f"expected entries of the shapes {dict(expected)}, found {shapes}: missing "
            f"{sorted(expected.keys() - shapes)}, unexpected "
            f"{sorted(shapes.keys() - expected)}, of another shape "
            f"{sorted(n for n in shapes.keys() & expected if shapes[n] != expected[n])}."
        )


def check_order(axes: tuple[int, ...], check: Check):
    """Raises unless it is known in which order the axes are in the input, which is the
    order of features in Flax and PyTorch."""
    if len({axis < 0 for axis in axes}) > 1:
        raise check.error(
            f"cannot tell the order of the feature axes {axes} without the input's rank. "
            "Make the layer with all of them negative, or none."
        )


def as_num_features(shape: Shape) -> int | Shape:
    """As one would give it to a constructor."""
    return shape[0] if len(shape) == 1 else shape


def feature_axes(layer: AbstractNorm) -> tuple[int, ...]:
    return as_tuple(getattr(layer, layer._axes_arguments[0]))


def over_last_axes(
    make: Callable[..., T], shape: Shape, epsilon: float, dtype: ResultDType = None
) -> T:
    """A `LayerNorm` or `RMSNorm` whose statistics are over its features."""
    axes = tuple(range(-len(shape), 0))
    return make(
        as_num_features(shape),
        epsilon=epsilon,
        dtype=dtype,
        reduction_axes=axes,
        feature_axes=axes,
    )


def running_stats(mean: Array, var: Array, count: Array) -> RunningStats:
    """In the precision that `BatchNorm` requires; one `count` is that of all features."""
    dtype = promote(mean.dtype, jnp.float32)
    count = jnp.broadcast_to(count[..., None].astype(jnp.int32), mean.shape)
    return RunningStats(mean.astype(dtype), cast(var, real_dtype(dtype)), count)


def with_init(layer: Any, value: Any) -> Any:
    """A layer with another initial state."""
    return with_fields(layer, state_index=with_fields(layer.state_index, init=value))


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


def contents(layer: Any, state: State | None, check: Check) -> dict[str, Array]:
    """All arrays of a layer and its state, in the order of the input's axes: of these names
    `scale`, `bias`, `mean`, `var` and `count` those that it has."""
    if not isinstance(layer, LAYERS):
        raise check.error(
            "needs a `BatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm` or `InstanceNorm` of "
            f"eqx_norms, got {type_name(layer)}."
        )
    if layer.scale_offset != 0:
        raise check.error(
            f"`scale_offset={layer.scale_offset}` has no counterpart. Use a layer without, "
            "whose scale is the sum of both."
        )
    if isinstance(layer, RMSNorm) and layer.bias is not None:
        raise check.error("there an RMSNorm has no bias, and this one has.")
    arrays: dict[str, Array | None] = {"scale": layer.scale, "bias": layer.bias}
    if isinstance(layer, BatchNorm):
        if state is None:
            raise check.error(
                "a BatchNorm has its statistics in the model's `equinox.nn.State`. Give it "
                f"too: `{check.name}(layer, state)`."
            )
        stats = layer.running_stats(state)
        arrays |= {"mean": stats.mean, "var": stats.var, "count": stats.count}
    axes = feature_axes(layer)
    check_order(axes, check)
    return {
        name: to_input_order(array, axes)
        for name, array in arrays.items()
        if array is not None
    }


def with_contents(layer: Any, arrays: Mapping[str, Array]) -> Any:
    """The opposite of `contents`: a layer with these arrays, and its state if it has one.
    One `count` is that of all features; without it no batches were counted."""
    stored = {
        name: to_feature_order(array, feature_axes(layer))
        for name, array in arrays.items()
        if name != "count"
    }
    layer = with_fields(layer, scale=stored.get("scale"), bias=stored.get("bias"))
    if isinstance(layer, BatchNorm):
        count = arrays.get("count", jnp.zeros((), jnp.int32))
        layer = with_init(layer, running_stats(stored["mean"], stored["var"], count))
    return with_state(layer)
