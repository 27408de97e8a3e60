import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State, StateIndex
from jax.core import Tracer
from jaxtyping import Array

from .._checks import as_tuple
from .._dtypes import promote
from .._instance_norm import InstanceNorm
from .._kinds import type_name
from .._layer import AbstractNorm
from .._rms_norm import RMSNorm
from .._statistics import abs_square
from .._trees import KeyPath, with_fields
from .._wrapped import AbstractWrapper, is_stateful
from ._conversion import Builders, Conversion, parameters


def to_equinox(layer: Any, state: State | None = None) -> Any:
    """Carries a norm over to `equinox.nn`, with its weights and its state: the opposite of
    [`eqx_norms.convert.from_equinox`][].

    In evaluation the result computes what the layer does for one example, up to rounding,
    and gives back the dtype of its input. So the layer must be for one example, with its
    features where Equinox has them:

    - `LayerNorm`, `RMSNorm`: `reduction_axes` and `feature_axes` are the same last axes,
        in order. The result takes no more axes than these: use `jax.vmap` for others.
    - `BatchNorm`: `axis=0`. The result has `mode="batch"`, and trains as the layer does,
        with `debias=True`. Without, the running statistics take plain steps, after a count
        of $2^{30}$; where `momentum` is `None`, by 0.99. A frozen one has
        `inference=True`.
    - `GroupNorm`: `feature_axis=0`, `batch_axes=()`, no `reduction_axes`.
        `InstanceNorm`: `feature_axes=0`, `batch_axes=()`. It becomes a GroupNorm with as
        many groups as features.
    - `WeightNorm`, `SpectralNorm`: one weight, which is a field of the wrapped layer, and
        no state there; at most one of `feature_axes`, in SpectralNorm 0. What `epsilon`
        does to the weights as they are is put into the scales.

    None has an `axis_name`, but for `BatchNorm`; `dtype` is such that the result has the
    dtype of the input where that is as wide as scale, bias and running statistics:
    `"input"` or `None`. A `scale_offset` is added to the scale, in float32 or wider. Where
    Equinox has both weight and bias or neither, the one that the layer does without is
    added, as ones or zeros.

    !!! example

        ```python
        norm = en.convert.to_equinox(en.GroupNorm(16, 4, feature_axis=0, batch_axes=()))
        ```

    **Arguments:**

    - `layer`: a [`eqx_norms.BatchNorm`][], `LayerNorm`, `RMSNorm`, `GroupNorm`,
        `InstanceNorm`, `WeightNorm` or `SpectralNorm`.
    - `state`: as in [`eqx_norms.convert.from_equinox`][].

    **Returns:**

    The layer; `(layer, state)` for `BatchNorm` and `SpectralNorm`.

    **Raises:**

    `ValueError` for anything else, and for a state that is missing or holds nothing for
    this layer.

    **Warns:**

    For norms within a wrapped layer, as [`eqx_norms.restore_norms`][].
    """
    return _ToEquinox(state).convert_layer(layer)


def restore_norms(model: Any, state: State | None = None) -> Any:
    """Puts layers of `equinox.nn` in the place of every norm of this library in a model,
    wherever it is in the tree, as [`eqx_norms.convert.to_equinox`][] does for one: the
    opposite of [`eqx_norms.replace_norms`][].

    !!! example

        ```python
        make = lambda: [en.BatchNorm(8, axis=0, axis_name="batch"), en.RMSNorm(8)]
        model, state = eqx.nn.make_with_state(make)()
        model, state = en.restore_norms(model, state)
        assert type(model[1]) is eqx.nn.RMSNorm
        ```

    Model and state given stay as they were. Layers that share their state go on to share
    it. What has no counterpart is left as it is, and listed in one warning; so is a norm
    class derived from one of this library. A model that calls its norms with a `mask`,
    `scale` or `bias` cannot call those of Equinox so.

    **Arguments:**

    - `model`: any PyTree.
    - `state`: the `equinox.nn.State` that belongs to it. What it holds for other layers is
        kept.

    **Returns:**

    The model, or with a state `(model, state)`.

    **Raises:**

    `ValueError` if there is nothing to replace in the model, and for a state that is
    missing or holds nothing for one of these layers.

    **Warns:**

    Once, with path, class and reason, for all norms that were left.
    """
    return _ToEquinox(state).convert_model(model)


