"""What arguments are called elsewhere, for errors that say what they are called here."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar


T = TypeVar("T")
P = ParamSpec("P")

_AFFINE = "affine elementwise_affine channelwise_affine"
_OPPOSITE = "is `{}` here, with the opposite value"
_NONE = "has no counterpart: there are no running statistics here. Leave it out"
# An argument that a function has, names of Flax, PyTorch and Equinox or of other layers
# here, and what to say of these if not that they are that argument. Of the rows that fit,
# the first one counts.
_ANSWERS = [
    ("epsilon", "eps", ""),
    ("num_features", "num_channels channels input_size normalized_shape shape dim", ""),
    ("num_groups", "groups", ""),
    ("use_bias", _AFFINE, "is `use_scale` and `use_bias` here"),
    ("use_scale", _AFFINE + " use_weight", ""),
    ("use_bias", "bias", ""),
    ("use_scale", "use_bias bias bias_init", "has no counterpart: there is no bias here"),
    ("scale", "weight", ""),
    ("axes", "axis dim reduction_axes feature_axes normalized_shape", ""),
    ("axis", "feature_axes feature_axis", ""),
    ("feature_axis", "feature_axes axis", ""),
    ("reduction_axes", "feature_axis axis", "is `feature_axes` and `reduction_axes` here"),
    ("feature_axes", "feature_axis axis dim", ""),
    ("axis_name", "process_group", ""),
    ("key", "rngs", "is `key` here, a `jax.random` key"),
    ("use_running_average", "inference", ""),
    ("use_running_average", "train training", _OPPOSITE),
    ("update_stats", "inference", _OPPOSITE),
    ("momentum", "mode", 'is "batch" here, always. Leave it out, and see `freeze`'),
    ("momentum", "track_running_stats", "is `True` here, always. Leave it out"),
    ("num_features", "momentum track_running_stats inference use_running_average", _NONE),
    ("x", "inference train training use_running_average", _NONE),
    ("layer", "layer_instance module", ""),
    ("where", "weight_name name variable_filter", "is `where` here, a function"),
    ("mask", "where", ""),
    ("n_steps", "n_power_iterations num_power_iterations", ""),
]


def answers_names(function: Callable[P, T]) -> Callable[P, T]:
    """A function, or a method, that answers an argument by its name elsewhere. For any
    other name there is Python's own answer."""
    own = frozenset(inspect.signature(function).parameters)

    @ft.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not kwargs.keys() <= own:
            answers = {name: _answer(name, own) for name in kwargs if name not in own}
            if any(answers.values()):
                layer = type(args[0]).__name__ if "self" in own else function.__name__
                raise TypeError(
                    f"{layer}: unexpected keyword argument {', '.join(map(repr, answers))}."
                    + "".join(
                        f" `{name}` {said}." for name, said in answers.items() if said
                    )
                )
        return function(*args, **kwargs)

    return wrapper


def _answer(name: str, own: frozenset[str]) -> str | None:
    for argument, names, said in _ANSWERS:
        if argument in own and name in names.split():
            return (said or "is `{}` here").format(argument)
    return None


def answer_names(layer: type) -> None:
    """Has a layer of the library answer names where it is made and called. (What reads the
    source, as type checkers do, finds the methods as they are written.)"""
    # Users' own subclasses name arguments as they like.
    if layer.__module__.partition(".")[0] == __package__:
        for name in {"__init__", "__call__"} & layer.__dict__.keys():
            method = layer.__dict__[name]
            # What hands all that it is given to another layer does not know the names.
            if "kwargs" not in inspect.signature(method).parameters:
                setattr(layer, name, answers_names(method))
