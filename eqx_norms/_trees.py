"""The nodes of a tree: found and changed."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path


Node = TypeVar("Node")
Tree = TypeVar("Tree")
Module = TypeVar("Module", bound=eqx.Module)
KeyPath: TypeAlias = tuple[Any, ...]


def find_nodes(tree: Any, kind: type[Node]) -> dict[str, Node]:
    """By path, without those that are within others."""
    leaves = tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
    return {keystr(path): node for path, node in leaves if isinstance(node, kind)}


def map_nodes(change: Callable[[Node], Any], tree: Tree, kind: type[Node]) -> Tree:
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, kind) else node,
        tree,
        is_leaf=lambda node: isinstance(node, kind),
    )


def map_children(
    change: Callable[[Any, KeyPath], Any], node: Any, path: KeyPath = ()
) -> Any:
    """A node whose children are what `change` makes of each of them and its path. A leaf,
    which has none, as it is."""
    if jax.tree_util.all_leaves([node]):
        return node
    return tree_map_with_path(
        lambda below, child: change(child, path + below),
        node,
        is_leaf=lambda other: other is not node,
    )


def children(node: Any, path: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    """What `map_children` changes."""
    if jax.tree_util.all_leaves([node]):
        return []
    found = tree_leaves_with_path(node, is_leaf=lambda other: other is not node)
    return [(path + below, child) for below, child in found]


def with_fields(module: Module, **fields: Any) -> Module:
    """A copy with other fields, static ones among them, which `equinox.tree_at` cannot."""
    new = copy.copy(module)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new