class _ToEquinox(Conversion):
    package = "eqx_norms"
    of_layer = "to_equinox"
    of_model = "restore_norms"

    def __init__(self, state: State | None):
        super().__init__(_BUILDERS, state, {})
        # By marker, what Equinox's BatchNorm has in a state besides.
        self.counters: dict[Any, StateIndex] = {}

    def resemblance(self, node: Any, around: bool) -> str | None:
        if not isinstance(node, (AbstractNorm, AbstractWrapper)) or self.builder(node):
            return None
        return "a class of its own, or with a `__call__` of its own"

    def counter(self, index: StateIndex, count: Array) -> StateIndex:
        """The index of a counter beside one of statistics, the same for the same one."""
        new = self.counters.setdefault(index.marker, StateIndex(count))
        if isinstance(index.marker, str):
            # As `make_with_state` names it.
            name = f"{index.marker.rpartition('.')[0]}.batch_counter"
            return with_fields(new, marker=name)
        return new


def _require(layer: Any, **wanted: Any) -> None:
    found = {name: getattr(layer, name) for name in wanted}
    if found != wanted:
        wants, has = (
            ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
            for settings in (wanted, found)
        )
        raise layer._check.error(
            f"needs {wants}, which is what `equinox.nn` computes for one example, has "
            f"{has}."
        )


def _require_dtype(layer: Any, dtype: Any, x: Any, *others: Array | None) -> None:
    """Whether a result for `x` has the dtype that Equinox's layer gives it."""
    result = layer._check.dtype_of(layer.dtype, x, *others)
    if result != dtype:
        raise layer._check.error(
            f"with `dtype={layer.dtype}` it gives {result} for {x.dtype}, the layer of "
            f"`equinox.nn` {dtype}. Make it with another `dtype`."
        )


def _require_positive(layer: Any, values: Array, what: str) -> None:
    # Under `jax.jit` nobody knows.
    if not isinstance(values, Tracer) and not jnp.all(values > 0):
        raise layer._check.error(
            f"a weight has {what} zero, by which `equinox.nn` divides."
        )


def _affine(layer: Any, *stats: Array, both: bool = False) -> tuple[Any, Any]:
    """Scale and bias, as Equinox's layers have them: the whole scale, both or neither."""
    scale, bias = parameters(layer, "scale", "bias")
    arrays = [array for array in (scale, bias, *stats) if array is not None]
    dtype = promote(*arrays) if arrays else np.dtype(np.float32)
    _require_dtype(layer, dtype, jnp.zeros((), dtype), scale, bias)
    if scale is not None and layer.scale_offset != 0:
        wide = scale.astype(promote(scale, jnp.float32))
        scale = wide + jnp.asarray(layer.scale_offset, wide.dtype)
    if both and scale is None and bias is not None:
        scale = jnp.ones_like(bias)
    if both and bias is None and scale is not None:
        bias = jnp.zeros_like(scale)
    return scale, bias


def _layer_norm(layer: Any, path: KeyPath, conversion: _ToEquinox) -> Any:
    shape = as_tuple(layer.num_features)
    axes = tuple(range(-len(shape), 0))
    order = layer.reduction_axes if set(layer.reduction_axes) == set(axes) else axes
    _require(layer, feature_axes=axes, reduction_axes=order, axis_name=None)
    scale, bias = _affine(layer)
    rms = isinstance(layer, RMSNorm)
    if rms and scale is not None and jnp.iscomplexobj(scale):
        raise ValueError(
            "RMSNorm: that of `equinox.nn` takes the mean of squares, not of squared "
            "absolute values, which complex input needs."
        )
    make = eqx.nn.RMSNorm if rms else eqx.nn.LayerNorm
    new = make(shape, layer.epsilon, scale is not None, bias is not None)
    return with_fields(new, weight=scale, bias=bias)


def _group_norm(layer: Any, path: KeyPath, conversion: _ToEquinox) -> eqx.nn.GroupNorm:
    (size,) = as_tuple(layer.num_features)[:1]
    if isinstance(layer, InstanceNorm):
        _require(layer, feature_axes=(0,), batch_axes=(), axis_name=None)
        groups = size
    else:
        _require(layer, feature_axis=0, batch_axes=(), reduction_axes=None, axis_name=None)
        groups = layer.num_groups
    scale, bias = _affine(layer, both=True)
    new = eqx.nn.GroupNorm(groups, size, layer.epsilon, scale is not None)
    return with_fields(new, weight=scale, bias=bias)


