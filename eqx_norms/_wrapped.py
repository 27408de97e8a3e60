"""The weights of another layer: chosen, read, and replaced in a copy of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from equinox.nn import StateIndex
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array


T = TypeVar("T")


def choose_weights(
    layer: Any, where: Callable[[Any], Any] | None, *, wrapper: str
) -> tuple[str, ...]:
    """The paths of the weights that `where` picks, by default all leaves called `weight`
    that have two dimensions or more.

    Unlike the function, paths are equal for layers made alike, as a static field must be.
    """
    leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(layer)}
    if where is None:
        paths = tuple(
            path
            for path, leaf in leaves.items()
            if path.endswith(".weight") and eqx.is_inexact_array(leaf) and leaf.ndim >= 2
        )
        wanted = "a `weight` of two dimensions or more"
    else:
        names = jax.tree.unflatten(jax.tree.structure(layer), leaves)
        paths = tuple(dict.fromkeys(jax.tree.leaves(where(names))))
        wanted = "floating-point arrays for `where` to choose"
    if not paths or not all(eqx.is_inexact_array(leaves.get(path)) for path in paths):
        raise ValueError(
            f"{wrapper}: needs {wanted} in the layer, got {type(layer).__name__} with the "
            f"arrays {[path for path, leaf in leaves.items() if eqx.is_array(leaf)]}"
            + (f", of which `where` chose {list(paths)}." if where else ".")
            + " Choose with `where=lambda layer: ...`, as for `equinox.tree_at`."
        )
    return paths


def get_weights(layer: Any, paths: tuple[str, ...], *, wrapper: str) -> tuple[Array, ...]:
    leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(layer)}
    if not leaves.keys() >= set(paths):
        raise ValueError(
            f"{wrapper}: the weights that were chosen when it was made are {list(paths)}, "
            f"but now the layer has {list(leaves)}. Wrap the new layer anew."
        )
    return tuple(leaves[path] for path in paths)


def set_weights(layer: T, paths: tuple[str, ...], weights: tuple[Array, ...]) -> T:
    new = dict(zip(paths, weights, strict=True))
    return tree_map_with_path(lambda path, leaf: new.get(keystr(path), leaf), layer)


def is_stateful(layer: Any) -> bool:
    """Whether there is a state anywhere in a layer, which then is called with it."""
    is_index = lambda node: isinstance(node, StateIndex)  # noqa: E731
    return any(map(is_index, jax.tree.leaves(layer, is_leaf=is_index)))
