"""Norms of one library in a model, replaced by those of another one."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
from equinox.nn import Shared, State, StateIndex
from jax.tree_util import GetAttrKey

from .._checks import Check
from .._kinds import Kept, calls_as, kind, list_kept, type_name
from .._layer import AbstractNorm
from .._state import get_state, initial_state, markers, remaining, with_entries
from .._trees import KeyPath, find_nodes, map_children, map_nodes, with_fields
from .._wrapped import AbstractWrapper
from ._common import with_state


# By class of a package, what makes a new layer of one at a path.
Builders: TypeAlias = Mapping[str, Callable[[Any, KeyPath, Any], Any]]
Rules: TypeAlias = Mapping[type, Callable[[Any], Any]]


class _MissingState(ValueError):
    """The fault of the call, not of the layer."""


class Conversion:
    """What a conversion goes by, and what it has done so far."""

    package: ClassVar[str]
    # The public functions, for one layer and for a model, and how to convert what was left.
    of_layer: ClassVar[str]
    of_model: ClassVar[str]
    remedy: ClassVar[str] = ""

    def __init__(self, builders: Builders, state: State | None, rules: Rules):
        self.builders = builders
        self.state = state
        self.rules = rules
        self.replaced: list[tuple[KeyPath, Any]] = []
        self.left: list[Kept] = []
        # How many norms there were so far, whatever became of them.
        self.met = 0
        # By marker, what new layers keep in the place of old ones.
        self.values: dict[Any, Any] = {}

    def __call__(self, node: Any, path: KeyPath) -> Any:
        """A node with all norms in it replaced."""
        met, done = self.met, len(self.replaced)
        rule = self._rule(node)
        if rule is not None:
            self.met += 1
            new = _apply(rule, node, path)
            if new is not node:
                self.replaced.append((path, node))
            return new
        build = self.builder(node)
        if build is not None:
            self.met += 1
            left = len(self.left)
            try:
                new = build(node, path, self)
            except _MissingState:
                raise
            except ValueError as error:
                # What is in it is tried once more, by itself.
                del self.replaced[done:], self.left[left:]
                self.left.append(Kept(path, node, str(error)))
            else:
                self.replaced.append((path, node))
                return new
        new = map_children(self, node, path)
        if not _is_whole(new):
            why = (
                f"{type_name(node)} around it refers to fields by names that would change. "
                "Convert the layer first, and put that around it then"
            )
            self.left += [Kept(*each, why) for each in self.replaced[done:]]
            del self.replaced[done:]
            new = node
        why = self.resemblance(node, self.met > met)
        if why is not None:
            self.met += 1
            self.left.append(Kept(path, node, why))
        self.met += isinstance(node, (AbstractNorm, AbstractWrapper))
        return new

    def builder(self, node: Any) -> Callable[[Any, KeyPath, Any], Any] | None:
        name = kind(node, self.package, self.builders)
        return None if name is None else self.builders[name]

    @abstractmethod
    def resemblance(self, node: Any, around: bool) -> str | None:
        """Why something looks like a norm that no builder is for, if it does; `around`
        norms, its name may be because of these."""

    def inner(self, layer: Any, weight_name: str, path: KeyPath) -> Any:
        """The layer that a wrapper wraps, with all norms in it replaced."""
        new = self(layer.layer, (*path, GetAttrKey("layer")))
        if not hasattr(new, weight_name):
            raise ValueError(
                f"{type_name(layer)}: the weight that it normalises is that of a "
                f"{type_name(layer.layer)}, which has none of that name once it is "
                "converted. Convert that one alone, and wrap it anew."
            )
        return new

    def read(self, index: StateIndex) -> Any:
        try:
            if self.state is not None:
                return get_state(self.state, index, check=Check(self.package))
            return initial_state(index)
        except ValueError as error:
            why = str(error)
            if self.state is None:
                why = (
                    f"A norm of `{self.package}` has a state, and "
                    "`equinox.nn.make_with_state` took it out of the layer. Give it too: "
                    f"`{self.of_layer}(layer, state)`, `{self.of_model}(model, state)`."
                )
            raise _MissingState(why) from None

    def keep_state(self, index: StateIndex, value: Any) -> StateIndex:
        """For a new layer, an index with the marker of an old one, so that layers that
        shared the old state share the new one."""
        self.values[index.marker] = value
        return with_fields(index, init=value)

    def convert_layer(self, layer: Any) -> Any:
        build = self.builder(layer)
        if build is None:
            raise ValueError(
                f"{self.of_layer}: no counterpart for {type_name(layer)}. There is one for "
                f"{', '.join(self.builders)} of `{self.package}`, and their subclasses "
                f"without a `__call__` of their own. `{self.of_model}` takes whole models."
            )
        new = build(layer, (), self)
        self._warn(self.of_layer)
        return with_state(new)

    def convert_model(self, model: Any) -> Any:
        new = self(model, ())
        if not self.replaced:
            raise ValueError(
                f"{self.of_model}: there is no norm to replace in this model. Those of "
                f"`{self.package}` are: {', '.join(self.builders)}." + self._report()
            )
        self._warn(self.of_model)
        return new if self.state is None else self._with_state(new, self.state)

    def _with_state(self, new: Any, state: State) -> tuple[Any, State]:
        """A model without initial states, and a state without those of old layers."""
        old = [layer for _, layer in self.replaced]
        entries = remaining(state, old, new)
        for marker in markers(old) & entries.keys() & self.values.keys():
            entries[marker] = self.values[marker]
        indices = find_nodes(new, StateIndex)
        for path, index in indices.items():
            if index.marker not in entries:
                try:
                    entries[index.marker] = initial_state(index)
                except ValueError:
                    raise ValueError(
                        f"replace_norms: there is no state for model{path}. A rule must "
                        "return a layer with its state, `(layer, state)`."
                    ) from None
        # In the order that `make_with_state` has, as for files of leaves.
        first = {index.marker: entries[index.marker] for index in indices.values()}
        return eqx.nn.delete_init_state(new), with_entries({**first, **entries})

    def _report(self) -> str:
        if not self.left:
            return ""
        return " Left as they are:" + list_kept(self.left) + self.remedy

    def _warn(self, source: str) -> None:
        if self.left:
            warnings.warn(
                f"{source}: not every norm was replaced." + self._report(),
                stacklevel=4,  # What called the public function.
            )

    def _rule(self, node: Any) -> Callable[[Any], Any] | None:
        for cls in type(node).__mro__:
            if cls in self.rules and calls_as(node, cls):
                return self.rules[cls]
        return None


def _apply(rule: Callable[[Any], Any], layer: Any, path: KeyPath) -> Any:
    """What a rule makes of a layer, with its state, if it has one, in it."""
    try:
        new = rule(layer)
    except Exception as error:
        where = list_kept([Kept(path, layer, "the rule for it raised this.")])
        error.add_note(f"replace_norms:{where}")
        raise
    if new is None:
        where = list_kept([Kept(path, layer, "the rule for it returned `None`.")])
        raise ValueError(
            f"replace_norms: a rule must return a layer, or the one it was given:{where}"
        )
    match new:
        case (made, State() as own):
            # Markers of their own: `make_with_state` gives each layer made alike the same.
            indices: dict[Any, StateIndex] = {}
            return map_nodes(
                lambda index: indices.setdefault(index.marker, StateIndex(own.get(index))),
                made,
                StateIndex,
            )
    return new


def _is_whole(node: Any) -> bool:
    """Whether what goes by the names of fields within it still finds them."""
    try:
        if isinstance(node, Shared):
            eqx.filter_eval_shape(node)
        elif isinstance(node, AbstractWrapper):
            node._weights()
        elif isinstance(node, (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)):
            getattr(node.layer, node.weight_name)
    except Exception:  # A function of the user's is among what is called.
        return False
    return True


def parameters(layer: Any, *names: str) -> list[Any]:
    """A weight and a bias, which must be arrays or `None`."""
    found = [getattr(layer, name) for name in names]
    for parameter in found:
        if not (parameter is None or hasattr(parameter, "dtype")):
            raise ValueError(
                f"{type_name(layer)}: {' and '.join(names)} must be arrays, found "
                f"{parameter!r}. If `equinox.nn.Shared` ties it to another one, convert "
                "the layers before they are tied."
            )
    return found
