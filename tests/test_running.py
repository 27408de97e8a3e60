"""Running statistics step by step as in PyTorch and Flax, and layers that are frozen."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import clone, make_mesh, normal, randomize, reference


def build(num_features=8, **kwargs):
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(num_features, **kwargs)
    return randomize(layer), state


@eqx.filter_jit
def step(layer, state, x, **kwargs):
    return layer(x, state, **kwargs)


def batches(shape, number=10):
    """Of changing mean and deviation."""
    return [i - 4 + (1 + i / 2) * normal(i, shape) for i in range(number)]


# PyTorch's momentum is the weight of the new batch, this library's that of the old ones.
@pytest.mark.parametrize("torch_momentum", [0.1, 0.7, None])
def test_ten_steps_of_pytorch(torch_momentum):
    torch = pytest.importorskip("torch")
    layer, state = build(
        axis=1,
        momentum=None if torch_momentum is None else 1 - torch_momentum,
        use_unbiased_variance=True,
    )
    theirs = torch.nn.BatchNorm2d(8, eps=1e-5, momentum=torch_momentum)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(layer.scale)))
        theirs.bias.copy_(torch.tensor(np.asarray(layer.bias)))
    x = None
    for number, x in enumerate(batches((2, 8, 3, 2))):
        wanted = theirs(torch.tensor(np.asarray(x))).detach().numpy()
        y, state = step(layer, state, x)
        stats = layer.running_stats(state)
        np.testing.assert_allclose(y, wanted, atol=2e-5)
        np.testing.assert_allclose(
            stats.mean, theirs.running_mean.numpy(), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(stats.var, theirs.running_var.numpy(), rtol=1e-5)
        assert theirs.num_batches_tracked.item() == number + 1
        assert np.all(stats.count == number + 1)
    theirs.eval()
    wanted = theirs(torch.tensor(np.asarray(x))).detach().numpy()
    y, _ = step(eqx.nn.inference_mode(layer), state, x)
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_ten_steps_of_flax():
    nnx = pytest.importorskip("flax.nnx")
    layer, state = build(momentum=0.7)
    theirs = nnx.BatchNorm(8, momentum=0.7, use_running_average=False, rngs=nnx.Rngs(0))
    theirs.scale[...], theirs.bias[...] = layer.scale, layer.bias
    x = None
    for x in batches((4, 3, 8)):
        y, state = step(layer, state, x)
        np.testing.assert_allclose(y, theirs(x), atol=2e-5)
        stats = layer.running_stats(state)
        np.testing.assert_allclose(stats.mean, theirs.mean[...], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats.var, theirs.var[...], rtol=1e-5)
    wanted = theirs(x, use_running_average=True)
    y, _ = step(layer, state, x, use_running_average=True)
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_average_against_numpy():
    """Of the batches' own statistics, whatever the state held at first."""
    layer, state = build(momentum=None)
    means, variances = [], []
    for x in batches((5, 8), 4):
        _, state = step(layer, state, x)
        _, mean, var = reference(x, (0,))
        means.append(mean[0])
        variances.append(var[0])
        stats = layer.running_stats(state)
        np.testing.assert_allclose(stats.mean, np.mean(means, 0), atol=1e-5)
        np.testing.assert_allclose(stats.var, np.mean(variances, 0), rtol=1e-5)


# The unbiased variance: over one fewer than was counted, wherever that was.


def over_devices(layer, x, mask, state):
    """Eight devices, each with a part of the batch."""

    def f(x, mask, state):
        y, state = layer(x, state, mask=mask)
        return y, layer.running_stats(state)

    mapped = jax.shard_map(
        f,
        mesh=make_mesh(batch=8),
        in_specs=(P("batch"), P("batch"), P()),
        out_specs=(P("batch"), P()),
    )
    return jax.jit(mapped)(x, mask, state)


def over_vmap(layer, x, mask, state):
    def f(x, mask):
        y, new = layer(x, clone(state), mask=mask)
        return y, layer.running_stats(new)

    return jax.jit(jax.vmap(f, axis_name="batch", out_axes=(0, None)))(x, mask)


