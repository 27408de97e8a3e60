"""PyTorch's `weight_norm` and `spectral_norm`, in all forms, against what they become; and
other things that are in checkpoints."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms import convert

from .helpers import as_pair, every
from .test_convert_torch import close, data, shaken


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn
parametrized = nn.utils.parametrizations
KEY = jax.random.key(0)


def old(function):
    def deprecated(module, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return function(module, **kwargs)

    return deprecated


FORMS = {
    "weight_norm, hooks": old(nn.utils.weight_norm),
    "weight_norm, parametrized": parametrized.weight_norm,
    "spectral_norm, hooks": old(nn.utils.spectral_norm),
    "spectral_norm, parametrized": parametrized.spectral_norm,
}
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
# What makes the module, the shape of a batch, and settings of the norm.
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "Linear": (lambda **k: nn.Linear(4, 6, **k), (5, 4), {}),
    "Linear, other axis": (lambda **k: nn.Linear(4, 6, **k), (5, 4), {"dim": 1}),
    "Linear, no bias": (lambda **k: nn.Linear(4, 6, bias=False, **k), (5, 4), {}),
    "Conv1d": (
        lambda **k: nn.Conv1d(4, 6, 3, 2, 1, dilation=2, **k),
        (5, 4, 9),
        {},
    ),
    "Conv2d, groups, same": (
        lambda **k: nn.Conv2d(4, 6, (2, 3), padding="same", groups=2, **k),
        (5, 4, 5, 6),
        {"dim": 1},
    ),
    "Conv2d, reflected, space": (
        lambda **k: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect", **k),
        (5, 4, 5, 6),
        {"dim": 2},
    ),
    "Conv3d, valid": (
        lambda **k: nn.Conv3d(4, 6, (1, 2, 3), padding="valid", **k),
        (5, 4, 3, 4, 5),
        {},
    ),
    "ConvTranspose1d": (
        lambda **k: T1(4, 6, 4, 3, 1, output_padding=2, **k),
        (5, 4, 7),
        {},
    ),
    "ConvTranspose2d, outputs": (
        lambda **k: T2(4, 6, (2, 3), (1, 2), dilation=2, **k),
        (5, 4, 3, 4),
        {"dim": 1},
    ),
    "ConvTranspose2d, inputs": (lambda **k: T2(4, 6, 3, **k), (5, 4, 3, 4), {"dim": 0}),
    "ConvTranspose3d, space": (
        lambda **k: T3(4, 6, (1, 2, 3), bias=False, **k),
        (5, 4, 2, 3, 4),
        {"dim": 4},
    ),
    "Conv1d, no axis": (lambda **k: nn.Conv1d(4, 6, 3, **k), (5, 4, 9), {"dim": None}),
    "ConvTranspose2d, groups, no axis": (
        lambda **k: T2(4, 6, 3, groups=2, **k),
        (5, 4, 3, 4),
        {"dim": None},
    ),
}
all_cases = pytest.mark.parametrize("case", CASES)
form = pytest.mark.parametrize("form", FORMS)


def module_of(case, form, **kwargs):
    make, shape, settings = CASES[case]
    if "spectral" in form and settings.get("dim", 0) is None:
        pytest.skip("has an axis always")
    module = FORMS[form](make(**kwargs), **settings)
    theirs, _ = data(shape)
    if "spectral" in form:
        for _ in range(3):
            module(theirs.to(module.weight.dtype))
    return module.eval(), shape


def evaluate(layer: Any, state, x):
    layer = eqx.nn.inference_mode(layer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if state is None:
            return jax.vmap(layer)(x)
        return jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))(x, state)[0]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@every(2)
@form
@all_cases
def test_module(case, form):
    """And its state dict, into a layer with other weights."""
    torch.manual_seed(0)
    module, shape = module_of(case, form)
    wrong = module_of(case, form)[0]
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "weight_g" in name or "original0" in name:
                value *= 1 + torch.rand(value.shape)
    theirs, ours = data(shape)
    layer, state = as_pair(convert.from_torch(module))
    assert type(layer) is (en.SpectralNorm if "spectral" in form else en.WeightNorm)
    expected = module(theirs)
    close(evaluate(layer, state, ours), expected, 2e-5)
    other, _ = as_pair(convert.from_torch(wrong))
    entries = {name: value.numpy() for name, value in module.state_dict().items()}
    again = as_pair(convert.from_torch(entries, like=other))
    arrays = jax.tree.leaves(eqx.filter(again, eqx.is_array))
    wanted = jax.tree.leaves(eqx.filter((layer, state), eqx.is_array))
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@form
def test_training(form):
    """Gradients, and steps of power iteration as PyTorch takes them."""
    torch.manual_seed(0)
    module, shape = module_of("ConvTranspose1d", form)
    module.train()
    layer, state = as_pair(convert.from_torch(module))
    assert not getattr(layer, "inference", False)
    theirs, ours = data(shape)
    wanted = found = None
    for _ in range(20):
        wanted = module(theirs)
        with jax.numpy_rank_promotion("allow"):
            if state is None:
                found = jax.vmap(layer)(ours)
            else:
                found, state = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))(
                    ours, state
                )
    close(found, wanted, 1e-4)


def test_settings():
    module = parametrized.spectral_norm(nn.Linear(3, 4), n_power_iterations=3, eps=1e-3)
    layer, _ = convert.from_torch(module)
    assert (layer.n_steps, layer.epsilon, layer.inference) == (3, 1e-3, False)
    layer, _ = convert.from_torch(module.eval())
    assert layer.inference
    assert convert.from_torch(parametrized.weight_norm(nn.Linear(3, 4))).epsilon == 0


@pytest.mark.parametrize("form", ["weight_norm, hooks", "spectral_norm, parametrized"])
def test_half_precision(form):
    torch.manual_seed(0)
    module, shape = module_of("Conv1d", form, dtype=torch.bfloat16)
    layer, state = as_pair(convert.from_torch(module))
    assert layer.layer.weight.dtype == layer.layer.bias.dtype == jnp.bfloat16
    theirs, ours = data(shape)
    y = evaluate(layer, state, ours.astype(jnp.bfloat16))
    expected = module(theirs.to(torch.bfloat16)).float().detach().numpy()
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=5e-2, atol=5e-2)
    # Into a layer in float32, values are cast.
    like = eqx.nn.Conv1d(4, 6, 3, 2, 1, dilation=2, key=KEY)
    make = en.WeightNorm if state is None else lambda layer: en.SpectralNorm(layer, key=KEY)
    wide, _ = as_pair(convert.from_torch(module.state_dict(), like=make(like)))
    assert wide.layer.weight.dtype == jnp.float32


def test_into_a_model():
    """A state dict of a whole model, layer by layer, into its place and state."""
    source = nn.Sequential(*(parametrized.spectral_norm(nn.Linear(3, 3)) for _ in range(2)))
    source.eval()

    def make(keys):
        return [
            en.SpectralNorm(eqx.nn.Linear(3, 3, key=key), update_stats=False, key=key)
            for key in keys
        ]

    model, state = eqx.nn.make_with_state(make)(jax.random.split(KEY))
    for i in range(2):
        entries = {
            name.removeprefix(f"{i}."): value
            for name, value in source.state_dict().items()
            if name.startswith(f"{i}.")
        }
        model[i], part = convert.from_torch(entries, like=model[i])
        state = state.update(part)
    theirs, x = data((5, 3))
    for layer in model:
        x = jax.vmap(lambda x, layer=layer: layer(x, state)[0])(x)
    close(x, source(theirs))


def like(make: Any = eqx.nn.Linear, *sizes, **kwargs):
    return en.WeightNorm(make(*(sizes or (3, 4)), key=KEY), **kwargs)


@pytest.mark.parametrize(
    ("target", "changes", "match"),
    [
        (like(), {"weight_g": None}, r"missing \['weight_g'\]"),
        (like(), {"bias": None}, r"missing \['bias'\]"),
        (
            like(eqx.nn.Linear, 3, 5),
            {},
            r"another shape \['bias', 'weight_g', 'weight_v'\]",
        ),
        (like(feature_axes=1), {}, r"\(1, 3\).* of another shape \['weight_g'\]"),
        (like(feature_axes=None), {}, r"of another shape \['weight_g'\]"),
        (like(use_scale=False), {}, r"with a scale if"),
        (
            like(where=lambda layer: layer.bias, feature_axes=()),
            {},
            r"the field `weight` of",
        ),
    ],
)
def test_wrong_entries(target, changes, match):
    module = FORMS["weight_norm, hooks"](nn.Linear(3, 4))
    entries = {**module.state_dict(), **changes}
    entries = {name: value for name, value in entries.items() if value is not None}
    with pytest.raises(ValueError, match=r"from_torch\(WeightNorm\): .*" + match):
        convert.from_torch(entries, like=target)


@pytest.mark.parametrize("function", [parametrized.weight_norm, parametrized.spectral_norm])
def test_groups_of_a_transposed_convolution(function):
    with pytest.raises(ValueError, match=r"transposed convolution with groups .* Remove"):
        convert.from_torch(function(T2(4, 6, 3, groups=2)))


@pytest.mark.parametrize(
    "module", [nn.Bilinear(2, 3, 4), nn.Embedding(3, 4), nn.BatchNorm1d(3)]
)
def test_other_modules(module):
    module = parametrized.weight_norm(module)
    with pytest.raises(ValueError, match=r"counterparts for Linear, Conv1d.* `like`"):
        convert.from_torch(module)


def test_embedding():
    """By its state dict."""
    module = parametrized.weight_norm(nn.Embedding(3, 4))
    target = en.WeightNorm(eqx.nn.Embedding(3, 4, key=KEY))
    layer = convert.from_torch(module.state_dict(), like=target)
    close(layer(jnp.array(1)), module(torch.tensor(1)))


def test_meta_device():
    with pytest.raises(ValueError, match=r"^from_torch: needs the values"):
        convert.from_torch(parametrized.weight_norm(nn.Linear(3, 4, device="meta")))


# -- Other things in checkpoints.


def test_zero_centred_scale():
    """Gemma's: what is stored is added to one, in float32, and goes in as it is."""
    weight = shaken(nn.RMSNorm(6, dtype=torch.bfloat16)).weight.detach() * 1e-3
    target = en.RMSNorm(6, scale_offset=1.0, param_dtype=jnp.bfloat16)
    layer = convert.from_torch({"weight": weight}, like=target)
    np.testing.assert_array_equal(layer.scale.astype(jnp.float32), weight.float())
    theirs, ours = data((4, 6))
    wide = theirs * torch.rsqrt(theirs.pow(2).mean(-1, keepdim=True) + 1e-6)
    close(layer(ours), wide * (1 + weight.float()))


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_float8(dtype):
    """The values, there and back."""
    values = torch.tensor([0.5, -1.75, 2.0]).to(getattr(torch, dtype))
    target = en.RMSNorm(3, param_dtype=dtype, dtype=jnp.float32)
    layer = convert.from_torch({"weight": values}, like=target)
    assert layer.scale.dtype == dtype
    np.testing.assert_array_equal(layer.scale.astype(jnp.float32), values.float())
    back = convert.to_torch_state_dict(layer)["weight"]
    assert back.dtype == values.dtype
    assert torch.equal(back.float(), values.float())
    wide = convert.from_torch({"weight": values}, like=en.RMSNorm(3))
    np.testing.assert_array_equal(wide.scale, values.float())


