"""Memory of the backward pass, beside Flax and Equinox, in units of the input's bytes.

    python -m tests.benchmarks.memory

Kept: what `jax.vjp` of one layer keeps. Scanned and unrolled: temporary memory of the
compiled gradient of twelve blocks `x + gelu(norm(x) @ w)`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks.rivals import Functional, available
from tests.benchmarks.tables import show_records, track
from tests.helpers import NORMS, Norm, bytes_kept


BATCH, WIDTH, BLOCKS = 512, 256, 12
# As many positions, for the layers that want axes of space.
SPACE = (8, 8, 8)


def kept(layer: Functional, dtype: Any, shape: tuple[int, ...] = (BATCH, WIDTH)) -> float:
    x = jnp.zeros(shape, dtype)
    return bytes_kept(lambda p, x: layer.apply(p, layer.state, x)[0], layer.params, x) / (
        x.nbytes
    )


def temporary(
    layer: Functional,
    dtype: Any,
    *,
    scanned: bool,
    blocks: int = BLOCKS,
    shape: tuple[int, ...] = (BATCH, WIDTH),
) -> float:
    """Weights are differentiated as well, so that the normalised input is wanted."""
    w = jnp.zeros((blocks, WIDTH, WIDTH), dtype)
    x = jnp.zeros(shape, dtype)
    params, state = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * blocks), (layer.params, layer.state)
    )

    def block(x, leaves):
        w, params, state = leaves
        y, new = layer.apply(params, state, x)
        return (x + jax.nn.gelu(y @ w)).astype(dtype), new

    def loss(w, params, x, state):
        if scanned:
            x, new = jax.lax.scan(block, x, (w, params, state))
        else:
            new = []
            for i in range(blocks):
                leaves = jax.tree.map(lambda leaf, i=i: leaf[i], (w, params, state))
                x, one = block(x, leaves)
                new.append(one)
        return jnp.sum(jnp.square(x).astype(jnp.float32)), new

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    analysis = grad.lower(w, params, x, state).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / x.nbytes


def records(
    cases: Sequence[Norm], *, quick: bool = False, track: Any = track
) -> list[dict[str, Any]]:
    made = []
    for case in track(cases, "memory"):
        shape, layout = ((BATCH, WIDTH), "NC")
        if not case.on_vectors:
            shape, layout = ((*SPACE, WIDTH), "NHWC")
        for dtype in (jnp.float32, jnp.bfloat16):
            for library, layer in available(case, WIDTH, dtype, layout).items():
                record = {
                    "layer": case.name,
                    "dtype": jnp.dtype(dtype).name,
                    "library": library,
                    "kept": kept(layer, dtype, shape),
                }
                for name, scanned in (("scanned", True), ("unrolled", False)):
                    record[name] = (
                        None
                        if quick
                        else temporary(layer, dtype, scanned=scanned, shape=shape)
                    )
                made.append(record)
    return made


TITLE = f"Memory in units of the input ({BATCH} by {WIDTH})"


def main() -> None:
    show_records(TITLE, records(NORMS), text=3)


if __name__ == "__main__":
    main()
