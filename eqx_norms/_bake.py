from typing import Any

import equinox as eqx
from equinox.nn import Shared, State
from jax.tree_util import keystr

from ._state import remaining, with_entries
from ._trees import KeyPath, find_nodes, map_children
from ._wrapped import AbstractWrapper


def bake(model: Any, state: State | None = None) -> Any:
    """Puts plain layers with normalised weights in the place of every
    [`eqx_norms.WeightNorm`][] and [`eqx_norms.SpectralNorm`][] in a model: to deploy it, to
    export it, to hand it to someone without this library.

    They compute what these layers do in evaluation, with weights of the same dtype. One
    inside another is done for both, and layers that were made under `equinox.filter_vmap`
    for each. Where a SpectralNorm was called as `layer(x, state)`, the plain layer takes
    `x` alone; `equinox.nn.Sequential` knows.

    !!! example

        ```python
        def make(key):
            linear = eqx.nn.Linear(3, 4, key=key)
            return eqx.nn.Sequential([en.SpectralNorm(linear, key=key), en.BatchNorm(4)])

        model, state = eqx.nn.make_with_state(make)(jax.random.key(0))
        model, state = en.bake(model, state)
        assert type(model[0]) is eqx.nn.Linear
        ```

    **Arguments:**

    - `model`: any PyTree, a single layer included.
    - `state`: the `equinox.nn.State` that belongs to it. Needed for a SpectralNorm, unless
        `equinox.nn.make_with_state` has not seen it: then its initial state counts.

    **Returns:**

    The model, or with a state `(model, state)`: a state without what the SpectralNorms had
    in it. What was given stays as it was.

    **Raises:**

    `ValueError` if there is no such layer; for a state that is missing, or is another
    model's; if `equinox.nn.Shared` ties a weight within such a layer to another one.
    """
    wrappers = find_nodes(model, AbstractWrapper)
    if not wrappers:
        raise ValueError(
            "bake: there is no `eqx_norms.WeightNorm` or `SpectralNorm` in this model. "
            "Those of `equinox.nn` become such by `eqx_norms.replace_norms`."
        )

    def visit(node: Any, path: KeyPath) -> Any:
        if isinstance(node, AbstractWrapper):
            return visit(node._baked(state), path)
        if not isinstance(node, Shared):
            return map_children(visit, node, path)
        try:
            new = map_children(visit, node, path)
            eqx.filter_eval_shape(new)
        except Exception as error:  # The functions that say what it ties are the user's.
            raise ValueError(
                f"bake: the `equinox.nn.Shared` at model{keystr(path)} ties what is in a "
                "`WeightNorm` or `SpectralNorm`, which is there no longer. Bake what it "
                f"ties in its place, `bake(shared())`: {error}"
            ) from error
        return new

    new = visit(model, ())
    if state is None:
        return new
    return new, with_entries(remaining(state, wrappers, new))
