"""What the type of an array says of a mesh with `Explicit` axes.

Such types are there without `jax.set_mesh` as well; so each sharding names its mesh.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def explicit_mesh(x: Array) -> AbstractMesh | None:
    """The mesh with `Explicit` axes that `x` is on, if it is on one."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def is_sharded(x: Array, axes: Sequence[int]) -> bool:
    """Whether `x` is split over devices along one of these axes, as far as its type says;
    on an `Auto` mesh it says nothing."""
    spec = jax.typeof(x).sharding.spec
    return any(spec[axis] is not None for axis in axes)


def reshard(array: Array, spec: Sequence) -> Array:
    """Splits `array` as `spec` says, on the `Explicit` mesh that it is on, if any."""
    mesh = explicit_mesh(array)
    if mesh is None or tuple(jax.typeof(array).sharding.spec) == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))


def shard_like(array: Array, like: Array) -> Array:
    """Splits `array` as another one of its shape is split."""
    return reshard(array, tuple(jax.typeof(like).sharding.spec))


def unshard(array: Array, axis: int) -> Array:
    """Gathers `array` along an axis that is going to be reshaped."""
    spec = jax.typeof(array).sharding.spec
    return reshard(array, (*spec[:axis], None, *spec[axis + 1 :]))
