from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State
from jaxtyping import Array, PyTree

from ._batch_norm import BatchNorm
from ._running import PooledStats, RunningStats
from ._state import get_state


def recalibrate(
    model: PyTree,
    state: State,
    batches: Iterable[Any],
    forward: Callable[[PyTree, State, Any], tuple[Any, State]],
    *,
    progress: bool = False,
) -> State:
    r"""Takes the running statistics of every [`eqx_norms.BatchNorm`][] in a model anew: not
    of the last batches, but of a whole data set, each position counting once.

    With $n_i$ positions of mean $m_i$ and variance $v_i$ in batch $i$, and $N = \sum_i n_i$,

    $$m = \frac{1}{N} \sum_i n_i m_i, \qquad
    v = \frac{1}{N} \sum_i n_i (v_i + |m_i - m|^2),$$

    which is the mean and the variance of all batches joined to one. For a model whose
    weights are an average over training or were changed otherwise, for other data than it
    was trained on, and where the batches of training were few or small.

    Every batch is normalised as in training, with its own statistics, so that each layer
    sees what it saw there. Layers other than BatchNorm, dropout among them, are as `model`
    has them, and start each batch from `state`.

    **Arguments:**

    - `model`: any PyTree with BatchNorm layers, in training or in evaluation. Those under
        [`eqx_norms.freeze`][] are left alone.
    - `state`: the model's `equinox.nn.State`. It stays usable.
    - `batches`: an iterable, run through once. Batches may differ in size.
    - `forward`: a function `(model, state, batch) -> (anything, state)` that calls the
        model it is given. It is run as it is: put it inside `equinox.filter_jit`, without
        donation of its arguments. Masks, named axes and devices count as in training.
    - `progress`: whether to show a progress bar, which needs `tqdm`.

    **Returns:**

    The given state with the running statistics of these layers replaced: their variance is
    that of the sample with `use_unbiased_variance`, and their count how many batches there
    were. A batch that has nothing for a feature, or something not finite, is left out for
    that feature; where all are, it keeps what it had. No other part of the state changes.

    **Raises:**

    `ValueError` if the model has no BatchNorm or only frozen ones, if `state` is not the
    model's, if there are no batches, if `forward` does not return a pair with the state, or
    if it leads no position to some layer. `ImportError` if there is no `tqdm` for the bar.

    !!! example

        ```python
        @eqx.filter_jit
        def forward(model, state, x):
            return jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)

        state = en.recalibrate(model, state, batches, forward)
        ```
    """
    layers = _layers(model)
    old = {name: layer.running_stats(state) for name, layer in layers.items()}
    start = _replace(state, layers, {name: _start(stats) for name, stats in old.items()})
    model = eqx.tree_at(
        lambda model: [layer.inference for layer in _layers(model).values()],
        model,
        [False] * len(layers),
    )
    totals = {name: _Total(*np.zeros(4, np.int64)) for name in layers}
    number = 0
    for batch in _with_bar(batches) if progress else batches:
        new = _pooled(forward(model, _copy(start), batch), layers, start)
        totals = {name: _add(totals[name], new[name]) for name in layers}
        number += 1
    if number == 0:
        raise ValueError(
            "recalibrate: `batches` is empty. Give at least one batch; if it is a generator, "
            "it may have been used up before."
        )
    missed = [name for name, total in totals.items() if not np.any(total.count)]
    if missed:
        raise ValueError(
            f"recalibrate: in {number} batches nothing finite was counted for the layers "
            f"{', '.join(missed)}. `forward` must call each in training, without "
            "`use_running_average=True`, and return the state that the model returns. "
            "`eqx_norms.freeze` those that are not to change."
        )
    return _replace(
        state,
        layers,
        {name: _finish(totals[name], old[name], layers[name]) for name in layers},
    )


def _layers(model: PyTree) -> dict[str, BatchNorm]:
    """The layers to recalibrate, by where they are in the model."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, BatchNorm)
    )
    found = {
        f"`model{jax.tree_util.keystr(path)}`": node
        for path, node in nodes
        if isinstance(node, BatchNorm)
    }
    layers = {name: layer for name, layer in found.items() if not layer.frozen}
    if not layers:
        raise ValueError(
            "recalibrate: "
            + (
                f"all {len(found)} `eqx_norms.BatchNorm` layers of this model are frozen. "
                "`eqx_norms.unfreeze` those to recalibrate."
                if found
                else "there is no `eqx_norms.BatchNorm` in this model."
            )
        )
    return layers


def _copy(state: State) -> State:
    """Setting a state makes it unusable: this may be done to a copy."""
    return jax.tree.map(lambda leaf: leaf, state)


def _replace(state: State, layers: dict[str, BatchNorm], stats: dict[str, Any]) -> State:
    """The state with other statistics, also of another kind; the one given stays usable."""
    ...


def _start(stats: RunningStats) -> PooledStats:
    return PooledStats(stats.mean, stats.var, jnp.zeros_like(stats.count))
