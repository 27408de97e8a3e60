"""Which precision a result has, and which one it is computed in."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._types import DTypeLike


def promote(*dtypes: DTypeLike | Array) -> np.dtype:
    # The promotion here is this library's contract, not an accident of the caller's:
    # `jax_numpy_dtype_promotion="strict"` must not forbid it.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def result_dtype(
    dtype: np.dtype | None, x: Array, *others: Array | None, layer: str
) -> np.dtype:
    """`dtype`, or else what the input and the parameters promote to."""
    promoted = promote(x.dtype, *(o for o in others if o is not None))
    if not jnp.issubdtype(promoted, jnp.inexact):
        promoted = promote(promoted, jnp.float32)
    if dtype is None:
        return promoted
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    if real and jnp.issubdtype(promoted, jnp.complexfloating):
        raise ValueError(
            f"{layer}: `dtype={dtype}` cannot hold the result, which is complex: input, "
            f"scale and bias promote to {promoted}. Use a complex `dtype` or leave it out."
        )
    return dtype


def real_dtype(dtype: np.dtype) -> np.dtype:
    return jnp.finfo(dtype).dtype


def cast(array: Array, dtype: np.dtype) -> Array:
    """To a real `dtype` goes the real part, for data that is complex in its dtype only."""
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    return (array.real if real else array).astype(dtype)
