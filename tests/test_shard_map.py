import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equinox.nn import State
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_norms as en

from .helpers import assert_close, clone, make_mesh, normal


class Network(eqx.Module):
    """Arrays, and leaves of every other kind: functions, a string, a flag, `None`."""

    linear: eqx.nn.Linear
    norm: en.BatchNorm
    activation: Any
    name: str
    nothing: None

    def __init__(self, axis_name):
        self.linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
        self.norm = en.BatchNorm(4, momentum=0.5, axis_name=axis_name)
        self.activation = jax.nn.tanh
        self.name = "network"
        self.nothing = None

    def __call__(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, state = self.norm(self.linear(x), state)
        return self.activation(x), state


def make_network(axis_name: tuple[str, ...] = ("batch", "d")) -> tuple[Network, State]:
    return eqx.nn.make_with_state(Network)(axis_name)


def forward(model, state, x):
    y, state = jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)
    return y, state, model


def loss(model, state, x):
    y, _, _ = forward(model, state, x)
    return jnp.mean(jnp.square(y - 0.3))


def expected(f, x):
    """What one device with all the data gets."""
    return f(*make_network(("batch",)), x)


@pytest.mark.parametrize("named", [False, True], ids=["set_mesh", "mesh"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_whole_models_go_in_and_out(kind, named):
    mesh = make_mesh(kind, d=4)
    x = jax.device_put(normal(1, (8, 3)), NamedSharding(mesh, P("d")))
    f = eqx.filter_jit(
        en.filter_shard_map(
            forward,
            mesh=mesh if named else None,
            in_specs=(P(), P(), P("d")),
            out_specs=(P("d"), P(), P()),
        )
    )
    model, state = make_network()
    with contextlib.nullcontext() if named else jax.set_mesh(mesh):
        y, new_state, same_model = f(model, clone(state), x)
    assert_close((y, new_state, same_model), expected(forward, normal(1, (8, 3))))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("d")), y.ndim)
    assert eqx.tree_equal(same_model, model)
    assert same_model.activation is model.activation
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradient_taken_outside(kind, check_vma):
    mesh = make_mesh(kind, d=4)
    x = jax.device_put(normal(1, (8, 3)), NamedSharding(mesh, P("d")))

    @en.filter_shard_map(
        mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P(), check_vma=check_vma
    )
    def mean_loss(model, state, x):
        return jax.lax.pmean(loss(model, state, x), "d")

    got = eqx.filter_jit(eqx.filter_value_and_grad(mean_loss))(*make_network(), x)
    assert_close(got, expected(eqx.filter_value_and_grad(loss), normal(1, (8, 3))))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradient_taken_inside(kind):
    mesh = make_mesh(kind, d=4)
    x = jax.device_put(normal(1, (8, 3)), NamedSharding(mesh, P("d")))

    @eqx.filter_jit
    @en.filter_shard_map(mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P())
    def mean_loss_and_grad(model, state, x):
        def mean_loss(model, state, x):
            return jax.lax.pmean(loss(model, state, x), "d")

        return eqx.filter_value_and_grad(mean_loss)(model, state, x)

    value, grads = mean_loss_and_grad(*make_network(), x)
    # What `filter_grad` leaves `None` is so outside as well.
    assert grads.activation is None
    assert_close(
        (value, grads), expected(eqx.filter_value_and_grad(loss), normal(1, (8, 3)))
    )


def test_arrays_of_one_argument_sharded_differently():
    linear = eqx.nn.Linear(3, 8, key=jax.random.key(0))
    specs = jax.tree.map(lambda a: P("d") if a.ndim == 2 else P(), linear)

    @en.filter_shard_map(mesh=make_mesh(d=4), in_specs=(specs, P()), out_specs=P("d"))
    def multiply(linear, x):
        assert linear.weight.shape == (2, 3)
        assert linear.bias.shape == (8,)
        return linear.weight @ x

    x = normal(1, (3,))
    assert_close(multiply(linear, x), linear.weight @ x)


def test_what_counts_as_an_array():
    def f(jax_array, numpy_array, number, text):
        assert jax_array.shape == numpy_array.shape == (2,)
        assert type(number) is float
        return jax_array + numpy_array, number, text, None

    mapped = en.filter_shard_map(f, mesh=make_mesh(d=4), in_specs=P("d"), out_specs=P("d"))
    x = np.arange(8.0, dtype=np.float32)
    total, *others = mapped(jnp.asarray(x), x, 0.5, "text")
    np.testing.assert_array_equal(total, 2 * x)
    assert others == [0.5, "text", None]


def test_some_axes_only():
    mesh = make_mesh(a=2, b=2)

    @jax.jit
    @en.filter_shard_map(mesh=mesh, in_specs=P("a"), out_specs=P(), axis_names={"a"})
    def total(x):
        assert x.shape == (4,)
        return jax.lax.psum(x.sum(), "a")

    assert total(jnp.ones(8)) == 8


def test_jitted_once():
    traces = []

    @eqx.filter_jit
    @en.filter_shard_map(
        mesh=make_mesh(d=4), in_specs=(P(), P(), P("d")), out_specs=(P("d"), P(), P())
    )
    def f(model, state, x):
        traces.append(None)
        return forward(model, state, x)

    model, state = make_network()
    f(model, clone(state), normal(1, (8, 3)))
    number = len(traces)
    f(model, clone(state), normal(2, (8, 3)))
    assert len(traces) == number > 0
    # Another flag is another program.
    f(eqx.nn.inference_mode(model), clone(state), normal(2, (8, 3)))
    assert len(traces) > number


def test_the_name_and_the_docstring_remain():
    def f(x):
        """A docstring."""
        return x

    mapped = en.filter_shard_map(f, mesh=make_mesh(d=4), in_specs=P(), out_specs=P())
    assert mapped.__name__ == "f"
    assert mapped.__doc__ == "A docstring."


def test_a_model_can_be_the_function():
    linear = eqx.nn.Linear(3, 3, use_bias=False, key=jax.random.key(0))
    x = normal(1, (4, 3))
    mapped = en.filter_shard_map(
        eqx.filter_vmap(linear), mesh=make_mesh(d=4), in_specs=P("d"), out_specs=P("d")
    )
    assert_close(mapped(x), x @ linear.weight.T)


def test_bad_specifications():
    model, state = make_network()
    f = en.filter_shard_map(
        forward,
        mesh=make_mesh(d=4),
        in_specs=(P(), P(), P("d")),
        out_specs=(P("d"), P(), P()),
    )
    # JAX names the argument as `forward` does.
    with pytest.raises(ValueError, match=r"bound to forward's parameter 'x'"):
        f(model, clone(state), normal(1, (6, 3)))
    with pytest.raises(ValueError, match="different lengths of tuple"):
        f(model, clone(state))
    with pytest.raises(ValueError, match="out_specs which require replication"):
        en.filter_shard_map(
            lambda x: x, mesh=make_mesh(d=4), in_specs=P("d"), out_specs=P()
        )(normal(1, (8, 3)))
