"""`BatchNorm`, parameter by parameter, against float64. Axes that all layers have, dtypes,
scale and bias, and what is common to the layers, have files of their own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en

from .helpers import (
    BATCH_NORM,
    along,
    assert_close,
    clone,
    normal,
    raises,
    randomize,
    reference,
    step,
)


def build(num_features: Any = 8, **kwargs: Any) -> Any:
    return eqx.nn.make_with_state(en.BatchNorm)(num_features, **kwargs)


def assert_stats(layer, state, mean, var, count, atol=1e-5):
    stats = layer.running_stats(state)
    np.testing.assert_allclose(stats.mean, mean, atol=atol)
    np.testing.assert_allclose(stats.var, var, atol=atol)
    assert np.all(stats.count == count)
    assert stats.count.dtype == jnp.int32


def test_running_stats_at_first():
    layer, state = build()
    stats = layer.running_stats(state)
    assert isinstance(stats, en.RunningStats)
    assert stats.mean.shape == stats.var.shape == stats.count.shape == (8,)
    assert_stats(layer, state, np.zeros(8), np.ones(8), 0)
    # So evaluation before any training changes next to nothing.
    x = normal(0, (4, 8))
    y, _ = layer(x, state, use_running_average=True)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e-2, 1.0])
def test_epsilon(epsilon):
    layer, state = build(epsilon=epsilon)
    x = 1 + normal(0, (16, 8)) / 10
    y, _ = layer(x, state)
    np.testing.assert_allclose(y, reference(x, (0,), epsilon=epsilon)[0], atol=1e-5)


def test_defaults():
    layer, _ = build()
    assert (layer.epsilon, layer.momentum) == (1e-5, 0.99)
    assert layer.inference is False
    assert layer.frozen is False


SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize(
    "axis", [-1, 1, 0, (1, 3), (3, 1), [-1, 0, 2], (0, 1, 3), ()], ids=str
)
def test_axis(axis):
    """One axis or several; `num_features` and the statistics follow their order."""
    x = 3 + normal(0, SHAPE)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    sizes = tuple(SHAPE[a] for a in axes)
    layer, state = build(
        sizes[0] if isinstance(axis, int) else sizes, axis=axis, momentum=0.0
    )
    layer = randomize(layer)
    y, state = eqx.filter_jit(layer)(x, state)
    others = tuple(a for a in range(4) if a not in {a % 4 for a in axes})
    expected, mean, var = reference(
        x,
        others,
        epsilon=1e-5,
        scale=along(layer.scale, axes, 4),
        bias=along(layer.bias, axes, 4),
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    stats = layer.running_stats(state)
    assert stats.mean.shape == stats.var.shape == stats.count.shape == sizes
    np.testing.assert_allclose(along(stats.mean, axes, 4), mean, atol=1e-5)
    np.testing.assert_allclose(along(stats.var, axes, 4), var, atol=1e-5)
    # In evaluation these take the place of the batch's own.
    y, _ = layer(x, state, use_running_average=True)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_momentum(momentum):
    layer, state = build(momentum=momentum)
    mean, var = np.zeros(8), np.ones(8)
    for number in range(4):
        x = number + (1 + number) * normal(number, (16, 8))
        _, state = layer(x, state)
        _, batch_mean, batch_var = reference(x, (0,))
        mean = momentum * mean + (1 - momentum) * batch_mean[0]
        var = momentum * var + (1 - momentum) * batch_var[0]
        assert_stats(layer, state, mean, var, number + 1, atol=2e-5)


def test_no_momentum_is_the_average_over_all_batches():
    layer, state = build(momentum=None)
    means, variances = [], []
    for number in range(5):
        x = number + (1 + number) * normal(number, (16, 8))
        _, state = layer(x, state)
        _, mean, var = reference(x, (0,))
        means.append(mean[0])
        variances.append(var[0])
        assert_stats(
            layer, state, np.mean(means, 0), np.mean(variances, 0), number + 1, atol=5e-5
        )


def test_average_counts_each_feature_by_itself():
    """A feature whose batch was left out has one batch fewer to average."""
    layer, state = build(momentum=None)
    first, second = (normal(seed, (16, 8)) for seed in (0, 1))
    _, state = layer(first.at[0, 3].set(jnp.nan), state)
    _, state = layer(second, state)
    assert np.array_equal(layer.running_stats(state).count, 2 - (np.arange(8) == 3))
    one, two = (reference(x, (0,))[1][0] for x in (first, second))
    expected = np.where(np.arange(8) == 3, two, (one + two) / 2)
    np.testing.assert_allclose(layer.running_stats(state).mean, expected, atol=1e-6)


@pytest.mark.parametrize("mask", [None, np.arange(6)[:, None] != 2], ids=["all", "masked"])
def test_use_unbiased_variance(mask):
    """Only the running variance, over one fewer than was counted."""
    x = normal(0, (6, 3, 8))
    counted = None if mask is None else jnp.asarray(mask[:, None])
    number = 18 if mask is None else 15
    expected, mean, var = reference(x, (0, 1), epsilon=1e-5, mask=counted)
    layer, state = build(use_unbiased_variance=True, momentum=0.0)
    y, state = layer(x, state, mask=counted)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert_stats(layer, state, mean[0, 0], var[0, 0] * number / (number - 1), 1)


def test_unbiased_variance_of_groups_one_of_which_is_masked():
    """A group that counted nothing takes no part in the average."""
    layer, state = build(
        use_unbiased_variance=True,
        momentum=0.0,
        axis_name="batch",
        axis_index_groups=[[0, 1], [2, 3]],
    )
    x = normal(0, (4, 3, 8))
    mask = jnp.asarray([True, True, False, False])
    _, state = jax.vmap(
        lambda x, mask: layer(x, state, mask=mask), axis_name="batch", out_axes=(0, None)
    )(x, mask)
    _, mean, var = reference(x[:2], (0, 1))
    assert_stats(layer, state, mean[0, 0], var[0, 0] * 6 / 5, 1)


@pytest.mark.parametrize("use_fast_variance", [False, True])
def test_use_fast_variance(use_fast_variance):
    layer, state = build(use_fast_variance=use_fast_variance, momentum=0.0)
    x = 100 + normal(0, (32, 8))
    y, state = layer(x, state)
    expected, mean, var = reference(x, (0,), epsilon=1e-5)
    np.testing.assert_allclose(y, expected, atol=5e-5)
    assert_stats(layer, state, mean[0], var[0], 1, atol=5e-5)


@pytest.mark.parametrize("shape", [(8,), (6, 1, 1), (3, 1), (6, 3, 8)])
def test_mask(shape):
    x = 2 + normal(0, (6, 3, 8))
    mask = normal(2, shape) > -0.5
    layer, state = build(momentum=0.0)
    y, state = layer(x, state, mask=mask)
    expected, mean, var = reference(x, (0, 1), epsilon=1e-5, mask=mask)
    seen = np.broadcast_to(mask, x.shape).any((0, 1))
    np.testing.assert_allclose(y[..., seen], expected[..., seen], atol=1e-5)
    # A feature without any counted position stays as it was.
    assert_stats(
        layer,
        state,
        np.where(seen, mean[0, 0], 0),
        np.where(seen, var[0, 0], 1),
        seen.astype(int),
    )


def test_use_running_average():
    """In the constructor, at the call, and the call wins."""
    x = 3 + normal(0, (16, 8))
    training, state = build(momentum=0.5)
    batch, trained = training(x, clone(state))
    stats = training.running_stats(trained)
    mean, var = (np.asarray(a, np.float64) for a in (stats.mean, stats.var))
    running = (np.asarray(x) - mean) / np.sqrt(var + 1e-5)

    evaluating, _ = build(momentum=0.5, use_running_average=True)
    assert evaluating.inference is True
    for layer, argument, expected in (
        (training, None, batch),
        (training, False, batch),
        (training, True, running),
        (evaluating, None, running),
        (evaluating, True, running),
        (evaluating, False, batch),
    ):
        y, new = layer(x, clone(trained), use_running_average=argument)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        unchanged = eqx.tree_equal(layer.running_stats(new), stats)
        assert unchanged == (expected is running)


def test_frozen():
    """Evaluates, even where the model trains: `inference_mode` does not wake it."""
    layer, state = build()
    x = 3 + normal(0, (16, 8))
    frozen = eqx.tree_at(lambda layer: layer.frozen, layer, True)
    for model in (frozen, eqx.nn.inference_mode(frozen, value=False)):
        for argument in (None, False):
            y, new = model(x, clone(state), use_running_average=argument)
            np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
            assert eqx.tree_equal(new, state)


def test_axis_name():
    """Statistics over the rest of the example and over the named axis."""
    x = 2 + normal(0, (4, 3, 8))
    layer, state = build(axis_name="batch", momentum=0.0)
    y, state = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(
        x, state
    )
    expected, mean, var = reference(x, (0, 1), epsilon=1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert_stats(layer, state, mean[0, 0], var[0, 0], 1)


def test_axis_index_groups_under_pmap():
    """Each group of devices by itself; the running statistics over all of them."""
    x = 2 + normal(0, (4, 3, 8))
    groups = [[0, 2], [1, 3]]
    layer, state = build(axis_name="batch", axis_index_groups=groups, momentum=0.0)
    mapped = eqx.filter_pmap(
        lambda x, state: layer(x, state), in_axes=(0, None), axis_name="batch"
    )
    y, states = mapped(x, state)
    means, variances = [], []
    for group in groups:
        indices = np.array(group)
        expected, mean, var = reference(x[indices], (0, 1), epsilon=1e-5)
        np.testing.assert_allclose(y[indices], expected, atol=1e-5)
        means.append(mean[0, 0])
        variances.append(var[0, 0])
    stats = layer.running_stats(states)
    for device in range(4):
        np.testing.assert_allclose(stats.mean[device], np.mean(means, 0), atol=1e-5)
        np.testing.assert_allclose(stats.var[device], np.mean(variances, 0), atol=1e-5)
        assert np.all(stats.count[device] == 1)


def test_no_gradient_into_what_is_stored():
    layer, state = build(momentum=0.5)

    def stored(x):
        _, new = layer(x, clone(state))
        stats = layer.running_stats(new)
        return jnp.sum(stats.mean) + jnp.sum(stats.var)

    assert np.all(jax.grad(stored)(normal(0, (4, 8))) == 0)


def test_gradient_into_a_state_in_evaluation():
    """The statistics may be differentiated where they are used, as any other number."""
    layer, state = build()
    x = normal(0, (4, 8))

    def loss(mean, var):
        index = layer.state_index
        stats = en.RunningStats(mean, var, jnp.zeros(8, jnp.int32))
        y, _ = layer(x, clone(state).set(index, stats), use_running_average=True)
        return jnp.sum(y * y)

    mean, var = (jnp.full(8, value, jnp.float32) for value in (0.5, 2))
    grads = jax.grad(loss, (0, 1))(mean, var)
    d = np.asarray(x, np.float64) - 0.5
    v = 2 + 1e-5
    np.testing.assert_allclose(grads[0], -2 * d.sum(0) / v, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], -(d * d).sum(0) / v**2, rtol=1e-4)


# A batch of one position.


ONE = [
    ("a vector", {}, (1, 8), None),
    ("an image of one pixel", {}, (1, 1, 1, 8), None),
    ("one example of a vmap", {"axis_name": "batch"}, (1, 8), "batch"),
    (
        "groups of one member",
        {"axis_name": "batch", "axis_index_groups": [[0], [1]]},
        (2, 8),
        "batch",
    ),
]


def over_batch(layer, state, x, name, **kwargs):
    if name is None:
        return step(layer, state, x, **kwargs)
    one = lambda x, kwargs: step(layer, state, x, **kwargs)  # noqa: E731
    return jax.vmap(one, out_axes=(0, None), axis_name=name)(x, kwargs)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("kwargs", "shape", "name"), [row[1:] for row in ONE], ids=[row[0] for row in ONE]
)
def test_one_position(kwargs, shape, name, jit):
    layer, state = BATCH_NORM.build(8, **kwargs)
    f = eqx.filter_jit(over_batch) if jit else over_batch
    x = 3 * normal(0, shape) + 5
    with raises("BatchNorm", "needs more than one position for each mean"):
        f(layer, state, x, name)
    # A mask may leave that many or none, from batch to batch: the statistics stay.
    mask = jnp.ones((*shape[:-1], 1), bool)
    y, new = f(layer, state, x, name, mask=mask)
    assert np.all(y == 0)
    assert_close(new, state, 0)
    # Evaluation has no need of any batch.
    y, _ = f(eqx.nn.inference_mode(layer), state, x, name)
    assert_close(y, x / np.sqrt(1 + 1e-5))


def test_one_position_of_one_of_the_groups():
    """The group that has more says it all."""
    groups = [[0, 1], [2, 3]]
    layer, state = BATCH_NORM.build(
        8, axis_name="batch", axis_index_groups=groups, momentum=0.0
    )
    x = normal(0, (4, 8))
    mask = jnp.asarray([True, True, True, False])[:, None]
    _, new = over_batch(layer, state, x, "batch", mask=mask)
    stats = layer.running_stats(new)
    _, mean, var = reference(x[:2], (0,))
    assert_close((stats.mean, stats.var), (jnp.asarray(mean[0]), jnp.asarray(var[0])))
