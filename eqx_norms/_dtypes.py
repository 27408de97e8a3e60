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


def promote(*dtypes: DTypeLike | Array) -> np.dtype:
    # The promotion here is this library's contract, not an accident of the caller's:
    # `jax_numpy_dtype_promotion="strict"` must not forbid it.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def result_dtype(
    dtype: ResultDType, x: Array, *others: Array | None, layer: str
) -> np.dtype:
    """The dtype of what is computed from `x` and, among `others`, the parameters."""
    promoted = promote(x.dtype, *(o for o in others if o is not None))
    if not jnp.issubdtype(promoted, jnp.inexact):
        promoted = promote(promoted, jnp.float32)
    if dtype is None:
        return promoted
    if isinstance(dtype, str):
        result = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else np.dtype(np.float32)
    else:
        result = dtype
    real = not jnp.issubdtype(result, jnp.complexfloating)
    if real and jnp.issubdtype(promoted, jnp.complexfloating):
        raise ValueError(
            f"{layer}: with `dtype={dtype!s}` {result} cannot hold the result, which is "
            f"complex: input, scale and bias promote to {promoted}. Use a complex `dtype` "
            "or leave it out."
        )
    return result


def real_dtype(dtype: np.dtype) -> np.dtype:
    return jnp.finfo(dtype).dtype


def cast(array: Array, dtype: np.dtype) -> Array:
    """To a real `dtype` goes the real part, for data that is complex in its dtype only."""
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    return (array.real if real else array).astype(dtype)
