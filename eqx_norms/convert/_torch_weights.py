"""PyTorch's layers with weights that are normalised: `weight_norm` and `spectral_norm`."""

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._checks import Check
from .._dtypes import promote
from .._kinds import base, kind, type_name
from .._spectral_norm import SpectralNorm, SpectralStats
from .._trees import with_fields
from .._weight_norm import WeightNorm
from ._common import check_entries, with_init, with_state


# The entries of `weight_norm` and of `spectral_norm`: by hooks, and parametrized.
_WEIGHT = "parametrizations.weight."
_ENTRIES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("weight_v", "weight_g"), (f"{_WEIGHT}original1", f"{_WEIGHT}original0")),
    (
        ("weight_orig", "weight_u", "weight_v"),
        (f"{_WEIGHT}original", f"{_WEIGHT}0._u", f"{_WEIGHT}0._v"),
    ),
)
PLAIN = ("Linear", *(f"Conv{way}{n}d" for way in ("", "Transpose") for n in (1, 2, 3)))


def normalizer(source: Any) -> Any:
    """The hook or the parametrization that normalises a weight of a module, if any."""
    parametrized = [
        how for each in getattr(source, "parametrizations", {}).values() for how in each
    ]
    names = ("WeightNorm", "_WeightNorm", "SpectralNorm", "_SpectralNorm")
    hooks = (*getattr(source, "_forward_pre_hooks", {}).values(), *parametrized)
    found = [how for how in hooks if base(how, "torch.nn.utils", names)]
    every = list({id(how): how for how in (*found, *parametrized)}.values())
    if found and len(every) > 1:
        raise ValueError(
            "from_torch: a module with one `weight_norm` or `spectral_norm` and no other "
            f"parametrization has a counterpart, got {type_name(source)} with "
            f"{[type(how).__name__ for how in every]}. Remove the others in PyTorch first, "
            "with `remove_parametrizations`."
        )
    return found[0] if found else None


def wrapper(source: Any, how: Any) -> WeightNorm | SpectralNorm:
    """A layer with the settings of such a module."""
    name = kind(source, "torch.nn", PLAIN, "forward")
    if name is None:
        raise ValueError(
            f"from_torch: of modules with a weight that is normalised there are "
            f"counterparts for {', '.join(PLAIN)}, got {type_name(source)}. For another "
            "give its state dict and `like`, the layer that takes its place."
        )
    fields = ["in_features", "out_features"]
    if name != "Linear":
        fields = ["in_channels", "out_channels", "kernel_size", "stride", "padding"]
        fields += ["dilation", "groups", "padding_mode"]
        fields += ["output_padding"] * ("Transpose" in name)
    layer = getattr(eqx.nn, name)(
        **{field: getattr(source, field) for field in fields},
        use_bias=source.bias is not None,
        dtype=to_array(source.weight).dtype,
        key=jax.random.key(0),  # Of weights that those of the module replace.
    )
    axis = _other_axis(layer, how.dim % layer.weight.ndim)
    if type(how).__name__.endswith("WeightNorm"):
        # For -1, which is `None` there, one length for the whole weight.
        return WeightNorm(
            layer,
            feature_axes=None if how.dim == -1 else axis,
            epsilon=0.0,
            param_dtype=layer.weight.dtype,
        )
    return SpectralNorm(
        layer,
        feature_axes=axis,
        n_steps=how.n_power_iterations,
        epsilon=how.eps,
        update_stats=source.training,
        key=jax.random.key(0),
    )


def _other_axis(layer: Any, axis: int) -> int:
    """An axis of PyTorch's kernel in Equinox's, and the other way round."""
    return 1 - axis if isinstance(layer, eqx.nn.ConvTranspose) and axis < 2 else axis


def fill_weights(like: Any, entries: Mapping[str, Any]) -> Any:
    """A wrapped layer like another one, with what is in a state dict."""
    check, layer = Check(f"from_torch({type(like).__name__})"), like.layer
    spectral = isinstance(like, SpectralNorm)
    if like.weights != (".weight",) or getattr(like, "scales", ()) is None:
        raise check.error(
            "`like` must normalise the field `weight` of a layer and no other, with a "
            f"scale if it is a WeightNorm, got one with {list(like.weights)} of a "
            f"{type_name(layer)}."
        )
    (weight,), bias = like._weights(), getattr(layer, "bias", None)
    transposed = isinstance(layer, eqx.nn.ConvTranspose)
    groups = layer.groups if transposed else 1
    axes = [_other_axis(layer, axis) for axis in like._axes(weight)[0]]
    if groups > 1 and min(axes, default=2) < 2:
        raise check.error(
            "in a transposed convolution with groups PyTorch's kernel has axes of channels "
            "that Equinox's has not. Remove the norm in PyTorch, with `remove_weight_norm` "
            "or `remove_parametrizations` for example."
        )
    # In PyTorch's layout: the weight, and what varies along its axes or across them.
    shape = list(weight.shape)
    if transposed:
        shape[:2] = layer.in_channels, layer.out_channels // groups
    along = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    across = [1 if axis in axes else size for axis, size in enumerate(shape)]
    expected: list[tuple[int, ...]] = [tuple(shape), tuple(along) if axes else ()]
    if spectral:
        expected[1:] = (math.prod(along),), (math.prod(across),)
    forms = _ENTRIES[spectral]
    names = next((form for form in forms if form[0] in entries), forms[0])
    wanted = dict(zip(names, expected, strict=True))
    check_entries(
        entries, wanted if bias is None else {**wanted, "bias": (bias.size,)}, check
    )

    def kernel(name, shape):
        """In Equinox's layout, where that of a transposed convolution is flipped."""
        array = to_array(entries[name]).reshape(shape)
        if not transposed:
            return array
        inputs, outputs, *space = shape
        number = math.gcd(groups, inputs)  # One, for what does not vary along them.
        array = jnp.flip(array, range(2, array.ndim))
        array = array.reshape(number, inputs // number, outputs, *space)
        return array.swapaxes(1, 2).reshape(number * outputs, inputs // number, *space)

    weight = kernel(names[0], shape).astype(weight.dtype)
    layer = like._with((weight,))
    if bias is not None:
        bias = to_array(entries["bias"]).reshape(bias.shape).astype(bias.dtype)
        layer = eqx.tree_at(lambda layer: layer.bias, layer, bias)
    new = with_fields(like, layer=layer)
    first = kernel(names[1], along)
    if not spectral:
        (scale,) = like.scales
        scale = first.reshape(scale.shape).astype(scale.dtype)
        return with_fields(new, scales=(scale,))
    second = kernel(names[2], across)
    dtype = promote(weight, first, jnp.float32)
    stats = SpectralStats(first.astype(dtype), second.astype(dtype), jnp.ones((), dtype))
    return with_state(with_init(new, (new._update(weight, stats, 0),)))


def to_array(value: Any) -> Array:
    """A copy of a tensor, or of anything that NumPy takes."""
    if hasattr(value, "detach"):
        if value.is_meta:
            raise ValueError(
                "from_torch: needs the values of all tensors, got one on the meta device, "
                "which has none. Load the weights first: `module.to_empty(device='cpu')`, "
                "then `module.load_state_dict(...)`."
            )
        value, dtype = value.detach().cpu(), str(value.dtype).removeprefix("torch.")
        if dtype.startswith(("bfloat", "float8")):
            # Which NumPy does not have.
            return jnp.array(value.float().numpy()).astype(dtype)
        value = value.numpy()
    return jnp.array(value)
