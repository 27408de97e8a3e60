"""The weights of another layer: chosen, read, and replaced in a copy of it."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
from equinox.nn import StatefulLayer, StateIndex
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array

from ._axes import canonicalize_axes, check_axes, other_axes
from ._dtypes import ResultDType, check_epsilon, check_result_dtype
from ._trees import find_nodes
from ._types import Axes, DTypeLike


Layer = TypeVar("Layer")


def choose_weights(
    layer: Any, where: Callable[[Any], Any] | None, *, wrapper: str
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
        raise ValueError(
            f"{wrapper}: needs {wanted} in the layer, got {type(layer).__name__} with the "
            f"arrays {[path for path, leaf in leaves.items() if eqx.is_array(leaf)]}"
            + (f", of which `where` chose {list(paths)}." if where else ".")
            + " Choose with `where=lambda layer: ...`, as for `equinox.tree_at`."
        )
    return paths


class AbstractWrapper(StatefulLayer, Generic[Layer]):
    """A layer, and which of its weights others take the place of when it is called."""

    layer: Layer
    weights: tuple[str, ...] = eqx.field(static=True)
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
        name = type(self).__name__
        self.layer = layer
        self.weights = choose_weights(layer, where, wrapper=name)
        self.feature_axes = check_axes(feature_axes, layer=name, argument="feature_axes")
        self.epsilon = check_epsilon(epsilon, layer=name)
        self.dtype = check_result_dtype(dtype, layer=name)
        return self._weights()

    def _axes(self, weight: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The feature axes of a weight, and all others."""
        axes = canonicalize_axes(
            self.feature_axes,
            weight.ndim,
            layer=type(self).__name__,
            argument="feature_axes",
        )
        return axes, other_axes(axes, weight.ndim)

    def _weights(self) -> tuple[Array, ...]:
        leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(self.layer)}
        if not leaves.keys() >= set(self.weights):
            raise ValueError(
                f"{type(self).__name__}: the weights that were chosen when it was made are "
                f"{list(self.weights)}, but now the layer has {list(leaves)}. Wrap the new "
                "layer anew."
            )
        return tuple(leaves[path] for path in self.weights)

    def _call(
        self, weights: Iterable[Array], *args: Any, key: Any = None, **kwargs: Any
    ) -> Any:
        """Calls a copy of the layer with other weights."""
        new = dict(zip(self.weights, weights, strict=True))
        layer: Any = tree_map_with_path(
            lambda path, leaf: new.get(keystr(path), leaf), self.layer
        )
        # Not every layer takes a key.
        return layer(*args, **kwargs) if key is None else layer(*args, key=key, **kwargs)


def is_stateful(layer: Any) -> bool:
    """Whether there is a state anywhere in a layer, which then is called with it."""
    return bool(find_nodes(layer, StateIndex))
