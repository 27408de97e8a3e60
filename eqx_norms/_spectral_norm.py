import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import Shared, State, StateIndex
from jax import lax
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from ._checks import Check
from ._dtypes import promote, real_dtype
from ._layer import split_key
from ._sharding import shard_like
from ._state import (
    check_precision,
    copy_state,
    get_state,
    initial_state,
    needs_state,
    set_state,
)
from ._statistics import abs_square
from ._trees import children, find_nodes
from ._types import Axes, DTypeLike
from ._weight_norm import WeightNorm
from ._wrapped import AbstractWrapper, Layer, is_stateful, over_stacks


# Before the first call, so that evaluation is of use from the start.
_FIRST_STEPS = 15
# From one look at how far it is to the next.
_STEPS = 10


class SpectralStats(eqx.Module):
    """What a [`eqx_norms.SpectralNorm`][] remembers of one of its weights.

    - `u`, `v`: the singular vectors of the largest singular value, with the rank of the
        weight: `u` along the feature axes, `v` along all others.
    - `sigma`: the largest singular value.
    """

    u: Inexact[Array, "..."]
    v: Inexact[Array, "..."]
    sigma: Float[Array, ""]


def _sigma(weight: Array, u: Array, v: Array) -> Array:
    vectors = (vector.astype(weight.dtype) for vector in (u, v))
    # An average of unit vectors is shorter than one.
    u, v = (_unit(vector, vector, 0.0) for vector in vectors)
    # Of either sign where the vectors are those of another weight.
    return jnp.abs(jnp.sum(u.conj() * weight * v))


def _unit(vector: Array, old: Array, epsilon: float) -> Array:
    """Of length one; where there is nothing to scale, or not to be had, what it was."""
    norm = jnp.sqrt(jnp.sum(abs_square(vector)))
    good = jnp.isfinite(norm) & (norm > epsilon)
    unit = vector / jnp.where(good, norm, 1).astype(vector.dtype)
    return jnp.where(good, unit, shard_like(old, vector))


