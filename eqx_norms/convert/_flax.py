import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from equinox.nn import State

from .._batch_norm import BatchNorm
from .._checks import Check, as_tuple
from .._group_norm import GroupNorm
from .._instance_norm import InstanceNorm
from .._kinds import kind, type_name
from .._layer_norm import LayerNorm
from .._rms_norm import RMSNorm
from .._types import AxisName
from ._common import as_num_features, check_entries, check_order, contents, with_contents


_COMMON = ("epsilon", "dtype", "axis_name", "axis_index_groups", "use_fast_variance")
# By class of Flax: ours, the attribute that says where the features are, and the settings
# besides the common ones.
_KINDS: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {
    "BatchNorm": (BatchNorm, "axis", ("momentum",)),
    "LayerNorm": (LayerNorm, "feature_axes", ("reduction_axes",)),
    "RMSNorm": (RMSNorm, "feature_axes", ("reduction_axes",)),
    "GroupNorm": (GroupNorm, None, ("num_groups", "reduction_axes")),
    "InstanceNorm": (InstanceNorm, "feature_axes", ()),
}
_COLLECTIONS = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}


def from_flax(
    layer: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    num_features: int | tuple[int, ...] | None = None,
    axis_name: AxisName = None,
) -> Any:
    """Carries a norm of Flax over, with its settings, its parameters and its statistics.

    The result computes what the layer did, up to rounding: statistics that Flax would
    square before it shifts them, or read in half precision, are more exact.

    !!! example

        ```python
        from flax import nnx

        norm, norm_state = en.convert.from_flax(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))

        # Into a model that has such a layer, and its state:
        model, state = eqx.nn.make_with_state(lambda: [en.BatchNorm(3)])()
        state = state.set(model[0].state_index, norm.running_stats(norm_state))
        parameters = lambda layer: (layer.scale, layer.bias)
        model[0] = eqx.tree_at(parameters, model[0], parameters(norm))
        ```

    **Arguments:**

    - `layer`: a `BatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm` or `InstanceNorm` of
        `flax.nnx` or `flax.linen`.
    - `variables`: of a `flax.linen` module, that is of this one module: `{"params": {...},
        "batch_stats": {...}}`. An nnx layer has its own.
    - `num_features`: how many features there are, along several feature axes in the order
        of the input's axes. Needed only where the layer does not tell: a `flax.linen`
        module without scale and bias, or an nnx layer with several feature axes.
    - `axis_name`: as in [`eqx_norms.BatchNorm`][], and for no other layer. By default the
        one that the layer has; `()` for none.

    **Returns:**

    The layer; `(layer, state)` for `BatchNorm`. Flax does not count batches, so the count
    in the state is zero. A linen `use_running_average=None` is taken for `False`.

    **Raises:**

    `ValueError` for any other layer; if the variables are not those of the layer; for an
    nnx layer with a `promote_dtype` of its own.
    """
    is_nnx = any(cls.__module__.startswith("flax.nnx.") for cls in type(layer).__mro__)
    package = "flax.nnx" if is_nnx else "flax.linen"
    name = kind(layer, package, _KINDS)
    if name is None:
        wraps = kind(layer, package, ("WeightNorm", "SpectralNorm"))
        raise ValueError(
            f"from_flax: no counterpart for {type_name(layer)}. "
            + (
                "It wraps a layer of Flax, which would have to be one of Equinox: wrap "
                f"that one in `eqx_norms.{wraps}`."
                if wraps
                else f"There is one for {', '.join(_KINDS)} of `flax.nnx` and "
                "`flax.linen`, and their subclasses without a `__call__` of their own."
            )
        )
    make, axes_name, settings = _KINDS[name]
    check = Check(f"from_flax({name})")
    axes = (-1,) if axes_name is None else as_tuple(getattr(layer, axes_name))
    check_order(axes, check)
    axes = tuple(sorted(axes))
    if is_nnx:
        arrays = _nnx_arrays(layer, variables, check)
    else:
        arrays = _linen_arrays(variables, check)
    used = [key for key in ("scale", "bias") if getattr(layer, f"use_{key}", False)]
    expected = [f"params/{key}" for key in used]
    if name == "BatchNorm":
        expected += ["batch_stats/mean", "batch_stats/var"]
    shape = _feature_shape(layer, arrays, expected, axes, num_features, check)
    if is_nnx and len(axes) > 1:
        # They are kept in one, in the order of the input's axes.
        arrays = {
            key: value.reshape(shape) if value.size == math.prod(shape) else value
            for key, value in arrays.items()
        }
    check_entries(arrays, dict.fromkeys(expected, shape), check)

    options = {option: getattr(layer, option) for option in (*_COMMON, *settings)}
    if axes_name is not None:
        options[axes_name] = axes
    if name == "BatchNorm":
        options["use_running_average"] = bool(layer.use_running_average)
        if axis_name is not None:
            options["axis_name"] = axis_name
    if name == "GroupNorm" and layer.num_groups is None:
        options["group_size"] = layer.group_size
    new = make(as_num_features(shape), **options)
    named = {key.partition("/")[2]: jnp.asarray(value) for key, value in arrays.items()}
    return with_contents(new, named)


