"""Bad input: each is a clear error before any arithmetic, and the state is untouched.

beartype, which checks every call of this suite, is faster than the library where an
argument is of the wrong type altogether. So the table is gone through twice: here, and in
a process without beartype, for the library's own words.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import eqx_norms as en

from .helpers import LAYERS, STATEFUL, Case, clone, normal, over, raises


def names(*conditions: str) -> tuple[str, ...]:
    """Of the layers of the table of which all of this is so."""
    return tuple(
        case.name
        for case in LAYERS
        if all(getattr(case, name, False) for name in conditions)
    )


EVERY = names()
NORMS = names("features_first")
ALL = names("features_first", "on_vectors")
BATCH = names("features_first", "stateful")
BIASED = names("on_vectors", "has_bias")
# All whose statistics are those of their input alone, and those that take any axes.
EXAMPLE = tuple(name for name in NORMS if name not in BATCH)
AXES = tuple(name for name in ALL if name not in BATCH)


class Bad(NamedTuple):
    name: str
    layers: tuple[str, ...]
    kwargs: dict[str, Any]
    match: str
    # What the layer is called with; without it the constructor has to complain.
    x: Any = None
    call: Mapping[str, Any] = MappingProxyType({})
    num_features: Any = 3
    error: type[Exception] = ValueError
    # Whether beartype complains first.
    typed: bool = False


def short(key, shape, dtype):
    return jnp.zeros(2, dtype)


def half(key, shape, dtype):
    return jnp.zeros(shape, jnp.float16)


def noise(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


X = np.ones((4, 3), np.float32)
TWICE = r"names an axis more than once"
RANGE = r"out of range for an input of 2 dimensions"
EPSILON = r"`epsilon` must be finite and not negative, got "
MOMENTUM = r"`momentum` is the weight of the old running statistics, from 0 to 1"
SIZES = r"one size for each feature axis"
SHAPES = r"must return shape \(3,\) and dtype float32, got "
KEY = r"failed .* `key=jax\.random\.key"
FEATURES = r"expected features of shape \(3,\) along `{}=\(1,\)`, got \(4,\) in an input of"
FITS = (
    r"of shape {} does not broadcast to the input's shape \(4, 3\)\. Give it axes of size 1"
)
FLAG = "`{}` must be True or False, got 'no'"
NUMBERS = "`{}` must be an array of numbers, got one of "
WIDE = np.ones((5, 4), np.float32)
COMPLEX = X.astype(np.complex64)
SPACE = np.ones((4, 5, 8), np.float32)
KEYS = jax.random.split(jax.random.key(0), 4)

TABLE = [
    # The constructor.
    Bad("axis twice", BATCH, {"axis": (1, 1)}, TWICE, num_features=(3, 3)),
    Bad("axis list twice", BATCH, {"axis": [1, 1]}, TWICE, num_features=(3, 3)),
    Bad("reduction twice", AXES, {"reduction_axes": (0, 0)}, "`reduction_axes.*" + TWICE),
    Bad(
        "features twice", AXES, {"feature_axes": (1, 1)}, "`feature_axes.*" + TWICE,
        num_features=(3, 3),
    ),
    Bad("negative epsilon", ALL, {"epsilon": -1e-5}, EPSILON + "-1e-05"),
    Bad("nan epsilon", ALL, {"epsilon": float("nan")}, EPSILON + "nan"),
    Bad("infinite epsilon", ALL, {"epsilon": float("inf")}, EPSILON + "inf"),
    Bad(
        "epsilon as text", ALL, {"epsilon": "1e-5"},
        "`epsilon` must be a Python number, known before tracing, got '1e-5'", typed=True,
    ),
    Bad(
        "momentum as text", BATCH, {"momentum": "0.9"},
        "`momentum` must be a Python number, known before tracing, got '0.9'", typed=True,
    ),
    Bad("negative momentum", BATCH, {"momentum": -0.1}, MOMENTUM + r".*got -0\.1"),
    Bad("big momentum", BATCH, {"momentum": 1.5}, MOMENTUM + r".*got 1\.5"),
    Bad("nan momentum", BATCH, {"momentum": float("nan")}, MOMENTUM + ".*got nan"),
    Bad("too many sizes", ALL, {}, SIZES, num_features=(3, 4)),
    Bad("too few sizes", BATCH, {"axis": (0, 1)}, SIZES),
    Bad("too few sizes", AXES, {"feature_axes": (0, 1), "reduction_axes": 1}, SIZES),
    Bad("no features", ALL, {}, "must be positive, got 0", num_features=0),
    Bad(
        "a fraction of features", ALL, {}, "`num_features` must be an integer, .*got 3.0",
        num_features=3.0, typed=True,
    ),
    Bad(
        "a fraction of an axis", AXES, {"reduction_axes": 1.0},
        "`reduction_axes` must be an integer, or a tuple of integers, got 1.0", typed=True,
    ),
    Bad(
        "a fraction of a group", ("GroupNorm",), {"num_groups": 1.5},
        "`num_groups` must be an integer, .*got 1.5", typed=True,
    ),
    Bad(
        "no groups", ("GroupNorm",), {"num_groups": 0}, "`num_features=3` cannot be divided"
    ),
    Bad(
        "a name that cannot be hashed", ALL, {"axis_name": {}},
        "`axis_name` must be a name, which can be hashed .*got {}", typed=True,
    ),
    Bad("a number for a name", ALL, {"axis_name": 0}, "is no integer, .*got 0. Give a str"),
    Bad(
        "a list in a name", ALL, {"axis_name": (("a", [1]),)},
        "`axis_name` must be a name, which can be hashed .*got",
    ),
    Bad(
        "groups of text", ("GroupNorm",), {},
        "`num_features` must be an integer, .*got '3'", num_features="3", typed=True,
    ),
    Bad(
        "an array for an initializer", ALL, {"scale_init": X[0]},
        r"`scale_init` must be a function `\(key, shape, dtype\) -> array`.*type ndarray",
        typed=True,
    ),
    Bad("short scale", ALL, {"scale_init": short}, f"`scale_init` {SHAPES}.*2"),
    Bad("short bias", BIASED, {"bias_init": short}, f"`bias_init` {SHAPES}.*2"),
    Bad("half scale", ALL, {"scale_init": half}, f"`scale_init` {SHAPES}.*float16"),
    Bad("no key", ALL, {"scale_init": noise}, "`scale_init` " + KEY),
    Bad("no key", BIASED, {"bias_init": noise}, "`bias_init` " + KEY),
    Bad("integer dtype", ALL, {"dtype": np.int32}, "`dtype` must be a floating or complex"),
    Bad(
        "unknown dtype", ALL, {"dtype": "float31"},
        "`dtype` must be a floating or complex dtype, \"input\" or `None`, got 'float31'",
    ),
    Bad(
        "no param_dtype", ALL, {"param_dtype": None},
        "`param_dtype` must be a floating or complex dtype, got None",
    ),
    Bad(
        "param_dtype of an input", ALL, {"param_dtype": "input"},
        "`param_dtype` must be a floating or complex dtype, got 'input'",
    ),
    Bad(
        "integer param_dtype", ALL, {"param_dtype": np.int32},
        "`param_dtype` must be a floating or complex",
    ),
    Bad(
        "groups without a name", ALL, {"axis_index_groups": [[0, 1], [2, 3]]},
        "Give the one name that the groups divide",
    ),
    Bad(
        "groups of two names", ALL,
        {"axis_index_groups": [[0, 1], [2, 3]], "axis_name": ("a", "b")},
        "Give the one name that the groups divide",
    ),
    Bad(
        "unequal groups", ALL, {"axis_index_groups": [[0, 1], [2]], "axis_name": "a"},
        "must be groups of equal size",
    ),
    *(
        Bad(
            f"{flag} as text", layers, {flag: "no"}, FLAG.format(flag), num_features=8,
            typed=True,
        )
        for flag, layers in {
            "use_fast_variance": NORMS,
            "use_scale": (*NORMS, "WeightNorm"),
            "use_bias": ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm"),
            "use_running_average": BATCH,
            "use_unbiased_variance": BATCH,
            "debias": BATCH,
            "update_stats": ("SpectralNorm",),
            "error_on_non_matrix": ("SpectralNorm",),
        }.items()
    ),
    Bad(
        "an array of flags", NORMS, {"use_scale": np.ones(3, bool)},
        r"`use_scale` must be True or False, got array\(\[ True,", num_features=8,
        typed=True,
    ),
    Bad(
        "a seed for a key", EVERY, {"key": 0},
        r"`key` must be a single random key, got 0\. .*`jax\.random\.key\(0\)`",
        num_features=8, typed=True,
    ),
    Bad(
        "several keys", EVERY, {"key": KEYS},
        "`key` must be a single random key, got Array.*", num_features=8, typed=True,
    ),
    Bad(
        "a feature axis as text", ("GroupNorm",), {"feature_axis": "last"},
        "`feature_axis` must be an integer, got 'last'", typed=True,
    ),
    Bad(
        "two numbers of groups", ("GroupNorm",), {"num_groups": (2, 2)},
        r"`num_groups` must be an integer, got \(2, 2\)", typed=True,
    ),
    Bad(
        "steps as text", ("SpectralNorm",), {"n_steps": "1"},
        "`n_steps` must be an integer, got '1'", num_features=8, typed=True,
    ),
    # The call.
    Bad(
        "no array", NORMS, {}, NUMBERS.format("x") + "type str", x="one", num_features=8,
        typed=True,
    ),
    Bad(
        "keys for input", NORMS, {}, NUMBERS.format("x") + "type .*key<fry>", x=KEYS,
        num_features=8,
    ),
    Bad(
        "numbers of four bits without a dtype", ("LayerNorm",), {"use_scale": False},
        "needs a `dtype` for its result.*got int4", x=jnp.ones((4, 3), jnp.int4),
    ),
    Bad(
        "scale as text", NORMS, {}, NUMBERS.format("scale") + "type str", x=SPACE,
        call={"scale": "one"}, num_features=8, typed=True,
    ),
    Bad(
        "mask as text", NORMS, {}, NUMBERS.format("mask") + "type str", x=SPACE,
        call={"mask": "all"}, num_features=8, typed=True,
    ),
    Bad(
        "scale for state", EXAMPLE, {},
        "the second argument must be the model's `equinox.nn.State`, or `None`, got one of "
        "type .*Array.*by their names", x=SPACE, call={"state": X[0]}, num_features=8,
        typed=True,
    ),
    Bad(
        "flag of a call as text", BATCH, {}, FLAG.format("use_running_average"), x=X,
        call={"use_running_average": "no"}, typed=True,
    ),
    Bad("features", BATCH, {}, FEATURES.format("axis"), x=WIDE),
    Bad("features", AXES, {}, FEATURES.format("feature_axes"), x=WIDE),
    Bad(
        "features without parameters", ("LayerNorm",),
        {"use_scale": False, "use_bias": False}, FEATURES.format("feature_axes"), x=WIDE,
    ),
    Bad(
        "features without parameters", ("RMSNorm",), {"use_scale": False},
        FEATURES.format("feature_axes"), x=WIDE,
    ),
    Bad(
        "features in another order", BATCH, {"axis": (1, 0)},
        r"expected features of shape \(4, 3\) along `axis=\(1, 0\)`, got \(3, 4\)",
        x=np.ones((4, 3, 2), np.float32), num_features=(4, 3),
    ),
    Bad("axis too great", BATCH, {"axis": 2}, f"`axis=.*{RANGE}", x=X),
    Bad("axis too small", BATCH, {"axis": -3}, f"axis -3.*{RANGE}", x=X),
    Bad("one axis in two ways", BATCH, {"axis": (1, -1)}, TWICE, x=X, num_features=(3, 3)),
    Bad(
        "features too great", AXES, {"feature_axes": 2, "reduction_axes": 1},
        f"`feature_axes=.*{RANGE}", x=X,
    ),
    Bad(
        "feature axes alone", AXES, {"feature_axes": 0},
        r"`feature_axes=\(0,\)` needs `reduction_axes` too",
    ),
    Bad("reduction too great", AXES, {"reduction_axes": 2}, f"`reduction_.*{RANGE}", x=X),
    Bad("reduction too small", AXES, {"reduction_axes": (-3,)}, f"axis -3.*{RANGE}", x=X),
    Bad("one reduction in two ways", AXES, {"reduction_axes": (1, -1)}, TWICE, x=X),
    Bad("scalar", ALL, {}, "for an input of 0 dimensions", x=np.float32(1)),
    Bad(
        "mask that does not fit", ALL, {}, "`mask` " + FITS.format(r"\(4, 2\)"), x=X,
        call={"mask": np.ones((4, 2), bool)},
    ),
    Bad(
        "mask that would enlarge", ALL, {}, "`mask` " + FITS.format(r"\(2, 4, 3\)"), x=X,
        call={"mask": np.ones((2, 4, 3), bool)},
    ),
    Bad(
        "mask of numbers", ALL, {}, "`mask` must be boolean.*got dtype float32", x=X,
        call={"mask": np.ones((4, 3), np.float32)}, typed=True,
    ),
    Bad(
        "mask of integers", ALL, {}, "`mask` must be boolean.*got dtype int32", x=X,
        call={"mask": np.ones((4, 3), np.int32)}, typed=True,
    ),
    Bad(
        "scale that does not fit", ALL, {}, "`scale` " + FITS.format(r"\(4,\)"), x=X,
        call={"scale": np.ones(4, np.float32)},
    ),
    Bad(
        "bias that does not fit", ALL, {}, "`bias` " + FITS.format(r"\(2, 4, 3\)"), x=X,
        call={"bias": np.ones((2, 4, 3), np.float32)},
    ),
    Bad(
        "unbound name", ALL, {"axis_name": "batch"},
        r"name 'batch', which is not bound here\. .*`jax\.vmap\(.*axis_name='batch'\)`",
        x=X, error=NameError,
    ),
    Bad(
        "one name unbound of two", ALL, {"axis_name": ("other", "batch")},
        r"name 'other', which is not bound", x=X, error=NameError,
    ),
    Bad(
        "no state", BATCH, {}, r"needs the model's `equinox\.nn\.State`", x=X,
        call={"state": None}, typed=True,
    ),
    Bad("nothing to average", BATCH, {}, "no axis left to take statistics over", x=X[0]),
    Bad(
        "nothing to average in two axes", BATCH, {"axis": (0, 1)},
        "no axis left to take statistics over", x=X, num_features=(4, 3),
    ),
    Bad("complex input", ALL, {"dtype": np.float32}, "cannot hold the result", x=COMPLEX),
    Bad(
        "complex scale", ALL, {"dtype": np.float32}, "cannot hold the result", x=X,
        call={"scale": np.ones(3, np.complex64)},
    ),
    Bad(
        "complex running mean", BATCH, {}, "cannot hold that of complex input", x=COMPLEX,
    ),
]  # fmt: skip

ROWS = [(bad, case) for bad in TABLE for case in LAYERS if case.name in bad.layers]


def provoke(bad: Bad, case: Case) -> None:
    """Makes the error, and returns normally if it is not raised."""
    layer, state = case.build(bad.num_features, **bad.kwargs)
    if bad.x is None:
        return
    as_array = lambda a: jnp.asarray(a) if isinstance(a, (np.ndarray, np.generic)) else a  # noqa: E731
    x, arguments = as_array(bad.x), {k: as_array(a) for k, a in bad.call.items()}
    if case.stateful:
        arguments = {"state": state, **arguments}
    before = [np.array(leaf) for leaf in jax.tree.leaves(clone(state))]
    try:
        layer(x, **arguments)
    finally:
        # The state still is what it was, and still is of use.
        after = [np.array(leaf) for leaf in jax.tree.leaves(state)]
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("bad", "case"), ROWS, ids=[f"{bad.name}-{case.name}" for bad, case in ROWS]
)
def test_bad_input(bad, case):
    error = jaxtyping.TypeCheckError if bad.typed else bad.error
    # beartype names the argument.
    argument = next(
        iter([*bad.call, *bad.kwargs, "num_features" if bad.x is None else "x"])
    )
    match = f"'{argument}'" if bad.typed else f"(?s)^{case.name}: .*{bad.match}"
    with pytest.raises(error, match=match):
        provoke(bad, case)


def complain_without_beartype() -> None:
    """The same, for a process of its own: fails on the first row that is not as it says."""
    for bad, case in ROWS:
        try:
            provoke(bad, case)
        except Exception as error:
            text = str(error)
            right = type(error) is bad.error and text.startswith(f"{case.name}: ")
            if right and re.search(bad.match, text, re.DOTALL):
                continue
            raise
        raise AssertionError(f"{bad.name}: {case.name} did not complain.")


def test_bad_input_without_beartype():
    code = "from tests.test_errors import complain_without_beartype as f; f(); print('all')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "all"


# What an unbound name must not stop.


def test_name_is_not_needed_outside_of_training():
    def make():
        return eqx.nn.make_with_state(en.BatchNorm)(3, axis_name="batch")

    layer, state = make()
    shapes, _ = eqx.filter_eval_shape(make)
    assert shapes.scale.shape == (3,)
    x = jnp.ones((4, 3))
    y, _ = layer(x, state, use_running_average=True)
    assert y.shape == x.shape
    evaluating = eqx.nn.inference_mode(layer)
    out, _ = eqx.filter_eval_shape(evaluating, x, state)
    assert out.shape == x.shape
    # One example with no axes left has its running statistics.
    y, _ = evaluating(x[0], state)
    assert y.shape == (3,)
    y, _ = jax.vmap(evaluating, in_axes=(0, None), out_axes=(0, None))(x, state)
    assert y.shape == x.shape


def test_groups_that_are_no_partition():
    for groups, match in (
        ([[0, 1], [1, 2]], "must have each index of axis 'batch', 0 to 3, in exactly one"),
        ([[0], [1]], "must have each index of axis 'batch'"),
        (
            [[0], [1], [2], [3], [4]],
            "must have each index of axis 'batch', 0 to 3, in exactly one",
        ),
    ):
        layer = en.LayerNorm(3, axis_name="batch", axis_index_groups=groups)
        with pytest.raises(ValueError, match=match):
            jax.vmap(layer, axis_name="batch")(jnp.ones((4, 3)))


def test_state_of_another_model():
    layer, _ = eqx.nn.make_with_state(en.BatchNorm)(3)
    _, state = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([en.BatchNorm(3)]))()
    with pytest.raises(ValueError, match="it was made for another model"):
        layer(jnp.ones((4, 3)), state)
    with pytest.raises(ValueError, match="it was made for another model"):
        layer.running_stats(state)


def test_wrong_types_are_caught():
    """jaxtyping and beartype read the annotations; a mistake should not reach JAX."""
    layer = en.LayerNorm(3)
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        layer([1.0, 2.0, 3.0])  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(jaxtyping.TypeCheckError, match="epsilon"):
        en.LayerNorm(3, epsilon="small")  # pyright: ignore[reportArgumentType]
    bn, _ = eqx.nn.make_with_state(en.BatchNorm)(3)
    with pytest.raises(jaxtyping.TypeCheckError, match="state"):
        bn(jnp.ones((4, 3)), None)  # pyright: ignore[reportArgumentType]


@over(*STATEFUL)
def test_input_by_keyword_without_a_state(case):
    layer: Any = case.build(8)[0]
    with raises(case.name, r"needs the model's `equinox.nn.State`.*got none.*make_with_st"):
        layer(x=normal(0, (16, 8)))


@pytest.mark.parametrize("groups", [3, [[0, 1.5], [2, 3]], [[0.9, 1.2]], [0, 1]], ids=str)
def test_groups_are_lists_of_integers(groups, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="must be a list of groups, each a list of int"):
        en.LayerNorm(4, axis_name="i", axis_index_groups=groups)
