"""Exported by `jax.export`, for sizes that are known later."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from .helpers import NORMS, WRAPPERS, all_norms, assert_close, call, normal, with_gradients


def without_name(kwargs):
    return {key: value for key, value in kwargs.items() if key != "axis_name"}


SYMBOLS = {
    "nothing": {},
    "mask": {"mask": "b, s, 8"},
    "row mask": {"mask": "b, 1, 1"},
    "short mask": {"mask": "s, 1"},
    "affine": {"scale": "8", "bias": "8"},
    "affine of each example": {"scale": "b, 1, 8", "bias": "b, s, 8"},
    "all": {"mask": "b, s, 1", "scale": "1, s, 8", "bias": "b, 1, 8"},
}


def exported(f, x, kwargs):
    """What is exported for any sizes, at these."""
    symbols = {"x": "b, s, 8", **kwargs}
    scope = jax.export.SymbolicScope()
    sizes = {
        name: jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(shape, scope=scope),
            jnp.bool_ if name == "mask" else jnp.float32,
        )
        for name, shape in symbols.items()
    }
    run = lambda arrays: eqx.filter(f(**arrays), eqx.is_array)  # noqa: E731
    export = jax.export.export(jax.jit(lambda arrays: jax.tree.leaves(run(arrays))))(sizes)
    known = {"b": x.shape[0], "s": x.shape[1]}
    given: dict[str, Any] = {"x": x}
    for seed, (name, shape) in enumerate(kwargs.items()):
        concrete = tuple(known.get(n) or int(n) for n in shape.split(", "))
        array = normal(seed + 1, concrete)
        given[name] = array > -0.5 if name == "mask" else array
    return export.call(given), run(given)


@pytest.mark.parametrize(
    ("case", "given"),
    # In a chequered pattern: each layer and each of what is given, with half of the others.
    [
        (case, given)
        for i, case in enumerate(NORMS)
        for j, given in enumerate(SYMBOLS)
        if (i + j) % 2 == 0
    ]
    + [(case, "nothing") for case in WRAPPERS],
    ids=lambda value: getattr(value, "name", value),
)
def test_symbolic_sizes(case, given):
    layer, state = case.build(8)
    f = functools.partial(with_gradients(call), layer, state)
    found, wanted = exported(f, normal(0, (4, 6, 8)), SYMBOLS[given])
    assert_close(found, wanted)


@pytest.mark.parametrize("given", ["nothing", "mask", "affine of each example"])
@all_norms
def test_symbolic_sizes_under_vmap(case, given):
    """Over examples, without a name: JAX has no `axis_size` for a symbolic one."""
    layer, state = case.build(8, **without_name(case.per_example))

    def f(x, **kwargs):
        return jax.vmap(lambda x, kwargs: call(layer, state, x, **kwargs))(x, kwargs)

    found, wanted = exported(f, normal(0, (4, 6, 8)), SYMBOLS[given])
    assert_close(found, wanted)
