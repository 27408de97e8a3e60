"""A folded layer against the layer and the norm one after the other."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import assert_close, clone, float64, normal, randomize


def norm(features=6, seed=0, **kwargs):
    """A BatchNorm with random parameters and running statistics."""
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(features, momentum=0.3, **kwargs)
    dtype = jnp.float32 if bn.scale is None else bn.scale.dtype
    x = 2 * normal(seed, (4, features), dtype) + 3
    _, state = bn(x, state)
    return randomize(bn, seed), state


def sequence(layer, bn, state, x):
    """A batch of examples through both, channels first."""
    y = jax.vmap(layer)(x)
    features = y.ndim == 1
    bn = eqx.nn.inference_mode(bn)
    y, _ = bn(y[:, None] if features else jnp.moveaxis(y, 1, -1), clone(state))
    return y[:, 0] if features else jnp.moveaxis(y, -1, 1)


KEY = jax.random.key(0)
LAYERS = {
    "Linear": lambda **kw: eqx.nn.Linear(4, 6, key=KEY, **kw),
    "Linear of a scalar": lambda **kw: eqx.nn.Linear("scalar", 6, key=KEY, **kw),
    "Conv of no dimension": lambda **kw: eqx.nn.Conv(0, 4, 6, (), key=KEY, **kw),
    "Conv1d": lambda **kw: eqx.nn.Conv1d(4, 6, 3, padding="SAME", key=KEY, **kw),
    "Conv2d in groups": lambda **kw: eqx.nn.Conv2d(
        4, 6, (3, 2), 2, padding_mode="REFLECT", padding=1, groups=2, key=KEY, **kw
    ),
    "Conv3d": lambda **kw: eqx.nn.Conv3d(4, 6, 2, dilation=2, key=KEY, **kw),
    "Conv of four dimensions": lambda **kw: eqx.nn.Conv(4, 4, 6, 1, key=KEY, **kw),
    "ConvTranspose": lambda **kw: eqx.nn.ConvTranspose(1, 4, 6, 3, 2, key=KEY, **kw),
    "ConvTranspose2d in groups": lambda **kw: eqx.nn.ConvTranspose2d(
        4, 6, (3, 2), (2, 1), groups=2, key=KEY, **kw
    ),
    "ConvTranspose3d": lambda **kw: eqx.nn.ConvTranspose3d(4, 6, 2, key=KEY, **kw),
}


def example_shape(layer):
    if isinstance(layer, eqx.nn.Linear):
        return () if layer.in_features == "scalar" else (layer.in_features,)
    return layer.in_channels, *(5, 4, 5, 3)[: layer.num_spatial_dims]


def assert_same(layer, bn, state, rtol=1e-5):
    folded = en.fold_batch_norm(layer, bn, state)
    x = normal(1, (3, *example_shape(layer)), layer.weight.dtype)
    wanted, found = jax.jit(lambda x: (sequence(layer, bn, state, x), jax.vmap(folded)(x)))(
        x
    )
    assert found.shape == wanted.shape
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * scale)
    return folded


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_equals_the_sequence(make, use_bias):
    layer = make(use_bias=use_bias)
    bn, state = norm()
    before = jax.tree.map(jnp.copy, (layer, eqx.filter(bn, eqx.is_array), state))
    folded = assert_same(layer, bn, state)
    assert type(folded) is type(layer)
    assert folded.use_bias
    # The same as a layer that was made with a bias: a model may be built around it.
    assert jax.tree.structure(folded) == jax.tree.structure(make(use_bias=True))
    wanted = jax.eval_shape(lambda: make(use_bias=True).bias)
    assert (folded.bias.shape, folded.bias.dtype) == (wanted.shape, wanted.dtype)
    after = layer, eqx.filter(bn, eqx.is_array), state
    assert eqx.tree_equal(before, after)
    assert layer.use_bias == use_bias
    assert not bn.frozen


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_scale": False},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"scale_offset": 1.0},
        {"use_scale": False, "scale_offset": 0.5},
        {"epsilon": 0.5},
        {"axis": 2},
        {"axis_name": "batch"},
        {"use_running_average": True},
        {"use_unbiased_variance": True},
    ],
    ids=str,
)
def test_settings_of_the_norm(kwargs):
    bn, state = norm()
    other = en.BatchNorm(6, momentum=0.3, **kwargs)
    fields = {"state_index": bn.state_index, "scale": bn.scale, "bias": bn.bias}
    if other.scale is None:
        del fields["scale"]
    if other.bias is None:
        del fields["bias"]
    other = eqx.tree_at(
        lambda bn: [getattr(bn, name) for name in fields], other, [*fields.values()]
    )
    layer: Any = eqx.nn.Conv1d(4, 6, 3, key=KEY)
    folded = en.fold_batch_norm(layer, other, state)
    x = normal(1, (3, 4, 5))
    y, _ = eqx.nn.inference_mode(other)(
        jnp.moveaxis(jax.vmap(layer)(x), 1, 2), clone(state)
    )
    np.testing.assert_allclose(
        jax.vmap(folded)(x), jnp.moveaxis(y, 2, 1), rtol=1e-5, atol=1e-5
    )


def test_against_numpy():
    bn, state = norm(scale_offset=1.0)
    layer: Any = eqx.nn.Linear(4, 6, key=KEY)
    folded = en.fold_batch_norm(layer, bn, state)
    stats = bn.running_stats(state)
    weight, bias, mean, var, scale, shift = (
        np.asarray(a, np.float64)
        for a in (layer.weight, layer.bias, stats.mean, stats.var, bn.scale, bn.bias)
    )
    factor = (scale + 1) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(folded.weight, factor[:, None] * weight, rtol=1e-6)
    np.testing.assert_allclose(folded.bias, factor * (bias - mean) + shift, rtol=1e-5)


@pytest.mark.parametrize("in_features", [4, "scalar"])
def test_scalar_output(in_features):
    bn, state = norm(1)
    assert_same(eqx.nn.Linear(in_features, "scalar", key=KEY), bn, state)


def test_tuple_of_one_feature_axis():
    bn, state = norm(6)
    other, _ = eqx.nn.make_with_state(en.BatchNorm)((6,), axis=(-1,))
    other = eqx.tree_at(lambda bn: (bn.scale, bn.bias), other, (bn.scale, bn.bias))
    assert_same(eqx.nn.Linear(4, 6, key=KEY), other, state)


def test_no_variance_and_no_epsilon():
    """What has no variance comes out as the bias, as it does from the norm."""
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(6, momentum=0.0, epsilon=0.0)
    _, state = bn(jnp.ones((3, 6)), state)
    bn = randomize(bn)
    layer: Any = eqx.nn.Linear(4, 6, key=KEY)
    folded = en.fold_batch_norm(layer, bn, state)
    np.testing.assert_array_equal(folded.weight, 0)
    np.testing.assert_allclose(folded.bias, bn.bias)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Computed in float32 and rounded once: a mean that nearly cancels the bias shows."""
    layer: Any = eqx.nn.Linear(4, 6, key=KEY, dtype=dtype)
    bn, state = norm(dtype=dtype)
    mean = layer.bias.astype(jnp.float32) + 1e-4
    state = eqx.tree_at(lambda s: jax.tree.leaves(s)[0], state, mean)
    folded = en.fold_batch_norm(layer, bn, state)
    assert folded.weight.dtype == folded.bias.dtype == dtype
    wide = eqx.tree_at(
        lambda tree: (tree.weight, tree.bias),
        layer,
        (layer.weight.astype(jnp.float32), layer.bias.astype(jnp.float32)),
    )
    wanted = en.fold_batch_norm(wide, bn, state)
    assert wanted.weight.dtype == wanted.bias.dtype == jnp.float32
    np.testing.assert_array_equal(folded.weight, wanted.weight.astype(dtype))
    np.testing.assert_array_equal(folded.bias, wanted.bias.astype(dtype))


