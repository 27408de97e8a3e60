"""The nodes of some kind in a tree."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.tree_util import keystr, tree_leaves_with_path


Node = TypeVar("Node")
Tree = TypeVar("Tree")


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
