"""Norms of `equinox.nn`, and whole models of them, against what they become."""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import eqx_norms as en
from eqx_norms import convert

from .helpers import assert_close, every, float64, normal, randomize


KEY = jax.random.key(0)
BN = eqx.nn.BatchNorm


def lenient():
    """Equinox promotes dtypes implicitly."""
    return jax.numpy_dtype_promotion("standard")


def conv(**kwargs):
    return eqx.nn.Conv2d(3, 4, 2, key=KEY, **kwargs)


def forward(layer, state, x) -> tuple[Any, Any]:
    """One example at a time, as Equinox's layers require."""
    with lenient():
        if state is None:
            return jax.vmap(layer)(x), None
        batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return batched(x, state)


call = eqx.filter_jit(forward)


def evaluate(layer, state, x):
    return call(eqx.nn.inference_mode(layer), state, x)[0]


STATELESS = {
    "LayerNorm": (lambda: eqx.nn.LayerNorm(5), (5,)),
    "LayerNorm, several axes": (lambda: eqx.nn.LayerNorm((3, 4, 5), 1e-2), (3, 4, 5)),
    "LayerNorm, no weight": (lambda: eqx.nn.LayerNorm(5, use_weight=False), (5,)),
    "LayerNorm, no bias": (lambda: eqx.nn.LayerNorm(5, use_bias=False), (5,)),
    "RMSNorm": (lambda: eqx.nn.RMSNorm((4, 5), 1e-2), (4, 5)),
    "RMSNorm, no weight": (lambda: eqx.nn.RMSNorm(5, use_weight=False), (5,)),
    "RMSNorm, no bias": (lambda: eqx.nn.RMSNorm(5, use_bias=False), (5,)),
    "GroupNorm": (lambda: eqx.nn.GroupNorm(2, 6, 1e-2), (6, 3, 3)),
    "GroupNorm, vectors": (lambda: eqx.nn.GroupNorm(3, 6), (6,)),
    "GroupNorm, plain": (
        lambda: eqx.nn.GroupNorm(2, 6, channelwise_affine=False),
        (6, 3),
    ),
    "WeightNorm": (lambda: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY)), (3,)),
    "WeightNorm, conv": (lambda: eqx.nn.WeightNorm(conv()), (3, 4, 4)),
    "WeightNorm, conv, other axis": (lambda: eqx.nn.WeightNorm(conv(), axis=1), (3, 4, 4)),
    "WeightNorm, conv, no axis": (lambda: eqx.nn.WeightNorm(conv(), axis=None), (3, 4, 4)),
}


def test_as_made_by_hand():
    made = en.LayerNorm(3, epsilon=1e-5, dtype="input")
    assert eqx.tree_equal(convert.from_equinox(eqx.nn.LayerNorm(3)), made)


@pytest.mark.parametrize("name", STATELESS)
def test_stateless(name):
    make, shape = STATELESS[name]
    old = randomize(make())
    new = convert.from_equinox(old)
    assert type(new) is getattr(en, type(old).__name__)
    x = 3 + normal(7, (2, *shape))

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def grad(layer):
        y, _ = call(layer, None, x)
        return jnp.sum(jnp.sin(y)), y

    (old_grads, expected), (new_grads, y) = grad(old), grad(new)
    assert_close(y, expected, 1e-5)
    pairs = zip(jax.tree.leaves(old_grads), jax.tree.leaves(new_grads), strict=True)
    for before, after in pairs:
        assert_close(after.reshape(before.shape), before, 1e-4)


def trained(make, x, steps=3) -> tuple[Any, Any]:
    old, state = eqx.nn.make_with_state(make)()
    old = randomize(old)
    for _ in range(steps):
        _, state = call(old, state, x)
    return old, state


SPECTRAL = {
    "linear": lambda k: eqx.nn.SpectralNorm(eqx.nn.Linear(3, 4, key=k), "weight", key=k),
    "conv": lambda k: eqx.nn.SpectralNorm(conv(), "weight", 2, inference=True, key=k),
}
STATEFUL = {
    "batch": (lambda: BN(4, "batch", 1e-2, momentum=0.9, mode="batch"), (4, 3)),
    "batch, plain": (lambda: BN(4, "batch", channelwise_affine=False, mode="batch"), (4,)),
    "ema": (lambda: BN(4, ["batch"], momentum=0.8, inference=True, mode="ema"), (4, 3)),
    "spectral, linear": (lambda: SPECTRAL["linear"](KEY), (3,)),
    "spectral, conv": (lambda: SPECTRAL["conv"](KEY), (3, 4, 4)),
}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", STATEFUL)
def test_stateful(name, steps):
    make, shape = STATEFUL[name]
    x = 3 + 2 * normal(7, (8, *shape))
    old, state = trained(make, x, steps)
    before = jax.tree.leaves((old, state))
    new, new_state = convert.from_equinox(old, state)
    assert type(new) is getattr(en, type(old).__name__)
    assert new.inference is old.inference
    expected = evaluate(old, state, x)
    assert_close(evaluate(new, new_state, x), expected, 1e-5)
    # What was given can be used again, and was not changed.
    for a, b in zip(jax.tree.leaves((old, state)), before, strict=True):
        assert a is b
    # The result does without the layer's initial state, as from `make_with_state`.
    assert jax.tree.leaves(new.state_index) == []
    call(new, new_state, x)


