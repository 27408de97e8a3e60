import re
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State
from jaxtyping import Array

from .._batch_norm import BatchNorm
from .._dtypes import promote
from .._group_norm import GroupNorm
from .._kinds import base, type_name
from .._layer import AbstractNorm
from .._layer_norm import LayerNorm
from .._rms_norm import RMSNorm
from .._spectral_norm import SpectralNorm, SpectralStats
from .._trees import KeyPath, with_fields
from .._types import AxisName
from .._weight_norm import WeightNorm
from .._wrapped import AbstractWrapper
from ._common import over_last_axes, running_stats
from ._conversion import Builders, Conversion, Rules, parameters


def from_equinox(
    layer: Any, state: State | None = None, *, axis_name: AxisName = None
) -> Any:
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

    The dtype is what it was: that of the input after a `LayerNorm`, `RMSNorm` or
    `GroupNorm`, which become layers with `dtype="input"`; after a `BatchNorm` what input,
    scale and bias promote to. (Integers come out as float32, and not truncated.)

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
    - `axis_name`: as in [`eqx_norms.BatchNorm`][], and for no other layer. By default the
        one that the layer has; `()` for none.

    **Returns:**

    The layer; `(layer, state)` for `BatchNorm` and `SpectralNorm`. An RMSNorm with a bias
    has it in the field `bias`, which the constructor of [`eqx_norms.RMSNorm`][] cannot set.

    **Raises:**

    `ValueError` for anything else, for a `GroupNorm` that does not say how many channels
    it has, and for a state that is missing or holds nothing for this layer.

    **Warns:**

    For norms within a wrapped layer, as [`eqx_norms.replace_norms`][].
    """
    return _FromEquinox(state, {}, axis_name).convert_layer(layer)


def replace_norms(
    model: Any,
    state: State | None = None,
    *,
    rules: Mapping[type, Callable[[Any], Any]] | None = None,
    axis_name: AxisName = None,
) -> Any:
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
    it.

    Norms that are no layers of `equinox.nn` are left as they are, and listed in one
    warning: subclasses with a `__call__` of their own, and modules whose class has `Norm`
    in its name. `rules` says what becomes of them:

    !!! example

        ```python
        class LlamaNorm(eqx.Module):
            weight: jax.Array

            def __call__(self, x):
                y = x.astype(jnp.float32)
                y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
                return self.weight * y.astype(x.dtype)

        class ScaledLast(eqx.Module):
            norm: en.RMSNorm
            weight: jax.Array

            def __call__(self, x):
                return self.weight * self.norm(x)

        def renew(layer):
            norm = en.RMSNorm(layer.weight.size, use_scale=False, dtype="input")
            return ScaledLast(norm, layer.weight)

        model = [eqx.nn.LayerNorm(4), LlamaNorm(jnp.ones(4))]
        model = en.replace_norms(model, rules={LlamaNorm: renew})
        ```

    A rule for a layer with a state gets that by the way: `rules={MyNorm: lambda layer:
    renew(layer, state)}` reads `state.get(layer.index)`.

    A layer that cannot be converted is left and listed too: a `GroupNorm` that does not
    say how many channels it has; one whose weight is tied to another by
    `equinox.nn.Shared`, or is normalised itself by a wrapper around it. What is not in the
    tree cannot be found: what a function closes over, or a static field holds.

    Checkpoints of the model as it was load into the new one, but for those with a
    `BatchNorm`, `SpectralNorm` or `WeightNorm`:
    [Coming from](../coming-from.md#from-equinoxnn) tells why, and what to do.

    **Arguments:**

    - `model`: any PyTree.
    - `state`: the `equinox.nn.State` that belongs to it. What it holds for other layers is
        kept.
    - `rules`: from classes to functions. A layer of such a class, or of a subclass without
        a `__call__` of its own, becomes what the function makes of it: another layer; a
        pair `(layer, state)`, as `equinox.nn.make_with_state` and `from_equinox` return
        it; or the layer itself, which then is left and not listed. Classes of `equinox.nn`
        may be among them.
    - `axis_name`: of every [`eqx_norms.BatchNorm`][] that comes of one of `equinox.nn`. By
        default the one that each has; `()` for none.

    **Returns:**

    The model, or with a state `(model, state)`.

    **Raises:**

    `ValueError` if there is nothing to replace in the model, and for a state that is
    missing or holds nothing for one of these layers.

    **Warns:**

    Once, with path, class and reason, for all norms that were left.
    """
    rules = {} if rules is None else rules
    if not isinstance(rules, Mapping) or not all(
        isinstance(cls, type) and callable(function) for cls, function in rules.items()
    ):
        raise ValueError(
            "replace_norms: `rules` must map classes to functions of a layer, "
            f"`{{MyNorm: lambda layer: ...}}`, got {rules!r}."
        )
    return _FromEquinox(state, rules, axis_name).convert_model(model)


