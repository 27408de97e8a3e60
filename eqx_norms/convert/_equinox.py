from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State, StateIndex
from jaxtyping import Array

from .._batch_norm import BatchNorm
from .._dtypes import promote
from .._group_norm import GroupNorm
from .._layer_norm import LayerNorm
from .._rms_norm import RMSNorm
from .._spectral_norm import SpectralNorm, SpectralStats
from .._state import get_state
from .._trees import find_nodes
from .._weight_norm import WeightNorm
from ._common import (
    as_num_features,
    kind,
    running_stats,
    type_name,
    with_init,
    with_parameters,
    with_state,
)


# Gives the value that a layer keeps in the state.
_Read = Callable[[StateIndex], Any]


def from_equinox(layer: Any, state: State | None = None) -> Any:
    r"""Carries a norm of `equinox.nn` over, with its weights and its state.

    In evaluation the result computes what the layer did, up to rounding, on one example as
    in Equinox. In training too, but for:

    - `BatchNorm(mode="ema")`, which normalises with its running average; ours normalises
        with the statistics of the batch.
    - The running statistics of a `BatchNorm` that was never trained: the first batch takes
        the place of the initial ones, with `debias=True`. Equinox's `mode="batch"` counts a
        first variance of 1 as well. From a trained one they go on as Equinox's: in
        `mode="batch"`, what Equinox reads, by its count; in `mode="ema"`, where it is not
        known how many batches there were, by plain steps, and a count of $2^{30}$.
    - `SpectralNorm`, where each call stores the vector $v$ half a step of power iteration
        earlier.

    The result's dtype is what input, scale and bias promote to; in Equinox's `LayerNorm`,
    `RMSNorm` and `GroupNorm` it is that of the input.

    !!! example

        ```python
        norm = en.convert.from_equinox(eqx.nn.GroupNorm(4, 16))
        ```

    **Arguments:**

    - `layer`: a `BatchNorm`, `GroupNorm`, `LayerNorm`, `RMSNorm`, `SpectralNorm` or
        `WeightNorm` of `equinox.nn`.
    - `state`: the `equinox.nn.State` of the model that the layer is in. May be left out
        for a layer that `equinox.nn.make_with_state` has not seen: then its initial state
        is carried over.

    **Returns:**

    The layer; `(layer, state)` for `BatchNorm` and `SpectralNorm`. An RMSNorm with a bias
    has it in the field `bias`, which the constructor of [`eqx_norms.RMSNorm`][] cannot set.

    **Raises:**

    `ValueError` for anything else, for a `GroupNorm` that does not say how many channels
    it has, and for a state that is missing or holds nothing for this layer.
    """
    if not _is_norm(layer):
        raise ValueError(
            f"from_equinox: no counterpart for {type_name(layer)}. There is one for "
            f"{', '.join(_BUILDERS)} of `equinox.nn`, and their subclasses without a "
            "`__call__` of their own. `replace_norms` takes whole models."
        )
    return with_state(_convert(layer, _reader(state)))


def replace_norms(model: Any, state: State | None = None) -> Any:
    """Carries every norm of `equinox.nn` in a model over, wherever it is in the tree, as
    [`eqx_norms.convert.from_equinox`][] does for one.

    !!! example

        ```python
        def make(key):
            linear = eqx.nn.Linear(3, 8, key=key)
            norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
            return eqx.nn.Sequential([linear, norm, eqx.nn.LayerNorm(8)])

        model, state = eqx.nn.make_with_state(make)(jax.random.key(0))
        model, state = en.replace_norms(model, state)

        # Or, before there is a state:
        renewed = lambda key: en.replace_norms(make(key))
        model, state = eqx.nn.make_with_state(renewed)(jax.random.key(0))
        ```

    Model and state given stay as they were. Layers that share their state go on to share
    it. Subclasses with a `__call__` of their own are left alone. A weight of a norm that
    is tied to another one by `equinox.nn.Shared` cannot be carried over; whole layers can.

    **Arguments:**

    - `model`: any PyTree.
    - `state`: the `equinox.nn.State` that belongs to it. What it holds for other layers is
        kept.

    **Returns:**

    The model, or with a state `(model, state)`.

    **Raises:**

    `ValueError` if there is no norm in the model, and as `from_equinox`.
    """
    norms = [n for n in jax.tree.leaves(model, is_leaf=_is_norm) if _is_norm(n)]
    if not norms:
        raise ValueError(
            "replace_norms: there is no norm in this model: no "
            f"{', '.join(_BUILDERS)} of `equinox.nn`."
        )
    new = _replace(model, _reader(state))
    if state is None:
        return new
    # A new layer's state has the marker of one of the old layer's.
    old = {index.marker for index in find_nodes(norms, StateIndex).values()}
    indices = find_nodes(new, StateIndex).values()
    values = {index.marker: index.init for index in indices if index.marker in old}
    entries = {
        marker: values.get(marker, value)
        for value, marker in zip(*state.tree_flatten(), strict=True)
        if marker in values or marker not in old
    }
    state = State.tree_unflatten(tuple(entries), tuple(entries.values()))
    return eqx.nn.delete_init_state(new), state


def _is_norm(node: Any) -> bool:
    return kind(node, "equinox.nn", _BUILDERS, "__call__") is not None


def _convert(layer: Any, read: _Read) -> Any:
    name = kind(layer, "equinox.nn", _BUILDERS, "__call__")
    assert name is not None
    return _BUILDERS[name](layer, read)


def _replace(model: Any, read: _Read) -> Any:
    return jax.tree.map(
        lambda node: _convert(node, read) if _is_norm(node) else node,
        model,
        is_leaf=_is_norm,
    )


