"""`recalibrate` against the statistics, in float64, of all batches joined to one."""

import functools
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en
from eqx_norms._recalibrate import _NOTHING, _merge
from eqx_norms._running import PooledStats

from .helpers import (
    BATCH_NORM,
    clone,
    float64,
    make_mesh,
    normal,
    raises,
    randomize,
    reference,
)


SIZES = 3, 8, 1, 5


def data(features=4, sizes=SIZES, dtype: Any = np.float32):
    """Batches of unequal sizes, means and deviations."""
    rng = np.random.default_rng(0)
    out = []
    for i, n in enumerate(sizes):
        x = rng.normal(3 * i - 2, 1 + i, (n, features))
        if np.issubdtype(dtype, np.complexfloating):
            x = x + 1j * rng.normal(i, 2, (n, features))
        out.append(jnp.asarray(x.astype(dtype)))
    return out


def build(features=4, **kwargs):
    """A layer whose running statistics are of something else."""
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(features, **kwargs)
    rng = np.random.default_rng(1)

    def draw(leaf):
        if not eqx.is_array(leaf):
            return leaf
        return jnp.asarray(rng.uniform(2, 9, leaf.shape).astype(leaf.dtype))

    return jax.tree.map(draw, bn), jax.tree.map(draw, state)


def forward(model, state, x):
    return model(x, state)


@eqx.filter_jit
def jitted(model, state, x):
    return model(x, state)


def joined(batches, masks=None, ddof=0):
    """Mean and variance of all data, and how many batches count, feature by feature."""
    x = np.concatenate([np.asarray(b) for b in batches])
    x = x.astype(np.result_type(x.dtype, np.float64))
    mask = np.ones(x.shape, bool) if masks is None else np.concatenate(masks)
    mask = np.broadcast_to(mask, x.shape)
    columns = [x[mask[:, i], i] for i in range(x.shape[1])]
    return (
        np.array([np.mean(c) for c in columns]),
        np.array([np.var(c, ddof=ddof) for c in columns]),
    )