def _batch_norm(layer: Any, path: KeyPath, conversion: _ToEquinox) -> eqx.nn.BatchNorm:
    _require(layer, axis=(0,), axis_index_groups=None)
    stats = conversion.read(layer.state_index)
    scale, bias = _affine(layer, stats.mean, stats.var, both=True)
    momentum = 0.99 if layer.momentum is None else layer.momentum
    # Equinox divides its averages by 1 - momentum^n after n batches. Those without debias
    # are stored as they are where that is one: of so many batches, or of none.
    many = 2**30
    if np.float32(momentum) ** np.float32(many) != 0:
        raise ValueError(
            f"BatchNorm: that of `equinox.nn` divides by zero for `momentum={momentum}`."
        )
    count = jnp.max(stats.count, -1).astype(jnp.array(0).dtype)
    rest = momentum ** count.astype(float)
    mean, var = stats.mean, stats.var
    if layer.debias and layer.momentum is not None:
        seen = jnp.where(count == 0, 1, 1 - rest)[..., None]
        mean, var = mean * seen.astype(mean.dtype), var * seen.astype(var.dtype)
    else:
        count = jnp.where((count == 0) | (rest == 0), count, many)
    names = layer.axis_name or ()
    (size,) = as_tuple(layer.num_features)
    new = eqx.nn.BatchNorm(
        size,
        names[0] if len(names) == 1 else names,
        layer.epsilon,
        scale is not None,
        momentum,
        layer._evaluates(None),
        mode="batch",
    )
    return with_fields(
        new,
        weight=scale,
        bias=bias,
        batch_state_index=conversion.keep_state(layer.state_index, (mean, var)),
        batch_counter=conversion.counter(layer.state_index, count),
    )


def _weight_of(layer: Any) -> tuple[str, Array]:
    """The name of the weight that a wrapper works on, and that weight."""
    (path, *others), (weight, *_) = layer.weights, layer._weights()
    if others or not re.fullmatch(r"\.\w+", path) or is_stateful(layer.layer):
        raise layer._check.error(
            "that of `equinox.nn` has one weight, a field of a layer without a state, this "
            f"one {list(layer.weights)} of a {type_name(layer.layer)}."
        )
    if weight.ndim != layer.ranks[0]:
        raise layer._check.error(
            "these are several, made under `equinox.filter_vmap`. Convert them under it "
            "too."
        )
    return path[1:], weight


def _weight_norm(layer: Any, path: KeyPath, conversion: _ToEquinox) -> eqx.nn.WeightNorm:
    name, weight = _weight_of(layer)
    axes, reduction = layer._reduction(weight)
    if len(axes) > 1:
        raise ValueError(
            "WeightNorm: that of `equinox.nn` has one feature axis or none, this one "
            f"{axes}."
        )
    square = reduction.sum(abs_square(weight.astype(promote(weight, jnp.float32))))
    _require_positive(layer, square, "a length of")
    (scale,) = layer._own()
    _require_dtype(
        layer, promote(weight, weight if scale is None else scale), weight, scale
    )
    # One, where epsilon is lost in the sum's rounding.
    ratio = jnp.sqrt(square / (square + layer.epsilon))
    g = jnp.ones_like(square, weight.dtype) if scale is None else scale
    g = g * ratio.astype(g.dtype)
    shape = [size if axis in axes else 1 for axis, size in enumerate(weight.shape)]
    axis = axes[0] if axes else None
    new = eqx.nn.WeightNorm(conversion.inner(layer, name, path), name, axis)
    return with_fields(new, g=g.reshape(shape))


def _spectral_norm(
    layer: Any, path: KeyPath, conversion: _ToEquinox
) -> eqx.nn.SpectralNorm:
    name, weight = _weight_of(layer)
    (stats,) = conversion.read(layer.state_index)
    axes, _ = layer._axes(weight)
    if axes != (0,) or jnp.iscomplexobj(weight):
        raise ValueError(
            "SpectralNorm: that of `equinox.nn` has the rows along axis 0 of a real "
            f"weight, this one along {axes} of one of dtype {weight.dtype}."
        )
    _require_dtype(layer, promote(weight, stats.u), weight)
    stats = layer._update(weight, stats, 0)
    _require_positive(layer, stats.sigma - layer.epsilon, "a largest singular value of")
    # Of the sign, and the length, with which the product is the singular value.
    product = jnp.sum(stats.u * weight.astype(stats.u.dtype) * stats.v)
    u = stats.u * (stats.sigma / product)
    new = eqx.nn.SpectralNorm(
        conversion.inner(layer, name, path),
        name,
        layer.n_steps,
        layer.epsilon,
        not layer._updates(None),
        key=jax.random.key(0),  # Of vectors that the stored ones replace.
    )
    index = conversion.keep_state(layer.state_index, (u.ravel(), stats.v.ravel()))
    return with_fields(new, uv_index=index)


_BUILDERS: Builders = {
    "BatchNorm": _batch_norm,
    "GroupNorm": _group_norm,
    "InstanceNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
    "SpectralNorm": _spectral_norm,
    "WeightNorm": _weight_norm,
}
