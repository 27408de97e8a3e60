# pyright: strict
"""What a type checker knows of the public interface, in its strictest mode.

pyright reads this file, as `.ci/run` has it do; what is run is only for company.
"""

from typing import Any, assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State
from jax import Array

import eqx_norms as en


X = jax.random.normal(jax.random.key(0), (2, 4, 4))


def test_an_array_or_a_pair():
    _, state = eqx.nn.make_with_state(en.BatchNorm)(4)
    for layer in (en.LayerNorm(4), en.RMSNorm(4), en.GroupNorm(4, 2), en.InstanceNorm(4)):
        assert_type(layer(X), Array)
        assert_type(layer(np.ones((2, 4, 4), np.float32)), Array)
        assert_type(layer(X, mask=X > 0, scale=X[0, 0], bias=X[0, 0]), Array)
        assert_type(layer(X, state), tuple[Array, State])


def test_batch_norm():
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(4, momentum=None, axis_name=None)
    assert isinstance(layer, en.BatchNorm)
    y, state = layer(X, state)
    assert_type(y, Array)
    stats = layer.running_stats(state)
    assert_type(stats, en.RunningStats)
    assert_type(stats.mean, Array)
    assert_type(en.unfreeze(en.freeze(layer)), en.BatchNorm)
    linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    assert_type(en.fold_batch_norm(linear, layer, state), eqx.nn.Linear)
    model = eqx.nn.Sequential([linear, layer])
    assert_type(en.fold_batch_norms(model, state), tuple[eqx.nn.Sequential, State])

    def forward(model: en.BatchNorm, state: State, batch: Array) -> tuple[Array, State]:
        return model(batch, state)

    assert_type(en.recalibrate(layer, state, [X], forward), State)


def test_abstract_norm():
    """The layers that normalise their input, and not those that normalise weights."""
    linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    norms = (
        en.BatchNorm(4),
        en.LayerNorm(4, dtype="input"),
        en.RMSNorm(4),
        en.GroupNorm(4, 2),
        en.InstanceNorm(4),
    )
    for norm in norms:
        assert isinstance(norm, en.AbstractNorm)
        assert_type(norm.scale, Array | None)
    others = (linear, en.WeightNorm(linear), en.SpectralNorm(linear, key=jax.random.key(0)))
    assert not any(isinstance(other, en.AbstractNorm) for other in others)
    assert_type(en.__version__, str)


def test_fields():
    layer = en.LayerNorm(
        (4, 4), feature_axes=(-1, -2), reduction_axes=-1, dtype=jnp.float32
    )
    assert_type(layer.scale, Array | None)
    assert_type(layer.bias, Array | None)
    assert_type(layer.feature_axes, tuple[int, ...])
    assert_type(layer.num_features, int | tuple[int, ...])


def test_wrappers():
    linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    weight = en.WeightNorm(linear, where=lambda layer: layer.weight)
    assert_type(weight, en.WeightNorm[eqx.nn.Linear])
    assert_type(weight.layer, eqx.nn.Linear)
    spectral = en.SpectralNorm(linear, key=jax.random.key(0))
    assert_type(spectral(X[0, 0], State(spectral)), tuple[Any, State])