def assert_stats(stats, mean, var, count=None, rtol=1e-6):
    mean, var = np.asarray(mean), np.asarray(var)
    scale = np.max(np.abs(mean)) + np.sqrt(np.max(var))
    np.testing.assert_allclose(stats.mean, mean, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(stats.var, var, rtol=4 * rtol)
    if count is not None:
        np.testing.assert_array_equal(stats.count, count)


def copies(tree):
    return jax.tree.map(lambda a: np.array(a) if eqx.is_array(a) else a, tree)


@pytest.mark.parametrize(
    ("kwargs", "f"),
    [
        ({}, forward),
        ({}, jitted),
        ({"momentum": None}, jitted),
        ({"use_running_average": True}, jitted),
        ({"use_fast_variance": False}, jitted),
        ({"use_unbiased_variance": True}, jitted),
        ({"use_scale": False, "use_bias": False}, jitted),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_joined_data(kwargs, f):
    bn, state = build(**kwargs)
    before = copies((bn, state))
    new = en.recalibrate(bn, state, data(), f)
    ddof = kwargs.get("use_unbiased_variance", False)
    assert_stats(bn.running_stats(new), *joined(data(), ddof=ddof), count=len(SIZES))
    # The given model and state are as they were; and the new state is one like it.
    assert eqx.tree_equal(before, copies((bn, state)))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    _, _ = bn(data()[1], state)
    y, _ = eqx.nn.inference_mode(bn)(data()[1], new)
    mean, var = joined(data(), ddof=ddof)
    wanted = (np.asarray(data()[1]) - mean) / np.sqrt(var + 1e-5)
    if bn.scale is not None:
        wanted = wanted * np.asarray(bn.scale) + np.asarray(bn.bias)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_one_position():
    """Its unbiased variance is zero, not NaN."""
    bn, state = build(use_unbiased_variance=True)
    x = data(sizes=(1,))
    new = en.recalibrate(bn, state, x, jitted)
    assert_stats(bn.running_stats(new), np.asarray(x[0])[0], np.zeros(4), count=1)


def test_many_batches_and_a_generator():
    """In one pass; more batches than float32 could average with no loss."""
    bn, state = build(1)
    x = np.asarray(np.random.default_rng(0).normal(100, 1, (2000, 1, 1)), np.float32)
    read = []

    def batches():
        for batch in x:
            read.append(None)
            yield jnp.asarray(batch)

    new = en.recalibrate(bn, state, batches(), jitted)
    assert len(read) == len(x)
    assert_stats(bn.running_stats(new), *joined(x), count=len(x), rtol=1e-7)


def test_more_positions_than_an_int32():
    total, number = _NOTHING, 2**31 - 1
    for value in (1.0, 4.0, 1.0):
        stats = PooledStats(jnp.array([value]), jnp.array([2.0]), jnp.array([number]))
        total = _merge(total, jax.device_get(stats))
    np.testing.assert_array_equal(total.positions, 3 * number)
    np.testing.assert_allclose(total.mean, 2.0)
    np.testing.assert_allclose(total.var, 4.0)


MASKS = [
    np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], bool),
    np.tile(np.array([[1], [0]], bool), (4, 4)),
    np.array([[1, 1, 1, 0]], bool),
    np.zeros((5, 4), bool),
]


@eqx.filter_jit
def masked(model, state, batch):
    x, mask = batch
    return model(x, state, mask=mask)


def test_masks():
    """Of unequal counts: for one feature in one batch alone, in one batch for none."""
    bn, state = build()
    x = [jnp.where(mask, b, jnp.nan) for b, mask in zip(data(), MASKS, strict=True)]
    new = en.recalibrate(bn, state, zip(x, MASKS, strict=True), masked)
    count = np.sum([mask.any(0) for mask in MASKS], 0)
    assert_stats(bn.running_stats(new), *joined(x, MASKS), count=count)


def test_not_finite():
    """A batch is left out for a feature; one left out of all keeps its statistics."""
    bn, state = build()
    x = data()
    x[1] = x[1].at[2, 0].set(jnp.inf).at[0, 2].set(jnp.nan)
    x = [b.at[0, 3].set(jnp.nan) for b in x]
    new = bn.running_stats(en.recalibrate(bn, state, x, jitted))
    old = bn.running_stats(state)
    np.testing.assert_array_equal(new.count, [3, 4, 3, old.count[3]])
    for feature, kept in ((0, (0, 2, 3)), (1, range(4)), (2, (0, 2, 3))):
        mean, var = joined([x[i][:, feature : feature + 1] for i in kept])
        np.testing.assert_allclose(new.mean[feature], mean[0], rtol=1e-5)
        np.testing.assert_allclose(new.var[feature], var[0], rtol=1e-5)
    assert (new.mean[3], new.var[3]) == (old.mean[3], old.var[3])


def test_old_statistics_do_not_matter():
    """As they do not in training: a state that was spoilt is made good."""
    bn, state = build()
    spoilt = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan if a.dtype == jnp.float32 else 7), state
    )
    new = en.recalibrate(bn, spoilt, data(), forward)
    assert_stats(bn.running_stats(new), *joined(data()), count=4)


class Deep(eqx.Module):
    first: en.BatchNorm
    dropout: eqx.nn.Dropout
    linear: eqx.nn.Linear
    second: en.BatchNorm
    steps: eqx.nn.StateIndex

    def __init__(self, **kwargs):
        self.first = en.BatchNorm(4, **kwargs)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)
        self.linear = eqx.nn.Linear(4, 3, key=jax.random.key(1))
        self.second = en.BatchNorm(3, use_unbiased_variance=True, **kwargs)
        self.steps = eqx.nn.StateIndex(jnp.array(5))

    def __call__(self, x: Any, state: Any) -> Any:
        x, state = self.first(x, state)
        x = self.dropout(jax.nn.relu(x))
        x = self.linear(x)
        x, state = self.second(x, state)
        return x, state.set(self.steps, state.get(self.steps) + 1)


def examples(model, state, x):
    return jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)


def hidden(model, batches):
    """What the second layer sees in training, by NumPy in float64."""
    out = []
    for x in batches:
        scale, bias = model.first.scale, model.first.bias
        y, _, _ = reference(x, (0,), epsilon=1e-5, scale=scale, bias=bias)
        weight, bias = (np.asarray(a, np.float64) for a in jax.tree.leaves(model.linear))
        out.append(np.maximum(y, 0) @ weight.T + bias)
    return out


