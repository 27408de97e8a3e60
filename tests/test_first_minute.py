"""What goes wrong in a new user's first minute, and what is said to it.

The library's own words; where its types are checked at run time that check comes first,
and names the argument.
"""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import eqx_norms as en

from .helpers import clone, normal


X = normal(0, (5, 3))
IMAGES = normal(0, (5, 3, 4, 4))


def batch_norm(*args, **kwargs):
    return eqx.nn.make_with_state(en.BatchNorm)(*args, **kwargs)


def no_state():
    norm: Any = batch_norm(3)[0]
    norm(X)


def no_state_and_the_input_by_its_name():
    norm: Any = batch_norm(3)[0]
    norm(x=X)


def no_state_in_a_sequential():
    model, _ = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([en.BatchNorm(3)]))()
    model(X)


def not_made_with_its_state():
    _, state = batch_norm(3)
    en.BatchNorm(3)(X, state)


def made_with_a_state_of_another_layer():
    norm, _ = batch_norm(3)
    _, state = batch_norm(4)
    norm(X, state)


def stale_state():
    norm, state = batch_norm(3)
    norm(X, state)
    norm(X, state)


def per_example(norm, state, **kwargs):
    axes = {"in_axes": (0, None), "out_axes": (0, None), **kwargs}
    return jax.vmap(norm, **axes)(X, state)


def vmap_does_not_bind_the_name():
    per_example(*batch_norm(3, axis_name="batch"))


def vmap_binds_another_name():
    per_example(*batch_norm(3, axis_name="batch"), axis_name="examples")


def name_but_no_vmap():
    norm, state = batch_norm(3, axis_name="batch")
    norm(X, state)


def layer_without_a_name_under_vmap():
    per_example(*batch_norm(3), axis_name="batch")


def layer_without_a_name_under_vmap_on_images():
    norm, state = batch_norm(3, axis=0)
    jax.vmap(norm, (0, None), (0, None), axis_name="batch")(IMAGES, state)


def state_left_out_of_out_axes():
    norm, state = batch_norm(3, axis_name="batch")
    _, state = per_example(norm, state, axis_name="batch", out_axes=0)
    per_example(norm, state, axis_name="batch")


def channels_first_and_features_last():
    norm, state = batch_norm(3)
    norm(IMAGES, state)


def wrong_number_of_features():
    en.LayerNorm(4)(X)


def one_example_as_a_batch():
    en.GroupNorm(3, num_groups=3)(X[0])


def groups_that_do_not_divide():
    en.GroupNorm(48)


def state_of_a_layer_without_parameters_left_out_of_out_axes():
    norm, state = eqx.nn.make_with_state(en.BatchNorm)(
        3, axis_name="batch", use_scale=False, use_bias=False
    )
    batched = jax.vmap(norm, in_axes=(0, None), axis_name="batch")
    _, state = batched(X, state)
    batched(X, state)


def torch_momentum():
    en.BatchNorm(3, momentum=1.1)


def flax_rngs():
    en.LayerNorm(3, rngs=0)  # pyright: ignore[reportCallIssue]


def random_initializer_without_key():
    en.LayerNorm(3, scale_init=jax.nn.initializers.normal())


def integer_mask():
    en.LayerNorm(3)(X, mask=jnp.ones((5, 3), jnp.int32))


def a_batch_of_one():
    norm, state = batch_norm(3)
    norm(X[:1], state)


def a_state_cast_with_the_model():
    norm, state = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, batch_norm(3)
    )
    norm(X, state)


def a_model_placed_as_a_whole():
    norm, state = jax.device_put(batch_norm(3), jax.devices()[0])
    eqx.filter_jit(norm)(X, state)


def a_flag_traced_by_jit():
    norm, state = batch_norm(3)
    jax.jit(lambda flag: norm(X, state, use_running_average=flag)[0])(True)


def eight_bits_without_a_dtype():
    en.LayerNorm(3)(X.astype(jnp.float8_e4m3fn))


