"""Which precision a result has, and which one it is computed in."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._types import DTypeLike


# What a layer's `dtype` can be: that of the result, that of the input, or what input and
# parameters promote to.
ResultDType: TypeAlias = np.dtype | Literal["input"] | None


def is_tiny(dtype: DTypeLike | Array) -> bool:
    """Whether it is a float of 8 bits or fewer, or an integer of fewer. JAX promotes these
    to nothing."""
    dtype = getattr(dtype, "dtype", dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 16
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def promote(*dtypes: DTypeLike | Array) -> np.dtype:
    """What these promote to by JAX's rules. One that JAX cannot promote counts as
    float32."""
    # The promotion here is this library's contract, not an accident of the caller's:
    # `jax_numpy_dtype_promotion="strict"` must not forbid it.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(
            *(jnp.float32 if is_tiny(dtype) else dtype for dtype in dtypes)
        )


def real_dtype(dtype: np.dtype) -> np.dtype:
    return jnp.finfo(dtype).dtype


def cast(array: Array, dtype: np.dtype) -> Array:
    """To a real `dtype` goes the real part, for data that is complex in its dtype only."""
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    return (array.real if real else array).astype(dtype)
