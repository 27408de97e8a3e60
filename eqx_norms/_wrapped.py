"""The weights of another layer: chosen, read, and replaced in a copy of it."""

import functools as ft
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import State, StatefulLayer, StateIndex
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array

from ._axes import other_axes
from ._checks import Check
from ._dtypes import ResultDType
from ._names import AnswersNames
from ._trees import find_nodes
from ._types import Axes, DTypeLike


Layer = TypeVar("Layer")


def choose_weights(
    layer: Any, where: Callable[[Any], Any] | None, *, check: Check
) -> tuple[str, ...]:
    """The paths of the weights that `where` picks, by default all leaves called `weight`
    that have two dimensions or more.

    Unlike the function, paths are equal for layers made alike, as a static field must be.
    """
    leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(layer)}
    if where is None:
        paths = tuple(
            path
            for path, leaf in leaves.items()
            if path.endswith(".weight") and eqx.is_inexact_array(leaf) and leaf.ndim >= 2
        )
        wanted = "a `weight` of two dimensions or more"
    else:
        names = jax.tree.unflatten(jax.tree.structure(layer), leaves)
        paths = tuple(dict.fromkeys(jax.tree.leaves(where(names))))
        wanted = "floating-point arrays for `where` to choose"
    if not paths or not all(eqx.is_inexact_array(leaves.get(path)) for path in paths):
        raise check.error(
            f"needs {wanted} in the layer, got {type(layer).__name__} with the "
            f"arrays {[path for path, leaf in leaves.items() if eqx.is_array(leaf)]}"
            + (f", of which `where` chose {list(paths)}." if where else ".")
            + " Choose with `where=lambda layer: ...`, as for `equinox.tree_at`."
        )
    return paths


class AbstractWrapper(AnswersNames, StatefulLayer, Generic[Layer]):
    """A layer, and which of its weights others take the place of when it is called."""

    layer: Layer
    weights: tuple[str, ...] = eqx.field(static=True)
    # How many dimensions each weight had when it was chosen: layers that are made under
    # `filter_vmap` have them stacked.
    ranks: tuple[int, ...] = eqx.field(static=True, repr=False)
    feature_axes: tuple[int, ...] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    dtype: ResultDType = eqx.field(static=True, default=None, kw_only=True)

    def _set_common(
        self,
        layer: Layer,
        where: Callable[[Any], Any] | None,
        *,
        feature_axes: Axes,
        epsilon: float,
        dtype: DTypeLike | None,
    ) -> tuple[Array, ...]:
        """Sets these fields, from within a constructor, and returns the weights."""
        check = self._check
        self.layer = layer
        self.weights = choose_weights(layer, where, check=check)
        self.feature_axes = check.axes(feature_axes, "feature_axes")
        self.epsilon = check.epsilon(epsilon)
        self.dtype = check.result_dtype(dtype)
        weights = self._weights()
        self.ranks = tuple(weight.ndim for weight in weights)
        return weights

    def _axes(self, weight: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The feature axes of a weight, and all others."""
        axes = self._check.axes_in(weight.ndim, self.feature_axes, "feature_axes")
        return axes, other_axes(axes, weight.ndim)

    def _weights(self) -> tuple[Array, ...]:
        leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(self.layer)}
        if not all(hasattr(leaves.get(path), "dtype") for path in self.weights):
            arrays = [path for path, leaf in leaves.items() if hasattr(leaf, "dtype")]
            raise self._check.error(
                f"the weights that were chosen when it was made are {list(self.weights)}, "
                f"but now the layer has {arrays}. Wrap the new layer anew; or, if "
                "`equinox.nn.Shared` ties a weight to another, call that first."
            )
        # After a checkpoint they may be NumPy's.
        return tuple(jnp.asarray(leaves[path]) for path in self.weights)

    @abstractmethod
    def _normalized(self, weight: Array, own: Any, /) -> Array:
        """What takes the place of a weight; `own` is what this layer has for it."""

    @abstractmethod
    def _own(self, state: State | None) -> Iterable[Any]:
        """What this layer has for each weight, in itself or in the state."""

    def _baked(self, state: State | None) -> Layer:
        """The layer with the weights that it is called with in evaluation."""
        each = ft.partial(over_stacks, self._normalized)
        return self._with(map(each, self._weights(), self.ranks, self._own(state)))

    def _with(self, weights: Iterable[Array]) -> Layer:
        """A copy of the layer with other weights."""
        new = dict(zip(self.weights, weights, strict=True))
        return tree_map_with_path(
            lambda path, leaf: new.get(keystr(path), leaf), self.layer
        )

    def _call(
        self, weights: Iterable[Array], *args: Any, key: Any = None, **kwargs: Any
    ) -> Any:
        layer: Any = self._with(weights)
        # Not every layer takes a key.
        return layer(*args, **kwargs) if key is None else layer(*args, key=key, **kwargs)


def over_stacks(function: Callable[..., Any], weight: Array, rank: int, *args: Any) -> Any:
    """Calls a function with one weight of this rank, or each of those that are stacked."""
    for _ in range(weight.ndim - rank):
        function = jax.vmap(function)
    return function(weight, *args)


def is_stateful(layer: Any) -> bool:
    """Whether there is a state anywhere in a layer, which then is called with it."""
    return bool(find_nodes(layer, StateIndex))