def test_half_precision_result_of_the_norm():
    """The norm's `dtype` is that of its output, not of what is computed before."""
    bn, state = norm()
    half = en.BatchNorm(6, dtype=jnp.bfloat16)
    half = eqx.tree_at(
        lambda bn: (bn.state_index, bn.scale, bn.bias),
        half,
        (bn.state_index, bn.scale, bn.bias),
    )
    layer: Any = eqx.nn.Linear(4, 6, key=KEY)
    found, wanted = (en.fold_batch_norm(layer, norm, state) for norm in (half, bn))
    assert eqx.tree_equal(found, wanted)


def test_float64():
    with float64():
        layer: Any = eqx.nn.Conv1d(4, 6, 3, key=jax.random.key(0))
        bn, state = norm(param_dtype=jnp.float64)
        folded = assert_same(layer, bn, state, rtol=1e-13)
    assert folded.weight.dtype == folded.bias.dtype == np.float64


def test_complex():
    layer: Any = eqx.nn.Linear(4, 6, key=KEY, dtype=jnp.complex64)
    bn, state = norm(param_dtype=jnp.complex64)
    folded = assert_same(layer, bn, state)
    assert folded.weight.dtype == folded.bias.dtype == jnp.complex64
    with pytest.raises(ValueError, match=r"weight of dtype float32 cannot hold.*complex64"):
        en.fold_batch_norm(eqx.nn.Linear(4, 6, key=KEY), bn, state)


