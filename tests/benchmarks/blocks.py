"""Times of a step of training of residual blocks, with the norms of several libraries.

    python -m tests.benchmarks.blocks [--layers LayerNorm,RMSNorm] [--rounds N]
                                      [--dtype bfloat16] [--tokens N] [--markdown]

The blocks are those of `compiled.py`, `x + relu(norm(x) @ w_in) @ w_out`, here run on JAX's
default device. All steps take turns, and a ratio is formed within each round; given are
medians. "no norm" is the same step without one: what a norm costs is what is beyond it.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import compiled, speed
from tests.benchmarks.rivals import Functional, available
from tests.benchmarks.tables import show, track


LAYERS = [case.name for case in speed.CASES if case.on_vectors and not case.stateful]


def steps(
    layer: str, dtype: str, tokens: int, *, scanned: bool
) -> Iterator[tuple[str, Callable[[], jax.Array]]]:
    (case,) = (case for case in speed.CASES if case.name == layer)
    layers = available(case, compiled.WIDTH, compiled.DTYPES[dtype])
    layers["no norm"] = Functional(lambda params, state, x: (x, state), (), ())
    rng = np.random.default_rng(0)

    def filled(leaf):
        small = rng.standard_normal(leaf.shape, np.float32) / leaf.shape[0] ** 0.5
        return jnp.asarray(small, leaf.dtype)

    for name, each in layers.items():
        step, leaves, x = compiled.step_of_blocks(
            each, compiled.DTYPES[dtype], scanned=scanned
        )
        args = jax.tree.map(
            lambda leaf: filled(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
            (leaves, jax.ShapeDtypeStruct((tokens, *x.shape[1:]), x.dtype)),
        )
        yield name, partial(jax.jit(step).lower(*args).compile(), *args)


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.blocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--dtype", choices=list(compiled.DTYPES), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=compiled.TOKENS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    cells = [
        (layer, way)
        for layer in arguments.layers.split(",")
        for way in ("unrolled", "scanned")
    ]
    records = []
    for layer, way in track(cells, "blocks"):
        scanned = way == "scanned"
        made = dict(steps(layer, arguments.dtype, arguments.tokens, scanned=scanned))
        runners = {name: {"step": speed.repeated(f)} for name, f in made.items()}
        measured = speed.measure(runners, rounds=arguments.rounds, seconds=math.inf)
        times = {name: passes["step"] for name, passes in measured.items()}
        for name, seconds in times.items():
            ratio = float(np.median(np.divide(seconds, times["eqx_norms"])))
            records.append(
                {
                    "layer": layer,
                    "blocks": way,
                    "norm": name,
                    "ms": f"{np.median(seconds) * 1e3:.2f}",
                    "of eqx_norms": f"{ratio:.3f}",
                }
            )
    device = jax.devices()[0]
    title = (
        f"{compiled.BLOCKS} blocks, {arguments.tokens} tokens of {compiled.WIDTH} "
        f"features, {arguments.dtype}, on {device.device_kind}"
    )
    columns = list(records[0])
    rows = [[str(record[name]) for name in columns] for record in records]
    show(title, columns, rows, text=3, markdown=arguments.markdown)
    return records


if __name__ == "__main__":
    main()
