"""Which class an object is of, by its name: classes of packages that nobody imported here;
and the layers that were left as they are."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.tree_util import keystr

from ._trees import KeyPath


def type_name(node: Any) -> str:
    """As one would import it: without the private modules in which it is defined."""
    modules = re.sub(r"\._\w+", "", type(node).__module__)
    return f"{modules}.{type(node).__qualname__}"


def kind(
    node: Any, package: str, kinds: Iterable[str], call: str = "__call__"
) -> str | None:
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


class Kept(NamedTuple):
    """A layer of a model that was left as it is, and why."""

    path: KeyPath
    layer: Any
    why: str


def list_kept(kept: Iterable[Kept]) -> str:
    """For a message: layers of the same class that were left for the same reason in one
    line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for path, layer, why in kept:
        lines.setdefault((type_name(layer), why), []).append(f"model{keystr(path)}")
    return "".join(
        f"\n- {name} at {', '.join(paths)}: {why}" for (name, why), paths in lines.items()
    )
