"""What arguments are called elsewhere, for errors that say what they are called here."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ._checks import Check


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


def _answer(name: str, own: frozenset[str]) -> str:
    for argument, names, said in _ANSWERS:
        if argument in own and name in names.split():
            return f" `{name}` {(said or 'is `{}` here').format(argument)}."
    return ""


def answers_names(function: Callable[P, T]) -> Callable[P, T]:
    """A function, or a method, that answers an argument by its name elsewhere. For any
    other name there is Python's own answer."""
    own = frozenset(inspect.signature(function).parameters)

    @ft.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not kwargs.keys() <= own:
            names = [name for name in kwargs if name not in own]
            if answers := "".join(_answer(name, own) for name in names):
                owner = type(args[0]).__name__ if "self" in own else function.__name__
                received = ", ".join(map(repr, names))
                raise TypeError(
                    f"{owner}: unexpected keyword argument {received}.{answers}"
                )
        return function(*args, **kwargs)

    return wrapper


class AnswersNames:
    """A layer that checks its arguments. Where it is made or called with an argument's name
    in another library, its error says the name here: `__init__` and `__call__` are wrapped.
    (Type checkers, which read the source, see them as they are written.)"""

    @property
    def _check(self) -> Check:
        return Check(type(self).__name__)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in {"__init__", "__call__"} & cls.__dict__.keys():
            method = cls.__dict__[name]
            # A method with `**kwargs` hands on names that it does not know. Users' own
            # subclasses name arguments as they like.
            knows = "kwargs" not in inspect.signature(method).parameters
            if knows and cls.__module__.partition(".")[0] == __package__:
                setattr(cls, name, answers_names(method))