@pytest.mark.parametrize("name", STATEFUL)
def test_initial_state(name):
    """Before `make_with_state`, the state is in the layer."""
    make, shape = STATEFUL[name]
    x = normal(7, (8, *shape))
    new, new_state = convert.from_equinox(make())
    old, state = eqx.nn.make_with_state(make)()
    assert_close(evaluate(new, new_state, x), evaluate(old, state, x), 1e-5)


@pytest.mark.parametrize(
    ("mode", "steps", "count"),
    [("batch", 0, 0), ("batch", 4, 4), ("ema", 0, 0), ("ema", 4, 2**30)],
)
def test_batch_norm_count(mode, steps, count):
    """An "ema" layer only knows whether there was a batch: so many that steps are plain."""
    old, state = trained(lambda: BN(4, "batch", mode=mode), normal(7, (8, 4)), steps)
    new, new_state = convert.from_equinox(old, state)
    np.testing.assert_array_equal(new.running_stats(new_state).count, [count] * 4)


@every(2)
@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_batch_norm_goes_on(mode, steps, momentum):
    """Trained on in both libraries, what evaluation gives stays the same."""
    make = lambda: BN(4, "batch", momentum=momentum, mode=mode)  # noqa: E731
    x = 3 + 2 * normal(7, (8, 4, 5))
    old, state = trained(make, x, steps)
    new, new_state = convert.from_equinox(old, state)
    for i in range(5):
        batch = 1 + (i + 1) * normal(8 + i, x.shape)
        y, state = call(old, state, batch)
        new_y, new_state = call(new, new_state, batch)
        if mode == "batch":
            assert_close(new_y, y, 1e-5)
        assert_close(evaluate(new, new_state, x), evaluate(old, state, x), 1e-5)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_batch_norm_that_was_never_trained(mode):
    """The average over the batches alone, also where it is made under `jit`."""
    x = 3 + 2 * normal(7, (8, 4, 5))
    make = lambda: convert.replace_norms(BN(4, "batch", momentum=0.9, mode=mode))  # noqa: E731
    layer, state = eqx.filter_jit(eqx.nn.make_with_state(make))()
    assert layer.debias
    means, variances = [], []
    for i in range(3):
        batch = x * (i + 1)
        _, state = call(layer, state, batch)
        means.append(np.asarray(batch, np.float64).mean((0, 2)))
        variances.append(np.asarray(batch, np.float64).var((0, 2)))
        weights = [0.81, 0.9, 1.0][2 - i :]
        stats = layer.running_stats(state)
        assert_close(stats.mean, np.average(means, 0, weights).astype(np.float32))
        assert_close(stats.var, np.average(variances, 0, weights).astype(np.float32))


