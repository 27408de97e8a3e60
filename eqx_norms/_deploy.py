"""A trained model made ready for evaluation by others: with plain layers where there can
be, and without what only training needs."""

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import Identity, Sequential, Shared, State
from jax.tree_util import GetAttrKey, SequenceKey, keystr

from ._batch_norm import BatchNorm
from ._checks import Check, as_tuple
from ._dtypes import cast, promote
from ._freeze import find_batch_norms
from ._kinds import Kept, calls_as, kind, list_kept, type_name
from ._state import get_state, remaining, with_entries
from ._trees import KeyPath, children, find_nodes, map_children, with_fields
from ._wrapped import AbstractWrapper, Layer


Model = TypeVar("Model")

_LINEAR = ("Linear", "Conv", "ConvTranspose")
_WRAPPERS = (AbstractWrapper, eqx.nn.WeightNorm, eqx.nn.SpectralNorm)


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


def fold_batch_norm(layer: Layer, bn: Any, state: State) -> Layer:
    r"""Makes one layer of a linear one and the [`eqx_norms.BatchNorm`][] that follows it,
    for evaluation.

    With the running mean $m$ and variance $v$,

    $$W' = \frac{\gamma}{\sqrt{v + \varepsilon}} W, \qquad
    b' = \frac{\gamma}{\sqrt{v + \varepsilon}} (b - m) + \beta.$$

    **Arguments:**

    - `layer`: an `equinox.nn.Linear`, `Conv` or `ConvTranspose`, or one of their kinds for
        a given number of dimensions.
    - `bn`: the BatchNorm, whose features are the outputs of `layer`. Whether it is in
        training or evaluation does not matter.
    - `state`: the model's `equinox.nn.State`, with the running statistics. It stays usable.

    **Returns:**

    A layer of the same type and settings, with a bias. It is computed in float32 or wider
    and has the dtype of the weight of `layer`, whatever the `dtype` of `bn`.

    **Raises:**

    `ValueError` if `layer` or `bn` is of another kind, if `bn` has several feature axes or
    as many features as `layer` has no outputs, if its result is complex where the weight is
    real, or if `state` belongs to another model.

    !!! example

        ```python
        conv = eqx.nn.Conv2d(3, 16, 3, key=jax.random.key(0))
        norm, state = eqx.nn.make_with_state(en.BatchNorm)(16, axis=0)
        conv = en.fold_batch_norm(conv, norm, state)
        ```
    """
    if not isinstance(layer, (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)):
        raise ValueError(
            "fold_batch_norm: `layer` must be an `equinox.nn.Linear`, `Conv` or "
            f"`ConvTranspose`, got {type(layer).__name__}."
        )
    if not isinstance(bn, BatchNorm):
        raise ValueError(
            f"fold_batch_norm: `bn` must be an `eqx_norms.BatchNorm`, got {type_name(bn)}."
        )
    weight = layer.weight
    features, outputs = as_tuple(bn.num_features), weight.shape[0]
    if features != (outputs,):
        raise ValueError(
            f"fold_batch_norm: `bn` must have one feature for each of the {outputs} "
            f"outputs of {type(layer).__name__}, got `num_features={bn.num_features}` "
            f"along `axis={bn.axis}`."
        )
    # As the layer computes it, but on a vector, and without a cast at the end.
    evaluation = with_fields(bn, frozen=True, axis=(0,), dtype=None)
    dtype = promote(weight.dtype, jnp.float32)
    bias = jnp.zeros(outputs, dtype)
    if layer.bias is not None:
        bias = layer.bias.reshape(outputs).astype(dtype)
    # It is affine in each feature: its derivative is what it multiplies with.
    bias, factor = jax.jvp(
        lambda x: evaluation(x, state)[0], (bias,), (jnp.ones_like(bias),)
    )
    if jnp.iscomplexobj(bias) and not jnp.iscomplexobj(weight):
        raise ValueError(
            f"fold_batch_norm: a weight of dtype {weight.dtype} cannot hold the result, "
            f"which is of dtype {bias.dtype}. Give `layer` a complex weight."
        )
    # The outputs are the first axis of the weight, with groups and transposed as well.
    trailing = (1,) * (weight.ndim - 1)
    new = weight.astype(factor.dtype) * factor.reshape(outputs, *trailing)
    # That of a convolution has the rank of an output.
    trailing = () if isinstance(layer, eqx.nn.Linear) else trailing[1:]
    return with_fields(
        layer,
        weight=cast(new, weight.dtype),
        bias=cast(bias, weight.dtype).reshape(outputs, *trailing),
        use_bias=True,
    )


