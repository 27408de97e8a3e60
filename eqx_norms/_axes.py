"""Which axes there are, and in what order."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._types import Shape


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def feature_shape(shape: Shape, feature_axes: Sequence[int]) -> Shape:
    return tuple(shape[axis] for axis in feature_axes)


def to_input_order(array: Array, feature_axes: Sequence[int]) -> Array:
    """From the feature shape, whose axes are in the order of `feature_axes`, to the same
    axes in the order that they have in the input."""
    return jnp.transpose(array, np.argsort(feature_axes).tolist())


def to_feature_order(array: Array, feature_axes: Sequence[int]) -> Array:
    """The inverse of `to_input_order`."""
    return jnp.transpose(array, np.argsort(np.argsort(feature_axes)).tolist())


def to_rank(array: Array, ndim: int) -> Array:
    """Axes of size one in front, for an array that broadcasts to this rank."""
    return jnp.expand_dims(array, tuple(range(ndim - array.ndim)))
