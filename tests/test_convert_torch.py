"""Norms of `torch.nn` against what they become, and back."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms import convert

from .helpers import as_pair, assert_close


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn

BN1, BN2, BN3 = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
IN1, IN2, IN3 = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
# What makes the module, and the shape of a batch for it.
CASES = {
    "BatchNorm1d": (lambda **k: BN1(6, eps=1e-2, momentum=0.3, **k), (4, 6)),
    "BatchNorm1d, sequences": (lambda **k: BN1(6, **k), (4, 6, 3)),
    "BatchNorm2d": (lambda **k: BN2(6, momentum=None, **k), (4, 6, 2, 3)),
    "BatchNorm3d, plain": (lambda **k: BN3(6, affine=False, **k), (4, 6, 2, 1, 3)),
    "BatchNorm2d, no statistics": (
        lambda **k: BN2(6, track_running_stats=False, **k),
        (4, 6, 2, 3),
    ),
    "LayerNorm": (lambda **k: nn.LayerNorm(6, eps=1e-2, **k), (4, 6)),
    "LayerNorm, axes": (lambda **k: nn.LayerNorm((3, 6), **k), (4, 2, 3, 6)),
    "LayerNorm, no bias": (lambda **k: nn.LayerNorm(6, bias=False, **k), (4, 6)),
    "LayerNorm, plain": (
        lambda **k: nn.LayerNorm(6, elementwise_affine=False, **k),
        (4, 6),
    ),
    "RMSNorm": (lambda **k: nn.RMSNorm(6, eps=1e-2, **k), (4, 6)),
    "RMSNorm, axes": (lambda **k: nn.RMSNorm((3, 6), **k), (4, 3, 6)),
    "RMSNorm, plain": (lambda **k: nn.RMSNorm(6, elementwise_affine=False, **k), (4, 6)),
    "GroupNorm": (lambda **k: nn.GroupNorm(3, 6, eps=1e-2, **k), (4, 6, 5)),
    "GroupNorm, plain": (lambda **k: nn.GroupNorm(2, 6, affine=False, **k), (4, 6)),
    "InstanceNorm1d": (lambda **k: IN1(6, eps=1e-2, affine=True, **k), (4, 6, 5)),
    "InstanceNorm2d": (lambda **k: IN2(6, **k), (4, 6, 2, 3)),
    "InstanceNorm3d": (lambda **k: IN3(6, affine=True, **k), (4, 6, 2, 2, 3)),
}
every = pytest.mark.parametrize("case", CASES)


def module_of(case, **kwargs):
    """With parameters and statistics at random."""
    make, shape = CASES[case]
    return shaken(make(**kwargs)), shape


def shaken(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            else:
                tensor += 7
    return module


def data(shape):
    x = np.random.default_rng(1).normal(1, 2, shape).astype(np.float32)
    return torch.tensor(x), jnp.asarray(x)


@eqx.filter_jit
def call(layer, state, x):
    return layer(x, state) if state is not None else (layer(x), None)


def close(actual, expected, tolerance=1e-5):
    assert_close(actual, expected.detach().numpy(), tolerance)


def same(a, b):
    """State dicts that are equal bit by bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name])


@every
def test_training(case):
    """Two steps: output, running statistics and how many there were."""
    module, shape = module_of(case)
    layer, state = as_pair(convert.from_torch(module))
    for _ in range(2):
        theirs, ours = data(shape)
        y, state = call(layer, state, ours)
        close(y, module(theirs))
    if state is not None:
        stats = layer.running_stats(state)
        close(stats.mean, module.running_mean)
        close(stats.var, module.running_var)
        np.testing.assert_array_equal(stats.count, [9] * 6)


@every
def test_evaluation(case):
    module, shape = module_of(case)
    module.eval()
    layer, state = as_pair(convert.from_torch(module))
    theirs, ours = data(shape)
    close(call(layer, state, ours)[0], module(theirs))
    assert getattr(layer, "inference", True) is True


