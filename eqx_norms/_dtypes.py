"""Which precision a result has, and which one it is computed in."""

import math
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


def check_number(number: float, *, layer: str, argument: str) -> float:
    try:
        math.isfinite(number)  # `float` would read a string.
    except TypeError:
        raise ValueError(
            f"{layer}: `{argument}` must be a number, got {number!r}."
        ) from None
    return float(number)


def check_epsilon(epsilon: float, *, layer: str) -> float:
    epsilon = check_number(epsilon, layer=layer, argument="epsilon")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(
            f"{layer}: `epsilon` must be finite and not negative, got {epsilon}."
        )
    return epsilon


def check_scale_offset(scale_offset: float, *, layer: str) -> float:
    scale_offset = check_number(scale_offset, layer=layer, argument="scale_offset")
    if not math.isfinite(scale_offset):
        raise ValueError(f"{layer}: `scale_offset` must be finite, got {scale_offset}.")
    return scale_offset


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
            f"{dtype!r}."
        )
    return jax.dtypes.canonicalize_dtype(known)


def check_result_dtype(dtype: DTypeLike | None, *, layer: str) -> ResultDType:
    if dtype is None or (isinstance(dtype, str) and dtype == "input"):
        return dtype
    return check_dtype(dtype, layer=layer, argument="dtype", others=', "input" or `None`')


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
