"""What the layers' programs read and write on a GPU and a TPU: compiled, not run.

    python -m tests.benchmarks.compiled [--platform gpu,tpu] [--parts layers,blocks,devices]
                                        [--layers LayerNorm,BatchNorm]
                                        [--dtype float32,bfloat16]
                                        [--json FILE] [--markdown]

XLA compiles for an NVIDIA H200 and a TPU v5e as they are described to it: neither need be
there. How bytes and kernels are counted is said in `hlo.py`. A platform whose compiler is
not installed is left out. While one works on a layer, a few seconds are enough:

    python -m tests.benchmarks.compiled --platform gpu --parts layers --layers LayerNorm

layers: inference is the forward pass alone, in BatchNorm too with the batch's statistics.
Training is two programs: the forward pass, which also writes what is kept for the backward
pass, and the backward pass, which reads it. Both are one program too, which need not write
all of that. A TPU's compiler estimates the time of each: the sum over the kernels of what
takes longer, arithmetic or reading and writing.

blocks: a step of training of residual blocks, `x + relu(norm(x) @ w_in) @ w_out`, with the
update of all parameters, in the last dtype that is asked for. Unrolled blocks stand one
after another in the program, scanned ones are a loop. The estimate above does not know how
often a loop runs; given are the cycles that the compiler notes beside each kernel.

devices: the collectives in BatchNorm's programs over eight devices, the batch split among
them: under `jax.jit` alone, which puts them in by itself, and under `jax.shard_map`.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any


if __name__ == "__main__":
    # JAX, once imported, is not to look for an accelerator; and as none is used, several
    # programs may compile for one at the same time.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from tests.benchmarks import hlo, speed
from tests.benchmarks.rivals import (
    Functional,
    available,
    count_bytes,
    ours,
    passes,
    versions,
)
from tests.benchmarks.tables import show, track


PLATFORMS = {"gpu": "NVIDIA H200", "tpu": "TPU v5e"}
H200 = pathlib.Path(__file__).with_name("h200.txtpb")
# A GPU that is not there cannot be asked which of several kernels is the fastest.
OPTIONS = {"gpu": {"xla_gpu_autotune_level": 0}, "tpu": {}}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "equinox", "flax")

# Arrays are larger than a TPU's memory on the chip, 128 MiB.
SHAPES = {"NC": (131072, 1024), "NCHW": (128, 256, 64, 64), "NHWC": (128, 64, 64, 256)}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
WHOLE = P()
PROGRAMS = ("inference", "forward", "backward", "both")
BLOCKS, TOKENS, WIDTH, HIDDEN = 3, 65536, 1024, 4096
DEVICES = 8


@functools.cache
def mesh(platform: str, number: int = 1) -> Mesh:
    """Of described devices, along the axis `devices`."""
    if platform == "tpu":
        name = "v5e:2x2" if number == 1 else "v5e:2x4"
        found = topologies.get_topology_desc(topology_name=name, platform="tpu")
    else:
        found = topologies.get_topology_desc(
            topology_name="h200",
            platform="cuda",
            target_config=H200.read_text(),
            topology=f"1x1x{number}",
        )
    return Mesh(np.array(found.devices[:number]), ("devices",))


def place(tree: Any, mesh: Mesh, spec: P = WHOLE) -> Any:
    """Descriptions of such arrays on these devices."""
    on = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on), tree
    )


def build(platform: str, f: Callable[..., Any], *args: Any) -> tuple[Compiled, hlo.Cost]:
    """For the devices on which the arguments are."""
    program = jax.jit(f).lower(*args).compile(OPTIONS[platform])
    text = program.as_text()
    assert text is not None
    return program, hlo.count(text)


def describe(cost: hlo.Cost, unit: int) -> dict[str, Any]:
    return {
        "units": cost.nbytes / unit,
        "kernels": cost.kernels,
        "conditionals": cost.conditionals,
    }


def libraries(cell: speed.Cell) -> dict[str, Functional]:
    args = (cell.case, cell.num_features, cell.dtype, cell.layout)
    first, *others = available(*args).items()
    return dict([first, ("vmap", ours(*args, per_example=True)), *others])


def layer_records(
    platform: str, layers: Sequence[str], dtypes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    cells = [
        speed.Cell(case, SHAPES[layout], layout, DTYPES[dtype])
        for case in speed.CASES
        if case.name in layers
        for layout in speed.layouts(case)
        for dtype in dtypes
    ]
    for cell in track(cells, f"{platform}: layers"):
        x = jax.ShapeDtypeStruct(cell.shape, cell.dtype)
        unit = count_bytes(x)
        for library, layer in libraries(cell).items():
            found = passes(layer, x)
            record = {
                "platform": platform,
                "layer": cell.case.name,
                "shape": list(cell.shape),
                "layout": cell.layout,
                "dtype": jnp.dtype(cell.dtype).name,
                "library": library,
                "kept": found.kept / unit,
            }
            programs = {name: getattr(found, name) for name in PROGRAMS[:-1]}
            programs["both"] = (layer.both, layer.params, layer.state, x, x)
            for name, (f, *args) in programs.items():
                program, cost = build(platform, f, *place(args, mesh(platform)))
                seconds = (program.cost_analysis() or {}).get("optimal_seconds")
                record[name] = describe(cost, unit)
                # A call of which the compiler knows no cost counts as minus one second.
                record[name]["microseconds"] = seconds and seconds % 1 * 1e6
            yield record


def step_of_blocks(
    layer: Functional, dtype: Any, *, scanned: bool
) -> tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]:
    """A step of training, with the parameters and the input that it takes."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def block(x, leaves):
        params, w_in, w_out = leaves
        y, _ = layer.apply(params, layer.state, x)
        return x + jax.nn.relu(y @ w_in) @ w_out, None

    def loss(leaves, x):
        if scanned:
            x, _ = jax.lax.scan(block, x, leaves)
        else:
            for each in leaves:
                x, _ = block(x, each)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def step(leaves, x):
        value, gradients = jax.value_and_grad(loss)(leaves, x)
        return value, jax.tree.map(lambda leaf, d: leaf - 0.1 * d, leaves, gradients)

    leaves = (layer.params, array(WIDTH, HIDDEN), array(HIDDEN, WIDTH))
    if scanned:
        leaves = jax.tree.map(lambda leaf: array(BLOCKS, *leaf.shape), leaves)
    else:
        leaves = [leaves] * BLOCKS
    return step, leaves, array(TOKENS, WIDTH)


