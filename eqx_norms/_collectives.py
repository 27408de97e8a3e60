"""Means over named axes: of `jax.vmap`, `jax.pmap`, `jax.shard_map`, or several of them.

This is the only module that knows how an axis came by its name.
"""

import math
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ._types import AxisIndexGroups, AxisName


Names: TypeAlias = tuple[Hashable, ...]
Groups: TypeAlias = tuple[tuple[int, ...], ...]


# The sum over the axis of a `vmap`, and a member's index along it.
#
# JAX has both, but not inside `shard_map` with its default `check_vma=True`, where each
# value says along which mesh axes it varies, and a vmapped axis is no mesh axis: a `psum`
# over its name is refused, and `lax.axis_index` within one more `jit`, `scan` or
# `checkpoint` claims to vary along it, so that arithmetic with it fails.
#
# These primitives have no name, and what they give is of the first operand's type. The
# second is `lax.axis_index(name)`, which is batched at exactly one `vmap`, the one that
# owns the name, and there they do what they are for. `jax.custom_batching.custom_vmap`
# could say the same, but has no transpose: `vmap(grad(f), axis_name=...)` would fail.


def _vmapped(name, at_owner):
    primitive = Primitive(name)

    def first(x, index):
        return x

    def batch(operands, dims):
        x, index = operands
        x_dim, index_dim = dims
        if index_dim is None:  # a `vmap` that does not own the name
            return primitive.bind(x, index), x_dim
        return at_owner(x, x_dim, index, index_dim)

    primitive.def_impl(first)
    primitive.def_abstract_eval(first)
    mlir.register_lowering(primitive, mlir.lower_fun(first, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    return primitive


def _sum_at_owner(x, x_dim, index, index_dim):
    if x_dim is None:
        return x * index.shape[index_dim], None
    return jnp.sum(x, axis=x_dim), None


_vmapped_sum_p = _vmapped("vmapped_sum", _sum_at_owner)
_vmapped_index_p = _vmapped("vmapped_index", lambda x, x_dim, *index: index)


def _vmapped_sum_jvp(primals, tangents):
    x, index = primals
    t, _ = tangents
    out = _vmapped_sum_p.bind(x, index)
    return out, t if type(t) is ad.Zero else _vmapped_sum_p.bind(t, index)


def _vmapped_sum_transpose(ct, x, index):
    # Everyone receives the sum, so everyone's cotangent comes back: a sum again.
    return ct if type(ct) is ad.Zero else _vmapped_sum_p.bind(ct, index), None


ad.primitive_jvps[_vmapped_sum_p] = _vmapped_sum_jvp
ad.primitive_transposes[_vmapped_sum_p] = _vmapped_sum_transpose


def _everywhere_batch(operands, dims):
    (x,), (dim,) = operands, dims
    return _everywhere_p.bind(jnp.all(x, axis=dim)), None


_everywhere_p = Primitive("everywhere")
_everywhere_p.def_impl(lambda x: x)
_everywhere_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_everywhere_p, lambda _, x: [x])
batching.primitive_batchers[_everywhere_p] = _everywhere_batch


def everywhere(condition: Array) -> Array:
    """Whether it holds for all elements, and all members of every `vmap`, names or none.

    So a `lax.cond` on it remains one; on a batch of conditions it would do both branches.
    """
    return _everywhere_p.bind(jnp.all(condition))


class Members(eqx.Module):
    """Those who share statistics: all along some named axes, or groups along one axis.

    The names are of axes of a mesh, where a sum costs communication, or of axes of a
    `vmap`, whose members sit on one device. Of the latter a member knows its `indices`:
    with them in hand it needs the names no more, and its sums may be taken within a custom
    derivative rule, where JAX resolves names too late.
    """

    names: Names = eqx.field(static=True)
    # How many groups there are, and members in each; which is this member's.
    num_groups: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    group: Array | None
    indices: tuple[Array, ...]

    def _rows(self, value: Array) -> Array:
        """A row for each group: the value in its own, zero in the others."""
        value = value[None]
        if self.group is None:
            return value
        rows = np.arange(self.num_groups, dtype=np.int32)
        rows = rows.reshape(-1, *[1] * (value.ndim - 1))
        return jnp.where(rows == self.group, value, jnp.zeros_like(value))

    def mean(self, *values: Array) -> tuple[Array, ...]:
        """The mean over the members of each value; over a mesh all in one collective.

        Values have one shape and dtype (complex ones travel as two). Each result has a
        leading axis with a row for each group, a single one without groups. The rows are
        the same for all members, and a mesh knows it: `psum` over groups of a mesh axis
        gives results that differ between devices, which neither `shard_map`'s default
        checks nor `vmap` admit.
        """
        if not self.names:
            return tuple(value[None] for value in values)
        if self.indices:
            return tuple(self._vmapped_sum(self._rows(v)) / self.size for v in values)
        parts = [
            p for v in values for p in ((v.real, v.imag) if jnp.iscomplexobj(v) else (v,))
        ]
        # Divided before they are added, numbers that fit do not overflow in their sum.
        stacked = self._rows(jnp.stack(parts) / self.size)
        means = iter(jnp.moveaxis(lax.psum(stacked, self.names), 1, 0))
        return tuple(
            lax.complex(next(means), next(means)) if jnp.iscomplexobj(v) else next(means)
            for v in values
        )

    def _vmapped_sum(self, x: Array) -> Array:
        for index in self.indices:
            x = _vmapped_sum_p.bind(x, index)
        return x

    def own(self, rows: Array) -> Array:
        """The row of this member's group."""
        if self.group is None:
            return rows[0]
        return lax.dynamic_index_in_dim(rows, self.group, keepdims=False)


ALONE = Members((), 1, 1, None, ())


def _members(names: Names, groups: Groups | None, *, vmapped: bool) -> Members:
    if not names:
        return ALONE
    indices = tuple(lax.axis_index(name) for name in names)
    kept = indices if vmapped else ()
    size = math.prod(lax.axis_size(name) for name in names)
    if groups is None:
        return Members(names, 1, size, None, kept)
    (index,) = indices
    group_of = np.empty(size, np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    if vmapped:
        index = _vmapped_index_p.bind(jnp.zeros((), index.dtype), index)
    group = jnp.asarray(group_of)[index]
    return Members(names, len(groups), len(groups[0]), group, kept)


def canonicalize_names(axis_name: AxisName, *, layer: str) -> Names | None:
    """A hashable form for a static field."""
    if axis_name is None:
        return None
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if not all(isinstance(name, Hashable) for name in names):
        raise ValueError(
            f"{layer}: `axis_name` must be a name, which can be hashed, or a tuple of "
            f"names, got {axis_name!r}."
        )
    if len(set(names)) != len(names):
        raise ValueError(
            f"{layer}: `axis_name={axis_name}` has a name more than once. Give each once."
        )
    return names or None


def canonicalize_groups(
    groups: AxisIndexGroups, names: Names | None, *, layer: str
) -> Groups | None:
    """A hashable form for a static field; what can be checked without the axis is."""
    if groups is None:
        return None
    if not all(isinstance(group, Sequence) for group in groups):
        raise ValueError(
            f"{layer}: `axis_index_groups` must be a list of groups, each a list of "
            f"indices, got {groups}."
        )
    canonical = tuple(tuple(int(index) for index in group) for group in groups)
    if names is None or len(names) != 1:
        raise ValueError(
            f"{layer}: `axis_index_groups` are groups of indices along one named axis, "
            f"got `axis_name={names}`. Give the one name that the groups divide."
        )
    if len({len(group) for group in canonical}) != 1 or not canonical[0]:
        raise ValueError(
            f"{layer}: `axis_index_groups` must be groups of equal size, got "
            f"{canonical}. Groups of unequal size are not supported."
        )
    return canonical


def bound_members(
    names: Names | None, groups: Groups | None, *, layer: str
) -> tuple[Members, Members]:
    """The members that share statistics: those on this device, and those on others.

    **Raises:**

    `NameError` for a name that is bound nowhere, `ValueError` for groups that do not
    partition their axis.
    """
    if names is None:
        return ALONE, ALONE
    for name in names:
        try:
            size = lax.axis_size(name)
        except NameError:
            raise NameError(
                f"{layer}: `axis_name` has the name {name!r}, which is not bound here. "
                "Call the layer inside a transformation that binds it, as in "
                f"`jax.vmap(..., axis_name={name!r})`, `eqx.filter_pmap(..., "
                f"axis_name={name!r})`, or `jax.shard_map` over a mesh with that axis; "
                "or leave `axis_name` out to use the statistics of the input alone."
            ) from None
        if groups is not None:
            if len(groups) > size:
                raise ValueError(
                    f"{layer}: `axis_index_groups` has {len(groups)} groups, more than "
                    f"the {size} members of axis {name!r}."
                )
            if sorted(sum(groups, ())) != list(range(size)):
                raise ValueError(
                    f"{layer}: `axis_index_groups={groups}` must have each index of axis "
                    f"{name!r}, 0 to {size - 1}, in exactly one group."
                )
    # `pmap` is built on `shard_map`, so its names are found here as well.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    here = tuple(name for name in names if name not in manual)
    elsewhere = tuple(name for name in names if name in manual)
    return _members(here, groups, vmapped=True), _members(elsewhere, groups, vmapped=False)