def _reader(state: State | None) -> _Read:
    def read(index: StateIndex) -> Any:
        if state is not None:
            return get_state(state, index, layer="equinox.nn")
        try:
            return State(index).get(index)
        except ValueError:
            raise ValueError(
                "A norm of `equinox.nn` has a state, and `equinox.nn.make_with_state` took "
                "it out of the layer. Give it too: `from_equinox(layer, state)`, "
                "`replace_norms(model, state)`."
            ) from None

    return read


def _keep_state(new: Any, index: StateIndex, value: Any) -> Any:
    """Gives a new layer its state under the marker of an old one, so that layers that
    shared the old state share the new one."""
    new = eqx.tree_at(lambda layer: layer.state_index, new, index)
    return with_init(new, value)


def _parameters(layer: Any) -> tuple[Array | None, Array | None]:
    for parameter in (layer.weight, layer.bias):
        if not (parameter is None or hasattr(parameter, "dtype")):
            raise ValueError(
                f"{type_name(layer)}: weight and bias must be arrays, found "
                f"{parameter!r}. If `equinox.nn.Shared` ties it to another one, convert "
                "the layers before they are tied."
            )
    return layer.weight, layer.bias


def _layer_norm(layer: Any, read: _Read) -> LayerNorm | RMSNorm:
    make = RMSNorm if isinstance(layer, eqx.nn.RMSNorm) else LayerNorm
    axes = tuple(range(-len(layer.shape), 0))
    new = make(
        as_num_features(layer.shape),
        epsilon=layer.eps,
        reduction_axes=axes,
        feature_axes=axes,
    )
    return with_parameters(new, *_parameters(layer))


def _group_norm(layer: Any, read: _Read) -> GroupNorm:
    if layer.channels is None:
        raise ValueError(
            "A GroupNorm of `equinox.nn` with `channels=None` does not say how many "
            "features it has, which `eqx_norms.GroupNorm` must know. Make it with "
            "`channels`."
        )
    new = GroupNorm(
        layer.channels, layer.groups, epsilon=layer.eps, feature_axis=0, batch_axes=()
    )
    return with_parameters(new, *_parameters(layer))


def _batch_norm(layer: Any, read: _Read) -> BatchNorm:
    new = BatchNorm(
        layer.input_size,
        use_running_average=layer.inference,
        axis=0,
        momentum=layer.momentum,
        epsilon=layer.eps,
        axis_name=layer.axis_name,
        debias=True,
    )
    if layer.mode == "ema":
        index = layer.ema_state_index
        mean, var = read(index)
        # How many it was is not known, only whether there was one. After very many, a
        # debiased step is a plain one.
        count = jnp.where(read(layer.ema_first_time_index), 0, 2**30)
    else:
        index = layer.batch_state_index
        mean, var = read(index)
        count = read(layer.batch_counter)
        with jax.numpy_dtype_promotion("standard"):
            seen = jnp.where(count == 0, 1, 1 - layer.momentum**count)[..., None]
            mean, var = mean / seen, var / seen
    new = with_parameters(new, *_parameters(layer))
    return _keep_state(new, index, running_stats(mean, var, count))


def _weight_of(layer: Any, size: int, axis: int | None) -> Array:
    """The weight that a wrapper works on, with something of this size along an axis."""
    weight = getattr(layer.layer, layer.weight_name)
    if size != (1 if axis is None else weight.shape[axis]):
        raise ValueError(
            f"{type_name(layer)}: a weight of shape {weight.shape} does not fit something "
            f"of size {size} along its axis {axis}. If these are several layers made under "
            "`equinox.filter_vmap`, convert them under it too."
        )
    return weight


def _weight_norm(layer: Any, read: _Read) -> WeightNorm:
    _weight_of(layer, layer.g.size, layer.axis)
    new = WeightNorm(
        _replace(layer.layer, read),
        feature_axes=layer.axis,
        epsilon=0.0,
        where=lambda wrapped: getattr(wrapped, layer.weight_name),
    )
    shape = () if layer.axis is None else (layer.g.size,)
    return eqx.tree_at(lambda layer: layer.scales, new, (layer.g.reshape(shape),))


def _spectral_norm(layer: Any, read: _Read) -> SpectralNorm:
    u, v = read(layer.uv_index)
    weight = _weight_of(layer, u.size, 0)
    if jnp.iscomplexobj(weight):
        raise ValueError(
            f"{type_name(layer)}: of a complex weight it does not find the largest "
            "singular value, as `eqx_norms.SpectralNorm` does: there is no counterpart."
        )
    new = SpectralNorm(
        _replace(layer.layer, read),
        n_steps=layer.num_power_iterations,
        epsilon=layer.eps,
        update_stats=not layer.inference,
        where=lambda wrapped: getattr(wrapped, layer.weight_name),
        key=jax.random.key(0),  # Of vectors that the stored ones replace.
    )
    dtype = promote(weight.dtype, jnp.float32)
    u, v = u.astype(dtype), v.astype(dtype)
    u = u.reshape(-1, *(1 for _ in weight.shape[1:]))
    v = v.reshape(1, *weight.shape[1:])
    sigma = jnp.sum(u * weight.astype(dtype) * v)
    return _keep_state(new, layer.uv_index, (SpectralStats(u, v, sigma),))


_BUILDERS: dict[str, Callable[[Any, _Read], Any]] = {
    "BatchNorm": _batch_norm,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
    "SpectralNorm": _spectral_norm,
    "WeightNorm": _weight_norm,
}