def test_under_jit_and_vmap():
    """For a stack of layers too."""

    def make(key):
        return eqx.nn.Linear(4, 6, use_bias=False, key=key), en.BatchNorm(6)

    keys = jax.random.split(KEY, 3)
    (layers, bns), states = eqx.nn.make_with_state(eqx.filter_vmap(make))(keys)
    stats = jax.tree.map(lambda a: a + jnp.arange(3, dtype=a.dtype)[:, None], states)
    folded = eqx.filter_jit(eqx.filter_vmap(en.fold_batch_norm))(layers, bns, stats)
    assert folded.weight.shape == (3, 6, 4)
    for i in range(3):
        one = jax.tree.map(
            lambda a, i=i: a[i] if eqx.is_array(a) else a, (layers, bns, stats)
        )
        wanted = en.fold_batch_norm(*one)
        np.testing.assert_allclose(folded.weight[i], wanted.weight, rtol=1e-6)
        np.testing.assert_allclose(folded.bias[i], wanted.bias, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: (eqx.nn.MLP(4, 6, 2, 1, key=KEY), en.BatchNorm(6)),
            "`layer` must be an `equinox.nn.Linear`, `Conv` or `ConvTranspose`, got MLP",
        ),
        (
            lambda: (
                eqx.nn.Linear(4, 6, key=KEY),
                eqx.nn.BatchNorm(6, "batch", mode="batch"),
            ),
            r"`bn` must be an `eqx_norms.BatchNorm`, got equinox\..*BatchNorm",
        ),
        (
            lambda: (eqx.nn.Linear(4, 6, key=KEY), en.LayerNorm(6)),
            "`bn` must be an `eqx_norms.BatchNorm`, got .*LayerNorm",
        ),
        (
            lambda: (eqx.nn.Linear(6, 4, key=KEY), en.BatchNorm(6)),
            "one feature for each of the 4 outputs of Linear, got `num_features=6`",
        ),
        (
            lambda: (eqx.nn.Conv1d(4, 6, 1, key=KEY), en.BatchNorm((2, 3), axis=(1, 2))),
            r"outputs of Conv1d, got `num_features=\(2, 3\)` along `axis=\(1, 2\)`",
        ),
    ],
)
def test_errors(make, message):
    (layer, bn), (_, state) = make(), norm()
    with pytest.raises(ValueError, match=message):
        en.fold_batch_norm(layer, bn, state)


