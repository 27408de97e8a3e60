"""Arguments by their names in Flax, PyTorch and Equinox: the answer is the name here."""

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqx_norms as en

from .helpers import LAYERS, NORMS, all_layers, normal


ELEMENTWISE = ("LayerNorm", "RMSNorm")
EXAMPLE = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
WRAPPERS = ("WeightNorm", "SpectralNorm")
NAMES = tuple(case.name for case in NORMS)
BIASED = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm")
BOTH = "is `use_scale` and `use_bias` here"
NONE = "has no counterpart: there are no running statistics here. Leave it out"

# A name elsewhere, the layers, and what is said of it.
MADE = [
    ("eps", tuple(case.name for case in LAYERS), "is `epsilon` here"),
    ("rngs", tuple(case.name for case in LAYERS), "is `key` here"),
    *(
        (name, NAMES, "is `num_features` here")
        for name in [
            "num_channels",
            "channels",
            "input_size",
            "normalized_shape",
            "shape",
            "dim",
        ]
    ),
    ("groups", ("GroupNorm",), "is `num_groups` here"),
    *(
        (name, layers, answer)
        for name in ["affine", "elementwise_affine", "channelwise_affine"]
        for layers, answer in ((BIASED, BOTH), (("RMSNorm",), "is `use_scale` here"))
    ),
    ("use_weight", NAMES, "is `use_scale` here"),
    ("bias", BIASED, "is `use_bias` here"),
    ("use_bias", ("RMSNorm",), "has no counterpart: there is no bias here"),
    ("axis", ELEMENTWISE, "is `feature_axes` and `reduction_axes` here"),
    ("axis", ("GroupNorm",), "is `feature_axis` here"),
    ("axis", ("InstanceNorm", *WRAPPERS), "is `feature_axes` here"),
    ("feature_axes", ("BatchNorm",), "is `axis` here"),
    ("feature_axes", ("GroupNorm",), "is `feature_axis` here"),
    ("feature_axis", ("InstanceNorm",), "is `feature_axes` here"),
    ("dim", WRAPPERS, "is `feature_axes` here"),
    ("process_group", NAMES, "is `axis_name` here"),
    ("inference", ("BatchNorm",), "is `use_running_average` here"),
    ("train", ("BatchNorm",), "is `use_running_average` here, with the opposite value"),
    ("inference", ("SpectralNorm",), "is `update_stats` here, with the opposite value"),
    ("inference", EXAMPLE, NONE),
    ("momentum", EXAMPLE, NONE),
    ("track_running_stats", EXAMPLE, NONE),
    ("track_running_stats", ("BatchNorm",), "is `True` here, always. Leave it out"),
    ("mode", ("BatchNorm",), 'is "batch" here, always'),
    ("weight_name", WRAPPERS, "is `where` here"),
    ("layer_instance", WRAPPERS, "is `layer` here"),
    ("n_power_iterations", ("SpectralNorm",), "is `n_steps` here"),
    ("num_power_iterations", ("SpectralNorm",), "is `n_steps` here"),
]
CALLED = [
    ("inference", ("BatchNorm",), "is `use_running_average` here"),
    ("train", ("BatchNorm",), "is `use_running_average` here, with the opposite value"),
    *((name, EXAMPLE, NONE) for name in ("inference", "train", "use_running_average")),
    ("rngs", NAMES, "is `key` here"),
    ("weight", NAMES, "is `scale` here"),
    ("where", NAMES, "is `mask` here"),
]


def rows(table):
    return [
        pytest.param(case, name, said, id=f"{name}-{case.name}")
        for name, layers, said in table
        for case in LAYERS
        if case.name in layers
    ]


def raises(layer, name, said):
    """The whole message: whoever reads it needs no other."""
    text = f"^{layer}: unexpected keyword argument '{name}'. `{name}` {said}"
    return pytest.raises(TypeError, match=text.replace("[", r"\["))


@pytest.mark.parametrize(("case", "name", "said"), rows(MADE))
def test_made(case, name, said):
    with raises(case.name, name, said):
        case.build(**{name: None})


