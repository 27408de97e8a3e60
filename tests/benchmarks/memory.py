"""Memory of the backward pass, beside Flax and Equinox, in units of the input's bytes.

    python -m tests.benchmarks.memory

Kept: what `jax.vjp` of one layer keeps. Scanned and unrolled: temporary memory of the
compiled gradient of twelve blocks `x + gelu(norm(x) @ w)`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.benchmarks.rivals import Functional, available
from tests.benchmarks.tables import show
from tests.helpers import NORMS, bytes_kept


BATCH, WIDTH, BLOCKS = 512, 256, 12


def kept(layer: Functional, dtype: Any) -> float:
    x = jnp.zeros((BATCH, WIDTH), dtype)
    return bytes_kept(lambda p, x: layer.apply(p, layer.state, x)[0], layer.params, x) / (
        x.nbytes
    )


def temporary(
    layer: Functional, dtype: Any, *, scanned: bool, blocks: int = BLOCKS
) -> float:
    """Weights are differentiated as well, so that the normalised input is wanted."""
    w = jnp.zeros((blocks, WIDTH, WIDTH), dtype)
    x = jnp.zeros((BATCH, WIDTH), dtype)
    state, static = eqx.partition(layer.state, eqx.is_array)
    params, state = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * blocks), (layer.params, state)
    )

    def block(x, leaves):
        w, params, state = leaves
        y, new = layer.apply(params, eqx.combine(state, static), x)
        return (x + jax.nn.gelu(y @ w)).astype(dtype), eqx.filter(new, eqx.is_array)

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


def main() -> None:
    rows = []
    for case in (case for case in NORMS if case.on_vectors):
        for dtype in (jnp.float32, jnp.bfloat16):
            for library, layer in available(case, WIDTH, dtype).items():
                figures = (
                    kept(layer, dtype),
                    temporary(layer, dtype, scanned=True),
                    temporary(layer, dtype, scanned=False),
                )
                texts = (f"{figure:.2f}" for figure in figures)
                rows.append([case.name, jnp.dtype(dtype).name, library, *texts])
    title = f"Memory in units of the input ({BATCH} by {WIDTH})"
    show(title, ["layer", "dtype", "library", "kept", "scanned", "unrolled"], rows, text=3)


if __name__ == "__main__":
    main()