def test_state_of_another_model():
    bn, state = norm()
    _, other = eqx.nn.make_with_state(lambda: (en.BatchNorm(6),))()
    layer: Any = eqx.nn.Linear(4, 6, key=KEY)
    with pytest.raises(ValueError, match="holds nothing for this layer"):
        en.fold_batch_norm(layer, bn, other)
    en.fold_batch_norm(layer, bn, state)


# -- Whole models.


def conv(inputs, outputs, seed, **kwargs) -> Any:
    return eqx.nn.Conv2d(inputs, outputs, 3, padding=1, key=jax.random.key(seed), **kwargs)


def bn(features, **kwargs):
    return en.BatchNorm(features, **{"axis": 0, "axis_name": "batch", **kwargs})


relu = eqx.nn.Lambda(jax.nn.relu)


class Skip(eqx.Module):
    """A Sequential in a module, and a BatchNorm that no Sequential has."""

    inner: eqx.nn.Sequential
    last: Any

    def __call__(self, x, state, *, key=None):
        y, state = self.inner(x, state)
        return x + y, state

    def is_stateful(self):
        return True


class Net(eqx.Module):
    trunk: eqx.nn.Sequential
    heads: list[Any]
    alone: en.BatchNorm

    def __init__(self):
        deep = eqx.nn.Sequential([conv(4, 4, 1), eqx.nn.Sequential([bn(4), relu])])
        self.trunk = eqx.nn.Sequential(
            [
                conv(2, 4, 0, use_bias=False),
                eqx.nn.Identity(),
                bn(4, axis=-3),
                relu,
                deep,
                bn(4),  # After a function.
                eqx.nn.Dropout(0.5),
                eqx.nn.Sequential([conv(4, 4, 2)]),
                bn(4),
                bn(4),  # And one more.
                eqx.nn.Lambda(lambda x: jnp.mean(x, (1, 2))),
            ]
        )
        self.heads = [
            eqx.nn.Sequential([bn(4), eqx.nn.Linear(4, 3, key=KEY), bn(3, axis=-1)])
        ]
        self.alone = bn(3)

    def __call__(self, x, state, key=None):
        x, state = self.trunk(x, state, key=key)
        (head,) = self.heads
        x, state = head(x, state)
        return self.alone(x, state)


def run(model, state, x, **kwargs):
    forward = jax.vmap(
        lambda x, state: model(x, state, **kwargs),
        in_axes=(0, None),
        out_axes=(0, None),
        axis_name="batch",
    )
    return forward(x, clone(state))


def trained(make, x) -> tuple[Any, Any]:
    """A model with random parameters, and the running statistics of a few batches."""
    model, state = eqx.nn.make_with_state(make)()
    model = randomize(model)
    step = eqx.filter_jit(lambda model, state, x: run(model, state, x, key=KEY)[1])
    for _ in range(30):
        state = step(model, state, x)
    return eqx.nn.inference_mode(model), state


def test_a_whole_model():
    x = 2 * normal(1, (6, 2, 5, 5)) + 1
    model, state = trained(Net, x)
    expected, _ = run(model, state, x)
    with pytest.warns(UserWarning, match="not every BatchNorm was folded") as record:
        folded, new_state = en.fold_batch_norms(model, state)
    (warning,) = record
    nowhere = "it is in no `equinox.nn.Sequential`, which says what it follows"
    assert str(warning.message).splitlines()[1:] == [
        "- eqx_norms.BatchNorm at model.trunk.layers[5]: what comes before it is "
        "equinox.nn.Lambda.",
        "- eqx_norms.BatchNorm at model.heads[0].layers[0]: nothing comes before it in its "
        "`equinox.nn.Sequential`",
        f"- eqx_norms.BatchNorm at model.alone: {nowhere}",
    ]
    y, after = eqx.filter_jit(run)(folded, new_state, x)
    assert_close(y, expected, 1e-4)
    # Three of eight are left, in model and state, each where it was.
    norms = [folded.trunk[5], folded.heads[0][0], folded.alone]
    assert all(type(norm) is en.BatchNorm for norm in norms)
    assert len(jax.tree.leaves(new_state)) == 9
    identities = [folded.trunk[2], folded.trunk[4][1][0], *folded.trunk[8:10]]
    assert all(
        type(layer) is eqx.nn.Identity for layer in [*identities, folded.heads[0][2]]
    )
    # These are trained as they were.
    _, after = run(eqx.nn.inference_mode(folded, False), after, x, key=KEY)
    for norm in norms:
        np.testing.assert_array_equal(norm.running_stats(after).count, 31)
    # What was given stays as it was.
    assert_close(run(model, state, x)[0], expected, 1e-4)