@pytest.mark.parametrize("inference", [False, True])
def test_deep_model(inference):
    """The second layer sees the first one's output in training, whatever mode is given."""
    model, state = eqx.nn.make_with_state(Deep)(axis_name="batch")
    model = eqx.tree_at(lambda m: m.first, model, randomize(model.first))
    model = eqx.nn.inference_mode(model, inference)
    if not inference:
        model = eqx.tree_at(lambda m: m.dropout.inference, model, True)
    new = en.recalibrate(model, state, data(sizes=(3, 8, 5)), eqx.filter_jit(examples))
    x = data(sizes=(3, 8, 5))
    assert_stats(model.first.running_stats(new), *joined(x), count=3)
    mean, var = joined(hidden(model, x), ddof=1)
    assert_stats(model.second.running_stats(new), mean, var, count=3, rtol=1e-5)
    # No other state changes.
    assert new.get(model.steps) == 5


def test_frozen_layer_is_left_alone():
    model, state = eqx.nn.make_with_state(Deep)()
    model = eqx.tree_at(lambda m: m.first, model, en.freeze(model.first))
    model = eqx.tree_at(lambda m: m.dropout.inference, model, True)

    @eqx.filter_jit
    def f(model, state, x):
        x, state = model.first(x, state)
        return model.second(x[:, :3], state)

    new = en.recalibrate(model, state, data(), f)
    frozen = model.first.running_stats(state)
    assert eqx.tree_equal(model.first.running_stats(new), frozen)
    x = [x[:, :3] / np.sqrt(np.float32(1 + 1e-5)) for x in data()]
    assert_stats(model.second.running_stats(new), *joined(x, ddof=1), count=4)


def test_layer_called_twice():
    """Both calls count, and so does one in evaluation, for nothing, between them."""
    bn, state = build()
    old = bn.running_stats(state)
    found = []

    def f(model, state, x):
        y, state = model(x, state, use_running_average=True)
        found.append(y)
        _, state = model(x, state)
        return model(2 * x[:2] + 1, state)

    new = en.recalibrate(bn, state, data(), f)
    both = [b for x in data() for b in (x, 2 * x[:2] + 1)]
    assert_stats(bn.running_stats(new), *joined(both), count=4)
    old, bn = jax.tree.map(np.asarray, (old, bn))
    wanted = (np.asarray(data()[2]) - old.mean) / np.sqrt(
        old.var + 1e-5
    ) * bn.scale + bn.bias
    np.testing.assert_allclose(found[2], wanted, rtol=1e-5, atol=1e-5)


def test_model_in_scan():
    """A layer for each step, and each with its statistics, along a leading axis."""
    make = eqx.filter_vmap(lambda key: en.BatchNorm(4), axis_size=2)
    layers, state = eqx.nn.make_with_state(make)(jax.random.split(jax.random.key(0), 2))

    def f(model, state, x):
        arrays, static = eqx.partition(model, eqx.is_array)

        def step(x, each):
            layer, part = each
            return eqx.combine(layer, static)(x, part)

        return jax.lax.scan(step, x + 0.0, (arrays, state))

    new = layers.running_stats(en.recalibrate(layers, state, data(), f))
    first = [np.asarray(x, np.float64) for x in data()]
    second = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in first]
    for i, x in enumerate((first, second)):
        assert_stats(jax.tree.map(lambda a, i=i: a[i], new), *joined(x), count=4, rtol=1e-5)


def test_several_feature_axes():
    bn, state = eqx.nn.make_with_state(en.BatchNorm)((3, 2), axis=(2, 0))
    x = [b.reshape(2, -1, 3) for b in data(6, sizes=(4, 7))]
    new = bn.running_stats(en.recalibrate(bn, state, x, jitted))
    rows = [np.transpose(b, (1, 2, 0)).reshape(-1, 6) for b in x]
    mean, var = joined(rows)
    assert_stats(new, mean.reshape(3, 2), var.reshape(3, 2), count=2)


# Precision.


def test_large_mean():
    bn, state = build(use_fast_variance=True)
    x = [b / 5 + 10000 for b in data()]
    new = en.recalibrate(bn, state, x, jitted)
    # Each batch's mean is rounded to float32: by 5e-4, with deviations of about one.
    assert_stats(bn.running_stats(new), *joined(x), rtol=1e-3)


def test_bfloat16_input():
    bn, state = build()
    x = [b.astype(jnp.bfloat16) for b in data()]
    new = en.recalibrate(bn, state, x, jitted)
    assert_stats(bn.running_stats(new), *joined([b.astype(jnp.float32) for b in x]))


def test_complex_input():
    bn, state = build(param_dtype=jnp.complex64)
    x = data(dtype=np.complex64)
    new = bn.running_stats(en.recalibrate(bn, state, x, jitted))
    assert (new.mean.dtype, new.var.dtype) == (jnp.complex64, jnp.float32)
    assert_stats(new, *joined(x))