def block_records(
    platform: str, layers: Sequence[str], dtype: str
) -> Iterator[dict[str, Any]]:
    cases = [case for case in speed.CASES if case.on_vectors and not case.stateful]
    programs = [
        (case, library, layer, way)
        for case in cases
        if case.name in layers
        for library, layer in available(case, WIDTH, DTYPES[dtype]).items()
        for way in ("unrolled", "scanned")
    ]
    for case, library, layer, way in track(programs, f"{platform}: blocks"):
        step, leaves, x = step_of_blocks(layer, DTYPES[dtype], scanned=way == "scanned")
        program, cost = build(platform, step, *place((leaves, x), mesh(platform)))
        memory = program.memory_analysis()
        assert memory is not None
        yield {
            "platform": platform,
            "layer": case.name,
            "dtype": dtype,
            "blocks": way,
            "library": library,
            **describe(cost, count_bytes(x)),
            "temporary": memory.temp_size_in_bytes / count_bytes(x),
            "cycles": cost.cycles or None,
        }


def device_records(platform: str, layers: Sequence[str]) -> Iterator[dict[str, Any]]:
    on, split = mesh(platform, DEVICES), P("devices")
    x = place(jax.ShapeDtypeStruct(SHAPES["NC"], jnp.float32), on, split)

    def sent(f, *args):
        try:
            _, cost = build(platform, f, *args)
        except (TypeError, ValueError) as error:
            return str(error)
        return {"collectives": cost.collectives, "conditionals": cost.conditionals}

    programs = [
        (case, way)
        for case in speed.CASES
        if case.stateful and case.name in layers
        for way in ("jit", "shard_map")
    ]
    for case, way in track(programs, f"{platform}: devices"):
        if way == "shard_map":
            case = replace(
                case,
                kwargs={"axis_name": "devices"},
                per_example={"axis_name": ("devices", "batch")},
            )
        cell = speed.Cell(case, x.shape, "NC", x.dtype)
        for library, layer in libraries(cell).items():
            if way == "shard_map":
                specs: dict[str, Any] = {
                    "in_specs": (WHOLE, WHOLE, split),
                    "out_specs": (split, WHOLE),
                }
                layer = layer._replace(apply=jax.shard_map(layer.apply, mesh=on, **specs))
            args = (*place((layer.params, layer.state), on), x)
            yield {
                "platform": platform,
                "layer": case.name,
                "way": way,
                "library": library,
                "forward": sent(layer.apply, *args),
                "both": sent(layer.both, *args, x),
            }


Table = tuple[list[str], list[list[str]]]


def text_of(given: dict[str, Any]) -> str:
    return f"{given['units']:.2f} ({given['kernels']})" + " if" * given["conditionals"]


def without_empty(columns: list[str], rows: list[list[str]]) -> Table:
    """Without the columns in which nothing stands."""
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def table_of_layers(records: list[dict[str, Any]]) -> Table:
    columns = ["layer", "shape", "dtype", "library", *PROGRAMS, "training", "kept"]
    columns += [f"{name}, us" for name in PROGRAMS]
    rows = []
    for each in records:
        given = [each[name] for name in PROGRAMS]
        row = [each["layer"], speed.label(each), each["dtype"], each["library"]]
        row += map(text_of, given)
        row.append(f"{each['forward']['units'] + each['backward']['units']:.2f}")
        row.append(f"{each['kept']:.2f}")
        times = [one["microseconds"] for one in given]
        rows.append(row + ["" if time is None else f"{time:.0f}" for time in times])
    return without_empty(columns, rows)