def test_a_key_is_split_as_before():
    """Dropout draws the same: the layers are as many as they were."""
    x = normal(1, (6, 3))

    def make():
        linear = eqx.nn.Linear(3, 4, key=KEY)
        return eqx.nn.Sequential([linear, bn(4), eqx.nn.Dropout(0.5)])

    model, state = trained(make, x)
    model = eqx.tree_at(lambda model: model[2].inference, model, False)
    folded, new_state = en.fold_batch_norms(model, state)
    assert jax.tree.leaves(new_state) == []
    expected, y = (
        run(*each, x, key=KEY)[0] for each in ((model, state), (folded, new_state))
    )
    assert not np.all(expected)
    assert_close(y, expected, 1e-4)


def test_a_sequential_in_a_module():
    x = normal(1, (6, 2, 5, 5))

    def make():
        last = eqx.nn.Sequential([Skip(eqx.nn.Sequential([conv(2, 2, 1), bn(2)]), bn(2))])
        # What comes before a module is not what its parts follow.
        return Skip(eqx.nn.Sequential([conv(2, 2, 0), last.layers[0].inner]), last)

    model, state = trained(make, x)
    with pytest.warns(UserWarning, match=r"at model\.last\.layers\[0\]\.last: it is in no"):
        folded, new_state = en.fold_batch_norms(model, state)
    assert_close(run(folded, new_state, x)[0], run(model, state, x)[0], 1e-4)
    for inner in (folded.inner[1], folded.last[0].inner):
        assert type(inner[1]) is eqx.nn.Identity


class Doubled(eqx.nn.Linear):
    def __call__(self, x, *, key=None):
        return 2 * super().__call__(x)


class Shifted(en.BatchNorm):
    def __init__(self):
        super().__init__(3, axis=0)

    def __call__(self, x, state, **kwargs):
        y, state = super().__call__(x, state, **kwargs)
        return y + 1, state


class Reversed(eqx.nn.Sequential):
    def __init__(self, layers):
        super().__init__(layers)

    def __call__(self, x, state: Any = None, *, key=None) -> Any:
        for layer in reversed(self.layers):
            x, state = (
                layer(x, state) if isinstance(layer, en.BatchNorm) else (layer(x), state)
            )
        return x, state


def linear(outputs=3, make=eqx.nn.Linear) -> Any:
    return make(3, outputs, key=KEY)