def fold_batch_norms(model: Model, state: State) -> tuple[Model, State]:
    """Folds every [`eqx_norms.BatchNorm`][] that directly follows a linear layer in an
    `equinox.nn.Sequential` into that layer, as [`eqx_norms.fold_batch_norm`][] does for
    one, for evaluation.

    A Sequential within another counts as its layers, one after the other. An
    `equinox.nn.Identity` takes the place of the BatchNorm: all other layers stay where they
    are, and the model is called as before, with a state and a key if it was.

    A BatchNorm is left where what comes before it is no `Linear`, `Conv` or `ConvTranspose`
    of `equinox.nn`; where it is in a module with a `__call__` of its own, since nothing
    tells what it follows there (`fold_batch_norm` and `equinox.tree_at` do it by hand);
    and where its weights are tied or normalised by what is around them. One warning lists
    all that are left.

    !!! example

        ```python
        conv = eqx.nn.Conv2d(3, 16, 3, use_bias=False, key=jax.random.key(0))
        make = lambda: eqx.nn.Sequential([conv, en.BatchNorm(16, axis=0)])
        model, state = eqx.nn.make_with_state(make)()
        model, state = en.fold_batch_norms(eqx.nn.inference_mode(model), state)
        assert type(model[1]) is eqx.nn.Identity
        ```

    **Arguments:**

    - `model`: any PyTree.
    - `state`: the `equinox.nn.State` that belongs to it, with the running statistics.

    **Returns:**

    The model, and a state without what the folded layers had in it. What was given stays as
    it was.

    **Raises:**

    `ValueError` if there is no BatchNorm, if none can be folded, or if `state` belongs to
    another model.

    **Warns:**

    Once, with path and reason, for all BatchNorms that were left.
    """
    check = Check("fold_batch_norms")
    found = find_batch_norms(model, check)
    for bn in found.values():
        get_state(state, bn.state_index, check=check)
    folding = _Folding(state)
    folding.scan(model, ())
    report = list_kept(folding.left)
    if not folding.new:
        raise ValueError(f"fold_batch_norms: no BatchNorm can be folded.{report}")
    if folding.left:
        warnings.warn(
            f"fold_batch_norms: not every BatchNorm was folded.{report}", stacklevel=2
        )
    new = folding.renew(model, ())
    return new, with_entries(remaining(state, found, new))


class _Folding:
    """What is folded and what is left of a model."""

    def __init__(self, state: State):
        self.state = state
        self.new: dict[KeyPath, Any] = {}
        self.left: list[Kept] = []

    def scan(self, node: Any, path: KeyPath, why: str = "") -> None:
        """Folds what is in a node, unless there is a reason not to."""
        if isinstance(node, BatchNorm):
            why = why or "it is in no `equinox.nn.Sequential`, which says what it follows"
            self.left.append(Kept(path, node, why))
        elif isinstance(node, eqx.nn.BatchNorm):
            self.left.append(Kept(path, node, "`replace_norms` makes one of ours of it"))
        elif not why and kind(node, "equinox.nn", ("Sequential",)):
            self._scan_links(node, path)
        else:
            if isinstance(node, Shared):
                why = "`equinox.nn.Shared` may tie it, or what it follows. Call that first"
            elif isinstance(node, _WRAPPERS):
                why = f"a {type(node).__name__} is around what it follows. `bake` it first"
            for below, child in children(node, path):
                self.scan(child, below, why)

    def _scan_links(self, sequence: Sequential, path: KeyPath) -> None:
        place, before = (), None
        for where, layer in _links(sequence, path):
            if kind(layer, "equinox.nn", ("Identity",)):
                continue
            if isinstance(layer, BatchNorm):
                try:
                    before = self._fold(before, layer)
                except ValueError as error:
                    self.left.append(Kept(where, layer, str(error)))
                else:
                    self.new[place], self.new[where] = before, Identity()
                    continue
            else:
                self.scan(layer, where)
            place, before = where, layer

    def _fold(self, layer: Any, bn: BatchNorm) -> Any:
        """A layer and the BatchNorm behind it in one."""
        if not calls_as(bn, BatchNorm):
            raise ValueError("a subclass of `BatchNorm` with a `__call__` of its own")
        if layer is None:
            raise ValueError("nothing comes before it in its `equinox.nn.Sequential`")
        if kind(layer, "equinox.nn", _LINEAR) is None:
            wrapped = " `bake` that first" if isinstance(layer, _WRAPPERS) else ""
            raise ValueError(f"what comes before it is {type_name(layer)}.{wrapped}")
        dimensions = getattr(layer, "num_spatial_dims", 0)
        if layer.weight.ndim != dimensions + 2:
            raise ValueError(
                "several layers that were made under `equinox.filter_vmap`. Call "
                "`fold_batch_norms` under it too"
            )
        if bn.axis not in ((0,), (-1 - dimensions,)):
            raise ValueError(
                f"its features are along `axis={bn.axis}`, those of the "
                f"{type(layer).__name__} before it along axis 0"
            )
        return fold_batch_norm(layer, bn, self.state)

    def renew(self, node: Any, path: KeyPath) -> Any:
        if path in self.new:
            return self.new[path]
        return map_children(self.renew, node, path)


def _links(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """What is applied one after the other, and where each is in the model."""
    if kind(node, "equinox.nn", ("Sequential",)):
        for number, layer in enumerate(node.layers):
            yield from _links(layer, (*path, GetAttrKey("layers"), SequenceKey(number)))
    else:
        yield path, node
