from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from equinox.nn import State

from .._batch_norm import BatchNorm
from .._checks import Check, as_tuple
from .._freeze import freeze
from .._group_norm import GroupNorm
from .._instance_norm import InstanceNorm
from .._kinds import kind, type_name
from .._layer import AbstractNorm
from .._layer_norm import LayerNorm
from .._rms_norm import RMSNorm
from .._trees import with_fields
from .._types import AxisName
from .._wrapped import AbstractWrapper
from ._common import (
    LAYERS,
    check_entries,
    check_order,
    contents,
    feature_axes,
    over_last_axes,
    with_contents,
)
from ._torch_weights import PLAIN, fill_weights, normalizer, to_array, wrapper


_NORMS = (
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    "GroupNorm",
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
    "LayerNorm",
    "RMSNorm",
)
# What an entry of a state dict is called here.
_NAMES = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "count",
}


def from_torch(
    source: Any,
    like: Any = None,
    *,
    batched: bool = True,
    axis_name: AxisName = None,
) -> Any:
    """Carries a norm of PyTorch over, with its settings, its weights and its statistics, or
    a `state_dict` alone.

    PyTorch's `momentum` weights the new statistics, here it weights the old ones: 0.1
    becomes 0.9. The running variance is unbiased, as there.

    - `BatchNorm` with `track_running_stats=False` normalises with the statistics of the
        batch in evaluation too. This is what [`eqx_norms.InstanceNorm`][] does with
        `batch_axes=()`, so that is what it becomes.
    - `InstanceNorm` with `track_running_stats=True` is in evaluation a BatchNorm: it
        becomes one, with [`eqx_norms.freeze`][]. Its training has no counterpart.
    - A module without parameters whose buffers are weight, bias, running mean and variance,
        like torchvision's `FrozenBatchNorm2d`, becomes one too. If it has no `eps`, it is
        taken for 1e-5.
    - A layer with `weight_norm` or `spectral_norm`, as hooks or parametrizations, becomes
        one of `equinox.nn` in a [`eqx_norms.WeightNorm`][] or [`eqx_norms.SpectralNorm`][],
        for one example. Equinox's kernel of a transposed convolution is flipped, with the
        outputs first. Parametrizations find $u$ first in training, here $v$ is.
    - The scale of a state dict is taken as it is, with a `scale_offset` of `like` too: so
        Gemma has it, which stores what is to be added to one.

    !!! example

        ```python
        import torch

        norm, state = en.convert.from_torch(torch.nn.BatchNorm2d(8))

        # A state dict, into a layer's place in a model and its state:
        entries = torch.nn.BatchNorm2d(8).state_dict()
        model, state = eqx.nn.make_with_state(lambda: [en.BatchNorm(8, axis=1)])()
        model[0], norm_state = en.convert.from_torch(entries, like=model[0])
        state = state.update(norm_state)
        ```

    **Arguments:**

    - `source`: a `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`, `SyncBatchNorm`, `GroupNorm`,
        `InstanceNorm1d`, `InstanceNorm2d`, `InstanceNorm3d`, `LayerNorm` or `RMSNorm`; a
        `Linear`, `Conv` or `ConvTranspose` with `weight_norm` or `spectral_norm`; or the
        `state_dict` of one, of tensors or NumPy arrays.
    - `like`: for a `state_dict`, a layer of eqx_norms with the settings that are wanted,
        `en.WeightNorm(eqx.nn.Linear(...))` for example. The values are cast to its dtypes.
    - `batched`: whether the result is for batches, with the features along axis 1, or for
        one example inside `jax.vmap`, with the features along axis 0. (The axes of
        `LayerNorm` and `RMSNorm` are the last ones either way.) For a `state_dict`, `like`
        says it.
    - `axis_name`: as in [`eqx_norms.BatchNorm`][], and for no other layer; `"batch"` if
        not `batched`. For `SyncBatchNorm`, the name of the axis of devices. For a
        `state_dict`, `like` says it.

    **Returns:**

    The layer; `(layer, state)` where it is a `BatchNorm` or `SpectralNorm`.

    **Raises:**

    `ValueError` for any other module; for missing, unexpected or misshapen entries, but a
    missing `num_batches_tracked` is zero, as in PyTorch; for tensors on the meta device;
    for `InstanceNorm` with running statistics in training.
    """
    if isinstance(source, Mapping):
        if like is None:
            raise ValueError(
                "from_torch: a state dict says nothing of the layer's settings. Give a "
                "layer of eqx_norms that has them: `from_torch(state_dict, like=layer)`."
            )
        if axis_name is not None:
            raise ValueError(
                "from_torch: `axis_name` is for a module. For a state dict make `like` "
                "with it."
            )
        return _fill(like, source)
    if like is not None:
        raise ValueError(
            "from_torch: `like` is for a state dict. A module has settings of its own. "
            "Give it alone, or its `state_dict()`."
        )
    name = kind(source, "torch.nn", _NORMS, "forward")
    how, frozen = normalizer(source), _is_frozen(source)
    if how is None and not frozen and name is None:
        raise ValueError(
            f"from_torch: no counterpart for {type_name(source)}. There is one for "
            f"{', '.join(_NORMS)} of `torch.nn`, for their subclasses without a "
            f"`forward` of their own, for {', '.join(PLAIN)} with `weight_norm` or "
            "`spectral_norm`, for frozen batch norms, and for a state dict of one."
        )
    if axis_name is None and not batched:
        axis_name = "batch"
    arrays = {entry: to_array(value) for entry, value in source.state_dict().items()}
    if how is not None:
        return fill_weights(wrapper(source, how), arrays)
    if frozen:
        layer = _frozen(source, batched, axis_name)
        arrays["num_batches_tracked"] = jnp.ones((), jnp.int32)
    else:
        layer = _norm(source, str(name), batched, axis_name)
    # Says which parameters there are, and their dtypes.
    layer = with_fields(layer, scale=arrays.get("weight"), bias=arrays.get("bias"))
    return _fill(layer, arrays)