# What must not be folded, and why.
UNFIT = {
    "another axis": (
        lambda: [conv(2, 3, 0), bn(3, axis=-1)],
        r"features are along `axis=\(-1,\)`, those of the Conv2d before it along axis 0",
    ),
    "several axes": (
        lambda: [conv(2, 3, 0), bn((3, 5), axis=(0, 1))],
        r"features are along `axis=\(0, 1\)`",
    ),
    "other features": (lambda: [linear(4), bn(3)], "one feature for each of the 4 outputs"),
    "a linear layer of its own": (
        lambda: [linear(make=Doubled), bn(3)], r"comes before it is .*\.Doubled"
    ),
    "a norm of its own": (
        lambda: [linear(), Shifted()], "a subclass of `BatchNorm` with"
    ),
    "a wrapper": (
        lambda: [en.WeightNorm(linear()), bn(3)],
        r"is eqx_norms\.WeightNorm\. `bake` that first",
    ),
    "inside a wrapper": (
        lambda: [en.WeightNorm(eqx.nn.Sequential([linear(), bn(3)]))],
        r"layers\[0\]\.layer\.layers\[1\]: a WeightNorm is around what .* `bake` it first",
    ),
    "inside one of Equinox": (
        lambda: [eqx.nn.WeightNorm(AroundLinear(linear(), bn(3)))],
        "a WeightNorm is around",
    ),
    "complex": (
        lambda: [linear(), bn(3, param_dtype=jnp.complex64)], "cannot hold the result"
    ),
    "tied": (
        lambda: [
            eqx.nn.Shared(
                (eqx.nn.Sequential([linear(), bn(3)]), linear()),
                lambda pair: pair[1],
                lambda pair: pair[0][0],
            )
        ],
        r"pytree\[0\]\.layers\[1\]: `equinox.nn.Shared` may tie it",
    ),
    "another Sequential": (
        lambda: [Reversed([linear(), bn(3)])], "it is in no `equinox.nn.Sequential`"
    ),
    "stacked": (
        lambda: eqx.filter_vmap(lambda key: [eqx.nn.Linear(3, 3, key=key), bn(3)])(
            jax.random.split(KEY, 3)
        ),
        "made under `equinox.filter_vmap`",
    ),
    "a function between": (lambda: [linear(), relu, bn(3)], r"is equinox\.nn\.Lambda"),
}  # fmt: skip


class AroundLinear(eqx.Module):
    weight: Any
    norm: Any
    inner: eqx.nn.Sequential

    def __init__(self, linear, norm):
        self.weight = linear.weight
        self.norm = None
        self.inner = eqx.nn.Sequential([linear, norm])


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_left(name):
    make, why = UNFIT[name]
    model, state = eqx.nn.make_with_state(lambda: eqx.nn.Sequential(make()))()
    with pytest.raises(ValueError, match=rf"(?s)no BatchNorm can be folded.*{why}"):
        en.fold_batch_norms(model, state)
    # Beside one that can be it is listed, and stays as it was.
    both, state = eqx.nn.make_with_state(
        lambda: [eqx.nn.Sequential([linear(), bn(3)]), eqx.nn.Sequential(make())]
    )()
    with pytest.warns(UserWarning, match=why):
        folded, new_state = en.fold_batch_norms(both, state)
    assert type(folded[0][1]) is eqx.nn.Identity
    assert eqx.tree_equal(folded[1], both[1])
    assert len(jax.tree.leaves(new_state)) == len(jax.tree.leaves(state)) - 3


def test_norms_of_equinox_are_listed():
    norms = [bn(3), eqx.nn.BatchNorm(3, "batch", mode="batch")]
    model, state = eqx.nn.make_with_state(
        lambda: [eqx.nn.Sequential([linear(), norm]) for norm in norms]
    )()
    with pytest.warns(UserWarning, match=r"equinox.nn.BatchNorm at .*: `replace_norms`"):
        en.fold_batch_norms(model, state)


def test_a_stack_under_vmap():
    def make(key):
        return eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=key), bn(4)])

    keys = jax.random.split(KEY, 3)
    models, states = eqx.filter_vmap(eqx.nn.make_with_state(make))(keys)
    models = eqx.nn.inference_mode(randomize(models))
    folded, new_states = eqx.filter_vmap(en.fold_batch_norms)(models, states)
    x = normal(1, (6, 3))
    ensemble = eqx.filter_vmap(lambda model, state: run(model, state, x)[0])
    assert_close(ensemble(folded, new_states), ensemble(models, states), 1e-4)


@pytest.mark.parametrize(
    "make", [linear, lambda: eqx.nn.Sequential([linear()]), lambda: None]
)
def test_nothing_to_fold(make):
    with pytest.raises(ValueError, match=r"fold_batch_norms: there is no `eqx_norms.Batch"):
        en.fold_batch_norms(make(), eqx.nn.State(None))


def test_state_of_another_whole_model():
    model, _ = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([linear(), bn(3)]))()
    _, foreign = eqx.nn.make_with_state(lambda: [bn(3)])()
    with pytest.raises(ValueError, match="holds nothing for this layer"):
        en.fold_batch_norms(model, foreign)
