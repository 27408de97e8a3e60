from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import State

from ._batch_norm import BatchNorm
from ._checks import Check
from ._freeze import find_batch_norms
from ._running import PooledStats, RunningStats
from ._state import copy_state, entries, get_state, with_entries
from ._trees import map_nodes, with_fields


Model = TypeVar("Model")

_CHECK = Check("recalibrate")


def recalibrate(
    model: Model,
    state: State,
    batches: Iterable[Any],
    forward: Callable[[Model, State, Any], tuple[Any, State]],
    *,
    progress: bool = False,
) -> State:
    r"""Takes the running statistics of every [`eqx_norms.BatchNorm`][] in a model anew: not
    of the last batches, but of a whole data set, each position counting once.

    With $n_i$ positions in batch $i$, of mean $m_i$ and variance $v_i$, and
    $N = \sum_i n_i$,

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
    model's, if there are no batches, if `forward` donates its arguments or does not return
    a pair with the state, or if it leads no position to some layer; what the layers raise
    in training. `ImportError` if there is no `tqdm` for the bar.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(en.BatchNorm)(3, axis_name="batch")
        batches = [jnp.ones((8, 3)), jnp.zeros((4, 3))]

        @eqx.filter_jit
        def forward(model, state, x):
            return jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)

        state = en.recalibrate(model, state, batches, forward)
        ```
    """
    layers = _layers(model)
    old = {name: layer.running_stats(state) for name, layer in layers.items()}
    # Nothing counted. The old mean and variance are for calls in evaluation.
    empty = {
        name: PooledStats(stats.mean, stats.var, jnp.zeros_like(stats.count))
        for name, stats in old.items()
    }
    start = _with_stats(state, layers, empty)
    model = map_nodes(
        lambda layer: layer if layer.frozen else with_fields(layer, inference=False),
        model,
        BatchNorm,
    )
    totals = {name: _NOTHING for name in layers}
    number = 0
    for batch in _with_bar(batches) if progress else batches:
        out = forward(model, copy_state(start), batch)
        _check_kept((model, start))
        new = _pooled(out, layers, old)
        totals = {name: _merge(totals[name], new[name]) for name in layers}
        number += 1
    if number == 0:
        raise _CHECK.error(
            "`batches` is empty. Give at least one batch; an iterator may have been used "
            "up before."
        )
    missed = [name for name in layers if not np.any(totals[name].batches)]
    if missed:
        raise _CHECK.error(
            f"nothing finite was counted in {number} batches for {', '.join(missed)}. "
            "`forward` must call each of these layers in training, without "
            "`use_running_average=True`, and return the state that they return. Use "
            "`eqx_norms.freeze` on those that are not to change."
        )
    stats = {name: _finish(layers[name], totals[name], old[name]) for name in layers}
    return _with_stats(state, layers, stats)


def _layers(model: Any) -> dict[str, BatchNorm]:
    """The layers to recalibrate, by where they are in the model."""
    found = find_batch_norms(model, _CHECK)
    layers = {f"`model{path}`": layer for path, layer in found.items()}
    thawed = {name: layer for name, layer in layers.items() if not layer.frozen}
    if not thawed:
        raise _CHECK.error(
            f"each `eqx_norms.BatchNorm` in this model, {', '.join(layers)}, is frozen. "
            "Use `eqx_norms.unfreeze` on those to recalibrate."
        )
    return thawed


def _with_stats(
    state: State,
    layers: dict[str, BatchNorm],
    stats: dict[str, PooledStats] | dict[str, RunningStats],
) -> State:
    """A new state. `State.set` would refuse statistics of another kind."""
    new = {layer.state_index.marker: stats[name] for name, layer in layers.items()}
    return with_entries({**entries(state), **new})


def _check_kept(arguments: Any) -> None:
    leaves = jax.tree.leaves(arguments)
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise _CHECK.error(
            "`forward` must leave the model and the state that it is given as they are, "
            "for the next batch, but it donated their arrays. Compile it without donation: "
            "`eqx.filter_jit(forward)`."
        )


def _pooled(
    out: Any, layers: dict[str, BatchNorm], old: dict[str, RunningStats]
) -> dict[str, PooledStats]:
    """What `forward` found, on the host."""
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], State)):
        kinds = [type(part).__name__ for part in out] if isinstance(out, tuple) else None
        raise _CHECK.error(
            "`forward` must return a pair of anything and the new `equinox.nn.State`, got "
            f"{type(out).__name__ if kinds is None else kinds}."
        )
    new = {
        name: get_state(out[1], layer.state_index, check=_CHECK)
        for name, layer in layers.items()
    }
    for name, stats in new.items():
        if not isinstance(stats, PooledStats):
            raise _CHECK.error(
                f"`forward` returned a state with other statistics of {name}. It must "
                "return the state it is given, as the model updates it."
            )
        if stats.count.shape != old[name].count.shape:
            raise _CHECK.error(
                f"`forward` returned statistics of shape {stats.count.shape} for {name}, "
                f"expected {old[name].count.shape}. If it maps the model with `jax.vmap`, "
                "its `out_axes` for the state must be `None`."
            )
    return jax.device_get(new)


class _Total(NamedTuple):
    """On the host and in double precision, for any number of batches."""

    mean: np.ndarray
    var: np.ndarray
    positions: np.ndarray
    batches: np.ndarray


_NOTHING = _Total(
    np.zeros(()), np.zeros(()), np.zeros((), np.int64), np.zeros((), np.int64)
)


def _merge(total: _Total, new: PooledStats) -> _Total:
    counted = np.asarray(new.count) > 0
    positions = total.positions + new.count
    share = new.count / np.maximum(positions, 1)
    double = np.result_type(new.mean.dtype, np.float64)
    delta = np.where(counted, np.asarray(new.mean, double) - total.mean, 0)
    var = np.where(counted, np.asarray(new.var, np.float64) - total.var, 0)
    return _Total(
        total.mean + share * delta,
        total.var + share * var + share * (1 - share) * np.abs(delta) ** 2,
        positions,
        total.batches + counted,
    )


def _finish(layer: BatchNorm, total: _Total, old: RunningStats) -> RunningStats:
    var = total.var
    if layer.use_unbiased_variance:
        var = var * (total.positions / np.maximum(total.positions - 1, 1))

    def like(new, old):
        new = np.where(total.batches > 0, new, jax.device_get(old)).astype(old.dtype)
        # Committed to devices only if the old ones are: others may go to any.
        committed = isinstance(old, jax.Array) and old.committed
        return jax.device_put(new, old.sharding) if committed else jnp.asarray(new)

    return RunningStats(
        like(total.mean, old.mean), like(var, old.var), like(total.batches, old.count)
    )


def _with_bar(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "recalibrate: `progress=True` needs tqdm. Install it with `pip install tqdm`, "
            "or leave `progress` out."
        ) from None
    return tqdm(batches, desc="recalibrate", unit="batch")
