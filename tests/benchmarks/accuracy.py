"""Largest errors of each library's layers against float64.

    python -m tests.benchmarks.accuracy [--markdown]

The input is rounded to its dtype first, so an error is the layer's alone. PyTorch's column
is there if PyTorch is.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.tables import show
from tests.helpers import NORMS, Norm, call, reference


EPSILON = 1e-6
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# How many statistics there are, and how many positions go into each.
SHAPE = (32, 512)

HAS_TORCH = importlib.util.find_spec("torch") is not None


def make_data() -> dict[str, np.ndarray]:
    """In float64, one statistic a row."""
    z = np.random.default_rng(0).standard_normal(SHAPE)
    data = {f"mean {mean:g}": mean + z for mean in (0.0, 2.0, 1e2, 1e3, 1e4, 1e5, 1e6)}
    data["deviation 1e-3"] = 1e-3 * z
    data["deviation 1e3"] = 1e3 * z
    outlier = z.copy()
    outlier[:, 0] = 1e4
    data["outlier first"] = outlier
    data["constant"] = np.full(SHAPE, 3.3)
    data["subnormal"] = np.round(20 * z)  # in units of the smallest subnormal number
    data["magnitude 1e18"] = 1e18 * z
    return data


DATA = make_data()


def as_dtype(name: str, dtype: Any) -> np.ndarray:
    data = DATA[name]
    if name == "subnormal":
        data = data * float(jnp.finfo(dtype).smallest_subnormal)
    return data.astype(jnp.dtype(dtype))


def holds(dtype: Any, name: str) -> bool:
    """Whether a dtype can hold the data."""
    info, data = jnp.finfo(dtype), DATA[name]
    # With a rounding as large as the deviation, only the mean would be left.
    too_coarse = name.startswith("mean") and data.mean() * float(info.eps) > 1
    return not too_coarse and np.abs(data).max() <= float(info.max)


def names(dtype: Any) -> list[str]:
    return [name for name in DATA if holds(dtype, name)]


def lay_out(case: Norm, data: np.ndarray) -> np.ndarray:
    """A batched input of three axes in which each row of the data is one statistic's."""
    reduced = case.reduction_axes(3)
    kept = [axis for axis in range(3) if axis not in reduced]
    number, size = data.shape

    def split(size, axes):
        return [size] if len(axes) == 1 else [4, size // 4]

    parts = data.reshape(*split(number, kept), *split(size, reduced))
    return np.ascontiguousarray(np.transpose(parts, np.argsort([*kept, *reduced])))


def ours(case: Norm, **kwargs: Any) -> Callable[[np.ndarray], np.ndarray]:
    def f(x):
        layer, state = case.build(x.shape[-1], epsilon=EPSILON, dtype=x.dtype, **kwargs)
        return np.asarray(eqx.filter_jit(call)(layer, state, jnp.asarray(x)))

    return f


def flax(case: Norm) -> Callable[[np.ndarray], np.ndarray] | None:
    from flax import nnx

    make = getattr(nnx, case.name, None)
    if make is None:
        return None

    def f(x):
        kwargs = {"epsilon": EPSILON, "dtype": x.dtype, **case.kwargs}
        layer = make(x.shape[-1], **kwargs, rngs=nnx.Rngs(0))
        return np.asarray(nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x)))

    return f


def equinox(case: Norm) -> Callable[[np.ndarray], np.ndarray] | None:
    def per_position(make):
        def f(x):
            layer = make(x.shape[-1], eps=EPSILON)
            return np.asarray(eqx.filter_jit(jax.vmap(jax.vmap(layer)))(jnp.asarray(x)))

        return f

    def batch_norm(x):
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            x.shape[-1], axis_name="batch", eps=EPSILON, mode="batch", dtype=x.dtype
        )
        f = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        y, _ = eqx.filter_jit(f)(jnp.moveaxis(jnp.asarray(x), -1, 1), state)
        return np.asarray(jnp.moveaxis(y, 1, -1))

    return {
        "LayerNorm": per_position(eqx.nn.LayerNorm),
        "RMSNorm": per_position(eqx.nn.RMSNorm),
        "BatchNorm": batch_norm,
    }.get(case.name)


def pytorch(case: Norm) -> Callable[[np.ndarray], np.ndarray] | None:
    if not HAS_TORCH:
        return None
    import torch
    import torch.nn.functional as F

    def channels_second(layer):
        return lambda x: layer(x.movedim(-1, 1)).movedim(1, -1)

    layers = {
        "LayerNorm": lambda x: F.layer_norm(x, x.shape[-1:], eps=EPSILON),
        "RMSNorm": lambda x: F.rms_norm(x, x.shape[-1:], eps=EPSILON),
        "BatchNorm": channels_second(
            lambda x: F.batch_norm(x, None, None, training=True, eps=EPSILON)
        ),
        "GroupNorm": channels_second(
            lambda x: F.group_norm(x, case.kwargs.get("num_groups", 32), eps=EPSILON)
        ),
        "InstanceNorm": channels_second(lambda x: F.instance_norm(x, eps=EPSILON)),
    }
    layer = layers.get(case.name)
    if layer is None:
        return None

    def f(x):
        dtype = getattr(torch, x.dtype.name)
        y = layer(torch.from_numpy(x.astype(np.float32)).to(dtype))
        return y.to(torch.float32).numpy().astype(x.dtype)

    return f


def libraries(case: Norm) -> dict[str, Callable[[np.ndarray], np.ndarray] | None]:
    return {
        "eqx_norms fast": ours(case, use_fast_variance=True),
        "eqx_norms exact": ours(case, use_fast_variance=False),
        "flax": flax(case),
        "equinox": equinox(case),
        "torch": pytorch(case),
    }


def answer(case: Norm, x: np.ndarray) -> np.ndarray:
    axes = case.reduction_axes(x.ndim)
    return reference(x, axes, **case.formula, epsilon=EPSILON)[0]


def error(y: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute error; NaN is infinitely wrong where a number is expected."""
    difference = np.abs(y.astype(np.float64) - expected)
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max())


class Row(NamedTuple):
    layer: str
    dtype: str
    data: str
    # Of the largest element of the float64 answer, to the output's dtype.
    rounding: float
    errors: dict[str, float | None]


def rows(case: Norm) -> Iterator[Row]:
    columns = libraries(case)
    for dtype in DTYPES:
        for name in names(dtype):
            x = lay_out(case, as_dtype(name, dtype))
            expected = answer(case, x)
            rounding = error(expected.astype(x.dtype), expected)
            errors = {
                library: None if f is None else error(f(x), expected)
                for library, f in columns.items()
            }
            yield Row(case.name, jnp.dtype(dtype).name, name, rounding, errors)


def to_text(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="for a README")
    markdown = parser.parse_args().markdown
    # NumPy's and PyTorch's remarks on overflow; the table says as much.
    warnings.simplefilter("ignore")
    columns = ["layer", "dtype", "data", "rounding", *libraries(NORMS[0])]
    table = (
        [*row[:3], to_text(row.rounding), *map(to_text, row.errors.values())]
        for case in NORMS
        for row in rows(case)
    )
    title = f"Largest absolute error against float64, {SHAPE[1]} positions a statistic"
    show(title, columns, table, text=3, markdown=markdown)


if __name__ == "__main__":
    main()
