"""What errors and hints say leads to the right result, when one does it."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eqx_norms as en

from .helpers import NORMS, call, normal, over, reference


ROWS = over(*(case for case in NORMS if case.name in ("LayerNorm", "RMSNorm")))
X = 1 + normal(1, (16, 6, 5))


def hint(error, pattern):
    found = re.search(pattern, str(error.value))
    assert found is not None, str(error.value)
    return found.group(1)


def arguments(error, pattern="give `(.*)`"):
    """Those that the hint names."""
    return eval(f"dict({hint(error, pattern)})")


def make(case, size, **kwargs):
    """(Groups are of several features here.)"""
    return case.build(size, **({"num_groups": 4} if "Group" in case.name else {}), **kwargs)


# The features are elsewhere.


@over(*NORMS)
def test_features_first(case):
    layer, state = make(case, 16)
    with pytest.raises(ValueError, match=r"got \(5,\) in an input.*along axis 0") as error:
        call(layer, state, X)
    given = arguments(error)
    layer, state = make(case, 16, **given)
    if case.per_example.get("batch_axes") == ():
        with pytest.raises(ValueError, match=r"use `(batch_axes=\(\))`") as error:
            call(layer, state, X)
        given |= arguments(error, r"use `(batch_axes=\(\))`")
        layer, state = make(case, 16, **given)
    y = call(layer, state, X)
    wanted = {
        "BatchNorm": ((1, 2), None),
        "LayerNorm": ((0,), None),
        "RMSNorm": ((0,), None),
        "GroupNorm": ((0, 1, 2), (0, 4)),
        "InstanceNorm": ((1, 2), None),
    }[case.name]
    axes, groups = wanted
    epsilon, center = layer.epsilon, case.center
    wanted, *_ = reference(X, axes, epsilon=epsilon, center=center, groups=groups)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16, 5), (4, 6, 5)], ids=["several", "none"])
@over(*NORMS)
def test_features_that_may_be_anywhere(case, shape):
    layer, state = make(case, 16)
    match = r"Check `num_features`, and that `\w+` says where the features are\.$"
    with pytest.raises(ValueError, match=match):
        call(layer, state, normal(0, shape))


@ROWS
def test_all_axes(case):
    """As PyTorch and Equinox have it."""
    with pytest.raises(ValueError, match="one size for each feature axis") as error:
        case.create(X.shape)
    given = arguments(error, "for the last ones `(.*)`")
    layer = case.create(X.shape, epsilon=1e-5, **given)
    theirs: Any = getattr(eqx.nn, case.name)(X.shape, eps=1e-5)
    np.testing.assert_allclose(layer(X), theirs(X), atol=1e-5)


def test_fewer_sizes_than_axes():
    """As nnx has it, their product."""
    axes = {"feature_axes": (1, 2), "reduction_axes": 2}
    with pytest.raises(
        ValueError, match=r"got 30 .*\(1, 2\)\. Give as many sizes as axes\.$"
    ):
        en.LayerNorm(30, **axes)


@pytest.mark.parametrize("axes", [0, (0,), (-2, -1), (1, 2), ()], ids=str)
@ROWS
def test_feature_axes_alone(case, axes):
    sizes = tuple(X.shape[axis] for axis in ([axes] if isinstance(axes, int) else axes))
    with pytest.raises(ValueError, match="needs `reduction_axes` too") as error:
        case.create(sizes, feature_axes=axes)
    if not sizes:
        return
    as_torch = arguments(error, r"`(reduction_axes=\(.*?\))` for the same, as in PyTorch")
    layer = case.create(sizes, feature_axes=axes, **as_torch)
    wanted, *_ = reference(X, as_torch["reduction_axes"], center=case.center)
    np.testing.assert_allclose(layer(X), wanted, atol=1e-5)
    as_flax = arguments(error, "`(reduction_axes=-1)` for the last alone, Flax's default")
    layer = case.create(sizes, feature_axes=axes, **as_flax)
    flax: Any = getattr(nnx, case.name)
    flax = flax(int(np.prod(sizes)), feature_axes=axes, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(X), flax(X), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "axes", "reduced"),
    [
        (5, {}, (-1,)),
        (5, {"feature_axes": -1}, (-1,)),
        (5, {"feature_axes": [-1], "reduction_axes": None}, (-1,)),
        (5, {"reduction_axes": (0, 1)}, (0, 1)),
        (16, {"feature_axes": 0, "reduction_axes": (1, 2)}, (1, 2)),
        ((16, 6), {"feature_axes": (0, 1), "reduction_axes": -1}, (-1,)),
    ],
    ids=str,
)
@ROWS
def test_axes_that_are_known(case, size, axes, reduced):
    """The last by default; where both are given they need have nothing in common."""
    layer = case.create(size, **axes)
    assert layer.reduction_axes == reduced
    wanted, *_ = reference(X, reduced, center=case.center)
    np.testing.assert_allclose(layer(X), wanted, atol=1e-5)


@pytest.mark.parametrize("axes", [{}, {"feature_axes": (1, 2)}, {"reduction_axes": (0, 1)}])
@ROWS
def test_from_flax(case, axes):
    """Flax's defaults are carried over as they are there."""
    sizes = (6, 5) if "feature_axes" in axes else 5
    flax: Any = getattr(nnx, case.name)(int(np.prod(sizes)), rngs=nnx.Rngs(0), **axes)
    layer = en.convert.from_flax(flax, num_features=sizes)
    np.testing.assert_allclose(layer(X), flax(X), atol=1e-5)


