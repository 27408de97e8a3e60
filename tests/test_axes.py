import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms._axes import other_axes, to_feature_order, to_input_order, to_rank
from eqx_norms._checks import Check, as_tuple

from .helpers import along, normal, randomize, reference


def canonical(axes, ndim):
    return Check("Layer").axes_in(ndim, as_tuple(axes), "axes")


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (-1, (2,)),
        (0, (0,)),
        ((), ()),
        ([0, 1], (0, 1)),
        # In the order given: `num_features` follows it.
        ((-1, 0), (2, 0)),
        ((1, -3), (1, 0)),
    ],
)
def test_canonicalize(axes, expected):
    assert canonical(axes, 3) == expected


@pytest.mark.parametrize("axes", [3, -4, (0, 3), (0, -4)])
def test_out_of_range(axes):
    with pytest.raises(ValueError, match=r"Layer: `axes=.* has axis -?\d, .* 3 dimensions"):
        canonical(axes, 3)


@pytest.mark.parametrize("axes", [(0, 0), (0, -3), (-1, 1, 2)])
def test_repeated(axes):
    with pytest.raises(ValueError, match=r"Layer: `axes=.* names an axis more than once"):
        canonical(axes, 3)


def test_other_axes():
    assert other_axes((2, 0), 4) == (1, 3)
    assert other_axes((), 2) == (0, 1)
    assert other_axes((0, 1), 2) == ()


@pytest.mark.parametrize("axes", [(0,), (3,), (0, 2), (2, 0), (3, 1, 2), (2, 3, 0, 1), ()])
def test_features_there_and_back(axes):
    x = jnp.zeros((2, 3, 4, 5))
    array = normal(0, tuple(x.shape[axis] for axis in axes))
    ordered = to_input_order(array, axes)
    assert np.array_equal(ordered, np.squeeze(along(array, axes, x.ndim)))
    assert np.array_equal(to_feature_order(ordered, axes), array)


def test_to_rank():
    x = jnp.zeros((4, 3))
    for shape in ((), (3,), (1,), (4, 1), (4, 3)):
        array = jnp.ones(shape)
        Check("Layer").broadcasts(array, x, "mask")
        laid_out = to_rank(array, x.ndim)
        assert laid_out.ndim == 2
        assert np.broadcast_shapes(laid_out.shape, x.shape) == x.shape
    for shape in ((4,), (2, 3), (1, 4, 3), (2, 4, 3)):
        with pytest.raises(
            ValueError, match=r"Layer: `mask` of shape .* does not broadcast"
        ):
            Check("Layer").broadcasts(jnp.ones(shape), x, "mask")


# The axes of the layers. All sizes differ, so that no two axes can be mistaken.

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("make", [en.LayerNorm, en.RMSNorm])
@pytest.mark.parametrize(
    ("reduction_axes", "feature_axes"),
    [
        (-1, -1),
        ((1, 3), (1, 3)),
        # In any order, of either.
        ((3, 1), (3, 1)),
        ((-1, 0, 2), (2, 0, -1)),
        # Features not reduced over, in part or altogether.
        ((2, 3), 1),
        ((1, 2), (3, 1)),
        (0, (3, 2, 1)),
        ([0, 1, 2, 3], -2),
        # No features: one scale for all.
        ((1, 2), ()),
    ],
    ids=str,
)
def test_axes_of_example_layers(make, reduction_axes, feature_axes):
    x = 3 + normal(0, SHAPE)
    axes = (feature_axes,) if isinstance(feature_axes, int) else tuple(feature_axes)
    sizes = tuple(SHAPE[axis] for axis in axes)
    num_features = sizes[0] if isinstance(feature_axes, int) else sizes
    layer = randomize(
        make(num_features, reduction_axes=reduction_axes, feature_axes=feature_axes)
    )
    assert layer.scale.shape == sizes
    has_bias = make is en.LayerNorm
    expected, _, _ = reference(
        x,
        tuple(np.atleast_1d(reduction_axes)),
        center=has_bias,
        scale=along(layer.scale, axes, 4),
        bias=along(layer.bias, axes, 4) if has_bias else None,
    )
    np.testing.assert_allclose(eqx.filter_jit(layer)(x), expected, atol=2e-5)


def test_statistics_of_one_number():
    """What is averaged over nothing else is its own mean."""
    x = 3 + normal(0, (1, 4))
    assert np.all(en.LayerNorm(4, reduction_axes=0)(x) == 0)
    y = en.RMSNorm(4, reduction_axes=0)(x)
    np.testing.assert_allclose(y, jnp.sign(x), atol=1e-5)


@pytest.mark.parametrize("layer", [en.LayerNorm, en.RMSNorm])
def test_statistics_of_nothing(layer):
    with pytest.raises(
        ValueError, match=f"{layer.__name__}: no axis left to take statistics"
    ):
        layer(4, reduction_axes=())(normal(0, (2, 4)))