def test_spectral_norm_training():
    """Different vectors at first, the same limit."""
    x = normal(7, (8, 3))
    old, state = eqx.nn.make_with_state(SPECTRAL["linear"])(KEY)
    new, new_state = convert.from_equinox(old, state)
    for _ in range(3):
        y, state = call(old, state, x)
        new_y, new_state = call(new, new_state, x)
        assert_close(new_y, y, 1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    """Parameters keep their dtype, statistics are float32."""
    x = normal(7, (8, 4)).astype(dtype)
    old, state = trained(lambda: BN(4, "batch", mode="batch", dtype=dtype), x)
    new, new_state = convert.from_equinox(old, state)
    assert new.scale.dtype == new.bias.dtype == dtype
    assert new.running_stats(new_state).mean.dtype == jnp.float32
    np.testing.assert_array_equal(new.scale, old.weight)
    norm = convert.from_equinox(eqx.nn.LayerNorm(4, dtype=dtype))
    assert norm.scale.dtype == norm(jnp.ones(4, dtype)).dtype == dtype


def test_stacked_layers():
    """Layers made by `vmap`, for a scan over them or an ensemble."""
    x = normal(7, (8, 4))
    keys = jax.random.split(KEY, 3)
    make = lambda key: (eqx.nn.LayerNorm(4), BN(4, "batch", mode="batch"))  # noqa: E731
    old, state = eqx.filter_vmap(eqx.nn.make_with_state(make))(keys)
    old = randomize(old)
    new, new_state = convert.replace_norms(old, state)

    @eqx.filter_vmap(in_axes=(eqx.if_array(0), eqx.if_array(0)))
    def both(model, state):
        norm, batch_norm = eqx.nn.inference_mode(model)
        return forward(batch_norm, state, forward(norm, None, x)[0])[0]

    assert_close(both(new, new_state), both(old, state), 1e-5)


# -- Whole models.


class Block(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    norms: tuple[BN, BN]
    shortcut: eqx.nn.Sequential

    def __init__(self, inputs, outputs, key):
        a, b, c = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(inputs, outputs, 3, padding=1, use_bias=False, key=a),
            eqx.nn.Conv2d(outputs, outputs, 3, padding=1, use_bias=False, key=b),
        ]
        self.norms = (norm(outputs), norm(outputs))
        project = [eqx.nn.Conv2d(inputs, outputs, 1, key=c), norm(outputs)]
        self.shortcut = eqx.nn.Sequential(project if inputs != outputs else [])

    def __call__(self, x, state):
        y = x
        for layer, norm in zip(self.convs, self.norms, strict=True):
            y, state = norm(layer(y), state)
            y = jax.nn.relu(y)
        if self.shortcut.layers:
            x, state = self.shortcut(x, state)
        return x + y, state


class ResNet(eqx.Module):
    """Nine of BatchNorm, and one each of GroupNorm, LayerNorm and RMSNorm."""

    stem: eqx.nn.Sequential
    blocks: dict[str, list[Block]]
    head: eqx.nn.Sequential

    def __init__(self, key):
        a, b, *keys = jax.random.split(key, 5)
        self.stem = eqx.nn.Sequential(
            [eqx.nn.Conv2d(1, 2, 3, padding=1, key=a), eqx.nn.GroupNorm(1, 2), norm(2)]
        )
        sizes = [(2, 4), (4, 4), (4, 6)]
        blocks = [Block(*size, key) for size, key in zip(sizes, keys, strict=True)]
        self.blocks = {"first": blocks[:2], "second": blocks[2:]}
        self.head = eqx.nn.Sequential(
            [eqx.nn.LayerNorm(6), eqx.nn.Linear(6, 3, key=b), eqx.nn.RMSNorm(3)]
        )

    def __call__(self, x, state):
        x, state = self.stem(x, state)
        for blocks in self.blocks.values():
            for block in blocks:
                x, state = block(x, state)
        return self.head(jnp.mean(x, (1, 2))), state


def norm(features):
    return BN(features, "batch", mode="batch")


def filled(structure):
    """Random numbers, without the time it takes to compile their initializers."""

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        count = jnp.issubdtype(leaf.dtype, jnp.integer)
        value = 3 if count else float(len(leaf.shape) == 1)
        return jnp.asarray(np.full(leaf.shape, value), leaf.dtype)

    return randomize(jax.tree.map(fill, structure))


def norms_in(model, *kinds):
    is_leaf = lambda node: isinstance(node, kinds)  # noqa: E731
    return [n for n in jax.tree.leaves(model, is_leaf=is_leaf) if is_leaf(n)]


EQUINOX = (BN, eqx.nn.GroupNorm, eqx.nn.LayerNorm, eqx.nn.RMSNorm)
OURS = (en.BatchNorm, en.GroupNorm, en.LayerNorm, en.RMSNorm)


def test_resnet():
    """A training step's loss and gradients, and evaluation, in float64."""
    with float64():
        old, state = filled(eqx.filter_eval_shape(eqx.nn.make_with_state(ResNet), KEY))
        x = normal(7, (4, 1, 8, 8), jnp.float64)

        def run(model, state):
            """Loss and gradients of a training step, and evaluation."""
            arrays, static = eqx.partition((model, state), eqx.is_array)

            def loss(model, state):
                return jnp.sum(jnp.sin(forward(model, state, x)[0]))

            def both(arrays):
                model, state = eqx.combine(arrays, static)
                step = eqx.filter_value_and_grad(loss)(model, state)
                return step, evaluate(model, state, x)

            return jax.jit(both)(arrays)

        new, new_state = convert.replace_norms(old, state)
        assert len(norms_in(old, *EQUINOX)) == len(norms_in(new, *OURS)) == 12
        assert norms_in(new, *EQUINOX) == []

        # Scale and bias are among the leaves where weight and bias were.
        expected, actual = run(old, state), run(new, new_state)
        pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        for after, before in pairs:
            assert_close(after, before, 1e-8)


class Counter(eqx.nn.StatefulLayer):
    """Another layer with a state."""

    index: eqx.nn.StateIndex

    def __init__(self):
        self.index = eqx.nn.StateIndex(41)

    def __call__(self, x, state, *, key=None):
        return x, state.set(self.index, state.get(self.index) + 1)


def mixed():
    return eqx.nn.Sequential(
        [
            Counter(),
            norm(3),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Sequential([eqx.nn.LayerNorm(3), norm(3)]),
            SPECTRAL["linear"](KEY),
        ]
    )


def test_other_states_are_kept():
    x = 3 + normal(7, (8, 3))
    old, state = trained(mixed, x)
    new, new_state = convert.replace_norms(old, state)
    assert new_state.get(new[0].index) == state.get(old[0].index) == 44
    assert_close(evaluate(new, new_state, x), evaluate(old, state, x), 1e-5)
    # Training goes on, from both.
    call(new, new_state, x)
    call(old, state, x)
    # One layer more for each layer less: nothing of the old ones is left.
    assert len(jax.tree.leaves(new_state)) == 1 + 3 + 3 + 3


def test_a_part_of_a_model():
    x = 3 + normal(7, (8, 3))
    old, state = trained(mixed, x)
    part, new_state = convert.replace_norms(old[3], state)
    new = eqx.tree_at(lambda model: model.layers[3], old, part)
    assert_close(evaluate(new, new_state, x), evaluate(old, state, x), 1e-5)


def test_before_make_with_state():
    x = 3 + normal(7, (8, 3))
    new, new_state = eqx.nn.make_with_state(lambda: convert.replace_norms(mixed()))()
    old, state = eqx.nn.make_with_state(mixed)()
    assert_close(evaluate(new, new_state, x), evaluate(old, state, x), 1e-5)
    # The same, model and state, as when converted afterwards, but for names.
    later, later_state = convert.replace_norms(old, state)
    for a, b in [(new, later), (new_state, later_state)]:
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.number):
                np.testing.assert_array_equal(x, y)


