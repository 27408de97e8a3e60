"""Arguments checked, and made canonical: hashable, as a static field must be."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

from ._axes import feature_shape, other_axes
from ._collectives import Groups, Names
from ._dtypes import ResultDType, result_dtype
from ._statistics import Inputs, Reduction
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Shape


def as_tuple(values: Axes) -> tuple[int, ...]:
    if isinstance(values, Sequence):
        return tuple(operator.index(value) for value in values)
    return (operator.index(values),)


def check_integer(value: int, *, layer: str, argument: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"{layer}: `{argument}` must be an integer, got {value!r}. Give a Python one."
        ) from None


def check_integers(values: Axes, *, layer: str, argument: str) -> tuple[int, ...]:
    try:
        return as_tuple(values)
    except TypeError:
        raise ValueError(
            f"{layer}: `{argument}` must be an integer, or a tuple of integers, got "
            f"{values!r}."
        ) from None


def assign(arguments: Sequence[str], axes: Sequence[int]) -> str:
    """How to name axes in a call."""
    value = axes[0] if len(axes) == 1 else tuple(axes)
    return f"`{', '.join(f'{argument}={value}' for argument in arguments)}`"


def check_axes(axes: Axes, *, layer: str, argument: str) -> tuple[int, ...]:
    """What can be checked of axes before there is an input."""
    axes = check_integers(axes, layer=layer, argument=argument)
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{layer}: `{argument}={axes}` names an axis more than once. Give each once."
        )
    return axes


def canonicalize_axes(
    axes: Axes, ndim: int, *, layer: str, argument: str
) -> tuple[int, ...]:
    """Non-negative axes in the order given, each in range and none twice."""
    axes = as_tuple(axes)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{layer}: `{argument}={axes}` has axis {axis}, which is out of range "
                f"for an input of {ndim} dimensions. Give an axis that the input has, or "
                "an input that has the axis."
            )
    canonical = tuple(axis % ndim for axis in axes)
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"{layer}: `{argument}={axes}` names an axis more than once for an input "
            f"of {ndim} dimensions. Give each axis once."
        )
    return canonical


def example_axes(
    batch_axes: Axes, feature_axes: Sequence[int], ndim: int, *, layer: str
) -> tuple[int, ...]:
    """The axes of each example that hold no features, those of space as a rule."""
    batch = canonicalize_axes(batch_axes, ndim, layer=layer, argument="batch_axes")
    if set(batch) & set(feature_axes):
        raise ValueError(
            f"{layer}: an axis cannot be among both the batch axes {batch} and the feature "
            f"axes {tuple(feature_axes)}. For one example, as inside `jax.vmap`, use "
            "`batch_axes=()`."
        )
    return other_axes((*batch, *feature_axes), ndim)


def check_features(
    features: Shape,
    shape: Shape,
    axes: tuple[int, ...],
    names: Sequence[str],
    *,
    layer: str,
):
    """`names` are the arguments that say along which axes the features are."""
    received = feature_shape(shape, axes)
    if received != features:
        remedy = f"that `{names[0]}` says where the features are"
        others = [axis for axis, size in enumerate(shape) if (size,) == features]
        if len(others) == 1:
            remedy = f"for features along axis {others[0]} give {assign(names, others)}"
        raise ValueError(
            f"{layer}: expected features of shape {features} along `{names[0]}={axes}`, "
            f"got {received} in an input of shape {shape}. Check `num_features`, and "
            f"{remedy}."
        )


def check_reduction_axes(
    axes: Axes | None, feature_axes: tuple[int, ...], *, layer: str
) -> tuple[int, ...]:
    """By default the last axis, where the features are along that too."""
    # For other feature axes alone, Flax reduces the last axis all the same, and PyTorch the
    # axes of its parameters. Either would be wrong, in silence, for who expects the other.
    if axes is None and feature_axes != (-1,):
        raise ValueError(
            f"{layer}: `feature_axes={feature_axes}` needs `reduction_axes` too, the axes "
            f"that statistics are over. Give `reduction_axes={feature_axes}` for the same, "
            "as in PyTorch, or `reduction_axes=-1` for the last alone, Flax's default."
        )
    axes = feature_axes if axes is None else axes
    return check_axes(axes, layer=layer, argument="reduction_axes")


def check_reduction(
    reduction: Reduction, names: Names | None, shape: Shape, *, layer: str, remedy: str
):
    if not reduction.axes and reduction.blocks is None and names is None:
        raise ValueError(
            f"{layer}: no axis left to take statistics over in an input of shape {shape}. "
            f"{remedy}"
        )


def check_num_features(
    num_features: int | tuple[int, ...],
    feature_axes: tuple[int, ...],
    names: Sequence[str] = (),
    *,
    layer: str,
) -> Shape:
    """The feature shape, in the order of `feature_axes`; `names` are the arguments that say
    which these are, where there may be several."""
    shape = check_integers(num_features, layer=layer, argument="num_features")
    if len(shape) != len(feature_axes):
        more = names and len(shape) > len(feature_axes)
        last = assign(names, range(-len(shape), 0)) if more else ""
        raise ValueError(
            f"{layer}: `num_features` must have one size for each feature axis, got "
            f"{num_features} for the axes {feature_axes}. Give as many sizes as axes"
            f"{': for the last ones ' if last else ''}{last}."
        )
    if any(size < 1 for size in shape):
        raise ValueError(
            f"{layer}: `num_features` must be positive, got {num_features}. Give the "
            "lengths of the feature axes."
        )
    return shape


def _is_number(value: Any) -> bool:
    """Whether it has the value of a float. (`float` itself would read a string.)"""
    try:
        math.isfinite(value)
    except (TypeError, OverflowError):
        return False
    return True


def check_number(number: float, *, layer: str, argument: str) -> float:
    if not _is_number(number):
        raise ValueError(
            f"{layer}: `{argument}` must be a Python number, known before tracing, got "
            f"{number!r}."
        )
    return float(number)


def check_epsilon(epsilon: float, *, layer: str) -> float:
    epsilon = check_number(epsilon, layer=layer, argument="epsilon")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(
            f"{layer}: `epsilon` must be finite and not negative, got {epsilon}. Give "
            "1e-6, for example."
        )
    return epsilon


def check_scale_offset(scale_offset: float, *, layer: str) -> float:
    scale_offset = check_number(scale_offset, layer=layer, argument="scale_offset")
    if not math.isfinite(scale_offset):
        raise ValueError(
            f"{layer}: `scale_offset` must be finite, got {scale_offset}. Give 1.0 for a "
            "scale that starts with zeros, 0.0 for any other."
        )
    return scale_offset


def check_momentum(momentum: float | None, *, layer: str) -> float | None:
    if momentum is None:
        return None
    momentum = check_number(momentum, layer=layer, argument="momentum")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{layer}: `momentum` is the weight of the old running statistics, from 0 to "
            f"1, or `None` for the average over all batches, got {momentum}."
        )
    return momentum


def check_flag(flag: Any, *, layer: str, argument: str) -> bool:
    """What decides which computation it is. An array must be a scalar that has a value."""
    if isinstance(flag, Tracer):
        raise ValueError(
            f"{layer}: `{argument}` must be True or False, got a traced array. `jax.jit`, "
            "`jax.device_put` and a scan that carries the model make arrays of all its "
            "leaves. Use `eqx.filter_jit` and `eqx.filter_shard`; or take out what is no "
            "array with `eqx.partition(model, eqx.is_array)`, and put it back with "
            "`eqx.combine`."
        )
    # A number passes: casts and averages of all leaves of a model make such of flags.
    if not _is_number(flag):
        raise ValueError(
            f"{layer}: `{argument}` must be True or False, got {flag!r}. Give a Python one."
        )
    return bool(flag)


def check_dtype(
    dtype: DTypeLike, *, layer: str, argument: str, others: str = ""
) -> np.dtype:
    try:
        # NumPy takes `None` for float64.
        known = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(
            f"{layer}: `{argument}` must be a floating or complex dtype{others}, got "
            f"{dtype!r}. Give `jnp.float32`, for example."
        )
    return jax.dtypes.canonicalize_dtype(known)


def check_result_dtype(dtype: DTypeLike | None, *, layer: str) -> ResultDType:
    if dtype is None or (isinstance(dtype, str) and dtype == "input"):
        return dtype
    return check_dtype(dtype, layer=layer, argument="dtype", others=', "input" or `None`')


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def check_names(axis_name: AxisName, *, layer: str) -> Names | None:
    if axis_name is None:
        return None
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    # JAX takes an integer for an axis of the array.
    if any(isinstance(name, int) or not _is_hashable(name) for name in names):
        raise ValueError(
            f"{layer}: `axis_name` must be a name, which can be hashed and is no integer, "
            f"or a tuple of names, got {axis_name!r}. Give a string."
        )
    if len(set(names)) != len(names):
        raise ValueError(
            f"{layer}: `axis_name={axis_name}` has a name more than once. Give each once."
        )
    return names or None


def check_groups(
    groups: AxisIndexGroups, names: Names | None, *, layer: str
) -> Groups | None:
    """What can be checked of groups before the axis is bound."""
    if groups is None:
        return None
    try:
        canonical = tuple(tuple(map(operator.index, group)) for group in groups)
    except TypeError:
        raise ValueError(
            f"{layer}: `axis_index_groups` must be a list of groups, each a list of "
            f"integers, got {groups!r}."
        ) from None
    if names is None or len(names) != 1:
        raise ValueError(
            f"{layer}: `axis_index_groups` are groups of indices along one named axis, "
            f"got `axis_name={names}`. Give the one name that the groups divide."
        )
    if len({len(group) for group in canonical}) != 1 or not canonical[0]:
        raise ValueError(
            f"{layer}: `axis_index_groups` must be groups of equal size, got "
            f"{canonical}. Groups of unequal size are not supported."
        )
    return canonical


def check_mask(mask: Array, *, layer: str):
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"{layer}: `mask` must be boolean, True where a position counts, got "
            f"dtype {mask.dtype}. Compare it with a number: `mask > 0`, for example."
        )


def check_broadcasts(array: Array, x: Array, *, layer: str, argument: str):
    # Size by size: `numpy.broadcast_shapes` refuses the symbolic sizes of `jax.export`.
    def fits(axes: Sequence[int]) -> bool:
        sizes = zip(array.shape, axes, strict=True)
        return all(own in (1, x.shape[axis]) for own, axis in sizes)

    if array.ndim > x.ndim or not fits(range(x.ndim - array.ndim, x.ndim)):
        # Which axes would fit: the first ones, if they do.
        axes = next(filter(fits, itertools.combinations(range(x.ndim), array.ndim)), ())
        rest = range(min(axes, default=0), x.ndim)
        index = [":" if axis in axes else "None" for axis in rest]
        remedy = f"`{argument}[..., {', '.join(index).lstrip(', :')}]`, for example"
        raise ValueError(
            f"{layer}: `{argument}` of shape {array.shape} does not broadcast to the "
            f"input's shape {x.shape}. Give it axes of size 1 where it is to be repeated"
            f"{': ' + remedy if axes else ''}."
        )


def check_mask_axes(mask: Array | None, shape: Shape, reduction: Reduction, *, layer: str):
    """Refuses a mask that fits the first axes as well as the last ones, where it belongs,
    if there it is the same for all that a statistic is over: it was meant for the first.
    (A mask of features is of use in a `LayerNorm`, for as many examples too.)"""
    missing = 0 if mask is None else len(shape) - mask.ndim
    if mask is None or not missing or mask.shape != shape[:-missing]:
        return
    varies = {missing + axis for axis, size in enumerate(mask.shape) if size != 1}
    if varies and varies.isdisjoint((*reduction.axes, *(reduction.blocks or ())[:1])):
        nones = ", ".join(["None"] * missing)
        raise ValueError(
            f"{layer}: `mask` of shape {mask.shape} fits the first axes of the input's "
            f"shape {shape} and the last. Write `mask[..., {nones}]` for the first, as for "
            f"a mask of positions, or `mask[{nones}]` for the last."
        )


def as_array(value: Any, *, layer: str, argument: str) -> Array:
    cause = None
    try:
        array = jnp.asarray(value)
        if not jnp.issubdtype(array.dtype, jax.dtypes.extended):
            return array
    except (TypeError, ValueError, OverflowError) as error:
        cause = error
    dtype = f" and dtype {value.dtype}" if hasattr(value, "dtype") else ""
    raise ValueError(
        f"{layer}: `{argument}` must be an array of numbers, got one of type "
        f"{type(value).__name__}{dtype}. Give a `jax.Array` of floats."
    ) from cause


def split_key(key: PRNGKeyArray, number: int, *, layer: str) -> list[PRNGKeyArray]:
    try:
        return list(jax.random.split(key, number))
    except (TypeError, ValueError):
        raise ValueError(
            f"{layer}: `key` must be a single random key, got {key!r}. Make one with "
            "`jax.random.key(0)`, for example."
        ) from None


def check_inputs(
    x: Array,
    mask: Any,
    scale: tuple[Any, ...],
    bias: tuple[Any, ...],
    *,
    feature_axes: tuple[int, ...],
    dtype: ResultDType,
    layer: str,
) -> tuple[Inputs, np.dtype]:
    """The arrays of a call, checked, and the dtype of its result. Of the scales and biases
    the last is that of the call, and what is before it the layer's own."""

    def optional(argument: str, *values: Any) -> tuple[Array | None, ...]:
        return tuple(
            None if value is None else as_array(value, layer=layer, argument=argument)
            for value in values
        )

    (mask,) = optional("mask", mask)
    scales, biases = optional("scale", *scale), optional("bias", *bias)
    if mask is not None:
        check_mask(mask, layer=layer)
        check_broadcasts(mask, x, layer=layer, argument="mask")
    features = feature_shape(x.shape, feature_axes)
    for argument, terms in (("scale", scales), ("bias", biases)):
        for term in terms[-1:]:
            if term is not None and term.shape != features:
                check_broadcasts(term, x, layer=layer, argument=argument)
    dtype = result_dtype(dtype, x, *scales, *biases, layer=layer)
    return Inputs(x, mask, scales, biases), dtype
