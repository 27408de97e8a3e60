"""What every layer does first: check its arguments, and lay them out for arithmetic."""

from collections.abc import Hashable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._affine import combine
from ._axes import as_tuple, canonicalize_axes, feature_shape, to_rank
from ._dtypes import promote, result_dtype
from ._types import Axes, Shape


class Inputs(NamedTuple):
    """The input and what goes with it, all of its rank."""

    x: Array
    mask: Array | None
    scale: Array | None
    bias: Array | None
    feature_axes: tuple[int, ...]
    # What to compute in, and what to return.
    compute_dtype: np.dtype
    dtype: np.dtype


def feature_sizes(
    num_features: int | tuple[int, ...],
    scale: Array | None,
    bias: Array | None,
    axis_name: tuple[Hashable, ...] | None,
) -> Shape | None:
    """The feature shape to expect: inside `shard_map` a parameter may be a part of one."""
    for parameter in (scale, bias):
        if parameter is not None:
            return parameter.shape
    # Without parameters there is nothing to tell how the features are split over devices.
    return as_tuple(num_features) if axis_name is None else None


def prepare(
    x: Array,
    mask: Array | None,
    scale: tuple[Array | None, Array | None],
    bias: tuple[Array | None, Array | None],
    *,
    scale_offset: float,
    dtype: np.dtype | None,
    features: Shape | None,
    feature_axes: Axes,
    argument: str,
    layer: str,
) -> Inputs:
    """`scale` and `bias` are each what was learned and what was given at the call.

    `features` is the feature shape that is required, `None` if any will do; `argument` is
    what the layer calls its `feature_axes`.
    """
    x = jnp.asarray(x)
    axes = canonicalize_axes(feature_axes, x.ndim, layer=layer, argument=argument)
    received = feature_shape(x.shape, axes)
    if features is not None and received != features:
        raise ValueError(
            f"{layer}: expected features of shape {features} along `{argument}={axes}`, "
            f"got {received} in an input of shape {x.shape}. Check `num_features`, and "
            f"that `{argument}` says where the features are."
        )
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"{layer}: `mask` must be boolean, True where a position counts, got "
                f"dtype {mask.dtype}."
            )
        mask = to_rank(mask, x, layer=layer, argument="mask")
    dtype = result_dtype(dtype, x, *scale, *bias, layer=layer)
    compute_dtype = promote(x.dtype, dtype, jnp.float32)

    def applied(parameter, offset, argument):
        learned, given = parameter
        return combine(
            learned, given, offset, x, axes, compute_dtype, layer=layer, argument=argument
        )

    return Inputs(
        x,
        mask,
        applied(scale, scale_offset, "scale"),
        applied(bias, 0.0, "bias"),
        axes,
        compute_dtype,
        dtype,
    )
