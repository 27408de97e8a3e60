"""Sharded arrays under `filter_jit`, with no `axis_name`: JAX finds the collectives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .helpers import all_layers, clone, normal, randomize


SHAPE = 8, 6, 16
# How the input is sharded, and how scale, bias and state are.
SPECS = [
    ("batch", P("data", None, None), P(None)),
    ("rows", P(None, "model", None), P(None)),
    ("features", P(None, None, "model"), P("model")),
    ("features of the input alone", P(None, None, "model"), P(None)),
    ("both", P("data", None, "model"), P("model")),
    ("two axes of the batch", P("data", "model", None), P(None)),
]


def run(layer, state, x, weights):
    """Output, new state, and gradients of parameters and input."""

    def loss(layer_and_x):
        layer, x = layer_and_x
        y, new = (layer(x), None) if state is None else layer(x, clone(state))
        return jnp.sum(jnp.sin(y) * weights), (y, new)

    (_, (y, new)), grads = eqx.filter_value_and_grad(loss, has_aux=True)((layer, x))
    return y, new, *grads


def spec(array):
    """The partition spec, without what it leaves out at its end."""
    got = tuple(array.sharding.spec)
    return P(*got, *[None] * (array.ndim - len(got)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("of_x", "of_params"), [s[1:] for s in SPECS], ids=[s[0] for s in SPECS]
)
@all_layers
def test_equals_one_device(case, of_x, of_params, axis_type):
    layer, state = case.build(SHAPE[-1])
    layer = randomize(layer)
    x, weights = 3 * normal(0, SHAPE) + 1, normal(1, SHAPE)
    wanted = eqx.filter_jit(run)(layer, state, x, weights)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):

        def put(tree, spec):
            return jax.tree.map(
                lambda leaf: (
                    jax.device_put(np.asarray(leaf), NamedSharding(mesh, spec))
                    if eqx.is_array(leaf)
                    else leaf
                ),
                tree,
            )

        args = (
            put(layer, of_params),
            put(state, of_params),
            put(x, of_x),
            put(weights, of_x),
        )
        found = eqx.filter_jit(run)(*args)
    for one, other in zip(
        jax.tree.leaves(eqx.filter(found, eqx.is_array)),
        jax.tree.leaves(eqx.filter(wanted, eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-5, atol=1e-5)
    y, new, dlayer, dx = found
    assert spec(y) == of_x
    assert spec(dx) == of_x
    if axis_type == AxisType.Explicit:
        # What has to be said there; on an Auto mesh the compiler chooses.
        for leaf in jax.tree.leaves(eqx.filter((new, dlayer), eqx.is_array)):
            assert spec(leaf) == of_params


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@all_layers
def test_without_jit(case, axis_type):
    of_x = P("data", None, "model")
    layer, state = case.build(SHAPE[-1])
    x = normal(0, SHAPE)

    def apply(layer, state, x):
        return layer(x) if state is None else layer(x, clone(state))[0]

    wanted = apply(layer, state, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        y = apply(layer, state, jax.device_put(np.asarray(x), NamedSharding(mesh, of_x)))
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=1e-5, atol=1e-5)
    assert spec(y) == of_x
