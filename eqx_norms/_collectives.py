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
    """Those that share statistics. A member is one index along the named axes: one example
    of a `vmap`, or one device of a mesh. All share them, or those of each group.

    - `size`: how many members share statistics.
    - `mesh_names`: the names of mesh axes, `pmap`'s among them: a sum over them is a
        collective.
    - `indices`: this member's index along each vmapped axis.
    - `num_groups`: how many groups there are; 1 without groups.
    - `group`: the number of this member's group; `None` without groups.
    """

    size: Size = eqx.field(static=True, default=1)
    mesh_names: Names = eqx.field(static=True, default=())
    num_groups: int = eqx.field(static=True, default=1)
    indices: tuple[Array, ...] = ()
    group: Array | None = None

    def sum(self, *values: Array) -> tuple[Array, ...]:
        """The sum of each value over the members; all values in one collective.

        The values have one shape and one precision. With groups each sum has a leading
        axis, with an entry for each group, the same for all members. (`psum` over groups of
        a mesh axis would give each device its own group's sum alone. Neither `shard_map`'s
        default checks nor `vmap` admit that.)
        """
        if self.group is not None:
            # An entry for each group: the value in that of this member, zeros elsewhere.
            own = self._is_own(values[0].ndim + 1)
            values = tuple(jnp.where(own, v[None], jnp.zeros_like(v)[None]) for v in values)
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
        """Returns the value of the first vmapped member on this device (see
        `vmapped_first`), and the members to sum it over: one on each device. With groups,
        the value and all members."""
        if self.group is not None:
            return value, self
        for index in self.indices:
            value = vmapped_first(value, index)
        size = math.prod(lax.axis_size(name) for name in self.mesh_names)
        return value, Members(size, self.mesh_names)

    def _is_own(self, ndim: int) -> Array:
        """A boolean for each group along axis 0, `True` for this member's, in an array of
        this rank."""
        numbers = np.arange(self.num_groups, dtype=np.int32)
        return numbers.reshape(-1, *[1] * (ndim - 1)) == self.group

    def own_group(self, entries: Array) -> Array:
        """The entry of this member's group; without groups, what is given. (By a sum: an
        index that is sharded on an `Explicit` mesh cannot be used to index.)"""
        if self.group is None:
            return entries
        own = jnp.where(self._is_own(entries.ndim), entries, jnp.zeros_like(entries))
        return jnp.sum(own, 0, dtype=entries.dtype)


ALONE = Members()


def _index_along(name: Hashable, x: Array) -> Array:
    """The member's index along a vmapped axis, on the mesh that `x` is on.

    A `vmap` over an axis that is split over devices of an `Explicit` mesh needs it there.
    Without `jax.set_mesh` JAX puts an index on no mesh.
    """
    mesh = explicit_mesh(x)
    if mesh is None or jax.sharding.get_abstract_mesh().shape:
        return lax.axis_index(name)
    return _index_on_mesh(name, mesh, x)


# `x` is not used, but kept: its data says which devices the mesh is of.
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
    # There is one name: `Check.groups` requires it.
    index = unvarying_index(indices[0]) if indices else lax.axis_index(names)
    group_of = np.empty(size, np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    is_index = np.arange(size, dtype=np.int32) == index
    group = jnp.sum(jnp.where(is_index, group_of, 0), dtype=np.int32)
    return Members(len(groups[0]), mesh_names, len(groups), indices, group)
