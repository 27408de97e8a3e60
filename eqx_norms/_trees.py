"""The nodes of a tree: found, changed, and named where one was left as it is."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path


Node = TypeVar("Node")
Tree = TypeVar("Tree")
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


def type_name(node: Any) -> str:
    """As one would import it: without the private modules in which it is defined."""
    modules = re.sub(r"\._\w+", "", type(node).__module__)
    return f"{modules}.{type(node).__qualname__}"


def kind(node: Any, package: str, kinds: Iterable[str], call: str) -> str | None:
    """Which of `kinds`, classes of `package`, an object is. `None` if it is none of them,
    or a subclass with a method `call` of its own, which may compute something else."""
    cls = base(node, package, kinds)
    if cls is None or not calls_as(node, cls, call):
        return None
    return cls.__name__


def base(node: Any, package: str, kinds: Iterable[str]) -> type | None:
    """Which of `kinds`, classes of `package`, an object's class is derived from."""
    for cls in type(node).__mro__:
        if cls.__name__ in kinds and cls.__module__.startswith(f"{package}."):
            return cls
    return None


def calls_as(node: Any, cls: type, call: str = "__call__") -> bool:
    """Whether an object of this class, or of one derived from it, has no other method."""
    return getattr(type(node), call, None) is getattr(cls, call, None)


class Left(NamedTuple):
    """A layer of a model that was left as it is, and why."""

    path: KeyPath
    layer: Any
    why: str


def list_left(left: Iterable[Left]) -> str:
    """For a message: layers of the same class that were left for the same reason in one
    line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for path, layer, why in left:
        lines.setdefault((type_name(layer), why), []).append(f"model{keystr(path)}")
    return "".join(
        f"\n- {name} at {', '.join(paths)}: {why}" for (name, why), paths in lines.items()
    )
