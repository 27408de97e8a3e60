"""What the devices tell each other, read off the compiled programs."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import eqx_norms as en

from .helpers import clone, count, hlo, make_mesh, normal


FEATURES = 16
OTHERS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# The layer, and what of its input, scale and bias is split over the devices.
LAYERS = {
    "BatchNorm": (en.BatchNorm, PartitionSpec("d"), PartitionSpec()),
    "LayerNorm": (en.LayerNorm, PartitionSpec(None, "d"), PartitionSpec("d")),
    "RMSNorm": (en.RMSNorm, PartitionSpec(None, "d"), PartitionSpec("d")),
}

all_split = pytest.mark.parametrize("name", LAYERS)


def program(name, *, devices=8, split=True, masked=False, backward=False, **kwargs):
    """The compiled layer on so many devices, forward or forward and backward: what runs in
    any case, and branches of conditionals."""
    make, of_x, of_params = LAYERS[name]
    if not split:
        of_x, of_params = PartitionSpec("d"), PartitionSpec()
    mesh = make_mesh(d=devices)
    state = None
    if split:
        kwargs["axis_name"] = "d"
    if name == "BatchNorm":
        layer, state = eqx.nn.make_with_state(make)(FEATURES, **kwargs)
    else:
        layer = make(FEATURES, **kwargs)
    params, static = eqx.partition(layer, eqx.is_array)
    x = normal(0, (16, FEATURES))
    mask = jnp.asarray(np.random.default_rng(0).random(x.shape) < 0.5) if masked else None

    def local(params, x, mask, state):
        own = eqx.combine(params, static)
        if state is None:
            return own(x, mask=mask), None
        return own(x, clone(state), mask=mask)

    def forward(params, x, mask, state):
        in_params = jax.tree.map(lambda leaf: of_params, params)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(in_params, of_x, of_x, PartitionSpec()),
            out_specs=(of_x, PartitionSpec()),
        )(params, x, mask, state)

    def forward_and_backward(params, x, mask, state):
        def loss(params, x):
            y, new = forward(params, x, mask, state)
            return jnp.sum(y * jax.lax.stop_gradient(jnp.sin(x))), (y, new)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    # Nobody asks for the value of the loss, so the compiler leaves its sum out.
    x, mask = jax.device_put((x, mask), NamedSharding(mesh, of_x))
    params = jax.device_put(params, NamedSharding(mesh, of_params))
    f = forward_and_backward if backward else forward
    return hlo(f, params, x, mask, state)


def sent(name, **kwargs):
    """How many numbers the all-reduces add up."""
    (text, _), total = program(name, **kwargs), 0
    for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            total += int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))
    return total


@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "centred"])
@all_split
def test_number_of_all_reduces(name, fast, backward, masked):
    text, branches = program(name, use_fast_variance=fast, backward=backward, masked=masked)
    # One for the shift, and one for the moments about it. Without a mean there is no shift.
    assert count(text, "all-reduce") == 1 + backward + (name != "RMSNorm")
    assert not branches
    assert not any(count(text, op) for op in OTHERS)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_nothing_split_nothing_sent(name):
    assert not any(
        count("".join(program(name, split=False)), op) for op in ("all-reduce", *OTHERS)
    )


@all_split
def test_what_is_sent_does_not_grow_with_the_devices(name):
    numbers = sent(name, devices=8, backward=True)
    assert numbers == sent(name, devices=2, backward=True)
    # One number for each statistic: a row of 16 or a column of 16, or a feature of 16; mean
    # and square forward, and their gradients, scale and bias backward.
    assert 0 < numbers <= 6 * 16


@all_split
def test_with_groups_it_grows_with_their_number(name):
    def groups(number, size):
        return np.arange(number * size).reshape(number, size).tolist()

    one = sent(name, devices=8, axis_index_groups=groups(1, 8))
    assert one == sent(name, devices=8)
    assert sent(name, devices=8, axis_index_groups=groups(2, 4)) == 2 * one
    assert sent(name, devices=4, axis_index_groups=groups(2, 2)) == 2 * one
    assert sent(name, devices=8, axis_index_groups=groups(4, 2)) == 4 * one


# Without a name, where the batch is split as `jax.jit` sees fit.

IMAGES = (16, 6, 8, FEATURES)


def over_a_batch(x):
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(FEATURES)
    return layer(x, state)[0]


@pytest.mark.parametrize(
    ("f", "sent"),
    [
        (over_a_batch, []),
        # It knows nothing of examples: one position is sent, from the middle.
        (lambda x: en.standardize(x, (0, 1, 2)), [FEATURES]),
    ],
    ids=["BatchNorm", "standardize"],
)
def test_the_shift_of_a_split_batch(f, sent):
    mesh = make_mesh(d=8)
    x = jax.device_put(normal(0, IMAGES), NamedSharding(mesh, PartitionSpec("d")))
    text, _ = hlo(lambda x: jax.vjp(f, x)[0], x)
    assert count(text, "all-reduce") == 2
    permutes = re.findall(r"= \w+\[([\d,]*)\]\S* collective-permute(?:-start)?\(", text)
    assert [int(np.prod([int(n) for n in p.split(",")])) for p in permutes] == sent
    assert count(text, "collective-permute") == len(sent)
    assert not any(count(text, op) for op in OTHERS if op != "collective-permute")
