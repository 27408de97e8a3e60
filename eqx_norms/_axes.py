"""Axes given by the user, made canonical; small arrays laid out against the input."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from ._types import Axes, Shape


try:
    from jax._src.xla_bridge import backends_are_initialized
except ImportError:  # It is private. Without it, to trace a layer starts the backend.

    def backends_are_initialized() -> bool:
        return True


def as_tuple(axes: Axes) -> tuple[int, ...]:
    if isinstance(axes, Sequence):
        return tuple(operator.index(axis) for axis in axes)
    return (operator.index(axes),)


def check_integers(values: Axes, *, layer: str, argument: str) -> tuple[int, ...]:
    try:
        return as_tuple(values)
    except TypeError:
        raise ValueError(
            f"{layer}: `{argument}` must be an integer, or a tuple of integers, got "
            f"{values!r}."
        ) from None


def check_axes(axes: Axes, *, layer: str, argument: str) -> tuple[int, ...]:
    """A hashable form for a static field; what can be checked without an input is."""
    axes = check_integers(axes, layer=layer, argument=argument)
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{layer}: `{argument}={axes}` names an axis more than once. Give each once."
        )
    return axes


def canonicalize_axes(
    axes: Axes, ndim: int, *, layer: str, argument: str
) -> tuple[int, ...]:
    """Non-negative axes in the order given, each in range and none twice."""
    axes = as_tuple(axes)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{layer}: `{argument}={axes}` has axis {axis}, which is out of range "
                f"for an input of {ndim} dimensions."
            )
    canonical = tuple(axis % ndim for axis in axes)
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"{layer}: `{argument}={axes}` names an axis more than once for an input "
            f"of {ndim} dimensions. Give each axis once."
        )
    return canonical


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def shard_like(array: Array, like: Array) -> Array:
    """On an Explicit mesh, shards an array along its axes as another of that rank is."""
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    spec = (None if n == 1 else s for n, s in zip(array.shape, sharding.spec, strict=True))
    return jax.sharding.reshard(array, PartitionSpec(*spec))


def is_sharded(x: Array, axes: Sequence[int]) -> bool:
    """Whether an array is split over devices along one of these axes, so far as its type
    says; on an Auto mesh it does not."""
    spec = jax.typeof(x).sharding.spec
    return any(spec[axis] is not None for axis in axes)


def on_one_cpu(x: Array) -> bool:
    """Whether an array is on a CPU, and surely in one piece, as none is on a mesh: along
    the axis of a `vmap`, of which its type says nothing, it may be split as well."""
    kinds = jax.typeof(x).sharding.mesh.axis_types
    return (
        all(kind == AxisType.Manual for kind in kinds)
        # To ask for the backend starts it, and whoever traces before may yet configure it.
        and backends_are_initialized()
        and jax.default_backend() == "cpu"
    )


def example_axes(
    batch_axes: Axes, feature_axes: Sequence[int], ndim: int, *, layer: str
) -> tuple[int, ...]:
    """The axes of each example that hold no features, those of space as a rule."""
    batch = canonicalize_axes(batch_axes, ndim, layer=layer, argument="batch_axes")
    if set(batch) & set(feature_axes):
        raise ValueError(
            f"{layer}: an axis cannot be among both the batch axes {batch} and the feature "
            f"axes {tuple(feature_axes)}. For a single example use `batch_axes=()`."
        )
    return other_axes((*batch, *feature_axes), ndim)


def unshard(array: Array, axis: int) -> Array:
    """On an Explicit mesh, gathers an array along an axis that is going to be reshaped."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    spec = (*sharding.spec[:axis], None, *sharding.spec[axis + 1 :])
    return jax.sharding.reshard(array, PartitionSpec(*spec))


def to_features(array: Array, feature_axes: Sequence[int], x: Array) -> Array:
    """From the feature shape, in the order of `feature_axes`, to the rank of `x`, with
    axes of size one where there are no features."""
    order = sorted(range(len(feature_axes)), key=feature_axes.__getitem__)
    array = jnp.transpose(array, order)
    return shard_like(jnp.expand_dims(array, other_axes(feature_axes, x.ndim)), x)


def from_features(array: Array, feature_axes: Sequence[int]) -> Array:
    """The inverse of `to_features`."""
    array = jnp.squeeze(array, other_axes(feature_axes, array.ndim))
    ranks = sorted(feature_axes)
    return jnp.transpose(array, [ranks.index(axis) for axis in feature_axes])


def feature_shape(shape: Shape, feature_axes: Sequence[int]) -> Shape:
    return tuple(shape[axis] for axis in feature_axes)


def to_rank(array: Array, x: Array, *, layer: str, argument: str) -> Array:
    """Axes of size one in front, for an array that broadcasts to `x`."""
    try:
        fits = np.broadcast_shapes(array.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{layer}: `{argument}` of shape {array.shape} does not broadcast to the "
            f"input's shape {x.shape}."
        )
    return jnp.expand_dims(array, tuple(range(x.ndim - array.ndim)))
