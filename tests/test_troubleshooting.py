"""Each message on the page for troubleshooting, raised for real."""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqx_norms as en

from .helpers import clone, normal


PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
X = normal(0, (4, 3))
BATCHES = normal(1, (2, 4, 3))
# Arrays that nothing but these tests uses: what is donated is gone.
NORM, STATE = eqx.nn.make_with_state(en.BatchNorm)(3)
NAMED, NAMED_STATE = eqx.nn.make_with_state(en.BatchNorm)(3, axis_name="batch")
LAYER = en.LayerNorm(3)
OTHER_STATE = eqx.nn.State(eqx.nn.StateIndex(jnp.zeros(())))


def state():
    return clone(STATE)


def use_twice():
    old = state()
    NORM(X, old)
    NORM(X, old)


def donate():
    old = jax.tree.map(jnp.copy, STATE)
    kept = clone(old)
    eqx.filter_jit(lambda x, s: NORM(x, s), donate="all")(X + 0, old)
    return NORM(X, kept)


def load():
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (NORM, STATE))
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, eqx.nn.make_with_state(en.BatchNorm)(4))


def assign():
    NORM.scale = jnp.ones(3)  # pyright: ignore


def warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eqx.nn.inference_mode(NORM)(X, state())


# A part of the message, which the page must have too, and what raises it.
TROUBLES: dict[str, Any] = {
    "vmap has mapped output (axis_name=batch) but out_axes is None": lambda: jax.vmap(
        NORM, (0, None), (0, None), axis_name="batch"
    )(BATCHES, state()),
    "got axis spec None but output was batched on axis 0": lambda: jax.vmap(
        NORM, (0, None), (0, None)
    )(BATCHES, state()),
    "BatchNorm: `axis_name` has the name 'batch', which is not bound here.": lambda: NAMED(
        X, clone(NAMED_STATE)
    ),
    "Attempted to use old state. Probably you have done something like:": use_twice,
    "BatchNorm: needs the model's `equinox.nn.State` as its second argument, got none.": (
        lambda: NORM(X)  # pyright: ignore
    ),
    "this `state` holds nothing for this layer; it was made for another model.": (
        lambda: NORM(X, OTHER_STATE)
    ),
    "unsupported operand type(s) for +: 'ArrayImpl' and 'tuple'": lambda: (
        LAYER(X) + NORM(X, state())  # pyright: ignore
    ),
    "vmap got inconsistent sizes for array axes to be mapped:": lambda: jax.vmap(
        NAMED, axis_name="batch"
    )(X, clone(NAMED_STATE)),
    "Gradient only defined for scalar-output functions. Output was": lambda: (
        eqx.filter_grad(lambda norm: norm(X, state()))(NORM)
    ),
    "Buffer has been deleted or donated.": donate,
    "grad requires real- or complex-valued inputs (input dtype that is a sub-dtype of "
    "np.inexact), but got bool.": lambda: jax.grad(
        lambda norm: jnp.sum(norm(X, state())[0])
    )(NORM),
    "unhashable type: 'jaxlib._jax.ArrayImpl'": lambda: jax.jit(LAYER)(X),
    "as an abstract array": lambda: jax.jit(lambda model, x: model(x))(
        eqx.nn.MLP(3, 3, 3, 1, key=jax.random.key(0)), X[0]
    ),
    "must be True or False, got a traced array.": lambda: jax.jit(
        lambda norm, x: norm(x, state())
    )(NORM, X),
    "cannot assign to field 'scale'": assign,
    "unsupported operand type(s) for +: 'jaxlib._jax.ArrayImpl' and 'NoneType'": lambda: (
        jax.tree.map(lambda p, u: p + u, LAYER, jax.tree.map(lambda _: None, LAYER))
    ),
    "BatchNorm: needs more than one position for each mean and variance": lambda: NORM(
        X[:1], state()
    ),
    "LayerNorm: expected features of shape (4,) along `feature_axes=(1,)`, got (3,)": (
        lambda: en.LayerNorm(4)(X)
    ),
    "BatchNorm: evaluates with running statistics that no batch has entered, mean 0 and "
    "variance 1": warned,
    "has changed shape from (4,) in `like` to (3,) on disk.": load,
}


# What JAX 0.8 or 0.12 says in the place of what 0.10 does; the page has that too.
IN_OTHER_VERSIONS = {
    "vmap has mapped output (axis_name=batch) but out_axes is None": (
        "vmap has mapped output (axis_name='batch') but out_axes is None",
    ),
    "Buffer has been deleted or donated.": (
        "Invalid buffer passed: buffer has been deleted or donated.",
        "Array has been deleted with shape=float32[3].",
    ),
}


@pytest.mark.parametrize(("text", "provoke"), TROUBLES.items(), ids=TROUBLES)
def test_each_is_on_the_page(text, provoke):
    texts = text, *IN_OTHER_VERSIONS.get(text, ())
    with pytest.raises(Exception, match="|".join(map(re.escape, texts))):
        provoke()
    page = PAGE.read_text()
    assert all(text in page for text in texts)


def test_the_page_has_no_others():
    """Every block of text is one of these, so that each is raised above."""
    blocks = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == len(TROUBLES)
    for block in blocks:
        assert sum(text in block for text in TROUBLES) == 1, block
