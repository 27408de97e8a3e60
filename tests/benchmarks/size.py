"""Size of the programs, and time from import to first result, beside Flax and Equinox.

    python -m tests.benchmarks.size [--repeats N] [--markdown]

Equations are those of the jaxpr, of all that is inside it as well, which is what tracing
and compiling take their time for. Times are of processes of their own, the best of a few.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from tests.benchmarks.rivals import Functional, available
from tests.benchmarks.tables import show_records, track
from tests.helpers import NORMS, Norm


SHAPE = (64, 256)
# For the layers that want axes of space.
IMAGES = (64, 4, 4, 256)

# One program a library: import it, make the layer, and have the first gradient.
START = """
import time
start = time.perf_counter()
import jax, jax.numpy as jnp
{imports}
imported = time.perf_counter()
{make}
x = jnp.ones({shape})
jax.block_until_ready(jax.jit(jax.grad(lambda x: f(x).sum()))(x))
print(imported - start, time.perf_counter() - start)
"""
VMAPPED = """
axes = (0, None)
f = lambda x: jax.vmap(layer, axes, axes, axis_name="batch")(x, state)[0]
"""
IMPORTS = {
    "eqx_norms": "import equinox as eqx, eqx_norms as en",
    "flax": "from flax import nnx",
    "equinox": "import equinox as eqx",
}


def make_program(
    library: str, layer: str, *, stateful: bool, shape: tuple[int, ...] = SHAPE
) -> str:
    width = shape[-1]
    with_state = "layer, state = eqx.nn.make_with_state"
    if library == "flax":
        make = f"layer = nnx.{layer}({width}, rngs=nnx.Rngs(0))\ng, s = nnx.split(layer)\n"
        make += "f = lambda x: nnx.merge(g, s, copy=True)(x)"
    elif library == "eqx_norms" and stateful:
        make = f"{with_state}(en.{layer})({width})\nf = lambda x: layer(x, state)[0]"
    elif library == "eqx_norms":
        make = f"f = en.{layer}({width})"
    elif stateful:
        arguments = f'{width}, axis_name="batch", mode="batch"'
        make = f"{with_state}(eqx.nn.{layer})({arguments})" + VMAPPED
    else:
        make = f"f = jax.vmap(eqx.nn.{layer}({width}))"
    return START.format(imports=IMPORTS[library], make=make, shape=shape)


def seconds(program: str, repeats: int) -> tuple[float, ...]:
    """Until all is imported, and until the first result."""
    times = []
    for _ in range(repeats):
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, check=True, text=True
        )
        times.append([float(text) for text in run.stdout.split()])
    return tuple(map(min, zip(*times, strict=True)))


def count_equations(jaxpr: Jaxpr) -> int:
    """With those of inner jaxprs; a call itself computes nothing and does not count."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            leaf
            for leaf in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda leaf: isinstance(leaf, (Jaxpr, ClosedJaxpr)),
            )
            if isinstance(leaf, (Jaxpr, ClosedJaxpr))
        ]
        jaxprs = [j.jaxpr if isinstance(j, ClosedJaxpr) else j for j in inner]
        total += sum(map(count_equations, jaxprs)) or 1
    return total


def equations(layer: Functional, shape: tuple[int, ...] = SHAPE) -> tuple[int, int]:
    """Of the forward pass, and of forward and backward pass together."""
    x = jnp.zeros(shape)

    def forward(params: Any, x: Any) -> Any:
        return layer.apply(params, layer.state, x)[0]

    def both(params: Any, x: Any) -> Any:
        y, backward = jax.vjp(forward, params, x)
        return y, backward(y)

    def count(f):
        return count_equations(jax.make_jaxpr(f)(layer.params, x).jaxpr)

    return count(forward), count(both)


def records(
    cases: Sequence[Norm], *, repeats: int, track: Any = track
) -> list[dict[str, Any]]:
    """Without times if `repeats` is zero."""
    made = []
    for case in track(cases, "size"):
        shape, layout = (SHAPE, "NC") if case.on_vectors else (IMAGES, "NHWC")
        for library, layer in available(case, shape[-1], layout=layout).items():
            forward, both = equations(layer, shape)
            program = make_program(library, case.name, stateful=case.stateful, shape=shape)
            imported, first = seconds(program, repeats) if repeats else (None, None)
            made.append(
                {
                    "layer": case.name,
                    "library": library,
                    "equations forward": forward,
                    "forward and backward": both,
                    "seconds to import": imported,
                    "to first result": first,
                }
            )
    return made


TITLE = f"Size and start-up, input {SHAPE[0]} by {SHAPE[1]}, or by {IMAGES[1:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each time")
    parser.add_argument("--markdown", action="store_true", help="for a README")
    arguments = parser.parse_args()
    made = records(NORMS, repeats=arguments.repeats)
    show_records(TITLE, made, text=2, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