def test_shared_state():
    """One layer at two places has one state, as long as `make_with_state` leaves it so."""
    layer = norm(3)
    model = eqx.nn.Sequential([layer, eqx.nn.LayerNorm(3), layer])
    state = eqx.nn.State(model)
    old = eqx.nn.delete_init_state(model)
    new, new_state = convert.replace_norms(old, state)
    x = 3 + normal(7, (8, 3))
    for _ in range(2):
        _, state = call(old, state, x)
        _, new_state = call(new, new_state, x)
    # Each call was two batches of the one layer.
    np.testing.assert_array_equal(new[0].running_stats(new_state).count, [4] * 3)
    assert len(jax.tree.leaves(new_state)) == 3
    fresh = convert.replace_norms(model)
    assert len(jax.tree.leaves(eqx.nn.State(fresh))) == 3


def test_shared_layers():
    """`equinox.nn.Shared`: a layer can be converted, a weight alone cannot."""
    pair = [eqx.nn.LayerNorm(3), eqx.nn.LayerNorm(3)]
    shared = randomize(eqx.nn.Shared(pair, lambda p: p[1], lambda p: p[0]))
    first, second = convert.replace_norms(shared)()
    assert type(first) is en.LayerNorm
    assert first.scale is second.scale
    tied = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
    with pytest.raises(
        ValueError, match=r"LayerNorm: weight and bias must be .*SharedNode"
    ):
        convert.replace_norms(tied)


def test_wrapped_norms():
    """Norms inside a wrapper are replaced with it."""

    class Normed(eqx.Module):
        weight: jax.Array
        norm: eqx.nn.LayerNorm

        def __call__(self, x):
            return self.norm(self.weight @ x)

    old = eqx.nn.WeightNorm(Normed(normal(1, (4, 3)), randomize(eqx.nn.LayerNorm(4))))
    new = convert.replace_norms([old])[0]
    assert type(new.layer.norm) is en.LayerNorm
    x = normal(7, (2, 3))
    assert_close(call(new, None, x)[0], call(old, None, x)[0], 1e-5)


class Doubled(eqx.nn.LayerNorm):
    def __init__(self):
        super().__init__(3)

    def __call__(self, x, state=None, *, key=None) -> Any:
        return 2 * super().__call__(x)


class Renamed(eqx.nn.LayerNorm):
    def __init__(self):
        super().__init__(3)


def test_subclasses():
    """Those that compute something else are left."""
    with pytest.warns(UserWarning, match=r"Doubled at model\[0\]: a subclass of `eq"):
        model = convert.replace_norms([Doubled(), Renamed()])
    assert [type(layer) for layer in model] == [Doubled, en.LayerNorm]


