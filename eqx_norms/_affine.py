"""Scale and bias, as a constructor creates them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ._checks import check_dtype, split_key
from ._types import DTypeLike, Initializer, Shape


def init_affine(
    shape: Shape,
    dtype: DTypeLike,
    key: PRNGKeyArray | None,
    *,
    scale_init: Initializer | None,
    bias_init: Initializer | None,
    layer: str,
) -> tuple[Array | None, Array | None]:
    """Scale and bias, each `None` without an initializer."""
    keys = (None, None) if key is None else split_key(key, 2, layer=layer)
    dtype = check_dtype(dtype, layer=layer, argument="param_dtype")
    return (
        _init(scale_init, shape, dtype, keys[0], layer=layer, argument="scale_init"),
        _init(bias_init, shape, dtype, keys[1], layer=layer, argument="bias_init"),
    )


def _init(
    init: Initializer | None,
    shape: Shape,
    dtype: np.dtype,
    key: PRNGKeyArray | None,
    *,
    layer: str,
    argument: str,
) -> Array | None:
    if init is None:
        return None
    if not callable(init):
        raise ValueError(
            f"{layer}: `{argument}` must be a function `(key, shape, dtype) -> array`, as "
            f"in `jax.nn.initializers`, got one of type {type(init).__name__}."
        )
    try:
        value = jnp.asarray(init(key, shape, dtype))
    except Exception as error:
        if key is not None:
            raise
        raise ValueError(
            f"{layer}: `{argument}` failed without a random key. If it draws random "
            "numbers, give the layer one: `key=jax.random.key(...)`."
        ) from error
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{layer}: `{argument}` must return shape {shape} and dtype {dtype}, got "
            f"shape {value.shape} and dtype {value.dtype}."
        )
    return value.astype(dtype)  # not weakly typed, whatever the initializer returned
