"""Accuracy with a large mean, over devices.

The shards differ, so that what one device guesses of the mean does not fit the others.
"""

import equinox as eqx
import jax
import numpy as np
import pytest

from .helpers import clone, reference
from .test_collectives import KINDS, SIZES, mapped, way, without


DEVICES = ["vmap:a", "pmap:a", "shard:a", "unchecked:a vmap:b"]


def far(kind, levels, mean, *, steps=1, **kwargs):
    """The error of the output for data of this mean and deviation one."""
    dims = "".join(level.dims for level in way(levels))
    rng = np.random.default_rng(3)
    shape = tuple({**SIZES, "r": 32, "f": 16}[d] for d in "abrf")
    x = rng.normal(size=shape) + mean
    x = np.float32(x + rng.normal(0.0, 0.5, (*shape[:2], 1, 1)))
    names = tuple(dims)
    make = KINDS[kind].make
    block = without("abrf", dims)
    over = tuple("abrf".index(d) for d in KINDS[kind].over)
    state = None
    if kind == "BatchNorm":
        # Without momentum the running mean is that of the last batch.
        layer, state = eqx.nn.make_with_state(make)(
            16, axis_name=names, momentum=0.0, **kwargs
        )
    else:
        axes = tuple(i for i, d in enumerate(block) if d in KINDS[kind].over)
        sizes = tuple(shape["abrf".index(d)] for d in block if d in KINDS[kind].over)
        layer = make(
            sizes,
            axis_name=names,
            reduction_axes=axes,
            feature_axes=axes,
            use_scale=False,
            use_bias=False,
            **kwargs,
        )

    def apply(x, state):
        return (layer(x), None) if state is None else layer(x, clone(state))

    run = jax.jit(mapped(apply, way(levels), ["abrf", "f"], ["abrf", "f"]))
    y, state = run(x, state)
    for _ in range(steps - 1):
        y, state = run(x, state)
    wanted, _, _ = reference(x, over, epsilon=layer.epsilon)
    return np.max(np.abs(y - wanted))


@pytest.mark.parametrize("levels", DEVICES)
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm"])
def test_centred_first_is_accurate_from_the_first_step(kind, levels):
    assert far(kind, levels, 1e4, use_fast_variance=False) < 5e-3


@pytest.mark.parametrize("levels", DEVICES)
def test_default_is_accurate_once_the_running_mean_is_near(levels):
    assert far("BatchNorm", levels, 1e4, steps=2) < 1e-2


@pytest.mark.parametrize("levels", DEVICES)
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm"])
def test_default_before_that(kind, levels):
    assert far(kind, levels, 1e2) < 1e-2
    # Beyond what it can, but a number.
    assert np.isfinite(far(kind, levels, 1e6))
