"""What the layers' programs read and write on a GPU and a TPU: compiled, not run.

    python -m tests.benchmarks.compiled [--platform gpu,tpu] [--layers LayerNorm,BatchNorm]
                                        [--dtype float32,bfloat16] [--markdown]

XLA compiles ahead of time for an NVIDIA H200 and a TPU v5e, which need not be there.
"""

import argparse
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


# Before JAX is imported. No accelerator is used, and none asked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.benchmarks import hlo, speed
from tests.benchmarks.rivals import Functional, available, ours
from tests.benchmarks.tables import show, track


# As large as what a TPU's memory on the chip (128 MiB) does not hold.
SHAPES = {"NC": (131072, 1024), "NCHW": (128, 256, 64, 64), "NHWC": (128, 64, 64, 256)}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DEVICES = {"gpu": "NVIDIA H200", "tpu": "TPU v5e"}
H200 = pathlib.Path(__file__).with_name("h200.txtpb")


@functools.cache
def mesh(platform: str, number: int = 1) -> Mesh:
    """Of described devices, along an axis `devices`."""
    if platform == "tpu":
        described = topologies.get_topology_desc(
            topology_name="v5e:2x4" if number > 4 else "v5e:2x2", platform="tpu"
        )
    else:
        described = topologies.get_topology_desc(
            topology_name="h200",
            platform="cuda",
            target_config=H200.read_text(),
            topology=f"1x1x{number}",
        )
    return Mesh(np.array(described.devices[:number]), ("devices",))


class Program(NamedTuple):
    cost: hlo.Cost
    # By the compiler's estimate, on a TPU.
    seconds: float | None
    # Bytes of temporary memory.
    temporary: int


def compile(platform: str, f: Any, *args: Any) -> Program:
    """Of arrays that are described and lie on one device."""
    on = NamedSharding(mesh(platform), P())
    args = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on), args
    )
    # A GPU that is not there cannot be asked which of several kernels is the fastest.
    options = {"xla_gpu_autotune_level": 0} if platform == "gpu" else {}
    compiled = jax.jit(f).lower(*args).compile(options)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    estimates = compiled.cost_analysis() or {}
    return Program(
        hlo.count(text), estimates.get("optimal_seconds"), memory.temp_size_in_bytes
    )


def cells(layers: Sequence[str], dtypes: Sequence[str]) -> Iterator[speed.Cell]:
    for case in (case for case in speed.CASES if case.name in layers):
        for layout in speed.layouts(case):
            for dtype in dtypes:
                yield speed.Cell(case, SHAPES[layout], layout, DTYPES[dtype])


class Passes(NamedTuple):
    """Functions, each with the arrays that it takes."""

    inference: tuple[Any, ...]
    forward: tuple[Any, ...]
    backward: tuple[Any, ...]
    # Bytes besides the parameters.
    kept: int


def passes(layer: Functional, x: jax.ShapeDtypeStruct) -> Passes:
    arrays, static = eqx.partition(layer.state, eqx.is_array)

    def inference(params, arrays, x):
        y, new = layer.apply(params, eqx.combine(arrays, static), x)
        return y, eqx.filter(new, eqx.is_array)

    def training(params, arrays, x):
        return jax.vjp(
            lambda params, x: inference(params, arrays, x), params, x, has_aux=True
        )

    args = (layer.params, arrays, x)
    closed, (y, residuals, _) = jax.make_jaxpr(training, return_shape=True)(*args)
    run = jax.extend.core.jaxpr_as_fun(closed)
    results = closed.jaxpr.outvars
    inputs = dict(zip(map(id, closed.jaxpr.invars), jax.tree.leaves(args), strict=True))
    # What is an input already is not written.
    written = [at for at, result in enumerate(results) if id(result) not in inputs]
    leaves, structure = jax.tree.flatten(residuals)
    start = len(jax.tree.leaves(y))
    kept = {id(result): result.aval for result in results[start : start + len(leaves)]}
    order = [id(result) for result in results[start : start + len(leaves)]]

    def forward(*leaves):
        results = run(*leaves)
        return [results[at] for at in written]

    def backward(kept, dy):
        return jax.tree.unflatten(structure, [kept[key] for key in order])(dy)

    of_params = set(map(id, closed.jaxpr.invars[:-1]))
    return Passes(
        (inference, *args),
        (forward, *inputs.values()),
        (backward, kept, y),
        sum(hlo_bytes(leaf) for key, leaf in kept.items() if key not in of_params),
    )


def hlo_bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def libraries(cell: speed.Cell) -> dict[str, Functional]:
    args = (cell.case, cell.num_features, cell.dtype, cell.layout)
    first, *others = available(*args).items()
    return dict([first, ("vmap", ours(*args, per_example=True)), *others])


def records(
    platform: str, layers: Sequence[str], dtypes: Sequence[str]
) -> list[dict[str, Any]]:
    made = []
    for cell in track(list(cells(layers, dtypes)), platform):
        x = jax.ShapeDtypeStruct(cell.shape, cell.dtype)
        for library, layer in libraries(cell).items():
            found = passes(layer, x)
            record = {
                "layer": cell.case.name,
                "shape": list(cell.shape),
                "layout": cell.layout,
                "dtype": jnp.dtype(cell.dtype).name,
                "library": library,
                "kept": found.kept / hlo_bytes(x),
            }
            for name in ("inference", "forward", "backward"):
                program = compile(platform, *getattr(found, name))
                record[name] = {
                    "units": program.cost.nbytes / hlo_bytes(x),
                    "kernels": program.cost.kernels,
                    "conditionals": program.cost.conditionals,
                    "microseconds": program.seconds and program.seconds * 1e6,
                }
            made.append(record)
    return made


def table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    def units(given):
        text = f"{given['units']:.2f} ({given['kernels']})"
        return text + " if" * given["conditionals"]

    names = ("inference", "forward", "backward")
    columns = ["layer", "shape", "dtype", "library", *names, "both", "kept"]
    timed = records[0]["inference"]["microseconds"] is not None
    columns += ["us", "us", "us"] * timed
    rows = []
    for each in records:
        row = [each["layer"], speed.label(each), each["dtype"], each["library"]]
        row += [units(each[name]) for name in names]
        row.append(f"{each['forward']['units'] + each['backward']['units']:.2f}")
        row.append(f"{each['kept']:.2f}")
        if timed:
            row += [f"{each[name]['microseconds']:.0f}" for name in names]
        rows.append(row)
    return columns, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in speed.CASES]
    parser.add_argument("--platform", default="gpu,tpu")
    parser.add_argument("--layers", default=",".join(names))
    parser.add_argument("--dtype", default=",".join(DTYPES))
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    for platform in arguments.platform.split(","):
        made = records(platform, arguments.layers.split(","), arguments.dtype.split(","))
        show(DEVICES[platform], *table(made), text=4, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