@every
def test_one_example(case):
    """Inside `vmap`, with the features first."""
    module, shape = module_of(case)
    layer, state = as_pair(convert.from_torch(module, batched=False))
    theirs, ours = data(shape)
    y = jax.vmap(lambda x: call(layer, state, x)[0], axis_name="batch")(ours)
    close(y, module(theirs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every
def test_round_trip(case, dtype):
    """Into a new module, bit by bit; and by way of its state dict."""
    module, _ = module_of(case, dtype=getattr(torch, dtype))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layer, state = as_pair(convert.from_torch(module))
    for parameter in (layer.scale, layer.bias):
        assert parameter is None or parameter.dtype == dtype
    back = convert.to_torch_state_dict(layer, state)
    new = CASES[case][0](dtype=getattr(torch, dtype))
    new.load_state_dict(back)
    same(new.state_dict(), before)
    again = as_pair(convert.from_torch(back, like=layer))
    assert eqx.tree_equal(again, (layer, state))


def test_memory_is_not_shared():
    """PyTorch changes its tensors in place."""
    module, _ = module_of("BatchNorm2d")
    layer, state = convert.from_torch(module)
    mean = np.array(layer.running_stats(state).mean)
    back = convert.to_torch_state_dict(layer, state)
    module.running_mean.fill_(77)
    back["running_mean"].fill_(78)
    back["weight"].fill_(79)
    np.testing.assert_array_equal(layer.running_stats(state).mean, mean)
    assert jnp.all(layer.scale < 78)


def test_settings():
    """momentum is the weight of the old statistics."""
    layer, _ = convert.from_torch(BN2(6, momentum=0.25), axis_name="devices")
    assert layer.momentum == 0.75
    assert layer.axis == (1,)
    assert layer.axis_name == ("devices",)
    assert layer.use_unbiased_variance
    assert not layer.inference
    layer, _ = convert.from_torch(BN2(6, momentum=None), batched=False, axis_name="b")
    assert layer.momentum is None
    assert layer.axis_name == ("b",)
    # PyTorch's default.
    assert convert.from_torch(nn.RMSNorm(6)).epsilon == float(np.finfo(np.float32).eps)
    double = convert.from_torch(nn.RMSNorm(6, dtype=torch.float64))
    assert double.epsilon == float(np.finfo(np.float64).eps)


def test_sync_batch_norm():
    """In training it wants a process group."""
    module = shaken(nn.SyncBatchNorm(6)).eval()
    layer, state = convert.from_torch(module, axis_name="devices")
    theirs, ours = data((4, 6, 3))
    close(layer(ours, state)[0], module(theirs))


def test_instance_norm_with_running_statistics():
    """Evaluation is that of a BatchNorm, whatever mode it is set to."""
    module = shaken(IN2(6, affine=True, track_running_stats=True))
    with pytest.raises(
        ValueError, match=r"running statistics in evaluation.* `\.eval\(\)`"
    ):
        convert.from_torch(module)
    layer, state = convert.from_torch(module.eval())
    theirs, ours = data((4, 6, 2, 3))
    for norm in (layer, eqx.nn.inference_mode(layer, value=False)):
        close(norm(ours, state)[0], module(theirs))
    same(convert.to_torch_state_dict(layer, state), module.state_dict())


def test_state_dict_of_a_model():
    """As the documentation says; NumPy arrays too."""
    model = nn.Sequential(nn.Linear(6, 6), shaken(BN1(6)))
    entries = {
        name.removeprefix("1."): value.numpy()
        for name, value in model.state_dict().items()
        if name.startswith("1.")
    }
    like, _ = eqx.nn.make_with_state(en.BatchNorm)(6, axis=0, axis_name="batch")
    layer, state = convert.from_torch(entries, like=like)
    assert layer.axis_name == ("batch",)
    same(convert.to_torch_state_dict(layer, state), model[1].state_dict())
    # The layer given stays as it was.
    np.testing.assert_array_equal(like.scale, np.ones(6))


@pytest.mark.parametrize("axes", [(-1, -2), (2, 1)])
def test_order_of_features(axes):
    """Ours are in the order of `feature_axes`, PyTorch's in that of the input."""
    module = shaken(nn.LayerNorm((3, 6)))
    like = en.LayerNorm((6, 3), epsilon=1e-5, reduction_axes=axes, feature_axes=axes)
    layer = convert.from_torch(module.state_dict(), like=like)
    theirs, ours = data((4, 3, 6))
    close(layer(ours), module(theirs))
    same(convert.to_torch_state_dict(layer), module.state_dict())


def test_dtype_of_like():
    """Values are cast, as by `load_state_dict`; statistics stay float32 or wider."""
    like = en.BatchNorm(6, param_dtype=jnp.bfloat16)
    layer, state = convert.from_torch(shaken(BN1(6)).state_dict(), like=like)
    assert layer.scale.dtype == layer.bias.dtype == jnp.bfloat16
    assert layer.running_stats(state).var.dtype == jnp.float32


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_old_state_dict_without_a_count(momentum):
    """Version 1 of PyTorch's state dicts. It loads them, and counts from zero."""
    source = shaken(BN1(6, momentum=momentum))
    entries = source.state_dict()
    del entries["num_batches_tracked"]
    like = convert.from_torch(BN1(6, momentum=momentum))[0]
    layer, state = convert.from_torch(dict(entries), like=like)
    module = BN1(6, momentum=momentum)
    entries._metadata[""]["version"] = 1
    module.load_state_dict(entries)
    theirs, ours = data((4, 6))
    y, state = layer(ours, state)
    close(y, module(theirs))
    for name, value in convert.to_torch_state_dict(layer, state).items():
        torch.testing.assert_close(value, module.state_dict()[name])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rms_norm_without_an_epsilon(dtype, affine):
    """PyTorch's is that of the precision it computes in. Without a weight nothing says
    which this will be: then it is that of float32."""
    module = nn.RMSNorm(6, eps=None, elementwise_affine=affine, dtype=getattr(torch, dtype))
    layer = convert.from_torch(module)
    wanted = torch.finfo(module.weight.dtype if affine else torch.float32).eps
    assert layer.epsilon == wanted


# -- Errors.


@pytest.mark.parametrize(
    "make",
    [nn.LayerNorm, nn.RMSNorm, BN1, BN2, IN1, lambda n, **k: nn.GroupNorm(2, n, **k)],
)
def test_meta_device(make):
    """A module without its weights."""
    module = make(6, device="meta")
    if not module.state_dict():
        # Nothing is missing.
        convert.from_torch(module)
        return
    with pytest.raises(
        ValueError, match=r"^from_torch: needs the values.*`module.to_empty"
    ):
        convert.from_torch(module)
    like = convert.from_torch(make(6))
    like = like[0] if isinstance(like, tuple) else like
    with pytest.raises(ValueError, match=r"^from_torch: needs the values.*meta device"):
        convert.from_torch(module.state_dict(), like=like)


def entries_with(**changes):
    entries = {**BN1(6).state_dict(), **changes}
    return {name: value for name, value in entries.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"running_var": None}, r"missing \['running_var'\]"),
        ({"fc.weight": torch.ones(6)}, r"unexpected \['fc.weight'\]"),
        ({"bias": torch.ones(5)}, r"\(6,\).* found .*\(5,\).* shape \['bias'\]"),
        ({"weight": torch.ones(1, 6, 1)}, r"of another shape \['weight'\]"),
    ],
)
def test_wrong_entries(changes, match):
    with pytest.raises(ValueError, match=r"from_torch\(BatchNorm\): expected .*" + match):
        convert.from_torch(entries_with(**changes), like=en.BatchNorm(6))


