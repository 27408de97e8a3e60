"""Checks of arguments and arrays; static arguments are made hashable."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ._axes import feature_shape
from ._dtypes import ResultDType, is_tiny, promote
from ._types import Axes, AxisIndexGroups, AxisName, DTypeLike, Groups, Names, Shape


def as_tuple(values: Axes) -> tuple[int, ...]:
    if isinstance(values, Sequence):
        return tuple(operator.index(value) for value in values)
    return (operator.index(values),)


def _assign(arguments: Sequence[str], axes: Sequence[int]) -> str:
    """How to name axes in a call."""
    value = axes[0] if len(axes) == 1 else tuple(axes)
    return f"`{', '.join(f'{argument}={value}' for argument in arguments)}`"


def _is_number(value: Any) -> bool:
    """Whether it has the value of a float. (`float` itself would read a string.)"""
    try:
        math.isfinite(value)
    except (TypeError, OverflowError):
        return False
    return True


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class Check(NamedTuple):
    """Checks arguments for a layer or a function. Errors begin with its name."""

    name: str

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.name}: {text}")

    # Numbers, flags and dtypes.

    def integer(self, value: int, argument: str) -> int:
        try:
            return operator.index(value)
        except TypeError:
            raise self.error(
                f"`{argument}` must be an integer, got {value!r}. Give a Python one."
            ) from None

    def number(self, number: float, argument: str) -> float:
        if not _is_number(number):
            raise self.error(
                f"`{argument}` must be a Python number, known before tracing, got "
                f"{number!r}."
            )
        return float(number)

    def epsilon(self, epsilon: float) -> float:
        epsilon = self.number(epsilon, "epsilon")
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise self.error(
                f"`epsilon` must be finite and not negative, got {epsilon}. Give 1e-6, for "
                "example."
            )
        return epsilon

    def scale_offset(self, scale_offset: float) -> float:
        scale_offset = self.number(scale_offset, "scale_offset")
        if not math.isfinite(scale_offset):
            raise self.error(
                f"`scale_offset` must be finite, got {scale_offset}. Give 1.0 for a scale "
                "that starts with zeros, 0.0 for any other."
            )
        return scale_offset

    def momentum(self, momentum: float | None) -> float | None:
        if momentum is None:
            return None
        momentum = self.number(momentum, "momentum")
        if not 0 <= momentum <= 1:
            raise self.error(
                "`momentum` is the weight of the old running statistics, from 0 to 1, or "
                f"`None` for the average over all batches, got {momentum}."
            )
        return momentum

    def flag(self, flag: Any, argument: str) -> bool:
        """A flag that selects the computation. An array must be a scalar with a value."""
        if isinstance(flag, Tracer):
            raise self.error(
                f"`{argument}` must be True or False, got a traced array. `jax.jit`, "
                "`jax.device_put` and a scan that carries the model make arrays of all its "
                "leaves. Use `eqx.filter_jit` and `eqx.filter_shard`; or take out what is "
                "no array with `eqx.partition(model, eqx.is_array)`, and put it back with "
                "`eqx.combine`."
            )
        # Numbers pass: what casts or averages all leaves of a model turns flags into them.
        if not _is_number(flag):
            raise self.error(
                f"`{argument}` must be True or False, got {flag!r}. Give a Python one."
            )
        return bool(flag)

    def dtype(self, dtype: DTypeLike, argument: str, others: str = "") -> np.dtype:
        try:
            # NumPy takes `None` for float64.
            known = None if dtype is None else jnp.dtype(dtype)
        except TypeError:
            known = None
        if known is None or not jnp.issubdtype(known, jnp.inexact):
            raise self.error(
                f"`{argument}` must be a floating or complex dtype{others}, got {dtype!r}. "
                "Give `jnp.float32`, for example."
            )
        return jax.dtypes.canonicalize_dtype(known)

    def result_dtype(self, dtype: DTypeLike | None) -> ResultDType:
        if dtype is None or (isinstance(dtype, str) and dtype == "input"):
            return dtype
        return self.dtype(dtype, "dtype", ', "input" or `None`')

    def dtype_of(self, dtype: ResultDType, x: Array, *others: Array | None) -> np.dtype:
        """The dtype of the result, for the setting `dtype` and these arrays."""
        present = [x, *(other for other in others if other is not None)]
        if dtype is None and any(map(is_tiny, present)):
            dtypes = ", ".join(str(array.dtype) for array in present)
            raise self.error(
                "needs a `dtype` for its result where an array has 8 bits or fewer, got "
                f"{dtypes} for input, scale and bias, and no `dtype`. Give one, "
                "`dtype=jnp.bfloat16` for example."
            )
        promoted = promote(x.dtype, *present[1:])
        if not jnp.issubdtype(promoted, jnp.inexact):
            promoted = promote(promoted, jnp.float32)
        if dtype is None:
            return promoted
        if isinstance(dtype, str):
            inexact = jnp.issubdtype(x.dtype, jnp.inexact)
            result = x.dtype if inexact else np.dtype(np.float32)
        else:
            result = dtype
        real = not jnp.issubdtype(result, jnp.complexfloating)
        if real and jnp.issubdtype(promoted, jnp.complexfloating):
            raise self.error(
                f"with `dtype={dtype!s}` {result} cannot hold the result, which is "
                f"complex: input, scale and bias promote to {promoted}. Use a complex "
                "`dtype` or leave it out."
            )
        return result

    # Axes and sizes.

    def integers(self, values: Axes, argument: str) -> tuple[int, ...]:
        try:
            return as_tuple(values)
        except TypeError:
            raise self.error(
                f"`{argument}` must be an integer, or a tuple of integers, got {values!r}."
            ) from None

    def axes(self, axes: Axes, argument: str) -> tuple[int, ...]:
        """What can be checked of axes before there is an input."""
        axes = self.integers(axes, argument)
        if len(set(axes)) != len(axes):
            raise self.error(
                f"`{argument}={axes}` names an axis more than once. Give each once."
            )
        return axes

    def axes_in(self, ndim: int, axes: tuple[int, ...], argument: str) -> tuple[int, ...]:
        """Non-negative axes in the order given, each in range and none twice."""
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise self.error(
                    f"`{argument}={axes}` has axis {axis}, which is out of range for an "
                    f"input of {ndim} dimensions. Give an axis that the input has, or an "
                    "input that has the axis."
                )
        canonical = tuple(axis % ndim for axis in axes)
        if len(set(canonical)) != len(canonical):
            raise self.error(
                f"`{argument}={axes}` names an axis more than once for an input of {ndim} "
                "dimensions. Give each axis once."
            )
        return canonical

    def batch_axes(
        self, ndim: int, batch_axes: tuple[int, ...], feature_axes: Sequence[int]
    ) -> tuple[int, ...]:
        batch = self.axes_in(ndim, batch_axes, "batch_axes")
        if set(batch) & set(feature_axes):
            raise self.error(
                f"an axis cannot be among both the batch axes {batch} and the feature axes "
                f"{tuple(feature_axes)}. For one example, as inside `jax.vmap`, use "
                "`batch_axes=()`."
            )
        return batch

    def reduction_axes(
        self, axes: Axes | None, feature_axes: tuple[int, ...]
    ) -> tuple[int, ...]:
        """By default the last axis, where the features are along that too."""
        # For other feature axes alone, Flax reduces the last axis all the same, and PyTorch
        # the axes of its parameters. Either would be wrong, in silence, for anyone who
        # expects the other.
        if axes is None and feature_axes != (-1,):
            raise self.error(
                f"`feature_axes={feature_axes}` needs `reduction_axes` too, the axes that "
                f"statistics are over. Give `reduction_axes={feature_axes}` for the same, "
                "as in PyTorch, or `reduction_axes=-1` for the last alone, Flax's default."
            )
        return self.axes(feature_axes if axes is None else axes, "reduction_axes")

    def num_features(
        self,
        num_features: int | tuple[int, ...],
        feature_axes: tuple[int, ...],
        arguments: Sequence[str] = (),
    ) -> Shape:
        """The feature shape, in the order of `feature_axes`; `arguments` are those to give
        for several, if that is possible."""
        shape = self.integers(num_features, "num_features")
        if len(shape) != len(feature_axes):
            remedy = "Give as many sizes as axes"
            if arguments and len(shape) > len(feature_axes):
                last = range(-len(shape), 0)
                remedy += f": for the last ones {_assign(arguments, last)}"
            raise self.error(
                "`num_features` must have one size for each feature axis, got "
                f"{num_features} for the axes {feature_axes}. {remedy}."
            )
        if any(size < 1 for size in shape):
            raise self.error(
                f"`num_features` must be positive, got {num_features}. Give the lengths of "
                "the feature axes."
            )
        return shape

    def features(
        self,
        features: Shape,
        shape: Shape,
        axes: tuple[int, ...],
        arguments: Sequence[str],
    ) -> None:
        """The first of `arguments` says along which axes the features are; all are to be
        given for others."""
        received = feature_shape(shape, axes)
        if received != features:
            remedy = f"that `{arguments[0]}` says where the features are"
            others = [axis for axis, size in enumerate(shape) if (size,) == features]
            if len(others) == 1:
                given = _assign(arguments, others)
                remedy = f"for features along axis {others[0]} give {given}"
            raise self.error(
                f"expected features of shape {features} along `{arguments[0]}={axes}`, got "
                f"{received} in an input of shape {shape}. Check `num_features`, and "
                f"{remedy}."
            )

    # Named axes.

    def names(self, axis_name: AxisName) -> Names | None:
        if axis_name is None:
            return None
        names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
        # JAX takes an integer for an axis of the array.
        if any(isinstance(name, int) or not _is_hashable(name) for name in names):
            raise self.error(
                "`axis_name` must be a name, which can be hashed and is no integer, or a "
                f"tuple of names, got {axis_name!r}. Give a string."
            )
        if len(set(names)) != len(names):
            raise self.error(
                f"`axis_name={axis_name}` has a name more than once. Give each once."
            )
        return names or None

    def groups(self, groups: AxisIndexGroups, names: Names | None) -> Groups | None:
        """What can be checked of groups before the axis is bound."""
        if groups is None:
            return None
        try:
            canonical = tuple(tuple(map(operator.index, group)) for group in groups)
        except TypeError:
            raise self.error(
                "`axis_index_groups` must be a list of groups, each a list of integers, "
                f"got {groups!r}."
            ) from None
        if names is None or len(names) != 1:
            raise self.error(
                "`axis_index_groups` are groups of indices along one named axis, got "
                f"`axis_name={names}`. Give the one name that the groups divide."
            )
        if len({len(group) for group in canonical}) != 1 or not canonical[0]:
            raise self.error(
                f"`axis_index_groups` must be groups of equal size, got {canonical}. "
                "Groups of unequal size are not supported."
            )
        return canonical

    # Arrays of a call.

    def array(self, value: Any, argument: str) -> Array:
        cause = None
        try:
            # `jnp.asarray` of a `jax.Array` looks at its values if `jax_debug_nans` is set.
            array = value if isinstance(value, jax.Array) else jnp.asarray(value)
            if not jnp.issubdtype(array.dtype, jax.dtypes.extended):
                return array
        except (TypeError, ValueError, OverflowError) as error:
            cause = error
        dtype = f" and dtype {value.dtype}" if hasattr(value, "dtype") else ""
        raise self.error(
            f"`{argument}` must be an array of numbers, got one of type "
            f"{type(value).__name__}{dtype}. Give a `jax.Array` of floats."
        ) from cause

    def arrays(self, argument: str, *values: Any) -> tuple[Array | None, ...]:
        return tuple(
            None if value is None else self.array(value, argument) for value in values
        )

    def broadcasts(
        self, array: Array, x: Array, argument: str, feature_axes: Sequence[int] = ()
    ) -> None:
        # Size by size: `numpy.broadcast_shapes` refuses the symbolic sizes of `jax.export`.
        def fits(axes: Sequence[int]) -> bool:
            sizes = zip(array.shape, axes, strict=True)
            return all(own in (1, x.shape[axis]) for own, axis in sizes)

        if array.ndim > x.ndim or not fits(range(x.ndim - array.ndim, x.ndim)):
            # Which axes would fit: the first ones, and none of features, if they do.
            fitting = filter(fits, itertools.combinations(range(x.ndim), array.ndim))
            features = set(feature_axes)
            axes = min(fitting, key=lambda axes: len(features & {*axes}), default=())
            rest = range(min(axes, default=0), x.ndim)
            index = [":" if axis in axes else "None" for axis in rest]
            remedy = f": `{argument}[..., {', '.join(index).lstrip(', :')}]`, for example"
            raise self.error(
                f"`{argument}` of shape {array.shape} does not broadcast to the input's "
                f"shape {x.shape}. Give it axes of size 1 where it is to be "
                f"repeated{remedy if axes else ''}."
            )

    def mask(
        self,
        mask: Array | None,
        x: Array,
        reduced: Sequence[int],
        feature_axes: Sequence[int],
    ) -> None:
        """`reduced` are the axes that statistics are over."""
        if mask is None:
            return
        if mask.dtype != jnp.bool_:
            raise self.error(
                "`mask` must be boolean, True where a position counts, got dtype "
                f"{mask.dtype}. Compare it with a number: `mask > 0`, for example."
            )
        self.broadcasts(mask, x, "mask", feature_axes)
        # A mask broadcasts to the last axes. If it fits the first axes too, and along the
        # last would vary only over axes that are not reduced, then it would exclude whole
        # statistics: it was meant for the first. (A mask of features is of use in a
        # `LayerNorm`, even where there are as many examples.)
        missing = x.ndim - mask.ndim
        if not missing or mask.shape != x.shape[:-missing]:
            return
        varies = {missing + axis for axis, size in enumerate(mask.shape) if size != 1}
        if varies and varies.isdisjoint(reduced):
            nones = ", ".join(["None"] * missing)
            raise self.error(
                f"`mask` of shape {mask.shape} fits the first axes of the input's shape "
                f"{x.shape} and the last. Write `mask[..., {nones}]` for the first, as for "
                f"a mask of positions, or `mask[{nones}]` for the last."
            )
