"""`BatchNorm(debias=True)`: the average over the batches that came, and nothing else."""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import every, make_mesh, normal, reference


MOMENTA = [0.0, 0.5, 0.99, 0.999999, 1.0, None]
FEATURES = 5


def build(num_features=FEATURES, **kwargs):
    return eqx.nn.make_with_state(en.BatchNorm)(num_features, debias=True, **kwargs)


def data(steps, rows=8):
    """Batches of changing mean and deviation, far from the initial 0 and 1."""
    scale = 10.0 ** np.arange(-2, FEATURES - 2)
    change = 1 + np.sin(np.arange(steps))[:, None, None] / 2
    noise = np.random.default_rng(0).normal(2, 1, (steps, rows, FEATURES))
    return jnp.asarray(scale * change * noise, jnp.float32)


def powers(momentum: float | None, number: int) -> np.ndarray:
    """The weight of each batch, of the last one 1."""
    return np.power(1.0 if momentum is None else momentum, np.arange(number)[::-1])


def weighted(x, momentum, mask=None):
    """Mean, variance and count, feature by feature, from the definition in float64."""
    result = np.zeros((3, FEATURES))
    result[1] = 1
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    for feature in range(FEATURES):
        came = [
            [m[0, 0] for m in reference(batch[:, None], (0,), mask=counts[:, None])[1:]]
            for batch, counts in zip(x[..., feature], mask[..., feature], strict=True)
            if counts.any()
        ]
        if came:
            result[:2, feature] = np.average(came, 0, powers(momentum, len(came)))
        result[2, feature] = len(came)
    return result


def check(stats, expected, rtol=2e-6):
    np.testing.assert_allclose(stats.mean, expected[0], rtol=rtol)
    np.testing.assert_allclose(stats.var, expected[1], rtol=rtol)
    np.testing.assert_array_equal(stats.count, expected[2])


@eqx.filter_jit
def scan(layer, state, x, mask=None):
    def body(state, batch):
        x, mask = batch
        return layer(x, state, mask=mask)[1], None

    return jax.lax.scan(body, state, (x, mask))[0]


@pytest.mark.parametrize("momentum", MOMENTA)
def test_average_of_the_batches_alone(momentum):
    """After each of them."""
    x = data(60)
    layer, state = build(momentum=momentum)

    def body(state, x):
        _, state = layer(x, state)
        return state, layer.running_stats(state)

    _, stats = jax.jit(lambda state: jax.lax.scan(body, state, x))(state)
    for steps in (1, 2, 7, 60):
        after = jax.tree.map(lambda leaf, n=steps: leaf[n - 1], stats)
        check(after, weighted(x[:steps], momentum))


@pytest.mark.parametrize("momentum", MOMENTA)
def test_each_feature_by_its_own_count(momentum):
    """The first has something in every batch, the last one in none."""
    x = data(12)
    often = np.arange(12)[:, None] % np.array([1, 2, 3, 12, 13]) == 0
    often[:, 4] = False
    often[0, 1] = False
    mask = jnp.asarray(often)[:, None] & (normal(1, x.shape) > -1)
    layer, state = build(momentum=momentum)
    state = scan(layer, state, jnp.where(mask, x, jnp.nan), mask)
    expected = weighted(x, momentum, mask)
    assert len(set(expected[2])) == FEATURES
    check(layer.running_stats(state), expected)


def test_the_first_batch_that_counts_is_all():
    """Whatever came before it, and however small it is beside a variance of 1."""
    layer, state = build()
    x = 1e-6 * normal(0, (8, FEATURES))
    start = layer.running_stats(state)
    for nothing in (jnp.full_like(x, jnp.nan), x.at[3].set(jnp.inf)):
        _, state = layer(nothing, state)
        assert eqx.tree_equal(layer.running_stats(state), start)
    _, state = layer(x, state)
    check(layer.running_stats(state), weighted(x[None], 0.99), 1e-6)


