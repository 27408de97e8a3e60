"""One of the processes of `test_processes.py`, or all of the work in one.

`python -m tests.distributed_worker OUT`, or, for each process, `... OUT ADDRESS NUMBER ID`:
trains a network and writes what it has learned to the file OUT.
"""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eqx_norms as en


STEPS = 3
EXAMPLES = 16


class Network(eqx.Module):
    """Works on one example."""

    inner: eqx.nn.Linear
    norm: en.BatchNorm
    outer: eqx.nn.Linear

    def __init__(self, axis_name: Any, key: Any):
        first, second = jax.random.split(key)
        self.inner = eqx.nn.Linear(5, 6, key=first)
        self.norm = en.BatchNorm(6, axis_name=axis_name, momentum=0.8)
        self.outer = eqx.nn.Linear(6, 2, key=second)

    def __call__(self, x, state):
        x, state = self.norm(self.inner(x), state)
        return self.outer(jnp.tanh(x)), state


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        x = rng.normal(2.0, 3.0, (EXAMPLES, 5)).astype(np.float32)
        yield x, np.sin(x[:, :2])


def train(mesh: Any) -> list[np.ndarray]:
    """Parameters and running statistics after a few steps, on a mesh or one device."""
    names = "batch" if mesh is None else ("devices", "batch")
    model, state = eqx.nn.make_with_state(Network)(names, jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, state, x, y):
        model = eqx.combine(params, static)
        apply = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        out, state = apply(x, state)
        # Of this device's examples: JAX adds up the gradients of what is replicated.
        return jnp.sum((out - y) ** 2) / EXAMPLES, state

    def step(params, state, x, y):
        grads, state = jax.grad(loss, has_aux=True)(params, state, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    split, whole = PartitionSpec("devices"), PartitionSpec()
    if mesh is not None:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=(whole, whole)
        )
    step = jax.jit(step)
    for batch in batches():
        if mesh is not None:
            # Each process fills in what its own devices hold.
            batch = [
                jax.make_array_from_callback(
                    a.shape, NamedSharding(mesh, split), lambda index, a=a: a[index]
                )
                for a in batch
            ]
        params, state = step(params, state, *batch)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]


def main(out: str, *where: str) -> None:
    mesh = None
    if where:
        address, number, identity = where[0], int(where[1]), int(where[2])
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(address, number, identity, initialization_timeout=60)
        assert jax.process_count() == number
        assert jax.device_count() == 2 * number
        mesh = jax.make_mesh((2 * number,), ("devices",), axis_types=(AxisType.Auto,))
    np.savez(out, *train(mesh))
    if where:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
