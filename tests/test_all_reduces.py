"""What the devices tell each other, read off the compiled programs."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import (
    NORMS,
    count,
    hlo,
    make_mesh,
    normal,
    over,
    step,
    vector_norms,
)
from .test_programs import check_primitives


FEATURES = 16
OTHERS = (
    "all-gather",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
(BATCH_NORM,) = (case for case in NORMS if case.stateful)
# With the shift of a few entries, with the mean, and with the mean of what counts.
hows = pytest.mark.parametrize("how", ["fast", "centred", "mask"])
passes = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def with_gradient(f):
    """What `f` returns, its output first, and the gradients of a loss by its arguments."""

    def forward_and_backward(params, x):
        def loss(params, x):
            y, stats = f(params, x)
            # As in a model, what comes back depends on the output. Where it does not, XLA
            # makes one all-reduce of an RMSNorm's two.
            return jnp.sum(y * jax.lax.stop_gradient(jnp.sin(y))), (y, stats)

        # Nobody asks for the value of the loss, so the compiler leaves its sum out.
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    return forward_and_backward


def check(f, params, x, *, number, backward):
    """So many for the statistics and one for the gradients, whatever the data: no other
    collective, and no conditional."""
    f = with_gradient(f) if backward else f
    check_primitives(f, params, x)
    text, branches = hlo(f, params, x)
    assert count(text) == number + backward
    assert not branches
    assert not any(count(text, op) for op in (*OTHERS, "conditional"))


def make_mask(shape):
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)


def over_devices(case, *, devices=8, split=True, masked=False, **kwargs):
    """A function of parameters and input, and these: under `jax.shard_map` the examples of
    `BatchNorm` are split, and the features of the other layers."""
    of_x, of_params = P("d"), P()
    if split:
        kwargs["axis_name"] = "d"
        if not case.stateful:
            of_x, of_params = P(None, "d"), P("d")
    mesh = make_mesh(d=devices)
    layer, state = case.build(FEATURES, **kwargs)
    params, static = eqx.partition(layer, eqx.is_array)
    x = normal(0, (16, FEATURES))
    mask = make_mask(x.shape) if masked else None
    x, mask = jax.device_put((x, mask), NamedSharding(mesh, of_x))

    def local(params, x, mask, state):
        return step(eqx.combine(params, static), state, x, mask=mask)

    def forward(params, x):
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(jax.tree.map(lambda leaf: of_params, params), of_x, of_x, P()),
            out_specs=(of_x, P()),
        )(params, x, mask, state)

    return forward, jax.device_put(params, NamedSharding(mesh, of_params)), x


def sent(case, *, backward=False, **kwargs):
    """How many numbers the all-reduces add up."""
    f, *args = over_devices(case, **kwargs)
    (text, _), total = hlo(with_gradient(f) if backward else f, *args), 0
    for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            total += int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))
    return total


@hows
@passes
@vector_norms
def test_number_of_all_reduces(case, backward, how):
    f, *args = over_devices(case, masked=how == "mask", use_fast_variance=how != "centred")
    # One for the shift, and one for the moments about it. Without a mean there is no shift.
    check(f, *args, number=1 + case.center, backward=backward)


@over(*(case for case in NORMS if case.on_vectors and not case.stateful))
def test_nothing_split_nothing_sent(case):
    f, *args = over_devices(case, split=False)
    check(f, *args, number=0, backward=False)


@vector_norms
def test_what_is_sent_does_not_grow_with_the_devices(case):
    numbers = sent(case, devices=8, backward=True)
    assert numbers == sent(case, devices=2, backward=True)
    # One number for each statistic: a row of 16 or a column of 16, or a feature of 16; mean
    # and square forward, and their gradients, scale and bias backward.
    assert 0 < numbers <= 6 * 16


@vector_norms
def test_with_groups_it_grows_with_their_number(case):
    def groups(number, size):
        return np.arange(number * size).reshape(number, size).tolist()

    one = sent(case, devices=8, axis_index_groups=groups(1, 8))
    assert one == sent(case, devices=8)
    assert sent(case, devices=4, axis_index_groups=groups(2, 2)) == 2 * one
    assert sent(case, devices=8, axis_index_groups=groups(4, 2)) == 4 * one


@hows
@passes
@pytest.mark.parametrize("way", ["pmap", "jit"])
def test_a_batch_that_is_split_in_other_ways(way, backward, how):
    """Under `jax.pmap`, and without a name, as `jax.jit` sees fit."""
    layer, state = BATCH_NORM.build(
        FEATURES,
        axis_name="d" if way == "pmap" else None,
        use_fast_variance=how != "centred",
    )
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    x = normal(0, (8, 6, FEATURES))
    mask = make_mask(x.shape) if how == "mask" else None
    if way == "jit":
        x, mask = jax.device_put((x, mask), NamedSharding(make_mesh(d=8), P("d")))

    def local(params, examples):
        x, mask = examples
        y, new = step(eqx.combine(params, static), state, x, mask=mask)
        return y, layer.running_stats(new)

    if way == "pmap":
        local = jax.pmap(local, axis_name="d", in_axes=(None, 0))
    f = lambda params, x: local(params, (x, mask))  # noqa: E731
    check(f, params, x, number=2, backward=backward)


def test_the_shift_of_a_split_input():
    """`standardize` knows nothing of examples: one position is sent, from the middle."""
    x = normal(0, (16, 6, 8, FEATURES))
    x = jax.device_put(x, NamedSharding(make_mesh(d=8), P("d")))
    text, _ = hlo(lambda x: jax.vjp(lambda x: en.standardize(x, (0, 1, 2)), x)[0], x)
    assert count(text) == 2
    permutes = re.findall(r"= \w+\[([\d,]*)\]\S* collective-permute(?:-start)?\(", text)
    assert [int(np.prod([int(n) for n in p.split(",")])) for p in permutes] == [FEATURES]
    assert count(text, "collective-permute") == 1
    assert not any(count(text, op) for op in OTHERS if op != "collective-permute")
