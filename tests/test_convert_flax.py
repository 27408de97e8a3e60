"""Norms of `flax.nnx` and `flax.linen` against what they become, and back."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eqx_norms as en
from eqx_norms import convert

from .helpers import as_pair, assert_close, normal


ALL = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
# Settings, and the shape of the input.
CASES = {
    "BatchNorm": ("BatchNorm", {"momentum": 0.8, "epsilon": 1e-2}, (4, 3, 6)),
    "BatchNorm, evaluation": ("BatchNorm", {"use_running_average": True}, (4, 6)),
    "BatchNorm, axis 1": ("BatchNorm", {"axis": 1, "use_bias": False}, (4, 6, 3)),
    "LayerNorm": ("LayerNorm", {"epsilon": 1e-2}, (4, 6)),
    "LayerNorm, no scale": ("LayerNorm", {"use_scale": False}, (4, 6)),
    "LayerNorm, axes": ("LayerNorm", {"reduction_axes": (1, 2)}, (4, 3, 6)),
    "RMSNorm": ("RMSNorm", {"epsilon": 1e-2}, (4, 6)),
    "RMSNorm, axes": ("RMSNorm", {"feature_axes": 1, "reduction_axes": -1}, (4, 6, 3)),
    "GroupNorm": ("GroupNorm", {"num_groups": 3, "epsilon": 1e-2}, (4, 5, 6)),
    "GroupNorm, by size": ("GroupNorm", {"num_groups": None, "group_size": 3}, (4, 6)),
    "InstanceNorm": ("InstanceNorm", {"epsilon": 1e-2}, (4, 5, 6)),
    "InstanceNorm, axis 1": ("InstanceNorm", {"feature_axes": 1}, (4, 6, 5)),
    "half precision": ("LayerNorm", {"param_dtype": jnp.bfloat16}, (4, 6)),
    "result": ("BatchNorm", {"dtype": jnp.bfloat16, "use_fast_variance": False}, (4, 6)),
}


def lenient():
    """Flax promotes dtypes implicitly."""
    return jax.numpy_dtype_promotion("standard")


@eqx.filter_jit
def call(layer, state, x):
    return layer(x, state) if state is not None else (layer(x), None)


def data(shape):
    """Of few bits, so that no cast to half precision can be what differs."""
    return (1 + normal(7, shape)).astype(jnp.bfloat16).astype(jnp.float32)


def close(actual, expected):
    tolerance = 1e-5 if actual.dtype == jnp.float32 else 2.0**-6
    assert_close(actual, expected, tolerance)


def drawn(shapes):
    """Variables of these shapes, at random."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.5, 2, leaf.shape), leaf.dtype), shapes
    )


def linen_layer(name, kwargs, x):
    if name == "BatchNorm":
        kwargs = {"use_running_average": False, **kwargs}
    module = getattr(nn, name)(**kwargs)
    with lenient():
        return module, drawn(jax.eval_shape(module.init, jax.random.key(0), x))


def nnx_layer(name, kwargs, num_features=6):
    layer = getattr(nnx, name)(num_features, rngs=nnx.Rngs(0), **kwargs)
    state = nnx.state(layer, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(layer, drawn(state))
    return layer


def linen_case(case):
    name, kwargs, shape = CASES[case]
    x = data(shape)
    module, variables = linen_layer(name, kwargs, x)
    hint = {"num_features": 6} if "params" not in variables else {}
    return module, variables, as_pair(convert.from_flax(module, variables, **hint)), x


@pytest.mark.parametrize("case", CASES)
def test_linen(case):
    module, variables, (layer, state), x = linen_case(case)
    assert type(layer) is getattr(en, type(module).__name__)
    with lenient():
        apply = jax.jit(module.apply, static_argnames="mutable")
        expected, after = apply(variables, x, mutable="batch_stats")
        y, state = call(layer, state, x)
    close(y, expected)
    if state is not None:
        # After the step that training takes.
        for name, value in after["batch_stats"].items():
            close(getattr(layer.running_stats(state), name), value)


@pytest.mark.parametrize("case", CASES)
def test_nnx(case):
    name, kwargs, shape = CASES[case]
    x = data(shape)
    old = nnx_layer(name, kwargs)
    layer, state = as_pair(convert.from_flax(old))
    with lenient():
        expected = nnx.jit(lambda old, x: old(x))(old, x)
        y, state = call(layer, state, x)
    close(y, expected)
    if state is not None:
        stats = layer.running_stats(state)
        close(stats.mean, old.mean[...])
        close(stats.var, old.var[...])


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    """Bit by bit, to Flax and back."""
    module, variables, (layer, state), _ = linen_case(case)
    back = convert.to_flax_variables(layer, state)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    hint = {"num_features": 6} if "params" not in variables else {}
    again = as_pair(convert.from_flax(module, back, **hint))
    assert eqx.tree_equal(again, (layer, state))


@pytest.mark.parametrize("axis_name", ["batch", "devices"])
@pytest.mark.parametrize("name", ALL)
def test_settings(name, axis_name):
    """What no output of a single device shows."""
    groups = ((0, 1), (2, 3))
    kwargs = {
        "axis_name": axis_name,
        "axis_index_groups": [list(group) for group in groups],
        "use_fast_variance": False,
        "dtype": jnp.float16,
    }
    if name == "GroupNorm":
        kwargs["num_groups"] = 2
    module, variables = linen_layer(name, {}, jnp.ones((4, 32)))
    for source, *rest in (
        (nnx_layer(name, kwargs),),
        (getattr(nn, name)(**kwargs), variables),
    ):
        layer, _ = as_pair(convert.from_flax(source, *rest))
        assert layer.axis_name == (axis_name,)
        assert layer.axis_index_groups == groups
        assert layer.use_fast_variance is False
        assert layer.dtype == jnp.float16
        if name == "BatchNorm":
            # linen's `None` leaves it to the call.
            assert layer.inference is False
    assert type(module).__name__ == type(layer).__name__


@pytest.mark.parametrize("axes", [(-1, -2), (2, 1), (-2, -1)])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "InstanceNorm"])
def test_several_feature_axes(name, axes):
    """Flax has them in the order of the input, whatever order it is given."""
    x = data((2, 3, 4) if name != "InstanceNorm" else (2, 5, 3, 4))
    if name == "InstanceNorm":
        axes = tuple(axis + 1 if axis > 0 else axis for axis in axes)
    kwargs = {"feature_axes": axes}
    module, variables = linen_layer(name, kwargs, x)
    layer = convert.from_flax(module, variables)
    close(layer(x), module.apply(variables, x))
    # nnx does not know the sizes.
    old = nnx_layer(name, kwargs, 12)
    with pytest.raises(ValueError, match=r"how many features .* num_features=\(n, m\)"):
        convert.from_flax(old)
    layer = convert.from_flax(old, num_features=(3, 4))
    close(layer(x), old(x))
    with pytest.raises(ValueError, match=r"expected entries .*\(4, 4\).* found .*\(12,\)"):
        convert.from_flax(old, num_features=(4, 4))