def test_float64_state():
    with float64():
        bn, state = build(param_dtype=jnp.float64)
        x = data(dtype=np.float64)
        new = bn.running_stats(en.recalibrate(bn, state, x, jitted))
        assert (new.mean.dtype, new.var.dtype) == (np.float64, np.float64)
        assert_stats(new, *joined(x), rtol=1e-14)


# Devices.


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_shard_map(use_fast_variance):
    """Counts differ between devices, one has none; so do means, far from those of the
    state, which are zero."""
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(
        4, axis_name=("batch", "d"), use_fast_variance=use_fast_variance
    )

    def each(model, state, batch):
        def one(batch, state):
            x, mask = batch
            return model(x, state, mask=mask)

        return jax.vmap(one, (0, None), (0, None), axis_name="batch")(batch, state)

    mesh = make_mesh(d=8)
    f = en.filter_shard_map(
        each, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=(P("d"), P())
    )
    x = [b + 1e3 + jnp.arange(len(b), dtype=b.dtype)[:, None] for b in data(sizes=(16, 24))]
    masks = [np.random.default_rng(i).random(b.shape) < 0.6 for i, b in enumerate(x)]
    masks[0][:2] = False
    new = en.recalibrate(bn, state, zip(x, masks, strict=True), eqx.filter_jit(f))
    assert_stats(bn.running_stats(new), *joined(x, masks), count=2, rtol=1e-6)


@pytest.mark.parametrize("vmapped", [True, False])
def test_groups(vmapped):
    """Each group is normalised by itself; the statistics are of all the data."""
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    name = "batch" if vmapped else "d"
    bn, state = eqx.nn.make_with_state(en.BatchNorm)(
        4, axis_name=name, axis_index_groups=groups
    )

    def f(model, state, batch):
        x, mask = batch

        def one(x, mask, state):
            return model(x, state, mask=mask)

        if vmapped:
            return jax.vmap(one, (0, 0, None), (0, None), axis_name=name)(x, mask, state)
        return en.filter_shard_map(
            one,
            mesh=make_mesh(d=8),
            in_specs=(P("d"), P("d"), P()),
            out_specs=(P("d"), P()),
        )(x, mask, state)

    x = [b + 5 * (jnp.arange(8) % 2)[:, None].astype(b.dtype) for b in data(sizes=(8, 8))]
    masks = [np.random.default_rng(i).random(b.shape) < 0.7 for i, b in enumerate(x)]
    batches = list(zip(x, masks, strict=True))
    if vmapped:
        batches = [(x[:, None], mask[:, None]) for x, mask in batches]
    new = en.recalibrate(bn, state, batches, eqx.filter_jit(f))
    assert_stats(bn.running_stats(new), *joined(x, masks), count=2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P(), P("d")], ids=str)
def test_sharded_state(kind, spec):
    """It stays where it was; one that was on no device in particular stays so."""
    mesh = make_mesh(kind, d=8)
    bn, state = build(8)
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        put = jax.tree.map(lambda a: jax.device_put(a, sharding), state)
        x = [jax.device_put(b, NamedSharding(mesh, P(None, *spec))) for b in data(8)]
        bn = eqx.tree_at(
            lambda bn: (bn.scale, bn.bias),
            bn,
            tuple(jax.device_put(a, sharding) for a in (bn.scale, bn.bias)),
        )
        new = en.recalibrate(bn, put, x, jitted)
        leaves = jax.tree.leaves(new)
        assert all(leaf.sharding == sharding and leaf.committed for leaf in leaves)
        y, _ = jitted(eqx.nn.inference_mode(bn), new, x[0])
    assert np.all(np.isfinite(y))
    assert_stats(bn.running_stats(new), *joined(data(8)), count=4)


def test_uncommitted_state():
    bn, state = build()
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))
    new = en.recalibrate(bn, state, data(), forward)
    assert not any(leaf.committed for leaf in jax.tree.leaves(new))


# What it costs.


def test_traces_once_for_each_shape():
    bn, state = build()
    traces = []

    @eqx.filter_jit
    def f(model, state, x):
        traces.append(x.shape)
        return model(x, state)

    f(bn, clone(state), data()[0])
    traces.clear()
    en.recalibrate(bn, state, data(sizes=(3, 5, 3, 5, 3)), f)
    assert traces == [(3, 4), (5, 4)]