STATE = r"BatchNorm: needs the model's `equinox.nn.State`.*`model, state = equinox.nn.make"
FEATURES = r"expected features of shape \({}\) along `{}=\({},\)`, got \({}\) in an input"
MISTAKES = [
    (no_state, ValueError, STATE, None),
    (no_state_and_the_input_by_its_name, ValueError, STATE, None),
    (no_state_in_a_sequential, ValueError, STATE, "state"),
    (
        not_made_with_its_state,
        ValueError,
        "BatchNorm: this `state` holds nothing for",
        None,
    ),
    (
        made_with_a_state_of_another_layer,
        ValueError,
        r"running statistics in `state` have shape \(4,\), the layer's features \(3,\)",
        None,
    ),
    (stale_state, ValueError, "Attempted to use old state", None),
    (
        vmap_does_not_bind_the_name,
        NameError,
        r"BatchNorm: `axis_name` has the name 'batch', which is not bound.*`jax.vmap\(...,",
        None,
    ),
    (vmap_binds_another_name, NameError, "name 'batch', which is not bound here", None),
    (name_but_no_vmap, NameError, "or leave `axis_name` out to use the statistics", None),
    (
        layer_without_a_name_under_vmap,
        ValueError,
        r"no axis left to take.*`jax.vmap\(..., axis_name='batch'\)`, make the layer with",
        None,
    ),
    # JAX's own words: whether the state is meant to differ from example to example, only
    # its caller knows.
    (
        layer_without_a_name_under_vmap_on_images,
        ValueError,
        r"(?s)out_axes.*(mean|None)",
        None,
    ),
    (
        state_left_out_of_out_axes,
        ValueError,
        r"left out of the axes of a `vmap`\? Write `jax.vmap\(model, in_axes=\(0, None\), ",
        None,
    ),
    (
        channels_first_and_features_last,
        ValueError,
        FEATURES.format("3,", "axis", 3, "4,"),
        None,
    ),
    (
        wrong_number_of_features,
        ValueError,
        FEATURES.format("4,", "feature_axes", 1, "3,"),
        None,
    ),
    (
        one_example_as_a_batch,
        ValueError,
        r"For one example, as inside `jax.vmap`, use `batch_axes=\(\)`",
        None,
    ),
    (
        groups_that_do_not_divide,
        ValueError,
        "`num_features=48` cannot be divided.* that divides it, 16 for example",
        None,
    ),
    (
        state_of_a_layer_without_parameters_left_out_of_out_axes,
        ValueError,
        r"have shape \(5, 3\), the layer's features one of length 1.*`out_axes|of a `vmap`",
        None,
    ),
    (torch_momentum, ValueError, "the weight of the old running statistics, from 0", None),
    (flax_rngs, TypeError, "unexpected keyword argument 'rngs'.*is `key` here", None),
    (
        random_initializer_without_key,
        ValueError,
        r"`scale_init` failed without a random key.*`key=jax.random.key\(...\)`",
        None,
    ),
    (
        a_batch_of_one,
        ValueError,
        r"BatchNorm: needs more than one position for each mean and variance, got an input "
        r"of shape \(1, 3\).*`equinox.nn.inference_mode`",
        None,
    ),
    (
        a_state_cast_with_the_model,
        ValueError,
        "BatchNorm: training needs a `state` in float32 or wider.*bfloat16.*Cast the model",
        None,
    ),
    (
        a_model_placed_as_a_whole,
        ValueError,
        "BatchNorm: `frozen` must be True or False.*`jax.device_put`.*`eqx.filter_shard`",
        None,
    ),
    (
        a_flag_traced_by_jit,
        ValueError,
        "BatchNorm: `use_running_average` must be True or False, got a traced array",
        "use_running_average",
    ),
    (
        eight_bits_without_a_dtype,
        ValueError,
        "LayerNorm: needs a `dtype` for its result.*got float8_e4m3fn.*Give one, `dtype=",
        None,
    ),
    (integer_mask, ValueError, "`mask` must be boolean, True where a position", "mask"),
]


@pytest.mark.parametrize(
    ("make", "error", "match", "typed"), MISTAKES, ids=[m[0].__name__ for m in MISTAKES]
)
def test_says_what_to_write(make, error, match, typed, request):
    if typed and request.config.getoption("--jaxtyping-packages"):
        error, match = jaxtyping.TypeCheckError, f"typechecking parameter '{typed}'"
    with pytest.raises(error, match=match):
        make()


def test_a_stale_state_can_be_cloned():
    norm, state = batch_norm(3)
    spare = clone(state)
    norm(X, state)
    assert norm(X, spare)[0].shape == X.shape


@pytest.fixture
def untyped(request):
    """What types forbid, and works all the same where nobody checks them."""
    if request.config.getoption("--jaxtyping-packages"):
        pytest.skip("jaxtyping checks types here")


def test_sizes_are_kept_as_integers(untyped):
    """An array in a static field could not be compared, and Equinox warns of it."""
    size: Any = np.prod((3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = [en.LayerNorm(size), batch_norm(size)[0], en.GroupNorm(size, num_groups=1)]
    for layer in layers:
        assert type(layer.num_features) is int
    sizes: Any = [4, 3]
    axes = {"feature_axes": (-2, -1), "reduction_axes": -1}
    one, other = (en.LayerNorm(n, **axes) for n in (sizes, (4, 3)))
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_a_sequential_that_is_given_no_state(untyped):
    """It gives an `object()` to each `StatefulLayer`, which may hand that on."""

    class Block(eqx.nn.StatefulLayer):
        norm: Any

        def __call__(self, x, state, *, key=None):
            return self.norm(x, state)

    for norm in (en.LayerNorm(3), en.RMSNorm(3)):
        block: Any = Block(norm)  # pyright: ignore[reportCallIssue]
        assert eqx.nn.Sequential([block])(X).shape == X.shape


@pytest.mark.parametrize(
    ("layer", "lines"),
    [(en.LayerNorm(3), 9), (en.RMSNorm(3), 9), (batch_norm(3)[0], 11)],
    ids=["LayerNorm", "RMSNorm", "BatchNorm"],
)
def test_prints_what_is_of_interest(layer, lines):
    """The parameters, and the settings that are not at their defaults."""
    text = eqx.tree_pformat(layer)
    assert text.count("\n") + 1 <= lines
    for part in ("scale=f32[3]", "num_features=3", "epsilon=1e-0"):
        assert part in text
    assert "axis_name" not in text
    assert "axis_name=('batch',)" in eqx.tree_pformat(en.LayerNorm(3, axis_name="batch"))
