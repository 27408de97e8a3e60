"""What a layer keeps in `equinox.nn.State`: read, with errors that help, and written."""

import functools as ft
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State, StateIndex

from ._checks import Check
from ._trees import find_nodes


T = TypeVar("T")
P = ParamSpec("P")


def needs_state(call: Callable[P, T]) -> Callable[P, T]:
    """A method `(self, x, state, ...)` whose state nobody leaves out without being told
    where to get one, while type checkers go on asking for it."""

    @ft.wraps(call)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        given: tuple[Any, ...] = args
        if len(given) + ("x" in kwargs) == 2 and "state" not in kwargs:
            _check_state(None, check=Check(type(given[0]).__name__))
        return call(*args, **kwargs)

    return wrapper


def _check_state(state: Any, *, check: Check) -> None:
    if not isinstance(state, State):
        # `equinox.nn.Sequential` passes an `object()` where it was given none.
        none = state is None or type(state) is object
        received = "none" if none else f"one of type {type(state).__name__}"
        raise check.error(
            f"needs the model's `equinox.nn.State` as its second argument, got {received}. "
            "Make both with `model, state = equinox.nn.make_with_state(Model)(...)`, and "
            "call `y, state = model(x, state)`."
        )


def check_optional_state(state: Any, *, check: Check) -> None:
    """For a layer that hands on the state it is given, whatever that is, if any. An array
    is refused: it was meant for another argument."""
    if eqx.is_array_like(state):
        raise check.error(
            "the second argument must be the model's `equinox.nn.State`, or `None`, got "
            f"one of type {type(state).__name__}. Give `mask`, `scale`, `bias` and `key` "
            "by their names."
        )


def get_state(state: State, index: StateIndex[T], *, check: Check) -> T:
    _check_state(state, check=check)
    try:
        return state.get(index)
    except KeyError:
        raise check.error(
            "this `state` holds nothing for this layer; it was made for another model. "
            "Make model and state together: `model, state = "
            "equinox.nn.make_with_state(Model)(...)`."
        ) from None


def check_precision(values: Any, *, check: Check) -> None:
    """Whether what is about to be updated takes small steps."""
    for array in jax.tree.leaves(values):
        if jnp.issubdtype(array.dtype, jnp.inexact) and jnp.finfo(array.dtype).bits < 32:
            raise check.error(
                "training needs a `state` in float32 or wider, got an array of dtype "
                f"{array.dtype}: small steps would be lost in rounding. Cast the model "
                "alone and leave `state` as `equinox.nn.make_with_state` made it, or cast "
                "its arrays back to float32."
            )


def copy_state(state: State) -> State:
    """To be used in its place: what sets a state makes it unusable."""
    return jax.tree.map(lambda leaf: leaf, state)


def initial_state(index: StateIndex[T]) -> T:
    """What a layer starts with, unless `make_with_state` took it out."""
    return State(index).get(index)


def entries(state: State) -> dict[Any, Any]:
    """What a state holds, by marker."""
    values, names = state.tree_flatten()
    return dict(zip(names, values, strict=True))


def remaining(state: State, old: Any, new: Any) -> dict[Any, Any]:
    """What a state holds, by marker, without what `old` has in it and `new` has not."""
    gone = markers(old) - markers(new)
    return {key: value for key, value in entries(state).items() if key not in gone}


def with_entries(entries: dict[Any, Any]) -> State:
    return State.tree_unflatten(tuple(entries), tuple(entries.values()))


def markers(tree: Any) -> set[Any]:
    return {index.marker for index in find_nodes(tree, StateIndex).values()}


def set_state(state: State, index: StateIndex[T], value: T) -> State:
    """`state.set`, for a value that a mesh describes in other words than the old one.

    `State.set` compares types. Inside `shard_map` that of a state which was closed over
    differs from anything computed there.
    """
    part = state.substate(index)
    return state.update(
        jax.tree.unflatten(jax.tree.structure(part), jax.tree.leaves(value))
    )