@pytest.mark.parametrize("axes", [(-1, -2), (2, 1), (1, 2)])
def test_back_with_several_feature_axes(axes):
    """The features of ours are in the order of `feature_axes`."""
    x = 1 + normal(7, (2, 3, 4))
    sizes = tuple(x.shape[axis] for axis in axes)
    layer = en.LayerNorm(sizes, feature_axes=axes, reduction_axes=-1)
    scale, bias = normal(1, sizes), normal(2, sizes)
    layer = eqx.tree_at(lambda layer: (layer.scale, layer.bias), layer, (scale, bias))
    variables = convert.to_flax_variables(layer)
    close(layer(x), nn.LayerNorm(feature_axes=axes).apply(variables, x))


def test_into_nnx():
    """As the documentation says."""
    layer, state = as_pair(convert.from_flax(nnx_layer("BatchNorm", {"momentum": 0.5})))
    variables = convert.to_flax_variables(layer, state)
    new = nnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(0))
    for collection in variables.values():
        for name, value in collection.items():
            getattr(new, name)[...] = value.reshape(-1)
    x = normal(7, (4, 6))
    y, _ = layer(x, state, use_running_average=True)
    close(y, new(x))


def test_boxed_and_frozen_variables():
    """With partitioning metadata, as linen's `init` returns them."""
    init = nn.with_partitioning(nn.initializers.ones, ("features",))
    module = nn.LayerNorm(scale_init=init)
    variables = nn.FrozenDict(module.init(jax.random.key(0), jnp.ones((2, 6))))
    layer = convert.from_flax(module, variables)
    np.testing.assert_array_equal(layer.scale, np.ones(6))


def test_numpy_variables():
    """As restored from a file."""
    _, variables = linen_layer("BatchNorm", {}, jnp.ones((2, 6)))
    variables = jax.tree.map(np.asarray, variables)
    layer, state = convert.from_flax(nn.BatchNorm(), variables)
    assert all(eqx.is_array(a) for a in (layer.scale, *jax.tree.leaves(state)))


# -- Errors.


def variables_with(**changes):
    params = {"scale": jnp.ones(6), "bias": jnp.ones(6), **changes}
    return {"params": {k: v for k, v in params.items() if v is not None}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bias": None}, r"missing \['params/bias'\], unexpected \[\]"),
        ({"gamma": jnp.ones(6)}, r"unexpected \['params/gamma'\]"),
        ({"bias": jnp.ones(5)}, r"\(6,\).* found .*\(5,\).* shape \['params/bias'\]"),
    ],
)
def test_wrong_variables(changes, match):
    with pytest.raises(ValueError, match=r"from_flax\(LayerNorm\): expected .*" + match):
        convert.from_flax(nn.LayerNorm(), variables_with(**changes))


def test_missing_statistics():
    with pytest.raises(ValueError, match=r"missing \['batch_stats/mean', 'batch_stats/var"):
        convert.from_flax(nn.BatchNorm(), variables_with())


def test_whole_model():
    with pytest.raises(ValueError, match=r"unexpected \['params/Dense_0', 'params/Layer"):
        convert.from_flax(
            nn.LayerNorm(), {"params": {"Dense_0": {}, "LayerNorm_0": {"scale": 1}}}
        )