@pytest.mark.parametrize(
    "layer", [eqx.nn.Linear(2, 2, key=KEY), Doubled(), en.LayerNorm(3), jnp.ones(3), None]
)
def test_no_counterpart(layer):
    with pytest.raises(ValueError, match=r"no counterpart for .*LayerNorm.* `equinox.nn`"):
        convert.from_equinox(layer)
    with pytest.raises(
        ValueError, match=r"no norm to replace in this model. .*: BatchNorm"
    ):
        convert.replace_norms([layer])


def test_channels_not_known():
    layer = eqx.nn.GroupNorm(2, channelwise_affine=False)
    with pytest.raises(
        ValueError, match=r"`channels=None` does not say .* with `channels`"
    ):
        convert.from_equinox(layer)


@pytest.mark.parametrize("name", STATEFUL)
def test_state_missing_or_foreign(name):
    old, _ = eqx.nn.make_with_state(STATEFUL[name][0])()
    for function in (convert.from_equinox, convert.replace_norms):
        with pytest.raises(
            ValueError, match=r"took it out .* `replace_norms\(model, state\)"
        ):
            function(old)
        _, foreign = eqx.nn.make_with_state(Counter)()
        with pytest.raises(ValueError, match="holds nothing for this layer"):
            function(old, foreign)


# -- What is left, and rules for it.


class ChannelNorm(eqx.Module):
    """Of a model's own."""

    weight: jax.Array

    def __init__(self, size=3, seed=1):
        self.weight = normal(seed, (size,))

    def __call__(self, x, *, key=None):
        y = x - jnp.mean(x, 0, keepdims=True)
        return self.weight[:, None] * y / jnp.sqrt(jnp.mean(y**2, 0, keepdims=True) + 1e-6)


class OwnChannelNorm(ChannelNorm):
    def __init__(self):
        super().__init__()


class TwiceChannelNorm(ChannelNorm):
    def __init__(self):
        super().__init__()

    def __call__(self, x, *, key=None):
        return 2 * super().__call__(x)


def renew(layer):
    new = en.LayerNorm(layer.weight.size, use_bias=False, reduction_axes=0, feature_axes=0)
    return eqx.tree_at(lambda new: new.scale, new, layer.weight)


class PreNorm(eqx.Module):
    """A norm by name alone: the one in it is."""

    norm: Any
    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear(self.norm(x))


class LogNormal(eqx.Module):
    def __call__(self, x):
        return x


class NormalizingFlow(LogNormal):
    pass


class NormStats(eqx.Module):
    mean: jax.Array


def unknown():
    return eqx.nn.GroupNorm(2, channelwise_affine=False)


def left_in(model, *args, **kwargs):
    """The result, and the lines of the one warning."""
    with pytest.warns(UserWarning, match="not every norm was replaced") as record:
        new = convert.replace_norms(model, *args, **kwargs)
    assert len(record) == 1
    return new, str(record[0].message).splitlines()


def test_what_is_left_is_listed():
    model = {
        "own": [ChannelNorm(), eqx.nn.Lambda(ChannelNorm())],
        "no norms": (
            LogNormal(),
            NormStats(jnp.ones(3)),
            en.LayerNorm(3),
            jax.nn.relu,
            1.0,
        ),
        "pre": PreNorm(eqx.nn.LayerNorm(3), eqx.nn.Linear(3, 3, key=KEY)),
        "ours": PreNorm(en.LayerNorm(3), eqx.nn.Linear(3, 3, key=KEY)),
        "unknown": eqx.filter_vmap(unknown()),
        "doubled": Doubled(),
    }
    new, lines = left_in(model)
    assert type(new["pre"].norm) is en.LayerNorm
    own = f"{__name__}.ChannelNorm at model['own'][0], model['own'][1].fn"
    assert lines[1:-1] == [
        f"- {__name__}.Doubled at model['doubled']: a subclass of `equinox.nn.LayerNorm` "
        "with a `__call__` of its own",
        f"- {own}: a class that is not of `equinox.nn`",
        "- equinox.nn.GroupNorm at model['unknown']._fun: A GroupNorm of `equinox.nn` "
        "with `channels=None` does not say how many features it has, which "
        "`eqx_norms.GroupNorm` must know. Make it with `channels`.",
    ]
    for name in ("own", "no norms", "ours", "unknown", "doubled"):
        assert eqx.tree_equal(new[name], model[name])


@pytest.mark.parametrize("make", [ChannelNorm, unknown, Doubled])
def test_nothing_but_what_is_left(make):
    """An error says it too."""
    with pytest.raises(
        ValueError, match=rf"(?s)no norm to replace.*{make().__class__.__name__}"
    ):
        convert.replace_norms([make()])