@pytest.mark.parametrize("over", [over_devices, over_vmap])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_unbiased_counts_all(over, masked):
    layer, state = build(axis_name="batch", use_unbiased_variance=True, momentum=0.0)
    x = 2 + normal(0, (8, 3, 8))
    mask = jnp.ones((8, 3, 1), bool)
    if masked:
        # Some devices with nothing, others with all.
        mask = mask.at[:3].set(False).at[5, 1].set(False)
    number = 14 if masked else 24
    _, stats = over(layer, jnp.where(mask, x, jnp.nan), mask, state)
    _, mean, var = reference(x, (0, 1), mask=mask)
    assert int(mask.sum()) == number
    np.testing.assert_allclose(stats.mean, mean[0, 0], rtol=1e-5)
    np.testing.assert_allclose(stats.var, var[0, 0] * number / (number - 1), rtol=1e-5)
    assert np.all(stats.count == 1)


@pytest.mark.parametrize("over", [over_devices, over_vmap])
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("counted", [1, 0], ids=["one counted", "none counted"])
def test_one_counted_says_nothing_of_a_variance(over, unbiased, counted):
    layer, state = build(axis_name="batch", use_unbiased_variance=unbiased, momentum=0.5)
    x = 2 + normal(0, (8, 3, 8))
    mask = jnp.zeros((8, 3, 1), bool).at[2, :counted].set(True)
    y, stats = over(layer, x, mask, state)
    assert np.isfinite(y).all()
    assert eqx.tree_equal(
        jax.tree.map(np.asarray, stats),
        jax.tree.map(np.asarray, layer.running_stats(state)),
    )


