"""Scale and bias: created, and laid out with those that are given at the call."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ._axes import check_integers, feature_shape, to_features, to_rank
from ._dtypes import check_dtype
from ._types import DTypeLike, Initializer, Shape


def check_num_features(
    num_features: int | tuple[int, ...], feature_axes: tuple[int, ...], *, layer: str
) -> Shape:
    """The feature shape, in the order of `feature_axes`."""
    shape = check_integers(num_features, layer=layer, argument="num_features")
    if len(shape) != len(feature_axes):
        raise ValueError(
            f"{layer}: `num_features` must have one size for each feature axis, got "
            f"{num_features} for the axes {feature_axes}."
        )
    if any(size < 1 for size in shape):
        raise ValueError(f"{layer}: `num_features` must be positive, got {num_features}.")
    return shape


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
    keys = (None, None) if key is None else jax.random.split(key)
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


def lay_out(
    learned: Array | None,
    given: Array | None,
    x: Array,
    feature_axes: tuple[int, ...],
    *,
    layer: str,
    argument: str,
) -> tuple[Array, ...]:
    """What there is of the two, of the rank of `x`."""
    terms = []
    if learned is not None:
        terms.append(to_features(learned, feature_axes, x))
    if given is not None:
        if given.shape == feature_shape(x.shape, feature_axes):
            terms.append(to_features(given, feature_axes, x))
        else:
            terms.append(to_rank(given, x, layer=layer, argument=argument))
    return tuple(terms)