def test_rules():
    model = [
        OwnChannelNorm(),
        {"a": ChannelNorm(seed=2)},
        unknown(),
        eqx.nn.LayerNorm(3),
        PreNorm(Renamed(), eqx.nn.Linear(3, 3, key=KEY)),
    ]
    rules = {
        ChannelNorm: renew,
        eqx.nn.GroupNorm: lambda layer: en.GroupNorm(
            4, layer.groups, epsilon=layer.eps, feature_axis=0, batch_axes=()
        ),
        # Of `equinox.nn`, and its subclasses that compute the same.
        eqx.nn.LayerNorm: lambda layer: en.RMSNorm(3),
    }
    new = convert.replace_norms(model, rules=rules)
    x = normal(7, (2, 3, 4))
    for old, layer in [(model[0], new[0]), (model[1]["a"], new[1]["a"])]:
        assert type(layer) is en.LayerNorm
        assert_close(call(layer, None, x)[0], call(old, None, x)[0], 1e-5)
    assert [type(layer) for layer in new[2:4]] == [en.GroupNorm, en.RMSNorm]
    assert type(new[4].norm) is en.RMSNorm
    assert_close(call(new[2], None, x.mT)[0], call(model[2], None, x.mT)[0], 1e-5)


def test_rules_end_at_another_call():
    model = [ChannelNorm(), TwiceChannelNorm()]
    new, lines = left_in(model, rules={ChannelNorm: renew})
    assert [type(layer) for layer in new] == [en.LayerNorm, TwiceChannelNorm]
    assert "TwiceChannelNorm at model[1]: a class that" in lines[1]


def test_a_rule_that_leaves():
    """On purpose: it is not listed."""
    model = [ChannelNorm(), eqx.nn.RMSNorm(3)]
    leave = {ChannelNorm: lambda layer: layer}
    new = convert.replace_norms(model, rules=leave)
    assert new[0] is model[0]
    assert type(new[1]) is en.RMSNorm
    with pytest.raises(ValueError, match="no norm to replace"):
        convert.replace_norms(model[:1], rules=leave)


def test_a_rule_that_raises():
    with pytest.raises(AttributeError, match="num_features") as raised:
        convert.replace_norms(
            [[ChannelNorm()]], rules={ChannelNorm: lambda layer: layer.num_features}
        )
    assert "ChannelNorm at model[0][0]: the rule" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match=r"model\[0\]: the rule for it returned `None`"):
        convert.replace_norms([ChannelNorm()], rules={ChannelNorm: lambda layer: None})


@pytest.mark.parametrize("rules", [{"ChannelNorm": renew}, {ChannelNorm: 3}, [renew]])
def test_no_rules(rules):
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="rules"):
        convert.replace_norms([eqx.nn.LayerNorm(3)], rules=rules)


class OwnBatchNorm(eqx.nn.StatefulLayer):
    """With a state of its own."""

    mean: eqx.nn.StateIndex
    var: eqx.nn.StateIndex
    inference: bool

    def __init__(self, seed):
        self.mean = eqx.nn.StateIndex(normal(seed, (3,)))
        self.var = eqx.nn.StateIndex(1 + normal(seed + 1, (3,)) ** 2)
        self.inference = True

    def __call__(self, x, state, *, key=None):
        mean, var = state.get(self.mean), state.get(self.var)
        return (x - mean) / jnp.sqrt(var + 1e-5), state


def own():
    return eqx.nn.Sequential(
        [OwnBatchNorm(1), Counter(), OwnBatchNorm(3), norm(3), eqx.nn.Linear(3, 3, key=KEY)]
    )


def read(layer, state):
    """`(layer, state)` of a BatchNorm in the place of one of the model's own."""
    make = eqx.nn.make_with_state(en.BatchNorm)
    new, new_state = make(3, use_scale=False, use_bias=False, axis_name="batch")
    stats = new.running_stats(new_state)
    mean, var = (
        eqx.nn.State(index).get(index) if state is None else state.get(index)
        for index in (layer.mean, layer.var)
    )
    stats = eqx.tree_at(lambda stats: (stats.mean, stats.var), stats, (mean, var))
    return new, new_state.set(new.state_index, stats)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_rules_with_state(before, pair):
    old, state = eqx.nn.make_with_state(own)()

    def rule(layer):
        new, own = read(layer, None if before else state)
        if pair:
            return new, own
        # Or a layer with its initial state in it.
        index = eqx.nn.StateIndex(own.get(new.state_index))
        return eqx.tree_at(lambda new: new.state_index, new, index)

    rules = {OwnBatchNorm: rule}
    if before:
        make = lambda: convert.replace_norms(own(), rules=rules)  # noqa: E731
        new, new_state = eqx.nn.make_with_state(make)()
    else:
        new, new_state = convert.replace_norms(old, state, rules=rules)
    x = normal(7, (8, 3))
    assert_close(evaluate(new, new_state, x), evaluate(old, state, x), 1e-5)
    # Each of three norms has three arrays, and the counter one.
    assert len(jax.tree.leaves(new_state)) == 10
    assert len({layer.state_index.marker for layer in norms_in(new, en.BatchNorm)}) == 3
    # Each goes its own way in training; the old model and state can be used again.
    _, new_state = call(new, new_state, x)
    first, second, _ = (
        layer.running_stats(new_state) for layer in norms_in(new, en.BatchNorm)
    )
    assert not np.allclose(first.mean, second.mean)
    evaluate(old, state, x)