@pytest.mark.parametrize(("case", "name", "said"), rows(CALLED))
def test_called(case, name, said):
    layer, state = case.build()
    arguments = {name: None} if state is None else {name: None, "state": state}
    with raises(case.name, name, said):
        layer(normal(0, (4, 8)), **arguments)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eps", "is `epsilon` here"),
        ("axis", "is `axes` here"),
        ("dim", "is `axes` here"),
        ("reduction_axes", "is `axes` here"),
        ("weight", "is `scale` here"),
        ("where", "is `mask` here"),
    ],
)
def test_standardize(name, said):
    function: Any = en.standardize
    with raises("standardize", name, said):
        function(normal(0, (4, 8)), **{name: None})


def test_each_name_is_answered():
    """In place of arguments that are missing, too, and by what is left out of account."""
    layer: Any = en.LayerNorm
    match = (
        "^LayerNorm: unexpected keyword argument 'shape', 'eps', 'foo'. `shape` is "
        "`num_features` here. `eps` is `epsilon` here.$"
    )
    with pytest.raises(TypeError, match=match):
        layer(shape=8, eps=1e-5, foo=1, use_bias=False)


@all_layers
def test_any_other_name(case):
    """Python's own words, as for any function."""
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'foo'$"):
        case.build(foo=1)
    if case in NORMS:
        layer, state = case.build()
        arguments = {} if state is None else {"state": state}
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'foo'$"):
            layer(normal(0, (4, 8)), foo=1, **arguments)


@all_layers
def test_signature(case):
    """Tools see the methods as they are written."""
    assert {"epsilon", "key"} <= inspect.signature(case.make).parameters.keys()
    assert "eps" not in inspect.signature(case.make).parameters
    assert "x" in inspect.signature(case.make.__call__).parameters
    assert case.make.__init__.__name__ == "__init__"
    assert case.make.__init__.__doc__.startswith("**Arguments:**")
    assert case.make.__call__.__doc__.startswith("**Arguments:**")


def test_subclass():
    """One of a user's own has its own names, and hands names on to be answered."""

    class Named(en.LayerNorm):
        def __init__(self, size, eps=1e-3):
            super().__init__(size, epsilon=eps)

        def __call__(self, x, train=False):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().__call__(x) if train else x

    class Open(en.BatchNorm):
        def __init__(self, num_features, **kwargs):
            super().__init__(num_features, **kwargs)

    x = normal(0, (4, 8))
    assert Named(8, eps=0.5).epsilon == 0.5
    assert Named(8)(x, train=False) is x
    assert jnp.all(Named(8)(x, train=True) == en.LayerNorm(8, epsilon=1e-3)(x))
    assert Named.__init__.__qualname__.endswith("Named.__init__")
    assert not hasattr(Named.__init__, "__wrapped__")
    with raises("Open", "eps", "is `epsilon` here"):
        Open(8, eps=0.5)
    # Not that it has no running statistics.
    strict: Any = Named
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'momentum'$"):
        strict(8, momentum=0.9)


def test_a_wrapper_hands_names_on():
    """To a layer that may have any."""

    class Inner(eqx.Module):
        weight: jax.Array

        def __call__(self, x, *, inference):
            return self.weight @ x * inference

    x, weight = normal(0, (3,)), normal(1, (2, 3))
    y = en.WeightNorm(Inner(weight), use_scale=False)(x, inference=2.0)
    length = jnp.linalg.norm(weight, axis=1)
    assert jnp.allclose(y, 2 * (weight @ x) / length)


@all_layers
def test_made_in_a_transformation_copied_and_pickled(case):
    layer, _ = case.build()
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = eqx.filter_vmap(lambda key: case.create(key=key))(keys)
    assert jax.tree.leaves(eqx.filter(stacked, eqx.is_array))[0].shape[0] == 3
    assert eqx.tree_equal(copy.deepcopy(layer), layer)
    if not case.stateful:  # Its marker is an object, equal to itself alone.
        assert eqx.tree_equal(pickle.loads(pickle.dumps(layer)), layer)
    with raises(case.name, "eps", "is `epsilon` here"):
        eqx.filter_eval_shape(lambda: case.create(eps=1.0))


def test_without_type_checks():
    """The suite runs under jaxtyping's hook. So does a user who has none."""
    code = (
        "import eqx_norms as en\n"
        "try: en.LayerNorm(8, eps=1.0)\n"
        "except TypeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "`eps` is `epsilon` here." in done.stdout, done.stderr