def test_groups_first():
    match = r"32 for example\. The features come first, then the groups: the reverse of Py"
    with pytest.raises(ValueError, match=match):
        en.GroupNorm(32, 64)


# Masks.

# The shape of a mask for (4, 6, 8), the hint, and the shape that it makes.
MASKS = [
    ((4, 6), "[..., None]", (4, 6, 1)),
    ((4,), "[..., None, None]", (4, 1, 1)),
    ((6,), "[..., None]", (6, 1)),
    ((1, 6), "[..., None]", (1, 6, 1)),
    ((4, 8), "[..., None, :]", (4, 1, 8)),
    ((5,), None, None),
    ((6, 4), None, None),
    ((1, 4, 6, 8), None, None),
]


def mask_of(shape):
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.7)


@pytest.mark.parametrize(("shape", "index", "result"), MASKS, ids=str)
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "standardize"])
def test_mask_that_does_not_fit(name, shape, index, result):
    x, mask = normal(1, (4, 6, 8)), mask_of(shape)
    if name == "standardize":
        function = lambda mask: en.standardize(x, (0, 1), mask=mask)  # noqa: E731
        axes, kwargs = (0, 1), {}
    else:
        (case,) = (case for case in NORMS if case.name == name)
        layer, state = case.build()
        function = lambda mask: call(layer, state, x, mask=mask)  # noqa: E731
        axes, kwargs = case.reduction_axes(3), case.formula | {"epsilon": layer.epsilon}
    with pytest.raises(ValueError, match=r"`mask` of shape .* does not broadcast") as error:
        function(mask)
    if index is None:
        assert str(error.value).endswith(
            "Give it axes of size 1 where it is to be repeated."
        )
        return
    assert hint(error, r"repeated: `mask(\[.*\])`, for example\.$") == index
    mask = eval(f"mask{index}")
    assert mask.shape == result
    wanted, *_ = reference(x, axes, mask=mask, **kwargs)
    np.testing.assert_allclose(function(mask), wanted, atol=1e-5)


def test_scale_that_does_not_fit():
    x = normal(1, (4, 6, 8))
    with pytest.raises(ValueError, match=r"`scale\[\.\.\., None\]`, for example"):
        en.LayerNorm(8)(x, scale=x[..., 0])
    with pytest.raises(ValueError, match=r"`bias\[\.\.\., None, None\]`, for example"):
        en.standardize(x, bias=x[:, 0, 0])