@every(2)
@pytest.mark.parametrize("seen", [1, 1000, 10_000_000])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_step_after_many(momentum, debias, seen):
    """One batch that weighs as much as all before it shows its share to the last digit."""
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(2, momentum=momentum, debias=debias)
    old = en.RunningStats(jnp.ones(2), jnp.ones(2), jnp.full(2, seen, jnp.int32))
    state = state.set(layer.state_index, old)
    if momentum is None or debias:
        share = 1 / powers(momentum, seen + 1).sum()
    else:
        share = 1 - momentum
    size = 1 / max(share, 1e-8)
    x = size + jnp.sqrt(size) * jnp.array([[1.0, 2.0], [-1.0, -2.0]])
    _, state = layer(x, state)
    stats = layer.running_stats(state)
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats.mean, 1 + share * (x.mean(0) - 1), rtol=1e-6)
    np.testing.assert_allclose(stats.var, 1 + share * (x.var(0) - 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("momentum", "debias"),
    [*((m, True) for m in MOMENTA), (0.99, False), (0.999999, False), (None, False)],
)
def test_a_million_steps(momentum, debias):
    """Rounding must not add up. A step of a millionth is rounded to some per cent."""
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(3, momentum=momentum, debias=debias)
    x = jnp.array([[1.0, 100.0, -3.0], [2.0, 103.0, 3.5]])
    times = 1 + np.sin(np.arange(10**6)) / 2
    times = jnp.asarray(times, jnp.float32)

    @jax.jit
    def many(state):
        def body(state, time):
            return layer(time * x, state)[1], None

        return jax.lax.scan(body, state, times)[0]

    stats = layer.running_stats(many(state))
    _, mean, var = reference(x, (0,))
    times = np.asarray(times, np.float64)
    weights = powers(momentum, 10**6)
    if momentum is None or debias:
        share, start = 1 / weights.sum(), 0.0
    else:
        share, start = 1 - momentum, momentum**10**6
    np.testing.assert_allclose(
        stats.mean, share * (weights @ times) * mean[0], rtol=5e-4, atol=1e-6
    )
    expected = start + share * (weights @ times**2) * var[0]
    np.testing.assert_allclose(stats.var, expected, rtol=5e-4)
    assert np.all(stats.count == 10**6)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_as_optax(momentum):
    ema = optax.ema(momentum, debias=True)
    x = data(20)
    layer, state = build(momentum=momentum)
    theirs = ema.init((jnp.zeros(FEATURES), jnp.zeros(FEATURES)))
    for batch in x:
        _, state = layer(batch, state)
        expected: Any
        with jax.numpy_dtype_promotion("standard"):  # Optax is not strict
            expected, theirs = ema.update((batch.mean(0), batch.var(0)), theirs)
        stats = layer.running_stats(state)
        np.testing.assert_allclose(stats.mean, expected[0], rtol=2e-5)
        np.testing.assert_allclose(stats.var, expected[1], rtol=2e-5)


# In all the ways to give it a batch of eight.


def batched(layer, state, x):
    return layer(x, state)[1]


def with_vmap(layer, state, x):
    batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return batched(x, state)[1]


def with_pmap(layer, state, x):
    f = eqx.filter_pmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return f(x, state)[1]


def with_shard_map(layer, state, x):
    mesh = make_mesh(batch=8)
    f = en.filter_shard_map(
        layer, mesh=mesh, in_specs=(P("batch"), P()), out_specs=(P("batch"), P())
    )
    return f(x, state)[1]


NAMED = [with_vmap, with_pmap, with_shard_map]
GROUPS = [[0, 3, 5, 6], [7, 4, 2, 1]]


@pytest.mark.parametrize(
    ("way", "kwargs"),
    [
        (batched, {}),
        (eqx.filter_jit(batched), {}),
        (with_vmap, {"axis_name": "batch"}),
        *((way, {"axis_name": "batch", "axis_index_groups": GROUPS}) for way in NAMED),
    ],
)
def test_ways(way, kwargs):
    x = data(4)
    layer, state = build(momentum=0.9, **kwargs)
    for batch in x:
        state = way(layer, state, batch)
    expected = weighted(x, 0.9)
    if "axis_index_groups" in kwargs:
        # The average over the groups.
        parts = [weighted(x[:, jnp.asarray(group)], 0.9) for group in GROUPS]
        expected = np.mean(parts, axis=0)
    check(layer.running_stats(state), expected, 1e-5)


def test_of_a_model_on_its_own_under_vmap():
    """An ensemble: states that are stacked, each with counts of its own."""
    make = eqx.filter_vmap(lambda _: build(momentum=0.9), axis_size=2)
    layers, states = make(jnp.arange(2))
    x = jnp.stack([data(3), -data(3)])
    state = eqx.filter_vmap(scan)(layers, states, x)
    stats = eqx.filter_vmap(lambda layer, state: layer.running_stats(state))(layers, state)
    for i in range(2):
        check(jax.tree.map(lambda leaf, i=i: leaf[i], stats), weighted(x[i], 0.9))


def test_saved_and_loaded():
    x = data(6)
    layer, state = build()
    expected = layer.running_stats(scan(layer, state, x))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (layer, scan(layer, state, x[:2])))
    file.seek(0)
    layer, state = eqx.tree_deserialise_leaves(file, build())
    assert eqx.tree_equal(layer.running_stats(scan(layer, state, x[2:])), expected)


@pytest.mark.parametrize("momentum", [0.0, None])
def test_changes_nothing_where_the_start_does_not_count(momentum):
    plain, state = eqx.nn.make_with_state(en.BatchNorm)(FEATURES, momentum=momentum)
    expected = plain.running_stats(scan(plain, state, data(5)))
    layer, state = build(momentum=momentum)
    assert eqx.tree_equal(layer.running_stats(scan(layer, state, data(5))), expected)


def test_evaluation_reads_what_is_stored():
    x = data(1)[0]
    layer, state = build()
    y, state = layer(x, state)
    evaluated, _ = eqx.nn.inference_mode(layer)(x, state)
    np.testing.assert_allclose(evaluated, y, rtol=1e-5, atol=1e-5)
    folded = en.fold_batch_norm(
        eqx.nn.Linear(3, FEATURES, key=jax.random.key(0)), layer, state
    )
    assert folded.weight.shape == (FEATURES, 3)


def test_printed_where_it_is_used():
    assert "debias=True" in repr(en.BatchNorm(3, debias=True))
    assert "debias" not in repr(en.BatchNorm(3))
