"""What happens on several devices: `python -m tests.benchmarks.devices`.

They are virtual devices of the CPU, whatever else there is.

Batch norm in training over eight devices, with a mask that counts a different number of
positions on each, or besides none on one of them: the largest error of the output, where
it is counted, against float64 on all the data at once; the same for data far from zero, all
of which is counted. Whether it runs inside
`jax.shard_map` with its default checks, one example at a time. And how many all-reduces
stand in the compiled forward and backward pass.

    python -m tests.benchmarks.devices --all-reduces LayerNorm,BatchNorm

prints as JSON how many stand there for each library, where `jax.jit` alone decides on them
from how the input is split: along the batch, or along the features.
"""

import argparse
import json
import os
import warnings
from typing import Any


os.environ["JAX_PLATFORMS"] = "cpu"

import jax


jax.config.update("jax_num_cpu_devices", 8)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import eqx_norms as en  # noqa: E402
from tests.benchmarks.rivals import Functional, available  # noqa: E402
from tests.helpers import NORMS, count_in_hlo, reference  # noqa: E402


MESH = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
X = 1 + 3 * jax.random.normal(jax.random.key(0), (64, 32))
COUNTS = jnp.arange(8)
UNEQUAL = (jnp.arange(8)[None] <= COUNTS[:, None]).reshape(64, 1)
EVERY = jnp.ones((64, 1), bool)
EMPTY = (jnp.arange(8)[None] < COUNTS[:, None]).reshape(64, 1)


def ours(name):
    layer, state = eqx.nn.make_with_state(en.BatchNorm)(32, axis_name=name)
    return lambda x, mask: layer(x, state, mask=mask)[0]


def flax():
    layer = linen.BatchNorm(use_running_average=False, axis_name="devices")
    params = {"scale": jnp.ones(32), "bias": jnp.zeros(32)}
    stats = {"mean": jnp.zeros(32), "var": jnp.ones(32)}
    variables = {"params": params, "batch_stats": stats}
    return lambda x, mask: layer.apply(variables, x, mask=mask, mutable="batch_stats")[0]


def equinox(name):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        32, axis_name=name, mode="batch"
    )
    return lambda x: layer(x, state)[0]


def mapped(f, number):
    return jax.shard_map(
        f, mesh=MESH, in_specs=(P("devices"),) * number, out_specs=P("devices")
    )


def count_all_reduces(
    layer: Functional, shape: tuple[int, ...], spec: P
) -> tuple[int, int]:
    """Of the forward pass, and of it with the gradients of the input and all parameters,
    for an input that is split like that, and parameters as it is along the features."""

    def put(spec):
        return lambda leaf: jax.device_put(leaf, NamedSharding(MESH, spec))

    x = put(spec)(jnp.ones(shape))
    features = P(*spec[len(shape) - 1 :])
    params, state = jax.tree.map(
        lambda leaf: put(features if leaf.ndim else P())(leaf), (layer.params, layer.state)
    )
    args = (params, state, x)
    return count_in_hlo(layer.apply, *args), count_in_hlo(layer.both, *args, x)


def count_all(names: list[str]) -> list[dict[str, Any]]:
    """One record for each layer and library; `None` where it does not compile."""
    made = []
    for case in (case for case in NORMS if case.name in names):
        shape, layout = ((64, 64), "NC") if case.on_vectors else ((64, 4, 4, 64), "NHWC")
        splits = {
            "batch": P("devices"),
            "features": P(*(None,) * (len(shape) - 1), "devices"),
        }
        for library, layer in available(case, shape[-1], layout=layout).items():
            record: dict[str, Any] = {"layer": case.name, "library": library}
            for split, spec in splits.items():
                try:
                    forward, both = count_all_reduces(layer, shape, spec)
                except (TypeError, ValueError):
                    forward = both = None
                record[f"{split}: forward"] = forward
                record[f"{split}: both"] = both
            made.append(record)
    return made


def attempt(f):
    try:
        return f()
    except Exception as error:
        return f"{type(error).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all-reduces", metavar="LAYERS", help="count these, as JSON")
    layers = parser.parse_args().all_reduces
    warnings.simplefilter("ignore")
    if layers is not None:
        print(json.dumps(count_all(layers.split(","))))
        return

    def error(layer, mask, x=X):
        expected, _, _ = reference(x, (0,), epsilon=1e-5, mask=mask)
        y = np.asarray(mapped(layer, 2)(x, mask), np.float64)
        return f"{np.max(np.abs(y - expected)[np.asarray(mask)[:, 0]]):.1e}"

    def all_reduces(layer):
        def loss(x):
            return jnp.sum(jnp.sin(mapped(layer, 2)(x, UNEQUAL)))

        return str(count_in_hlo(jax.grad(loss), X))

    def per_example(layer):
        y = mapped(jax.vmap(layer, axis_name="batch"), 1)(X)
        full, _, _ = reference(X, (0,), epsilon=1e-5)
        return f"{np.max(np.abs(np.asarray(y, np.float64) - full)):.1e}"

    both = ("devices", "batch")
    rows = {
        "error, unequal counts": [
            attempt(lambda: error(ours("devices"), UNEQUAL)),
            attempt(lambda: error(flax(), UNEQUAL)),
            "no mask",
        ],
        "error, nothing on one device": [
            attempt(lambda: error(ours("devices"), EMPTY)),
            attempt(lambda: error(flax(), EMPTY)),
            "no mask",
        ],
        "error, a mean of 3000": [
            attempt(lambda: error(ours("devices"), EVERY, 2999 + X)),
            attempt(lambda: error(flax(), EVERY, 2999 + X)),
            "takes no batch",
        ],
        "error, one example at a time": [
            attempt(lambda: per_example(lambda x: ours(both)(x, None))),
            "takes batches only",
            attempt(lambda: per_example(equinox(both))),
        ],
        "all-reduces, forward and backward": [
            attempt(lambda: all_reduces(ours("devices"))),
            attempt(lambda: all_reduces(flax())),
            "",
        ],
    }
    print(
        f"jax {jax.__version__}, {jax.device_count()} {jax.devices()[0].platform} devices"
    )
    print(f"{'BatchNorm in jax.shard_map':36}{'eqx_norms':>14}{'flax':>14}{'equinox':>18}")
    for name, (a, b, c) in rows.items():
        print(f"{name:36}{a:>14}{b:>14}{c:>18}")


if __name__ == "__main__":
    main()