class SpectralNorm(AbstractWrapper[Layer]):
    r"""Calls a layer with weights divided by their largest singular value.

    $$w = \frac{v}{\sigma(v)}, \qquad \sigma(v) = \max_{|a| = 1} |v a|$$

    $v$ is the wrapped layer's weight, which stays as it is; what is divided is a copy, made
    at each call. A weight of more than two dimensions is taken for the matrix that has the
    positions along `feature_axes` for rows, and all others for columns.

    $\sigma$ is found by power iteration, some steps in each training call; the singular
    vectors are kept in an `equinox.nn.State`. No gradient flows through them. In evaluation
    the stored vectors are used as they are.

    !!! example

        ```python
        linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
        layer, state = eqx.nn.make_with_state(en.SpectralNorm)(
            linear, key=jax.random.key(1)
        )
        y, state = layer(jnp.ones(3), state)
        ```

    !!! cite

        [Spectral Normalization for Generative Adversarial
        Networks](https://arxiv.org/abs/1802.05957), with the parameters of Flax's
        `nnx.SpectralNorm`.
    """

    state_index: StateIndex[tuple[SpectralStats, ...]]
    inference: bool
    n_steps: int = eqx.field(static=True)

    def __init__(
        self,
        layer: Layer,
        *,
        feature_axes: Axes = 0,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        where: Callable[[Layer], Any] | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `layer`: any layer. One that has a state is called with it too.
        - `feature_axes`: the axes of a weight that are the rows of the matrix: 0, by
            default, the outputs of Equinox's layers.
        - `n_steps`: how many steps of power iteration a training call takes.
        - `epsilon`: lengths up to this count as zero: a weight whose largest singular value
            is no larger is not divided, and keeps its singular vectors.
        - `dtype`: of the weights that the layer is called with. By default that of the
            weight, and so with `"input"`. The arithmetic is in float32 or wider.
        - `param_dtype`: of the singular vectors and values, if wider than float32.
        - `error_on_non_matrix`: whether to raise for weights that are no matrices, rather
            than to take them for such.
        - `update_stats`: whether to take steps, and keep what they found. Its opposite is
            kept in the field `inference`, which `equinox.nn.inference_mode` toggles.
        - `where`: as in [`eqx_norms.WeightNorm`][].
        - `key`: a `jax.random` key for the first vectors.

        **Raises:**

        `ValueError` where one of these is not as described.
        """
        check = self._check
        weights = self._set_common(
            layer, where, feature_axes=feature_axes, epsilon=epsilon, dtype=dtype
        )
        n_steps = check.integer(n_steps, "n_steps")
        if n_steps < 1:
            raise check.error(
                f"`n_steps` must be at least 1, got {n_steps}. To leave the singular "
                "vectors as they are, use `update_stats=False`."
            )
        self.n_steps = n_steps
        param_dtype = check.dtype(param_dtype, "param_dtype")
        inside = {
            f"{path}.layer{weight}"
            for path, wrapper in find_nodes(layer, WeightNorm).items()
            for weight in wrapper.weights
        }
        if any(path in inside for path in self.weights):
            raise check.error(
                f"of the weights {list(self.weights)} {list(inside)} are in a "
                "`WeightNorm`, which takes their direction alone: it would not matter how "
                f"long they are. Put it outside: `WeightNorm({check.name}(layer))`."
            )
        strict = check.flag(error_on_non_matrix, "error_on_non_matrix")
        if strict and any(weight.ndim != 2 for weight in weights):
            shapes = dict(zip(self.weights, (w.shape for w in weights), strict=True))
            raise check.error(
                "with `error_on_non_matrix=True` all weights must have two dimensions, got "
                f"{shapes}."
            )
        keys = split_key(key, len(weights), check=check)
        stats = []
        for weight, key in zip(weights, keys, strict=True):
            drawn = self._draw(weight, promote(weight.dtype, param_dtype, jnp.float32), key)
            stats.append(self._update(weight, drawn, _FIRST_STEPS))
        self.state_index = StateIndex(tuple(stats))
        self.inference = not check.flag(update_stats, "update_stats")

    def _draw(self, weight: Array, dtype: np.dtype, key: PRNGKeyArray) -> SpectralStats:
        def draw(axes: tuple[int, ...], key: PRNGKeyArray) -> Array:
            shape = [n if axis in axes else 1 for axis, n in enumerate(weight.shape)]
            drawn = jax.random.normal(key, shape, dtype)
            return _unit(drawn, drawn, 0.0)

        u, v = map(draw, self._axes(weight), jax.random.split(key))
        return SpectralStats(u, v, jnp.ones((), real_dtype(dtype)))

    def _update(self, weight: Array, old: SpectralStats, steps: int) -> SpectralStats:
        """After some steps of power iteration. (Sums, not products of matrices: those are
        in lower precision on accelerators, and refuse sharded weights on an Explicit
        mesh.)"""
        weight = lax.stop_gradient(weight).astype(old.u.dtype)
        features, others = self._axes(weight)
        u, v = old.u, old.v
        for _ in range(steps):
            product = jnp.sum(weight.conj() * _unit(u, u, 0.0), features, keepdims=True)
            v = _unit(product, v, self.epsilon)
            u = _unit(jnp.sum(weight * v, others, keepdims=True), u, self.epsilon)
        sigma = _sigma(weight, u, v)
        sigma = jnp.where(jnp.isfinite(sigma), sigma, old.sigma)
        # Sharded as before, so that a step can be the body of a scan.
        return SpectralStats(shard_like(u, old.u), shard_like(v, old.v), sigma)

    def _converged(
        self, accuracy: float, max_steps: int, weight: Array, old: SpectralStats
    ) -> SpectralStats:
        weight = lax.stop_gradient(weight).astype(old.u.dtype)
        features, _ = self._axes(weight)
        accuracy = max(accuracy, 8 * float(jnp.finfo(weight.dtype).eps))

        def is_far(carry: tuple[SpectralStats, Array]) -> Array:
            stats, steps = carry
            product = jnp.sum(weight.conj() * stats.u, features, keepdims=True)
            rest = shard_like(product, stats.v) - stats.sigma.astype(weight.dtype) * stats.v
            residual = jnp.sqrt(jnp.sum(abs_square(rest)))
            return (residual > accuracy * stats.sigma) & (steps < max_steps)

        def go_on(carry: tuple[SpectralStats, Array]) -> tuple[SpectralStats, Array]:
            stats, steps = carry
            return self._update(weight, stats, _STEPS), steps + _STEPS

        # Those of another weight may be singular vectors of this one, but not the first.
        start = self._draw(weight, old.u.dtype, jax.random.key(0))
        new, _ = lax.while_loop(is_far, go_on, (start, jnp.zeros((), int)))
        sigma = _sigma(weight, new.u, new.v)
        good = jnp.isfinite(sigma) & (sigma > self.epsilon)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(good, shard_like(new, old), old)

        return jax.tree.map(choose, new, old)

    def _normalized(self, weight: Array, stats: SpectralStats) -> Array:
        wide = weight.astype(promote(weight.dtype, stats.u.dtype, jnp.float32))
        sigma = _sigma(wide, stats.u, stats.v)
        sigma = jnp.where(sigma > self.epsilon, sigma, 1)
        dtype = self._check.dtype_of(self.dtype, weight)
        return (wide / sigma.astype(wide.dtype)).astype(dtype)

    @needs_state
    @jax.named_scope("eqx_norms.SpectralNorm")
    def __call__(
        self,
        x: Any,
        state: State,
        *args: Any,
        update_stats: bool | None = None,
        key: PRNGKeyArray | None = None,
        **kwargs: Any,
    ) -> tuple[Any, State]:
        """**Arguments:**

        - `x`, and all but those named here: handed to the layer. `key` only if there is
            one, `state` if the layer has one too.
        - `state`: the model's `equinox.nn.State`, which holds the singular vectors.
        - `update_stats`: if given, takes the place of the opposite of the field
            `inference`.

        **Returns:**

        A pair of what the layer returns, and the state, updated in training.

        **Raises:**

        `ValueError` if `state` holds nothing for this layer, or in training if it is
        narrower than float32; what the layer raises.
        """
        check = self._check
        stats = self.spectral_stats(state)
        weights = self._weights()
        if self._updates(update_stats):
            check_precision(stats, check=check)
            stats = tuple(
                self._update(weight, old, self.n_steps)
                for weight, old in zip(weights, stats, strict=True)
            )
            state = set_state(state, self.state_index, stats)
        # For the backward pass the weight is kept, not a wider copy of it.
        normalized = jax.checkpoint(lambda *args: self._normalized(*args))
        new = map(normalized, weights, stats)
        if is_stateful(self.layer):
            return self._call(new, x, state, *args, key=key, **kwargs)
        return self._call(new, x, *args, key=key, **kwargs), state

    def _updates(self, update_stats: bool | None) -> bool:
        check = self._check
        if update_stats is not None:
            return check.flag(update_stats, "update_stats")
        return not check.flag(self.inference, "inference")

    def _own(self, state: State | None) -> tuple[SpectralStats, ...]:
        if state is not None:
            return self.spectral_stats(state)
        try:
            return initial_state(self.state_index)
        except ValueError:
            raise self._check.error(
                "has its singular vectors in the model's `equinox.nn.State`. Give it too: "
                "`bake(model, state)`."
            ) from None

    def spectral_stats(self, state: State) -> tuple[SpectralStats, ...]:
        """What `state` holds for this layer, weight by weight in the order of the field
        `weights`."""
        stats = get_state(state, self.state_index, check=self._check)
        return jax.tree.map(jnp.asarray, stats)


def converge_spectral_norms(
    model: Any, state: State, *, accuracy: float = 1e-5, max_steps: int = 10_000
) -> State:
    r"""Finds the singular vectors of every [`eqx_norms.SpectralNorm`][] in a model anew,
    for the weights as they are now: for those that are an average over training, or were
    loaded or changed otherwise. For `BatchNorm` there is [`eqx_norms.recalibrate`][].

    Power iteration starts from vectors drawn at random, the same at each call, and stops
    where

    $$|v^H a - \sigma b| \le \text{accuracy} * \sigma$$

    for the weight $v$ and its vectors $a$ and $b$ of length one, with $v b = \sigma a$.
    Then a singular value of $v$ is no further than $\text{accuracy} * \sigma$ from
    $\sigma$, and most often far nearer.

    **Arguments:**

    - `model`: any PyTree, a single layer included. Layers that were made under
        `equinox.filter_vmap` count each.
    - `state`: the model's `equinox.nn.State`. It stays usable.
    - `accuracy`: see above. Less than 8 times the `eps` of the vectors' dtype is that.
    - `max_steps`: how many steps to take at most, rounded up to tens. Many are needed where
        the largest singular values are near each other; after ten thousand $\sigma$ is
        most often within a thousandth even then.

    **Returns:**

    The given state with new vectors and singular values. A weight that is not finite, or
    has none larger than the layer's `epsilon`, keeps what it had. No other part of the
    state changes.

    **Raises:**

    `ValueError` if the model has no SpectralNorm, if `state` is not the model's, or if
    `accuracy` or `max_steps` is not as described.

    !!! example

        ```python
        key = jax.random.key(0)
        linear = eqx.nn.Linear(3, 4, key=key)
        layer, state = eqx.nn.make_with_state(en.SpectralNorm)(linear, key=key)
        state = en.converge_spectral_norms(layer, state)
        ```
    """
    check = Check("converge_spectral_norms")
    how = check.number(accuracy, "accuracy"), check.integer(max_steps, "max_steps")
    if not (0 <= how[0] < 1 and how[1] > 0):
        raise check.error(
            f"`accuracy` must be from 0 to 1, and `max_steps` positive, got {accuracy} and "
            f"{max_steps}. Leave them out for the defaults."
        )

    found = []

    # As `bake` does it: what is inside a wrapper has the weights that this one gives it.
    def visit(node: Any, state: State) -> State:
        if isinstance(node, Shared):
            return visit(node(), state)
        if isinstance(node, SpectralNorm):
            found.append(node)
            converged = ft.partial(over_stacks, ft.partial(node._converged, *how))
            stats = map(converged, node._weights(), node.ranks, node.spectral_stats(state))
            state = set_state(state, node.state_index, tuple(stats))
        if isinstance(node, AbstractWrapper):
            return visit(node._baked(state), state)
        for _, child in children(node):
            state = visit(child, state)
        return state

    state = visit(model, copy_state(state))
    if not found:
        raise check.error("there is no `eqx_norms.SpectralNorm` in this model.")
    return state
