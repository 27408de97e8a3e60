from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Array


# `Hashable` alone would cover a tuple of names; the sequence says what it means.
AxisName: TypeAlias = Hashable | Sequence[Hashable] | None
AxisIndexGroups: TypeAlias = Sequence[Sequence[int]] | None
# As a static field holds them.
Names: TypeAlias = tuple[Hashable, ...]
Groups: TypeAlias = tuple[tuple[int, ...], ...]
Axes: TypeAlias = int | Sequence[int]
# The symbols of `jax.export` stand for an `int`, but are none.
Size: TypeAlias = Any
Shape: TypeAlias = tuple[Size, ...]
# What a layer may be called with. What it returns is always JAX's.
AnyArray: TypeAlias = Array | np.ndarray
# Anything `jax.numpy.dtype` accepts: `jnp.float32` is a scalar constructor, not a type.
DTypeLike: TypeAlias = Any


@runtime_checkable
class Initializer(Protocol):
    """Makes the initial value of a parameter, as those of `jax.nn.initializers` do."""

    def __call__(self, key: Any, shape: Shape, dtype: DTypeLike, /) -> Array: ...
