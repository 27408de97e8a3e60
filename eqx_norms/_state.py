"""What a layer keeps in `equinox.nn.State`: read, with errors that help, and written."""

from typing import TypeVar

import jax
from equinox.nn import State, StateIndex


T = TypeVar("T")


def get_state(state: State, index: StateIndex[T], *, layer: str) -> T:
    if not isinstance(state, State):
        raise ValueError(
            f"{layer}: needs the model's `equinox.nn.State` as its second argument, got "
            f"{type(state).__name__}. Make both with `model, state = "
            f"equinox.nn.make_with_state({layer})(...)`, and call `y, state = model(x, "
            "state)`."
        )
    try:
        return state.get(index)
    except KeyError:
        raise ValueError(
            f"{layer}: this `state` holds nothing for this layer; it was made for another "
            "model. Make model and state together: `model, state = "
            "equinox.nn.make_with_state(Model)(...)`."
        ) from None


def set_state(state: State, index: StateIndex[T], value: T) -> State:
    """`state.set`, for a value that a mesh describes in other words than the old one.

    `State.set` compares types. Inside `shard_map` that of a state which was closed over
    differs from anything computed there.
    """
    part = state.substate(index)
    return state.update(
        jax.tree.unflatten(jax.tree.structure(part), jax.tree.leaves(value))
    )
