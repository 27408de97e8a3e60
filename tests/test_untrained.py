"""The warning where nothing was trained: it comes when it is true, and else it does not."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import clone, normal


X = normal(0, (4, 3))
TEXT = "BatchNorm: evaluates with running statistics that no batch has entered"


def build(**kwargs) -> Any:
    norm, state = eqx.nn.make_with_state(en.BatchNorm)(3, **kwargs)
    return eqx.nn.inference_mode(norm), state


WARNED: dict[str, Any] = {
    "the field": lambda norm, s: norm(X, s),
    "the argument": lambda norm, s: eqx.nn.inference_mode(norm, False)(
        X, s, use_running_average=True
    ),
    "frozen": lambda norm, s: en.freeze(norm)(X, s),
    "NumPy": lambda norm, s: norm(X, jax.tree.map(np.asarray, s)),
    "half": lambda norm, s: norm(
        X,
        jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, s),
    ),
    "vmap": lambda norm, s: jax.vmap(norm, (0, None), (0, None))(X, s),
    "guarded": lambda norm, s: guarded(norm, s),
}


def guarded(norm, state):
    with jax.transfer_guard_device_to_host("disallow"):
        norm(X, state)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("evaluate", WARNED.values(), ids=WARNED)
def test_warns(evaluate):
    norm, state = build()
    with pytest.warns(UserWarning, match=TEXT):
        evaluate(norm, state)


def converted(norm, state):
    """As weights of Flax come: statistics without a count."""
    stats = norm.running_stats(state)
    stats = eqx.tree_at(lambda s: s.mean, stats, stats.mean + 0.1)
    return norm(X, state.set(norm.state_index, stats))


def sharded(norm, state):
    mesh = jax.make_mesh((3,), ("d",))
    put = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("d"))), state)
    return norm(X, put)


def recalibrated(norm, state):
    def forward(norm, state, x):
        norm(x, clone(state), use_running_average=True)
        return norm(x, state)

    return norm(X, en.recalibrate(norm, state, [X], forward))


SILENT: dict[str, Any] = {
    "trained": lambda norm, s: norm(X, norm(X, s, use_running_average=False)[1]),
    "converted": converted,
    "traced": lambda norm, s: eqx.filter_jit(norm)(X, s),
    "gradient": lambda norm, s: jax.grad(lambda s: jnp.sum(norm(X, s)[0]), allow_int=True)(
        s
    ),
    "split over devices": sharded,
    "recalibrated": recalibrated,
    "training": lambda norm, s: norm(X, s, use_running_average=False),
}


@pytest.mark.parametrize("evaluate", SILENT.values(), ids=SILENT)
def test_does_not_warn(evaluate):
    norm, state = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(norm, state)


def test_another_feature_alone():
    """One of them has been entered: then so has the layer."""
    norm, state = build()
    mask = np.zeros((4, 3), bool)
    mask[:, 1] = True
    _, state = norm(X, state, mask=mask, use_running_average=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm(X, state)