def test_training_pools_nothing():
    """Its program is another one, without what is done here."""
    bn, state = build()
    programs = []

    def f(model, state, x):
        programs.append(str(jax.make_jaxpr(lambda s: model(x, s))(clone(state))))
        return model(x, state)

    f(bn, clone(state), data()[0])
    en.recalibrate(bn, state, data()[:1], f)
    training, pooling = programs
    assert training.count("\n") < pooling.count("\n")


# The progress bar.


def test_progress(capsys):
    bn, state = build()
    pytest.importorskip("tqdm")
    new = en.recalibrate(bn, state, data(), forward, progress=True)
    printed = capsys.readouterr().err
    assert "recalibrate" in printed
    assert "4/4" in printed
    assert eqx.tree_equal(new, en.recalibrate(bn, state, iter(data()), forward))
    assert not capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch):
    bn, state = build()
    batches = iter(data())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        en.recalibrate(bn, state, batches, forward, progress=True)
    assert len(list(batches)) == len(SIZES)
    en.recalibrate(bn, state, data(), forward)


# Errors.


def other_state(model, state, x):
    y, _ = model(x, state)
    return y, eqx.nn.make_with_state(en.BatchNorm)(4)[1]


@eqx.filter_jit
def batched_state(model, state, x):
    return jax.vmap(model, (0, None), axis_name="batch")(x[:, None], state)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (
            lambda model, state, x: model(x, state, use_running_average=True),
            "nothing finite was counted in 4 batches for `model`.*use_running_average",
        ),
        (
            lambda model, state, x: eqx.nn.inference_mode(model)(x, state),
            "nothing finite was counted in 4 batches for `model`",
        ),
        (
            lambda model, state, x: (model(x, clone(state))[0], state),
            "nothing finite was counted in 4 batches for `model`",
        ),
        (
            lambda model, state, x: model(x * jnp.nan, state),
            "nothing finite was counted in 4 batches for `model`",
        ),
        (lambda model, state, x: model(x, state)[1], "must return a pair .* got State"),
        (
            lambda model, state, x: model(x, state)[::-1],
            r"must return a pair .*got \['State', 'Array",
        ),
        (other_state, "a state with other statistics of `model`"),
        (batched_state, r"statistics of shape \(3, 4\) for `model`, expected \(4,\)"),
    ],
)
def test_wrong_forward(f, message):
    bn, state = build()
    before = copies((bn, state))
    with pytest.raises(ValueError, match=message):
        en.recalibrate(bn, state, data(), f)
    assert eqx.tree_equal(before, copies((bn, state)))
    en.recalibrate(bn, state, data(), forward)


def test_model_that_was_closed_over():
    """It is the state that is recalibrated: a model in training serves as well."""
    bn, state = build()
    new = en.recalibrate(bn, state, data(), lambda _, state, x: bn(x, state))
    assert_stats(bn.running_stats(new), *joined(data()), count=4)


def test_a_layer_that_is_not_called():
    model, state = eqx.nn.make_with_state(Deep)()
    with pytest.raises(ValueError, match=r"counted in 4 batches for `model\.second`\. "):
        en.recalibrate(model, state, data(), lambda model, state, x: model.first(x, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bn: eqx.nn.Linear(2, 2, key=jax.random.key(0)), "there is no `eqx_norms"),
        (lambda bn: [en.freeze(bn)], r"in this model, `model\[0\]`, is frozen.*unfreeze"),
        (lambda bn: [bn, en.BatchNorm(4)], "holds nothing for this layer"),
    ],
)
def test_wrong_model(change, message):
    bn, state = build()
    batches = iter(data())
    with pytest.raises(ValueError, match=message):
        en.recalibrate(change(bn), state, batches, forward)
    assert len(list(batches)) == len(SIZES)
    bn(data()[0], state)


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches(batches):
    bn, state = build()
    with pytest.raises(ValueError, match="`batches` is empty"):
        en.recalibrate(bn, state, batches, forward)
    bn(data()[0], state)


@pytest.mark.parametrize("donate", ["all", "all-except-first"])
def test_recalibration_with_donation(donate):
    layer, state = BATCH_NORM.build(8)

    @functools.partial(eqx.filter_jit, donate=donate)
    def forward(layer, state, x):
        return layer(x, state)

    batches = [normal(seed, (16, 8)) for seed in range(3)]
    match = r"`forward` must leave the model and the state.*donated.*`eqx.filter_jit\(forw"
    with raises("recalibrate", match):
        en.recalibrate(layer, clone(state), batches, forward)
