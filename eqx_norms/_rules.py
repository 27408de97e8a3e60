"""Derivative rules that keep nothing but what they are given."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def lean(
    primal: Callable[..., Any],
    tangent: Callable[..., Any],
    residuals: Callable[[tuple[Any, ...], Any], Any],
    split: Callable[..., Sequence[tuple[Any, ...]]] = lambda *tangents: [tangents],
) -> Callable[..., Any]:
    """`primal(spec, *args)` with its derivative given by hand.

    `tangent(spec, residuals, *tangents)` is linear in the tangents, of which those that
    are zero come as `None`. `residuals(args, outputs)` says what it needs: this, and
    nothing computed on the way, is kept for the backward pass.

    `split(*tangents)` divides them into parts, whose derivatives add up to that of all. In
    the backward pass each part computes what it needs by itself, and shares it with none.

    A `jax.custom_vjp` keeps as little, but has no forward mode and no second derivative.
    Here `jax.checkpoint` around a linear function has JAX transpose that function when the
    time comes, from its arguments alone. The names of axes must be resolved outside: JAX
    does it too late in a custom rule when the derivative is taken outside an inner `jit`.
    """

    call = jax.custom_jvp(primal, nondiff_argnums=(0,))

    def rule(spec, args, tangents):
        out = call(spec, *args)

        @jax.checkpoint
        def linear(kept, tangents):
            return tangent(spec, kept, *tangents)

        tangents = jax.tree.map(
            lambda t: None if isinstance(t, SymbolicZero) else t,
            tangents,
            is_leaf=lambda t: isinstance(t, SymbolicZero),
        )
        kept = residuals(args, out)
        parts = [linear(kept, part) for part in split(*tangents)]
        return out, functools.reduce(functools.partial(jax.tree.map, operator.add), parts)

    call.defjvp(rule, symbolic_zeros=True)
    return call
