"""The named axis of a `jax.vmap`, inside `jax.shard_map` too.

JAX has `lax.psum` and `lax.axis_index` for such an axis. Inside `shard_map` with its
default checks they fail. There the type of an array says along which mesh axes it varies,
and a vmapped axis is no mesh axis: `psum` over its name is refused, and `axis_index` in an
inner `jit`, `scan` or `checkpoint` claims to vary along it.

The primitives below take no name. Each takes an array and the member's index, which is
`lax.axis_index(name)` computed outside every custom rule. The one `vmap` that owns the name
batches the index; there the primitives do their work. Any other `vmap` batches the array
alone and leaves them as they are. (`jax.custom_batching.custom_vmap` could say the same,
but JAX cannot transpose it: `vmap(grad(f), axis_name=...)` would fail.)
"""

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ._sharding import is_sharded


def _primitive(name, at_owner):
    primitive = Primitive(name)

    def unowned(x, index):
        return x

    def batch(operands, dims):
        x, index = operands
        x_dim, index_dim = dims
        if index_dim is None:
            return primitive.bind(x, index), x_dim
        return at_owner(x, x_dim, index, index_dim)

    primitive.def_impl(unowned)
    primitive.def_abstract_eval(unowned)
    mlir.register_lowering(primitive, mlir.lower_fun(unowned, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    return primitive


def _sum_at_owner(x, x_dim, index, index_dim):
    if x_dim is None:
        return x * index.shape[index_dim], None
    return jnp.sum(x, axis=x_dim), None


def _first_at_owner(x, x_dim, index, index_dim):
    if x_dim is None:
        return x, None
    if is_sharded(x, (x_dim,)):
        return jnp.mean(x, axis=x_dim), None
    return lax.index_in_dim(x, 0, x_dim, keepdims=False), None


def _index_at_owner(x, x_dim, index, index_dim):
    return index, index_dim


_sum_p = _primitive("vmapped_sum", _sum_at_owner)
_first_p = _primitive("vmapped_first", _first_at_owner)
_index_p = _primitive("vmapped_index", _index_at_owner)


def _sum_jvp(primals, tangents):
    x, index = primals
    t, _ = tangents
    out = _sum_p.bind(x, index)
    return out, t if type(t) is ad.Zero else _sum_p.bind(t, index)


def _sum_transpose(ct, x, index):
    # Each member receives the sum. So its cotangent is the sum of theirs.
    return ct if type(ct) is ad.Zero else _sum_p.bind(ct, index), None


ad.primitive_jvps[_sum_p] = _sum_jvp
ad.primitive_transposes[_sum_p] = _sum_transpose


def vmapped_sum(x: Array, index: Array) -> Array:
    """The sum of `x` over all members of the axis that `index` counts."""
    return _sum_p.bind(x, index)


def vmapped_first(x: Array, index: Array) -> Array:
    """The first member's `x`; or the mean of all members' where JAX refuses to slice,
    along an axis that is sharded on an `Explicit` mesh. There is no derivative."""
    return _first_p.bind(x, index)


def unvarying_index(index: Array) -> Array:
    """The index, typed as one that varies along no named axis. (It is a zero, which the
    `vmap` that owns the name replaces.)"""
    return _index_p.bind(jnp.zeros((), index.dtype), index)