def to_flax_variables(layer: Any, state: State | None = None) -> dict[str, Any]:
    """Carries a norm over to Flax: its parameters and statistics, without its settings.

    !!! example

        ```python
        from flax import linen, nnx

        norm, state = eqx.nn.make_with_state(en.BatchNorm)(3)
        variables = en.convert.to_flax_variables(norm, state)
        y = linen.BatchNorm(use_running_average=True).apply(variables, jnp.ones((2, 3)))

        # Into an nnx layer, where the features of several axes are flattened to one:
        layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        for collection in variables.values():
            for name, value in collection.items():
                getattr(layer, name)[...] = value.reshape(-1)
        ```

    **Arguments:**

    - `layer`: a [`eqx_norms.BatchNorm`][], `LayerNorm`, `RMSNorm`, `GroupNorm` or
        `InstanceNorm`.
    - `state`: the `equinox.nn.State` that belongs to it, for `BatchNorm`.

    **Returns:**

    `{"params": {"scale": ..., "bias": ...}, "batch_stats": {"mean": ..., "var": ...}}`, as
    much of it as there is, as `flax.linen` lays it out.

    **Raises:**

    `ValueError` for any other layer, without the state of a `BatchNorm`, and for what Flax
    does not have: a `scale_offset`, a bias in an RMSNorm.
    """
    arrays = contents(layer, state, Check("to_flax_variables"))
    variables = {
        collection: {name: arrays[name] for name in names if name in arrays}
        for collection, names in _COLLECTIONS.items()
    }
    return {collection: values for collection, values in variables.items() if values}


def _nnx_arrays(
    layer: Any, variables: Mapping[str, Any] | None, check: Check
) -> dict[str, Any]:
    """The variables, by collection and name."""
    from flax.nnx.nn.dtypes import promote_dtype

    if variables is not None:
        raise check.error("an nnx layer has its variables; give it alone.")
    if getattr(layer, "promote_dtype", promote_dtype) is not promote_dtype:
        raise check.error(
            "the layer has a `promote_dtype` of its own, and what that does has no "
            "counterpart. Use `dtype` and `param_dtype`."
        )
    return {
        f"{collection}/{key}": getattr(layer, key)[...]
        for collection, keys in _COLLECTIONS.items()
        for key in keys
        if getattr(layer, key, None) is not None
    }


def _linen_arrays(variables: Mapping[str, Any] | None, check: Check) -> dict[str, Any]:
    """The variables, by collection and name."""
    if variables is None:
        raise check.error(
            "a `flax.linen` module needs its variables: `from_flax(module, variables)`."
        )
    if not isinstance(variables, Mapping) or not all(
        isinstance(entries, Mapping) for entries in variables.values()
    ):
        raise check.error(
            f"the variables must be those of this one module, by collection: "
            f'`{{"params": {{"scale": ..., "bias": ...}}}}`, found {variables!r:.200}.'
        )
    from flax.core import meta

    return {
        f"{collection}/{key}": value
        for collection, entries in meta.unbox(variables).items()
        for key, value in entries.items()
    }


def _feature_shape(
    layer: Any,
    arrays: dict[str, Any],
    expected: list[str],
    axes: tuple[int, ...],
    num_features: int | tuple[int, ...] | None,
    check: Check,
) -> tuple[Any, ...]:
    shapes = [np.shape(arrays[key]) for key in expected if key in arrays]
    if num_features is not None:
        shape = as_tuple(num_features)
    elif shapes:
        shape = shapes[0]
    elif getattr(layer, "num_features", None) is not None:
        shape = (layer.num_features,)
    else:
        # If there should be entries, the check of them says what there is instead.
        shape = ("n",) * len(axes) if expected else ()
    if len(shape) != len(axes):
        raise check.error(
            f"cannot tell how many features there are along {axes}. Say so: "
            f"`from_flax(..., num_features={'n' if len(axes) == 1 else '(n, m)'})`."
        )
    return shape