def test_unbiased_counts_each_feature_by_itself():
    layer, state = build(use_unbiased_variance=True, momentum=0.0)
    x = normal(0, (9, 8))
    # One row for the first feature, two for the second, and so on.
    mask = jnp.arange(9)[:, None] <= jnp.arange(8)[None]
    _, state = step(layer, state, x, mask=mask)
    x = np.asarray(x, np.float64)
    # One row says nothing of a variance: the first feature stays as it was.
    wanted = [x[: n + 1, n].var(ddof=1) if n else 1.0 for n in range(8)]
    stats = layer.running_stats(state)
    np.testing.assert_allclose(stats.var, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(stats.count, [0, *[1] * 7])


# Frozen layers.


class Model(eqx.Module):
    first: en.BatchNorm
    more: list[en.BatchNorm]
    dropout: eqx.nn.Dropout
    norm: en.LayerNorm

    def __init__(self):
        self.first = en.BatchNorm(8)
        self.more = [en.BatchNorm(8, momentum=0.5)]
        self.dropout = eqx.nn.Dropout()
        self.norm = en.LayerNorm(8)

    def __call__(self, x, state):
        for layer in (self.first, *self.more):
            x, state = layer(x, state)
        return self.norm(x), state


def test_freeze_a_model():
    model, state = eqx.nn.make_with_state(Model)()
    x = 2 + 3 * normal(0, (6, 8))
    _, state = step(model, state, x)
    evaluated, _ = step(eqx.nn.inference_mode(model), state, x)
    frozen = en.freeze(model)
    # In all the ways in which a model is told to train.
    awake = eqx.nn.inference_mode(frozen, value=False)
    asleep = eqx.nn.inference_mode(eqx.nn.inference_mode(frozen), value=False)
    for form in (frozen, awake, asleep):
        assert form.first.frozen is form.more[0].frozen is True
        assert form.first.inference is form.dropout.inference is False
        y, same = step(form, state, x)
        np.testing.assert_array_equal(y, evaluated)
        assert eqx.tree_equal(same, state)
    # Nothing else is touched, and it is undone.
    assert model.first.frozen is False
    assert eqx.tree_equal(en.unfreeze(frozen), model)
    y, new = step(en.unfreeze(frozen), state, x)
    np.testing.assert_array_equal(y, step(model, state, x)[0])
    assert np.all(model.first.running_stats(new).count == 2)


def test_freeze_a_layer():
    layer, state = build(momentum=0.5)
    x = 3 + normal(0, (6, 8))
    _, state = step(layer, state, x)
    frozen = en.freeze(layer)
    assert isinstance(frozen, en.BatchNorm)
    wanted, _ = step(layer, state, x, use_running_average=True)
    # The call does not wake it either.
    for argument in (None, False, True):
        y, same = step(frozen, state, x, use_running_average=argument)
        np.testing.assert_array_equal(y, wanted)
        assert eqx.tree_equal(same, state)
    assert eqx.tree_equal(en.unfreeze(frozen), layer)
    assert eqx.tree_equal(en.freeze(frozen), frozen)


def test_freeze_a_part():
    """The rest of the model goes on."""
    model, state = eqx.nn.make_with_state(Model)()
    model = eqx.tree_at(lambda model: model.first, model, replace_fn=en.freeze)
    _, new = step(model, state, normal(0, (6, 8)))
    assert np.all(model.first.running_stats(new).count == 0)
    assert np.all(model.more[0].running_stats(new).count == 1)


def test_frozen_parameters_are_still_trained():
    layer, state = build()
    frozen = en.freeze(layer)
    x = 3 + normal(0, (6, 8))
    grads = eqx.filter_grad(lambda layer: jnp.sum(layer(x, clone(state))[0] ** 2))(frozen)
    assert np.all(grads.scale != 0)
    assert np.all(grads.bias != 0)
    # The statistics are constants, so the gradient of the input is elementwise.
    dx = jax.grad(lambda x: jnp.sum(frozen(x, clone(state))[0]))(x)
    wanted = np.broadcast_to(layer.scale / np.sqrt(1 + 1e-5), x.shape)
    np.testing.assert_allclose(dx, wanted, rtol=1e-6)


def test_frozen_needs_no_axis_name():
    """No statistics of the batch, so nothing to bind."""
    layer, state = build(axis_name="batch")
    x = normal(0, (6, 8))
    y, _ = en.freeze(layer)(x, state)
    scale, bias = np.asarray(layer.scale), np.asarray(layer.bias)
    wanted = np.asarray(x) / np.sqrt(1 + 1e-5) * scale + bias
    np.testing.assert_allclose(y, wanted, atol=1e-6)


@pytest.mark.parametrize("function", [en.freeze, en.unfreeze])
@pytest.mark.parametrize(
    "model",
    [en.LayerNorm(8), eqx.nn.Linear(2, 2, key=jax.random.key(0)), None, []],
    ids=str,
)
def test_nothing_to_freeze(function, model):
    with pytest.raises(ValueError, match=r"no `eqx_norms\.BatchNorm` in this model"):
        function(model)


@pytest.mark.parametrize("kwargs", [{"momentum": 0.0}, {"debias": True}], ids=str)
def test_what_has_no_weight_may_be_nan(kwargs):
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(3, **kwargs)
    old = layer.running_stats(state)
    nan = jax.tree.map(lambda a: a * jnp.nan if a.dtype == jnp.float32 else a, old)
    x = normal(0, (8, 3))
    _, state = layer(x, state.set(layer.state_index, nan))
    stats = layer.running_stats(state)
    np.testing.assert_allclose(stats.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.var, x.var(0), atol=1e-6)


def test_averaged_counts():
    """An average of states has counts that are no integers."""
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(3, debias=True)
    x = normal(0, (4, 3))
    _, one = bn(x, clone(state))
    _, two = bn(x, clone(one))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    _, new = bn(x, clone(mean))
    np.testing.assert_allclose(bn.running_stats(new).count, 2.5)
    assert jnp.all(jnp.isfinite(bn.running_stats(new).var))
    again = en.recalibrate(bn, mean, [x], lambda m, s, x: m(x, s))
    np.testing.assert_allclose(bn.running_stats(again).count, 1)
