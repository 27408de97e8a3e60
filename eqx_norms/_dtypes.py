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


def _is_tiny(dtype: DTypeLike | Array) -> bool:
    """Whether it is a float of 8 bits or fewer, or an integer of fewer. JAX promotes these
    to nothing."""
    dtype = getattr(dtype, "dtype", dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 16
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def promote(*dtypes: DTypeLike | Array) -> np.dtype:
    """The dtype to compute in; in the place of what JAX cannot promote, float32."""
    # The promotion here is this library's contract, not an accident of the caller's:
    # `jax_numpy_dtype_promotion="strict"` must not forbid it.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jnp.float32 if _is_tiny(d) else d for d in dtypes))


def result_dtype(
    dtype: ResultDType, x: Array, *others: Array | None, layer: str
) -> np.dtype:
    """The dtype of what is computed from `x` and, among `others`, the parameters."""
    present = [x, *(other for other in others if other is not None)]
    if dtype is None and any(map(_is_tiny, present)):
        dtypes = ", ".join(str(array.dtype) for array in present)
        raise ValueError(
            f"{layer}: needs a `dtype` for its result where an array has 8 bits or fewer, "
            f"got {dtypes} for input, scale and bias, and no `dtype`. Give one, "
            "`dtype=jnp.bfloat16` for example."
        )
    promoted = promote(x.dtype, *present[1:])
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