class Frozen(nn.Module):
    """As torchvision's and those of detection transformers."""

    def __init__(self, size, counts=False, **fields):
        super().__init__()
        for name, value in fields.items():
            setattr(self, name, value)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(size))
        if counts:
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        shape = (1, -1, 1, 1)
        epsilon = getattr(self, "eps", 1e-5)
        scale = self.weight.reshape(shape) * torch.rsqrt(
            self.running_var.reshape(shape) + epsilon
        )
        bias = self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale
        return x * scale + bias


@pytest.mark.parametrize("fields", [{}, {"eps": 0.1}, {"eps": 0.0, "counts": True}])
def test_frozen_batch_norm(fields):
    module = shaken(Frozen(6, **fields))
    layer, state = convert.from_torch(module)
    assert layer.frozen
    theirs, ours = data((4, 6, 2, 3))
    expected = module(theirs)
    close(layer(ours, state)[0], expected)
    layer, state = convert.from_torch(module, batched=False)
    y, _ = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(
        ours, state
    )
    close(y, expected)


def test_not_frozen():
    """A module with a parameter, or without one of the buffers, is another one."""
    module = Frozen(6)
    module.register_parameter("scale", nn.Parameter(torch.ones(6)))
    without = Frozen(6)
    del without.bias
    for other in (module, without, nn.Module()):
        with pytest.raises(ValueError, match=r"no counterpart for .*, for frozen batch"):
            convert.from_torch(other)


def test_a_second_parametrization():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = parametrized.spectral_norm(nn.Linear(3, 4))
    nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    match = r"from_torch: a module with one .*\['_SpectralNorm', 'Twice'\]. Remove"
    with pytest.raises(ValueError, match=match):
        convert.from_torch(module)