# Layer, the shapes of input and mask, and whether the mask is refused.
SQUARE = [
    ("BatchNorm", (8, 8), (8,), True),
    ("BatchNorm", (1, 8, 8), (1, 8), True),
    ("BatchNorm", (8, 8, 8), (8,), True),
    # Along the last axes it varies over positions; or has no size that differs.
    ("BatchNorm", (8, 8, 8), (8, 8), False),
    ("BatchNorm", (1, 4, 8), (1,), False),
    ("BatchNorm", (8, 8), (1, 8), False),
    ("BatchNorm", (8, 8), (8, 1), False),
    ("BatchNorm", (4, 8), (8,), False),
    ("InstanceNorm", (1, 8, 8), (1, 8), True),
    ("GroupNorm", (1, 8, 8), (1, 8), False),
    ("LayerNorm", (8, 8), (8,), False),
    ("RMSNorm", (8, 8), (8,), False),
    ("LayerNorm, first axis", (8, 8), (8,), True),
]


@pytest.mark.parametrize(("name", "shape", "size", "refused"), SQUARE, ids=str)
def test_mask_of_first_or_last_axes(name, shape, size, refused):
    x, mask = normal(1, shape), mask_of(size).at[..., 0].set(True)
    (case,) = (case for case in NORMS if case.name == name.partition(",")[0])
    axes, kwargs = case.reduction_axes(x.ndim), {}
    if case.name != name:
        axes, kwargs = (0,), {"reduction_axes": 0}
    layer, state = case.build(**kwargs)
    y = lambda mask: call(layer, state, x, mask=mask)  # noqa: E731
    masks = [mask]
    if refused:
        with pytest.raises(
            ValueError, match=r"fits the first axes .* and the last"
        ) as error:
            y(mask)
        first = hint(error, r"Write `mask(\[[^`]*\])` for the first")
        last = hint(error, r"or `mask(\[[^`]*\])` for the last")
        masks = [eval(f"mask{first}"), eval(f"mask{last}")]
        full = np.broadcast_to(masks[0], shape)
        np.testing.assert_array_equal(full[(..., *[0] * (x.ndim - mask.ndim))], mask)
        np.testing.assert_array_equal(np.broadcast_to(mask, shape), masks[1] & (x == x))
    for one in masks:
        wanted, *_ = reference(x, axes, mask=one, epsilon=layer.epsilon, **case.formula)
        np.testing.assert_allclose(y(one), wanted, atol=2e-5)


def test_mask_of_one_example_in_a_vmap():
    """As many positions as features, for good."""
    x, mask = normal(1, (3, 8, 8)), mask_of((3, 8))
    norm, state = eqx.nn.make_with_state(en.BatchNorm)(8, axis_name="batch")

    def one(x, mask):
        return norm(x, state, mask=mask)

    batched = jax.vmap(one, out_axes=(0, None), axis_name="batch")
    with pytest.raises(ValueError, match=r"Write `mask\[\.\.\., None\]` for the first"):
        batched(x, mask)
    y, _ = batched(x, mask[..., None])
    wanted, *_ = reference(x, (0, 1), mask=mask[..., None], epsilon=1e-5)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"Write `mask\[\.\.\., None\]` for the first"):
        en.standardize(x[0], 0, mask=mask[0])


def test_a_mask_for_features_first():
    """The hint leaves the features aside, where their number is that of an axis of space
    too."""
    x, mask = normal(0, (2, 4, 4, 4)), np.random.default_rng(0).random((2, 4, 4)) < 0.7
    layer = en.InstanceNorm(4, feature_axes=1)
    with pytest.raises(ValueError, match=r"`mask\[..., None, :, :\]`, for example"):
        layer(x, mask=mask)
    wanted = np.where(mask[:, None], x, 0).sum((2, 3)) / mask.sum((1, 2))[:, None]
    moments = en.moments(x, (2, 3), mask=mask[..., None, :, :])
    np.testing.assert_allclose(moments.mean[..., 0, 0], wanted, rtol=1e-4, atol=1e-6)