def to_torch_state_dict(layer: Any, state: State | None = None) -> dict[str, Any]:
    """Carries a norm over to PyTorch, as what `torch.nn.Module.load_state_dict` takes: its
    parameters and statistics, without its settings.

    PyTorch has one count of batches for all features: it is the largest one. Where it has a
    scale and a bias or neither, the one that the layer does without is added, as ones or
    zeros.

    **Arguments:**

    - `layer`: a [`eqx_norms.BatchNorm`][], `LayerNorm`, `RMSNorm`, `GroupNorm` or
        `InstanceNorm`.
    - `state`: the `equinox.nn.State` that belongs to it, for `BatchNorm`.

    **Returns:**

    A dictionary from names to tensors, which share no memory with the arrays.

    **Raises:**

    `ValueError` for any other layer, without the state of a `BatchNorm`, and for what
    PyTorch does not have: a `scale_offset`, a bias in an RMSNorm, several feature axes
    but in `LayerNorm` and `RMSNorm`. `ImportError` without PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "to_torch_state_dict: needs PyTorch, which is not installed."
        ) from error

    check = Check("to_torch_state_dict")
    arrays = contents(layer, state, check)
    # There both are learned or none, but for a LayerNorm, which may do without a bias.
    if "bias" in arrays:
        arrays.setdefault("scale", jnp.ones_like(arrays["bias"]))
    elif "scale" in arrays and not isinstance(layer, LayerNorm | RMSNorm):
        arrays["bias"] = jnp.zeros_like(arrays["scale"])
    axes = feature_axes(layer)
    if len(axes) != 1 and not isinstance(layer, LayerNorm | RMSNorm):
        raise check.error(
            f"in PyTorch a {type(layer).__name__} has one feature axis, this one has "
            f"{axes}."
        )
    if "count" in arrays:
        arrays["count"] = jnp.max(arrays["count"])

    def tensor(array):
        # A copy, by way of a dtype that is NumPy's own.
        wide = array if array.dtype.isbuiltin == 1 else array.astype(jnp.float32)
        dtype = (
            torch.int64 if array.dtype == jnp.int32 else getattr(torch, str(array.dtype))
        )
        return torch.from_numpy(np.array(wide)).to(dtype)

    return {entry: tensor(arrays[name]) for entry, name in _NAMES.items() if name in arrays}


def _fill(like: Any, entries: Mapping[str, Any]) -> Any:
    """A layer like another one, with what is in a state dict."""
    if isinstance(like, AbstractWrapper):
        return fill_weights(like, entries)
    if not isinstance(like, LAYERS):
        raise ValueError(
            f"from_torch: `like` must be a layer of eqx_norms, got {type_name(like)}."
        )
    check = Check(f"from_torch({type(like).__name__})")
    axes, sizes = feature_axes(like), as_tuple(like.num_features)
    check_order(axes, check)
    shape = tuple(size for _, size in sorted(zip(axes, sizes, strict=True)))
    parameters = {"weight": like.scale, "bias": like.bias}
    expected = {name: shape for name, old in parameters.items() if old is not None}
    if isinstance(like, BatchNorm):
        expected |= {"running_mean": shape, "running_var": shape, "num_batches_tracked": ()}
        # Old state dicts have no count, and PyTorch starts to count anew.
        entries = {"num_batches_tracked": np.zeros((), np.int32), **entries}
    check_entries(entries, expected, check)
    arrays = {name: to_array(value) for name, value in entries.items()}
    for name, old in parameters.items():
        if old is not None:
            arrays[name] = arrays[name].astype(old.dtype)
    return with_contents(like, {_NAMES[name]: array for name, array in arrays.items()})


def _is_frozen(source: Any) -> bool:
    """Whether a module is a batch norm that is not trained, by what it holds."""
    buffers = dict(getattr(source, "named_buffers", dict)())
    return not any(True for _ in getattr(source, "parameters", tuple)()) and (
        buffers.keys() - {"num_batches_tracked"} == _NAMES.keys() - {"num_batches_tracked"}
    )


def _frozen(source: Any, batched: bool, axis_name: AxisName) -> BatchNorm:
    return freeze(
        BatchNorm(
            source.running_mean.numel(),
            axis=1 if batched else 0,
            epsilon=getattr(source, "eps", 1e-5),
            axis_name=axis_name,
            use_unbiased_variance=True,
        )
    )


def _norm(source: Any, name: str, batched: bool, axis_name: AxisName) -> AbstractNorm:
    """A layer with the settings of a module, which is one of `_NORMS`."""
    if name in ("LayerNorm", "RMSNorm"):
        make = LayerNorm if name == "LayerNorm" else RMSNorm
        return over_last_axes(make, tuple(source.normalized_shape), _epsilon(source))
    axis, batch_axes = (1, 0) if batched else (0, ())
    if name == "GroupNorm":
        return GroupNorm(
            source.num_channels,
            source.num_groups,
            epsilon=source.eps,
            feature_axis=axis,
            batch_axes=batch_axes,
        )
    by_example = name.startswith("InstanceNorm")
    if not source.track_running_stats:
        return InstanceNorm(
            source.num_features,
            epsilon=source.eps,
            feature_axes=axis,
            batch_axes=batch_axes if by_example else (),
            axis_name=None if by_example else axis_name,
        )
    if by_example and source.training:
        raise ValueError(
            "from_torch: an InstanceNorm with `track_running_stats=True` normalises each "
            "example in training and by running statistics in evaluation, which no layer "
            "of eqx_norms does. For its evaluation call `.eval()` first; for its training "
            "set `track_running_stats=False`."
        )
    layer = BatchNorm(
        source.num_features,
        use_running_average=not source.training,
        axis=axis,
        momentum=None if source.momentum is None else 1 - source.momentum,
        epsilon=source.eps,
        axis_name=axis_name,
        use_unbiased_variance=True,
    )
    return freeze(layer) if by_example else layer


def _epsilon(source: Any) -> float:
    if source.eps is not None:
        return source.eps
    # PyTorch's RMSNorm takes that of the precision it computes in.
    double = source.weight is not None and str(source.weight.dtype) == "torch.float64"
    return float(np.finfo(np.float64 if double else np.float32).eps)
