import functools as ft
from collections.abc import Callable, Hashable, Set
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


class _Static(eqx.Module):
    """Leaves that are no arrays, carried through JAX as part of a tree's structure."""

    leaves: Any = eqx.field(static=True)


def filter_shard_map(
    f: Callable[..., Any] | None = None,
    /,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    in_specs: Any,
    out_specs: Any,
    axis_names: Set[Hashable] = frozenset(),
    check_vma: bool = True,
) -> Callable[..., Any]:
    """`jax.shard_map` for functions of whole models.

    An Equinox model is a PyTree with leaves that are no arrays, such as activation
    functions and flags, which `jax.shard_map` refuses or traces. Here the arrays among
    the leaves are mapped, and all other leaves reach `f` as they are. The same holds
    for what `f` returns.

    **Arguments:**

    - `f`: a function of positional arguments, each a PyTree. Without it, a decorator is
        returned.
    - `mesh`: the devices. By default those of the enclosing `jax.set_mesh`.
    - `in_specs`: a tuple with a `jax.sharding.PartitionSpec` for each argument, or one for
        all; it holds for every array in the argument. To shard the arrays of an argument
        differently, a PyTree of them that is a prefix of the argument.
    - `out_specs`: the same for what `f` returns.
    - `axis_names`: the axes of the mesh that are mapped over, if not all.
    - `check_vma`: whether JAX checks that what `out_specs` calls replicated is so, and
        gives gradients with respect to replicated arguments as sums over the devices.

    **Returns:**

    A function with the arguments of `f`. Put it inside `equinox.filter_jit`: by itself it
    is traced at each call.

    **Raises:**

    What `jax.shard_map` raises where the specifications do not fit.

    !!! example

        ```python
        @eqx.filter_jit
        @en.filter_shard_map(
            mesh=mesh, in_specs=(P(), P(), P("devices")), out_specs=(P("devices"), P())
        )
        def forward(model, state, x):
            apply = jax.vmap(model, (0, None), (0, None), axis_name="batch")
            return apply(x, state)
        ```
    """
    if f is None:
        return ft.partial(
            filter_shard_map,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=axis_names,
            check_vma=check_vma,
        )

    # JAX's error messages take the names of the arguments from what is wrapped.
    @ft.wraps(f, updated=())
    def wrapper(*args: Any) -> Any:
        arrays, static = eqx.partition(args, eqx.is_array)

        @ft.wraps(f, updated=())
        def on_arrays(*arrays: Any) -> Any:
            out, static_out = eqx.partition(f(*eqx.combine(arrays, static)), eqx.is_array)
            return out, _Static(static_out)

        mapped = jax.shard_map(
            on_arrays,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=(out_specs, PartitionSpec()),
            axis_names=axis_names,
            check_vma=check_vma,
        )
        out, static_out = mapped(*arrays)
        return eqx.combine(out, static_out.leaves)

    return wrapper
