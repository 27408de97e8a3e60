"""Which axes there are, and in what order."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._checks import canonicalize_axes
from ._types import Axes, Shape


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


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


def feature_shape(shape: Shape, feature_axes: Sequence[int]) -> Shape:
    return tuple(shape[axis] for axis in feature_axes)


def to_input_order(array: Array, feature_axes: Sequence[int]) -> Array:
    """From the feature shape, whose axes are in the order of `feature_axes`, to the same
    axes in the order that they have in the input."""
    return jnp.transpose(array, np.argsort(feature_axes))


def to_feature_order(array: Array, feature_axes: Sequence[int]) -> Array:
    """The inverse of `to_input_order`."""
    return jnp.transpose(array, np.argsort(np.argsort(feature_axes)))


def to_rank(array: Array, ndim: int) -> Array:
    """Axes of size one in front, for an array that broadcasts to this rank."""
    return jnp.expand_dims(array, tuple(range(ndim - array.ndim)))