def test_a_rule_without_its_state():
    old, state = eqx.nn.make_with_state(own)()
    with pytest.raises(ValueError, match=r"no state for model.layers\[0\].state_index"):
        convert.replace_norms(
            old, state, rules={OwnBatchNorm: lambda layer: read(layer, state)[0]}
        )


def test_names_in_shared():
    """Functions that tie by the names of fields keep them: the whole is left."""
    pair = [eqx.nn.LayerNorm(3), eqx.nn.LayerNorm(3), eqx.nn.RMSNorm(3)]
    tied = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
    new, lines = left_in([tied, eqx.nn.LayerNorm(3)])
    assert eqx.tree_equal(new[0], tied)
    assert type(new[1]) is en.LayerNorm
    assert [line.partition(": ")[0] for line in lines[1:-1]] == [
        "- equinox.nn.LayerNorm at model[0].pytree[1]",
        "- equinox.nn.LayerNorm at model[0].pytree[0]",
        "- equinox.nn.RMSNorm at model[0].pytree[2]",
    ]
    new[0]()
    # What is tied is no part of the norms here.
    embedding = eqx.nn.Embedding(3, 3, key=KEY)
    parts = [embedding, eqx.nn.LayerNorm(3), eqx.nn.Linear(3, 3, key=KEY)]
    tied = eqx.nn.Shared(parts, lambda p: p[2].weight, lambda p: p[0].weight)
    first, second, third = convert.replace_norms(tied)()
    assert type(second) is en.LayerNorm
    assert third.weight is first.weight


def test_names_in_wrappers():
    """The weights of a norm may be what a wrapper normalises."""
    table = randomize(eqx.nn.LayerNorm((3, 4)))
    model = [
        eqx.nn.WeightNorm(table),
        en.WeightNorm(PreNorm(table, eqx.nn.Linear(3, 3, key=KEY))),
        eqx.nn.LayerNorm(3),
    ]
    new, lines = left_in(model)
    assert eqx.tree_equal(new[:2], model[:2])
    assert [line.partition(": ")[0] for line in lines[1:-1]] == [
        "- equinox.nn.WeightNorm at model[0]",
        "- equinox.nn.LayerNorm at model[0].layer",
        "- equinox.nn.LayerNorm at model[1].layer.norm",
    ]
    with pytest.raises(
        ValueError, match="which has none of that name once it is converted"
    ):
        convert.from_equinox(model[0])


def test_one_of_a_state_is_left():
    """Left with the state it had: of what was tried, nothing is kept."""

    class Both(eqx.Module):
        weight: jax.Array
        norm: BN

    def make():
        linear = eqx.nn.Linear(3, 3, dtype=jnp.complex64, key=KEY)
        tied = [norm(3), eqx.nn.LayerNorm(3)]
        return [
            eqx.nn.SpectralNorm(linear, "weight", key=KEY),
            eqx.nn.Shared(tied, lambda t: t[1].weight, lambda t: t[0].weight),
            norm(3),
        ]

    old, state = eqx.nn.make_with_state(make)()
    (new, new_state), lines = left_in(old, state)
    assert len(lines) == 5
    assert eqx.tree_equal(new[:2], old[:2])
    assert type(new[2]) is en.BatchNorm
    for index in (old[0].uv_index, old[1].pytree[0].batch_state_index):
        assert eqx.tree_equal(new_state.get(index), state.get(index))


def test_norms_in_a_wrapper_of_equinox():
    """`from_equinox` warns of them too."""

    class Normed(eqx.Module):
        weight: jax.Array
        norm: Any

    layer = eqx.nn.WeightNorm(Normed(normal(1, (4, 3)), unknown()))
    with pytest.warns(
        UserWarning, match=r"from_equinox: not every(?s:.*)at model.layer.norm"
    ):
        new = convert.from_equinox(layer)
    assert type(new) is en.WeightNorm
    assert type(new.layer.norm) is eqx.nn.GroupNorm


# -- Dtypes, names of axes, and checkpoints.


ALL = {**STATELESS, **STATEFUL}
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


