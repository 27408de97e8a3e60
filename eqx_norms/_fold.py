import copy
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State

from ._batch_norm import BatchNorm
from ._checks import as_tuple
from ._dtypes import cast, promote


Layer = TypeVar("Layer")


def fold_batch_norm(layer: Layer, bn: Any, state: State) -> Layer:
    r"""Makes one layer of a linear one and the [`eqx_norms.BatchNorm`][] that follows it,
    for evaluation.

    With the running mean $m$ and variance $v$,

    $$W' = \frac{\gamma}{\sqrt{v + \varepsilon}} W, \qquad
    b' = \frac{\gamma}{\sqrt{v + \varepsilon}} (b - m) + \beta.$$

    **Arguments:**

    - `layer`: an `equinox.nn.Linear`, `Conv` or `ConvTranspose`, or one of their kinds for
        a given number of dimensions.
    - `bn`: the BatchNorm, whose features are the outputs of `layer`. Whether it is in
        training or evaluation does not matter.
    - `state`: the model's `equinox.nn.State`, with the running statistics. It stays usable.

    **Returns:**

    A layer of the same type and settings, with a bias. It is computed in float32 or wider
    and has the dtype of the weight of `layer`, whatever the `dtype` of `bn`.

    **Raises:**

    `ValueError` if `layer` or `bn` is of another kind, if `bn` has several feature axes or
    as many features as `layer` has no outputs, if its result is complex where the weight is
    real, or if `state` belongs to another model.

    !!! example

        ```python
        conv = eqx.nn.Conv2d(3, 16, 3, key=jax.random.key(0))
        norm, state = eqx.nn.make_with_state(en.BatchNorm)(16, axis=0)
        conv = en.fold_batch_norm(conv, norm, state)
        ```
    """
    if not isinstance(layer, (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)):
        raise ValueError(
            "fold_batch_norm: `layer` must be an `equinox.nn.Linear`, `Conv` or "
            f"`ConvTranspose`, got {type(layer).__name__}."
        )
    if not isinstance(bn, BatchNorm):
        raise ValueError(
            "fold_batch_norm: `bn` must be an `eqx_norms.BatchNorm`, got "
            f"{type(bn).__module__}.{type(bn).__name__}."
        )
    weight = layer.weight
    features, outputs = as_tuple(bn.num_features), weight.shape[0]
    if features != (outputs,):
        raise ValueError(
            f"fold_batch_norm: `bn` must have one feature for each of the {outputs} "
            f"outputs of {type(layer).__name__}, got `num_features={bn.num_features}` "
            f"along `axis={bn.axis}`."
        )
    # As the layer computes it, but on a vector, and without a cast at the end.
    evaluation = _replace(bn, frozen=True, axis=(0,), dtype=None)
    dtype = promote(weight.dtype, jnp.float32)
    bias = jnp.zeros(outputs, dtype)
    if layer.bias is not None:
        bias = layer.bias.reshape(outputs).astype(dtype)
    # It is affine in each feature: its derivative is what it multiplies with.
    bias, factor = jax.jvp(
        lambda x: evaluation(x, state)[0], (bias,), (jnp.ones_like(bias),)
    )
    if jnp.iscomplexobj(bias) and not jnp.iscomplexobj(weight):
        raise ValueError(
            f"fold_batch_norm: a weight of dtype {weight.dtype} cannot hold the result, "
            f"which is of dtype {bias.dtype}. Give `layer` a complex weight."
        )
    # The outputs are the first axis of the weight, with groups and transposed as well.
    trailing = (1,) * (weight.ndim - 1)
    new = weight.astype(factor.dtype) * factor.reshape(outputs, *trailing)
    # That of a convolution has the rank of an output.
    trailing = () if isinstance(layer, eqx.nn.Linear) else trailing[1:]
    return _replace(
        layer,
        weight=cast(new, weight.dtype),
        bias=cast(bias, weight.dtype).reshape(outputs, *trailing),
        use_bias=True,
    )


def _replace(module: Any, **fields: Any) -> Any:
    """A copy with other fields, static ones among them, which `equinox.tree_at` cannot."""
    new = copy.copy(module)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new
