"""Sharded arrays under `filter_jit`, with no `axis_name`: JAX finds the collectives."""

import contextlib
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .helpers import (
    LAYERS,
    NORMS,
    WRAPPERS,
    all_norms,
    assert_close,
    call,
    clone,
    make_mesh,
    normal,
    over,
    randomize,
    step,
)


SHAPE = 8, 6, 16
# How the input is sharded, how scale, bias and state are, and how the output is.
OF_NORMS = [
    ("batch", P("data", None, None), P(None)),
    ("rows", P(None, "model", None), P(None)),
    ("features", P(None, None, "model"), P("model")),
    ("features of the input alone", P(None, None, "model"), P(None)),
    ("both", P("data", None, "model"), P("model")),
    ("two axes of the batch", P("data", "model", None), P(None)),
]
# The same with a weight, whose rows are the features that come out.
OF_WRAPPERS = [
    ("batch", P("data", None, None), P(None, None), P("data", None, None)),
    ("rows", P("data", None, None), P("model", None), P("data", None, "model")),
    ("columns", P("data", None, None), P(None, "model"), P("data", None, None)),
    ("rows and columns", P(None, None, None), P("data", "model"), P(None, None, "data")),
]
ROWS = [
    pytest.param(case, of_x, of_params, of_x, id=f"{name}-{case.name}")
    for name, of_x, of_params in OF_NORMS
    for case in NORMS
] + [
    pytest.param(case, *specs, id=f"{name}-{case.name}")
    for name, *specs in OF_WRAPPERS
    for case in WRAPPERS
]

MESHES = {
    "Auto": (AxisType.Auto, jax.set_mesh),
    "Explicit": (AxisType.Explicit, jax.set_mesh),
    # What `jax.make_mesh` gives by default, and nothing said of it.
    "Explicit and not set": (AxisType.Explicit, contextlib.nullcontext),
}
meshes = pytest.mark.parametrize(
    ("axis_type", "context"), MESHES.values(), ids=MESHES.keys()
)


def run(layer, state, x, weights):
    """Output, new state, and gradients of parameters and input."""

    def loss(layer_and_x):
        layer, x = layer_and_x
        y, new = step(layer, state, x)
        return jnp.sum(jnp.sin(y) * weights), (y, new)

    (_, (y, new)), grads = eqx.filter_value_and_grad(loss, has_aux=True)((layer, x))
    return y, new, *grads


def spec(array):
    """The partition spec, without what it leaves out at its end."""
    got = tuple(array.sharding.spec)
    return P(*got, *[None] * (array.ndim - len(got)))


def fit(spec, array):
    """For the leading axes of an array, but those of size one."""
    pairs = zip(spec, array.shape, strict=False)
    fitting = [None if size == 1 else axis for axis, size in pairs]
    return P(*fitting, *[None] * (array.ndim - len(fitting)))


def put(tree, spec, mesh):
    def place(leaf):
        if not eqx.is_array(leaf):
            return leaf
        return jax.device_put(np.asarray(leaf), NamedSharding(mesh, fit(spec, leaf)))

    return jax.tree.map(place, tree)


# On an Auto mesh, on an Explicit one that is set, and on one that is not, in turn.
@pytest.mark.parametrize(
    ("case", "of_x", "of_params", "of_y", "axis_type", "context"),
    [
        pytest.param(*row.values, *MESHES[mesh], id=f"{row.id}-{mesh}")
        for row, mesh in zip(ROWS, itertools.cycle(MESHES), strict=False)
    ],
)
def test_equals_one_device(case, of_x, of_params, of_y, axis_type, context):
    layer, state = case.build(SHAPE[-1])
    layer = randomize(layer)
    x, weights = 3 * normal(0, SHAPE) + 1, normal(1, SHAPE)
    wanted = eqx.filter_jit(run)(layer, state, x, weights)
    mesh = make_mesh(axis_type, data=4, model=2)
    with context(mesh):
        args = (
            put(layer, of_params, mesh),
            put(state, of_params, mesh),
            put(x, of_x, mesh),
            put(weights, of_y, mesh),
        )
        found = eqx.filter_jit(run)(*args)
    assert_close(eqx.filter(found, eqx.is_array), eqx.filter(wanted, eqx.is_array))
    y, new, dlayer, dx = found
    if axis_type == AxisType.Explicit or case in NORMS:
        assert spec(y) == of_y
        assert spec(dx) == of_x
    if axis_type == AxisType.Explicit:
        # What has to be said there; on an Auto mesh the compiler chooses.
        for leaf in jax.tree.leaves(eqx.filter((new, dlayer), eqx.is_array)):
            assert spec(leaf) == fit(of_params, leaf)


@meshes
@all_norms
def test_without_jit(case, axis_type, context):
    of_x = P("data", None, "model")
    layer, state = case.build(SHAPE[-1])
    x = normal(0, SHAPE)
    wanted = call(layer, state, x)
    mesh = make_mesh(axis_type, data=4, model=2)
    with context(mesh):
        y = call(layer, state, put(x, of_x, mesh))
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=1e-5, atol=1e-5)
    assert spec(y) == of_x


@pytest.mark.parametrize("context", [jax.set_mesh, contextlib.nullcontext])
@over(*(case for case in LAYERS if case.stateful))
def test_replicated_state_stays_so(case, context):
    """Whatever the rest is sharded like: else a step would be no body of a scan."""
    layer, state = case.build(SHAPE[-1])
    mesh = make_mesh(AxisType.Explicit, data=4, model=2)
    with context(mesh):
        of_x = P("data", None, "model" if case in NORMS else None)
        layer = put(layer, P("model"), mesh)
        xs = put(normal(0, (3, *SHAPE)), P(None, *of_x), mesh)
        one = lambda state, x: (step(layer, state, x)[1], None)  # noqa: E731
        new, _ = jax.lax.scan(one, clone(put(state, P(), mesh)), xs)
    for leaf in jax.tree.leaves(new):
        assert spec(leaf) == P(*[None] * leaf.ndim)