class _FromEquinox(Conversion):
    package = "equinox.nn"
    of_layer = "from_equinox"
    of_model = "replace_norms"
    remedy = (
        "\n`replace_norms(..., rules={Class: function})` takes each layer of a class to "
        "what the function makes of it."
    )

    def __init__(self, state: State | None, rules: Rules, axis_name: AxisName):
        super().__init__(_BUILDERS, state, rules)
        self.axis_name = axis_name

    def resemblance(self, node: Any, around: bool) -> str | None:
        if not isinstance(node, eqx.Module) or not callable(node) or self.builder(node):
            return None
        if isinstance(node, (AbstractNorm, AbstractWrapper)):
            return None
        cls = base(node, self.package, self.builders)
        if cls is not None:
            return f"a subclass of `equinox.nn.{cls.__name__}` with a `__call__` of its own"
        if not around and _NAME.search(type(node).__name__):
            return "a class that is not of `equinox.nn`"
        return None


# No normal distribution, and no normalizing flow.
_NAME = re.compile("([Nn]orm|NORM)(?!al(?!i[sz](e|ation)))")


def _layer_norm(layer: Any, path: KeyPath, conversion: _FromEquinox) -> LayerNorm | RMSNorm:
    make = RMSNorm if isinstance(layer, eqx.nn.RMSNorm) else LayerNorm
    new = over_last_axes(make, layer.shape, layer.eps, "input")
    scale, bias = parameters(layer, "weight", "bias")
    return with_fields(new, scale=scale, bias=bias)


def _group_norm(layer: Any, path: KeyPath, conversion: _FromEquinox) -> GroupNorm:
    if layer.channels is None:
        raise ValueError(
            "A GroupNorm of `equinox.nn` with `channels=None` does not say how many "
            "features it has, which `eqx_norms.GroupNorm` must know. Make it with "
            "`channels`."
        )
    new = GroupNorm(
        layer.channels,
        layer.groups,
        epsilon=layer.eps,
        dtype="input",
        feature_axis=0,
        batch_axes=(),
    )
    scale, bias = parameters(layer, "weight", "bias")
    return with_fields(new, scale=scale, bias=bias)


def _batch_norm(layer: Any, path: KeyPath, conversion: _FromEquinox) -> BatchNorm:
    axis_name = conversion.axis_name
    new = BatchNorm(
        layer.input_size,
        use_running_average=layer.inference,
        axis=0,
        momentum=layer.momentum,
        epsilon=layer.eps,
        axis_name=layer.axis_name if axis_name is None else axis_name,
        debias=True,
    )
    if layer.mode == "ema":
        index = layer.ema_state_index
        mean, var = conversion.read(index)
        # How many it was is not known, only whether there was one. After very many, a
        # debiased step is a plain one.
        count = jnp.where(conversion.read(layer.ema_first_time_index), 0, 2**30)
    else:
        index = layer.batch_state_index
        mean, var = conversion.read(index)
        count = conversion.read(layer.batch_counter)
        with jax.numpy_dtype_promotion("standard"):
            seen = jnp.where(count == 0, 1, 1 - layer.momentum**count)[..., None]
            mean, var = mean / seen, var / seen
    scale, bias = parameters(layer, "weight", "bias")
    index = conversion.keep_state(index, running_stats(mean, var, count))
    return with_fields(new, scale=scale, bias=bias, state_index=index)


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


def _weight_norm(layer: Any, path: KeyPath, conversion: _FromEquinox) -> WeightNorm:
    _weight_of(layer, layer.g.size, layer.axis)
    new = WeightNorm(
        conversion.inner(layer, layer.weight_name, path),
        feature_axes=layer.axis,
        epsilon=0.0,
        where=lambda wrapped: getattr(wrapped, layer.weight_name),
    )
    shape = () if layer.axis is None else (layer.g.size,)
    return with_fields(new, scales=(layer.g.reshape(shape),))


def _spectral_norm(layer: Any, path: KeyPath, conversion: _FromEquinox) -> SpectralNorm:
    u, v = conversion.read(layer.uv_index)
    weight = _weight_of(layer, u.size, 0)
    if jnp.iscomplexobj(weight):
        raise ValueError(
            f"{type_name(layer)}: of a complex weight it does not find the largest "
            "singular value, as `eqx_norms.SpectralNorm` does: there is no counterpart."
        )
    dtype = promote(weight.dtype, u.dtype)
    new = SpectralNorm(
        conversion.inner(layer, layer.weight_name, path),
        n_steps=layer.num_power_iterations,
        epsilon=layer.eps,
        dtype=None if dtype == weight.dtype else dtype,
        update_stats=not layer.inference,
        where=lambda wrapped: getattr(wrapped, layer.weight_name),
        key=jax.random.key(0),  # Of vectors that the stored ones replace.
    )
    wide = promote(weight.dtype, jnp.float32)
    u, v = u.astype(wide), v.astype(wide)
    u = u.reshape(-1, *(1 for _ in weight.shape[1:]))
    v = v.reshape(1, *weight.shape[1:])
    sigma = jnp.sum(u * weight.astype(wide) * v)
    index = conversion.keep_state(layer.uv_index, (SpectralStats(u, v, sigma),))
    return with_fields(new, state_index=index)


_BUILDERS: Builders = {
    "BatchNorm": _batch_norm,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
    "SpectralNorm": _spectral_norm,
    "WeightNorm": _weight_norm,
}