def test_variables_or_none():
    with pytest.raises(ValueError, match=r"needs its variables: `from_flax\(module, var"):
        convert.from_flax(nn.LayerNorm())
    with pytest.raises(ValueError, match="an nnx layer has its variables; give it alone"):
        convert.from_flax(nnx_layer("LayerNorm", {}), variables_with())


def test_features_not_known():
    module = nn.LayerNorm(use_scale=False, use_bias=False)
    with pytest.raises(ValueError, match=r"how many features .* num_features=n\)"):
        convert.from_flax(module, {})


def test_mixed_axes():
    module = nn.LayerNorm(feature_axes=(1, -1))
    with pytest.raises(ValueError, match=r"order of the feature axes \(1, -1\)"):
        convert.from_flax(module, variables_with())


class Doubled(nn.LayerNorm):
    @nn.compact
    def __call__(self, x, *, mask=None):
        return 2 * super().__call__(x, mask=mask)


class Other(nn.LayerNorm):
    epsilon: float = 1e-2


def test_subclasses():
    assert convert.from_flax(Other(), variables_with()).epsilon == 1e-2
    with pytest.raises(ValueError, match=r"no counterpart for .*Doubled"):
        convert.from_flax(Doubled(), variables_with())


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_wrappers(name):
    layers = [getattr(nn, name)(nn.Dense(3))]
    # Not in every version of Flax.
    if hasattr(nnx, name):
        rngs = nnx.Rngs(0)
        layers.append(getattr(nnx, name)(nnx.Linear(2, 3, rngs=rngs), rngs=rngs))
    for layer in layers:
        with pytest.raises(
            ValueError, match=rf"wraps a layer of Flax.* `eqx_norms.{name}`"
        ):
            convert.from_flax(layer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Dense(3),
        lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        lambda: en.LayerNorm(3),
        lambda: None,
    ],
)
def test_no_counterpart(make):
    with pytest.raises(
        ValueError, match=r"no counterpart for .* BatchNorm, .*InstanceNorm"
    ):
        convert.from_flax(make())


def test_promotion_of_its_own():
    layer = nnx_layer("LayerNorm", {})
    layer.promote_dtype = lambda arrays, *, dtype: arrays
    with pytest.raises(ValueError, match=r"`promote_dtype` of its own"):
        convert.from_flax(layer)


def test_not_to_flax():
    norm, _ = eqx.nn.make_with_state(en.BatchNorm)(3)
    with pytest.raises(
        ValueError, match=r"has its statistics .* `to_flax_variables\(layer, state\)`"
    ):
        convert.to_flax_variables(norm)
    with pytest.raises(ValueError, match=r"`scale_offset=1.0` has no counterpart"):
        convert.to_flax_variables(en.RMSNorm(3, scale_offset=1.0))
    with pytest.raises(
        ValueError, match=r"needs a `BatchNorm`, .* got equinox.nn.LayerNorm"
    ):
        convert.to_flax_variables(eqx.nn.LayerNorm(3))
    with pytest.raises(ValueError, match="an RMSNorm has no bias"):
        convert.to_flax_variables(convert.from_equinox(eqx.nn.RMSNorm(3)))
    mixed = en.LayerNorm((3, 4), feature_axes=(1, -1), reduction_axes=-1)
    with pytest.raises(ValueError, match=r"order of the feature axes \(1, -1\)"):
        convert.to_flax_variables(mixed)


@pytest.mark.parametrize("variables", [{"scale": np.ones(3)}, {"params": None}], ids=str)
def test_variables_that_are_none(variables):
    with pytest.raises(
        ValueError, match=r"variables must be those of this one module, by c"
    ):
        convert.from_flax(nn.LayerNorm(), variables)


@pytest.mark.parametrize("package", ["nnx", "linen"])
def test_axis_name_at_conversion(package):
    """For use inside a `vmap`, where Flax's was for batches."""
    x = data((4, 3, 6))

    def source(name, **kwargs):
        if package == "nnx":
            return (nnx_layer(name, kwargs),)
        return linen_layer(name, kwargs, x)

    given = source("BatchNorm")
    layer, state = convert.from_flax(*given)
    expected, expected_state = call(layer, state, x)
    named, state = convert.from_flax(*given, axis_name="batch")
    assert named.axis_name == ("batch",)
    forward = jax.vmap(named, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    y, state = forward(x, state)
    close(y, expected)
    after, before = named.running_stats(state), layer.running_stats(expected_state)
    close(after.mean, before.mean)
    close(after.var, before.var)


def test_axis_name_of_its_own():
    """Taken away by none, and that of other layers is theirs."""
    layer = nnx_layer("BatchNorm", {"axis_name": "batch"})
    assert convert.from_flax(layer)[0].axis_name == ("batch",)
    assert convert.from_flax(layer, axis_name=())[0].axis_name is None
    layer = nnx_layer("LayerNorm", {"axis_name": "devices"})
    assert convert.from_flax(layer, axis_name="batch").axis_name == ("devices",)