def test_like():
    with pytest.raises(ValueError, match=r"`from_torch\(state_dict, like=layer\)`"):
        convert.from_torch(entries_with())
    with pytest.raises(ValueError, match="`like` is for a state dict"):
        convert.from_torch(BN1(6), like=en.BatchNorm(6))
    with pytest.raises(ValueError, match="`axis_name` is for a module"):
        convert.from_torch(entries_with(), like=en.BatchNorm(6), axis_name="batch")
    with pytest.raises(ValueError, match=r"must be a layer of eqx_norms, got equinox\.nn"):
        convert.from_torch(entries_with(), like=eqx.nn.LayerNorm(6))


class Channels(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Renamed(nn.LayerNorm):
    pass


def test_subclasses():
    assert type(convert.from_torch(Renamed(6))) is en.LayerNorm
    with pytest.raises(ValueError, match=r"no counterpart for .*Channels"):
        convert.from_torch(Channels(6))


@pytest.mark.parametrize(
    "source", [nn.Linear(2, 3), nn.LocalResponseNorm(2), nn.LazyBatchNorm1d(), 3, None]
)
def test_no_counterpart(source):
    with pytest.raises(
        ValueError, match=r"no counterpart for .*BatchNorm1d, .*RMSNorm of `t"
    ):
        convert.from_torch(source)


@pytest.mark.parametrize("missing", ["scale", "bias"])
def test_to_torch_adds_what_every_module_there_has(missing):
    without: dict[str, Any] = {f"use_{missing}": False}
    norm = en.GroupNorm(6, 3, **without)
    module = nn.GroupNorm(3, 6)
    module.load_state_dict(convert.to_torch_state_dict(norm))
    assert bool((module.weight == 1).all())
    assert bool((module.bias == 0).all())


def test_not_to_torch():
    norm, _ = eqx.nn.make_with_state(en.BatchNorm)(3)
    with pytest.raises(
        ValueError, match=r"statistics .* `to_torch_state_dict\(layer, state"
    ):
        convert.to_torch_state_dict(norm)
    with pytest.raises(
        ValueError, match=r"needs a `BatchNorm`, .* got equinox.nn.LayerNorm"
    ):
        convert.to_torch_state_dict(eqx.nn.LayerNorm(3))
    several = en.InstanceNorm((3, 4), feature_axes=(1, 2))
    with pytest.raises(ValueError, match=r"has one feature axis, this one has \(1, 2\)"):
        convert.to_torch_state_dict(several)


def test_two_layers_of_one_model_keep_their_statistics_apart():
    class Model(eqx.Module):
        first: en.BatchNorm
        second: en.BatchNorm

        def __init__(self):
            self.first, self.second = (en.BatchNorm(3, axis=1) for _ in range(2))

    model, state = eqx.nn.make_with_state(Model)()
    modules = {name: shaken(BN2(3)) for name in ("first", "second")}
    with torch.no_grad():
        modules["second"].running_mean += 5
    for name, module in modules.items():
        like = getattr(model, name)
        norm, part = convert.from_torch(module.state_dict(), like=like)
        model = eqx.tree_at(lambda m, name=name: getattr(m, name), model, norm)
        state = state.update(part)
    for name, module in modules.items():
        stats = getattr(model, name).running_stats(state)
        np.testing.assert_array_equal(stats.mean, module.running_mean.numpy())
        np.testing.assert_array_equal(stats.var, module.running_var.numpy())
