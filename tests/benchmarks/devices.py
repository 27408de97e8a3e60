"""What happens on several devices: `python -m tests.benchmarks.devices`.

Batch norm in training over eight devices, with a mask that counts a different number of
positions on each, or besides none on one of them: the largest error of the output, where
it is counted, against float64 on all the data at once. Whether it runs inside
`jax.shard_map` with its default checks, one example at a time. And how many all-reduces
stand in the compiled forward and backward pass.
"""

import warnings

import jax


jax.config.update("jax_num_cpu_devices", 8)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import eqx_norms as en  # noqa: E402
from tests.helpers import count_in_hlo, reference  # noqa: E402


MESH = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
X = 1 + 3 * jax.random.normal(jax.random.key(0), (64, 32))
COUNTS = jnp.arange(8)
UNEQUAL = (jnp.arange(8)[None] <= COUNTS[:, None]).reshape(64, 1)
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


def attempt(f):
    try:
        return f()
    except Exception as error:
        return f"{type(error).__name__}"


def main() -> None:
    warnings.simplefilter("ignore")

    def error(layer, mask):
        expected, _, _ = reference(X, (0,), epsilon=1e-5, mask=mask)
        y = np.asarray(mapped(layer, 2)(X, mask), np.float64)
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
        "error, one example at a time": [
            attempt(lambda: per_example(lambda x: ours(both)(x, None))),
            "not its way",
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
