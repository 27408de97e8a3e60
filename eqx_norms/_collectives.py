"""Sums over named axes: of `jax.vmap`, `jax.pmap`, `jax.shard_map`, or several of them."""

import functools
import math
from collections.abc import Hashable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ._checks import Check
from ._sharding import explicit_mesh
from ._types import Groups, Names, Size
from ._vmapped import unvarying_index, vmapped_first, vmapped_sum


class Members(eqx.Module):
    """Those that share statistics: all along some named axes, or groups along one axis.

    - `size`: how many members share statistics.
    - `mesh_names`: the names of mesh axes, `pmap`'s among them: a sum over them is a
        collective.
    - `indices`: this member's index along each vmapped axis.
    - `num_groups`: how many groups there are; 1 without groups.
    - `group`: which of them is this member's; `None` without groups.
    """

    size: Size = eqx.field(static=True, default=1)
    mesh_names: Names = eqx.field(static=True, default=())
    num_groups: int = eqx.field(static=True, default=1)
    indices: tuple[Array, ...] = ()
    group: Array | None = None

    def sum(self, *values: Array) -> tuple[Array, ...]:
        """The sum of each value over the members; all values in one collective.

        The values have one shape and one precision. With groups each sum has a leading
        axis: a row for each group, the same for all members. (`psum` over groups of a mesh
        axis would give each device its own group's sum alone. Neither `shard_map`'s default
        checks nor `vmap` admit that.)
        """
        values = tuple(self._in_own_group(value) for value in values)
        for index in self.indices:
            values = tuple(vmapped_sum(value, index) for value in values)
        if not self.mesh_names:
            return values
        # Complex values travel as two real ones.
        parts = [
            part
            for value in values
            for part in ((value.real, value.imag) if jnp.iscomplexobj(value) else (value,))
        ]
        stacked = jnp.stack(parts)
        # Inside `shard_map` with its default checks `psum` refuses an array that does not
        # vary along each of the axes. Adding zero times the index makes it vary.
        zero = 0 * lax.axis_index(self.mesh_names)
        sums = iter(lax.psum(stacked + zero.astype(stacked.dtype), self.mesh_names))
        return tuple(
            lax.complex(next(sums), next(sums)) if jnp.iscomplexobj(value) else next(sums)
            for value in values
        )

    def first(self, value: Array) -> "tuple[Array, Members]":
        """Returns the value of the first vmapped member on this device, and the members to
        sum it over: one on each device. With groups, the value and all members."""
        if self.group is not None:
            return value, self
        for index in self.indices:
            value = vmapped_first(value, index)
        size = math.prod(lax.axis_size(name) for name in self.mesh_names)
        return value, Members(size, self.mesh_names)

    def _is_own(self, ndim: int) -> Array:
        """Which row, of this rank and for each group, is that of this member's group."""
        numbers = np.arange(self.num_groups, dtype=np.int32)
        return numbers.reshape(-1, *[1] * (ndim - 1)) == self.group

    def _in_own_group(self, value: Array) -> Array:
        """With groups: a row for each, the value in this member's, zeros in the others."""
        if self.group is None:
            return value
        own = self._is_own(value.ndim + 1)
        return jnp.where(own, value[None], jnp.zeros_like(value)[None])

    def own_group(self, rows: Array) -> Array:
        """The row of this member's group; without groups, what is given. (An index that is
        sharded on an `Explicit` mesh cannot be used to index.)"""
        if self.group is None:
            return rows
        own = self._is_own(rows.ndim)
        return jnp.sum(jnp.where(own, rows, jnp.zeros_like(rows)), 0, dtype=rows.dtype)


ALONE = Members()


def _index_along(name: Hashable, x: Array) -> Array:
    """The member's index along a vmapped axis, on the mesh that `x` is on.

    Without `jax.set_mesh` JAX puts an index on no mesh. But a `vmap` over an axis that is
    split over devices on an `Explicit` mesh splits all that it batches.
    """
    mesh = explicit_mesh(x)
    if mesh is None or jax.sharding.get_abstract_mesh().shape:
        return lax.axis_index(name)
    return _index_on_mesh(name, mesh, x)


# The type of `x` does not say which devices these are. Its data does, if kept.
@functools.partial(jax.jit, static_argnums=(0, 1), keep_unused=True)
def _index_on_mesh(name: Hashable, mesh: AbstractMesh, x: Array) -> Array:
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.reshard(lax.axis_index(name), sharding)


def bound_members(
    names: Names | None, groups: Groups | None, x: Array, *, check: Check
) -> Members:
    """The members along these names, as the call with `x` finds them bound.

    **Raises:**

    `NameError` for a name that is bound nowhere, `ValueError` for groups that do not
    partition their axis.
    """
    if names is None:
        return ALONE
    for name in names:
        try:
            size = lax.axis_size(name)
        except NameError:
            raise NameError(
                f"{check.name}: `axis_name` has the name {name!r}, which is not bound "
                "here. Call the layer inside a transformation that binds it, as in "
                f"`jax.vmap(..., axis_name={name!r})`, `eqx.filter_pmap(..., "
                f"axis_name={name!r})`, or `jax.shard_map` over a mesh with that axis; "
                "or leave `axis_name` out to use the statistics of the input alone."
            ) from None
        if groups is not None and sorted(sum(groups, ())) != list(range(size)):
            raise check.error(
                f"`axis_index_groups={groups}` must have each index of axis {name!r}, 0 to "
                f"{size - 1}, in exactly one group."
            )
    # `pmap` is built on `shard_map`, so its names are found here as well.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mesh_names = tuple(name for name in names if name in manual)
    indices = tuple(_index_along(name, x) for name in names if name not in manual)
    size = math.prod(lax.axis_size(name) for name in names)
    if groups is None:
        return Members(size, mesh_names, 1, indices)
    # There is one name.
    index = unvarying_index(indices[0]) if indices else lax.axis_index(names)
    group_of = np.empty(size, np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    is_index = np.arange(size, dtype=np.int32) == index
    group = jnp.sum(jnp.where(is_index, group_of, 0), dtype=np.int32)
    return Members(len(groups[0]), mesh_names, len(groups), indices, group)