@every(3)
@pytest.mark.parametrize("x", FLOATS, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("param", FLOATS, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("name", [n for n in ALL if "conv" not in n and n != "ema"])
def test_dtype_as_before(name, param, x):
    """With parameters of any dtype, and a state that is float32 still. (In training, "ema"
    raises in half precision. A convolution takes one dtype.)"""
    make, shape = ALL[name]
    old, state = eqx.nn.make_with_state(make)() if name in STATEFUL else (make(), None)
    old = jax.tree.map(lambda a: a.astype(param) if eqx.is_inexact_array(a) else a, old)
    if state is None:
        new, new_state = convert.from_equinox(old), None
    else:
        new, new_state = convert.from_equinox(old, state)
    x = jnp.zeros((2, *shape), x)

    def dtypes(*args):
        training = eqx.filter_eval_shape(forward, *args, x)[0].dtype
        args = eqx.nn.inference_mode(args[0]), args[1]
        return training, eqx.filter_eval_shape(forward, *args, x)[0].dtype

    found = dtypes(new, new_state)
    if type(new) is not en.BatchNorm:
        assert found == dtypes(old, state)
    else:
        # That of Equinox may be wider in evaluation, as the running statistics are.
        training, evaluation = dtypes(eqx.nn.inference_mode(old, False), state)
        assert found == (training, training)
        assert evaluation in (training, jnp.float32)


def test_integers():
    """Equinox truncates the result."""
    x = jnp.arange(5)
    layer = eqx.nn.LayerNorm(5)
    y = convert.from_equinox(layer)(x)
    assert_close(y, layer(x.astype(jnp.float32)), 1e-5)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, ("batch",)), ("rows", ("rows",)), (("a", "b"), ("a", "b")), ((), None)],
)
def test_axis_name(given, kept):
    """Settings are static: they are chosen when a layer is made."""
    layer, state = eqx.nn.make_with_state(norm)(3)
    new, _ = convert.from_equinox(layer, state, axis_name=given)
    assert new.axis_name == kept
    model, state = eqx.nn.make_with_state(ResNet)(KEY)
    model, _ = convert.replace_norms(model, state, axis_name=given)
    assert {layer.axis_name for layer in norms_in(model, en.BatchNorm)} == {kept}
    assert {layer.axis_name for layer in norms_in(model, *OURS[1:])} == {None}


def test_checkpoints():
    """Files of a model as it was load into what it has become."""

    def make(seed):
        a, b = jax.random.split(jax.random.key(seed))
        return [
            eqx.nn.LayerNorm((3, 4)),
            PreNorm(eqx.nn.RMSNorm(3), eqx.nn.Linear(3, 3, key=a)),
            eqx.nn.GroupNorm(2, 4),
            {"table": eqx.nn.Embedding(3, 3, key=b)},
            eqx.filter_vmap(lambda _: eqx.nn.LayerNorm(3))(jnp.arange(5)),
        ]

    old = randomize(make(0))
    wanted = convert.replace_norms(old)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, old)
    skeletons = {
        "arrays": convert.replace_norms(make(1)),
        "shapes": eqx.filter_eval_shape(lambda: convert.replace_norms(make(1))),
    }
    for skeleton in skeletons.values():
        file.seek(0)
        assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, skeleton), wanted)


@pytest.mark.parametrize("name", [*STATEFUL, "WeightNorm"])
def test_checkpoints_of_other_arrays(name, tmp_path):
    """An error, or these load into the model as it was, which then is converted."""
    make = ALL[name][0]
    old, state = eqx.nn.make_with_state(make)()
    eqx.tree_serialise_leaves(tmp_path / "old.eqx", (randomize(old), state))
    like = eqx.nn.make_with_state(lambda: convert.replace_norms(make()))()
    with pytest.raises((RuntimeError, ValueError, EOFError)):
        eqx.tree_deserialise_leaves(tmp_path / "old.eqx", like)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "old.eqx", (old, state))
    assert eqx.tree_equal(loaded, (randomize(old), state))


def test_several_wrappers_made_under_vmap():
    keys = jax.random.split(jax.random.key(0), 5)
    make = lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=key))  # noqa: E731
    stacked = eqx.filter_vmap(make)(keys)
    with pytest.raises(ValueError, match=r"under `equinox.filter_vmap`, convert them"):
        en.replace_norms(stacked)
    ours = eqx.filter_vmap(en.replace_norms)(stacked)
    x = jnp.ones(3)
    apply = eqx.filter_vmap(lambda layer: layer(x))
    np.testing.assert_allclose(apply(ours), apply(stacked), rtol=1e-5, atol=1e-6)


def test_no_counterpart_for_a_complex_spectral_norm():
    linear = eqx.nn.Linear(3, 4, dtype=jnp.complex64, key=jax.random.key(0))
    layer = eqx.nn.SpectralNorm(linear, "weight", key=jax.random.key(1))
    with pytest.raises(ValueError, match=r"of a complex weight .* no counterpart"):
        convert.from_equinox(layer)