def table_of_blocks(records: list[dict[str, Any]]) -> Table:
    names = ["layer", "dtype", "blocks", "library"]
    columns = [*names, "read and written", "temporary memory", "million cycles"]
    rows = []
    for each in records:
        row = [each[name] for name in names]
        row += [text_of(each), f"{each['temporary']:.2f}"]
        rows.append([*row, f"{each['cycles'] / 1e6:.1f}" if each["cycles"] else ""])
    return without_empty(columns, rows)


def table_of_devices(records: list[dict[str, Any]]) -> Table:
    def collectives(given):
        if isinstance(given, str):
            return "raises"
        texts = [
            f"{number} {kind} ({nbytes / 1024:.1f} KiB)"
            for kind, (number, nbytes) in sorted(given["collectives"].items())
        ]
        texts += [f"{given['conditionals']} conditional"] * bool(given["conditionals"])
        return ", ".join(texts) or "none"

    columns = ["layer", "way", "library", "forward", "forward and backward"]
    rows = [
        [each["layer"], each["way"], each["library"]]
        + [collectives(each[name]) for name in ("forward", "both")]
        for each in records
    ]
    return columns, rows


# By part: the title, the table, and how many of its columns are text.
TABLES = {
    "layers": ("bytes read and written", table_of_layers, 4),
    "blocks": (f"a step of training of {BLOCKS} blocks", table_of_blocks, 4),
    "devices": (f"what {DEVICES} devices send", table_of_devices, 5),
}
LEGEND = """
Bytes read and written, kept, and of temporary memory are in units of the input's. Beside
them the number of kernels, and "if" where there is a conditional. training: forward and
backward. vmap: eqx_norms, one example inside `jax.vmap`. us: the compiler's estimate. KiB:
what each device hands over.
"""


CHOICES = {
    "--platform": list(PLATFORMS),
    "--parts": list(TABLES),
    "--layers": [case.name for case in speed.CASES],
    "--dtype": list(DTYPES),
}


def parse(
    argv: list[str] | None,
    choices: Mapping[str, Collection[str]] = CHOICES,
    name: str = "compiled",
    about: str | None = __doc__,
) -> argparse.Namespace:
    """Of each option some of its choices, with commas in between; by default all."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(option, known):
        def some(text):
            unknown = sorted(set(text.split(",")) - set(known))
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown} are none of {list(known)}")
            return text.split(",")

        parser.add_argument(option, type=some, default=list(known), help=", ".join(known))

    for option, known in choices.items():
        add(option, known)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    arguments = parser.parse_args(argv)
    arguments.command = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    return arguments


def why_not(platform: str) -> str | None:
    """The reason why there is no compiling for it."""
    try:
        build(platform, jnp.tanh, place(jnp.ones(8), mesh(platform)))
    except Exception as error:  # Each platform has errors of its own.
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def about_run(
    arguments: argparse.Namespace, start: float, packages: Sequence[str]
) -> dict[str, Any]:
    return {
        "command": arguments.command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start),
        "versions": versions(packages),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    results: dict[str, Any] = {part: [] for part in arguments.parts}
    for platform in arguments.platform:
        if reason := why_not(platform):
            print(f"{PLATFORMS[platform]} is left out: {reason}")
            continue
        makers = {
            "layers": partial(layer_records, dtypes=arguments.dtype),
            "blocks": partial(block_records, dtype=arguments.dtype[-1]),
            "devices": device_records,
        }
        for part in arguments.parts:
            results[part] += makers[part](platform, arguments.layers)
    return {"run": about_run(arguments, start, PACKAGES), **results}


def report(
    results: dict[str, Any],
    *,
    markdown: bool,
    platforms: dict[str, str] = PLATFORMS,
    tables: dict[str, Any] = TABLES,
    legend: str = LEGEND,
) -> None:
    for platform, device in platforms.items():
        for part, (title, table, text) in tables.items():
            records = [r for r in results.get(part, []) if r["platform"] == platform]
            if records:
                title = f"{device}: {title}"
                show(title, *table(records), text=text, markdown=markdown)
                print()
    run = results["run"]
    print(legend)
    print(f"{run['command']}\n{run['date']}, {run['seconds']} s")
    print(", ".join(f"{name} {v}" for name, v in run["versions"].items() if v))


def finish(
    arguments: argparse.Namespace, results: dict[str, Any], **kwargs: Any
) -> dict[str, Any]:
    report(results, markdown=arguments.markdown, **kwargs)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    return finish(arguments, run(arguments))


if __name__ == "__main__":
    main()
