"""Times of the layers beside those of other libraries, and of a plain copy of the input.

All functions of a cell, which is one layer, shape and dtype, take turns in one process, in
a new order each round, so that what disturbs the machine disturbs all of them. A ratio is
formed within each round; given are its median and its interquartile range.

The floor is the time of a copy of the input for each two arrays of its size that a pass
has to read or write: forward, input and output, one copy; forward and backward, cotangent
and gradient besides, two. A pass returns all that it computes: the output, the new running
statistics, and the gradients of input, scale and bias.

"both" is forward and backward in one program, where a compiler may keep what it likes in
between. "apart", on accelerators, is two programs, one after the other: the first also
writes what is kept for the second, as it must where a model has other layers in between.

With `--small`, of rows that fit into a CPU's caches, there is "of x" besides: the gradient
of the input alone, which has three arrays to read or write.
"""

import ctypes
import importlib.util
import math
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.rivals import Functional, available, ours, passes, pytorch
from tests.helpers import NORMS, Norm


CASES = [
    replace(case, kwargs={"num_groups": 32}, groups=(-1, 32))
    if case.name == "GroupNorm"
    else case
    for case in NORMS
]
SHAPES = {
    "vectors": [(8192, 1024), (4096, 4096), (65536, 128)],
    "images": [(64, 32, 32, 64), (32, 16, 16, 512)],
}
SMALL_SHAPES = [(1, 64), (32, 64), (256, 64), (1024, 256)]
QUICK_SHAPES = {"vectors": [(512, 256)], "images": [(8, 8, 8, 64)]}
DTYPES = (jnp.float32, jnp.bfloat16)
# How many copies of the input a pass is at least.
PASSES = {"forward": 1, "both": 2, "apart": 2, "of x": 1.5}

# A batch, and one example inside `jax.vmap`.
OURS = ("eqx_norms", "vmap")
PEERS = {"JAX": ("flax", "equinox"), "PyTorch": ("torch", "torch.compile")}
EVERY_PEER = (*PEERS["JAX"], *PEERS["PyTorch"])

# An accelerator's queue is kept full: launching is not what is timed. Its batches grow to
# this many elements, beyond what its caches hold.
QUEUED_CALLS = 20
ACCELERATOR_SIZE = 2**26
FEWEST_ROUNDS = 5

Runner = Callable[[int], Any]
"""Makes that many calls, waits for the last one, and returns its result."""


class Cell(NamedTuple):
    case: Norm
    # As it is, with features along the axis called C.
    shape: tuple[int, ...]
    layout: str
    dtype: Any

    @property
    def num_features(self) -> int:
        return self.shape[self.layout.index("C")]


def layouts(case: Norm) -> list[str]:
    on_images = case.stateful or not case.on_vectors
    return ["NC"] * case.on_vectors + ["NCHW", "NHWC"] * on_images


def cells(
    layers: Iterable[str], *, quick: bool, first_shape: bool = False, small: bool = False
) -> Iterator[Cell]:
    for case in (case for case in CASES if case.name in layers):
        for layout in layouts(case):
            if (quick and layout == "NHWC") or (small and layouts(case) != ["NC"]):
                continue
            kind = "vectors" if layout == "NC" else "images"
            shapes = SMALL_SHAPES if small else (QUICK_SHAPES if quick else SHAPES)[kind]
            for shape in shapes[:1] if first_shape else shapes:
                n, *rest = shape
                if jax.default_backend() != "cpu" and not (quick or small):
                    n *= math.ceil(ACCELERATOR_SIZE / math.prod(shape))
                if layout == "NCHW":
                    rest = [rest[-1], *rest[:-1]]
                for dtype in DTYPES:
                    yield Cell(case, (n, *rest), layout, dtype)


def repeated(f: Callable[[], Any]) -> Runner:
    def run(calls):
        out = None
        for _ in range(calls):
            out = f()
        return jax.block_until_ready(out)

    return run


def _jax_runner(f: Callable[..., Any], *args: Any) -> Runner:
    return repeated(partial(jax.jit(f), *args))


def _jax_runners(
    layer: Functional, x: jax.Array, dy: jax.Array, *, small: bool
) -> dict[str, Runner]:
    # Lists are quicker to hand over than modules.
    leaves, structure = jax.tree.flatten((layer.params, layer.state))

    def forward(leaves, x):
        params, state = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(layer.apply(params, state, x))

    def both(leaves, x, dy):
        params, state = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(layer.both(params, state, x, dy))

    made = {
        "forward": _jax_runner(forward, leaves, x),
        "both": _jax_runner(both, leaves, x, dy),
    }
    if small:

        def of_x(leaves, x, dy):
            params, state = jax.tree.unflatten(structure, leaves)
            return jax.vjp(lambda x: layer.apply(params, state, x)[0], x)[1](dy)

        made["of x"] = _jax_runner(of_x, leaves, x, dy)
    elif jax.default_backend() != "cpu":
        found = passes(layer, x)
        first, second = jax.jit(found.forward[0]), jax.jit(found.backward[0])
        args = found.forward[1:]
        made["apart"] = repeated(lambda: second(args, first(*args), dy))
    return made


def torch_device() -> str | None:
    """PyTorch's name of JAX's device; nothing if it is not installed, or not for that."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    names = {"cpu": "cpu", "gpu": "cuda" if torch.cuda.is_available() else None}
    return names.get(jax.default_backend())


def _torch_runners(
    cell: Cell, x: np.ndarray, dy: np.ndarray, device: str, libraries: Collection[str]
) -> dict[str, dict[str, Runner]]:
    import torch

    dtype = getattr(torch, jnp.dtype(cell.dtype).name)
    module = pytorch(cell.case, cell.num_features, dtype, cell.layout, device=device)
    if module is None:
        return {}

    def to_tensor(array):
        tensor = torch.from_numpy(array).to(device, dtype)
        return tensor.movedim(-1, 1) if cell.layout == "NHWC" else tensor

    tensor, cotangent = to_tensor(x), to_tensor(dy)
    inputs = (tensor.requires_grad_(), *module.parameters())

    def runner(f):
        def run(calls):
            out = None
            for _ in range(calls):
                out = f()
            if device == "cuda":
                torch.cuda.synchronize()
            return out

        return run

    def runners(module):
        def forward():
            with torch.no_grad():
                return (module(tensor),)

        def both():
            y = module(tensor)
            return y.detach(), *torch.autograd.grad(y, inputs, cotangent)

        made = {"forward": runner(forward), "both": runner(both)}
        # It has two passes in any case, unless it is compiled, when these are two programs.
        return made if device == "cpu" else {**made, "apart": made["both"]}

    made = {"torch": runners(module)} if "torch" in libraries else {}
    if device == "cuda" and "torch.compile" in libraries:
        # What is compiled is kept by code, not by module, and only so many times.
        torch.compiler.reset()
        torch.cuda.empty_cache()
        compiled = runners(torch.compile(module, dynamic=False))
        try:
            for run in compiled.values():
                run(1)
            made["torch.compile"] = compiled
        except Exception as error:  # It needs a compiler of its own.
            print(f"torch.compile is left out: {error}", file=sys.stderr)
    return made


def runners(
    cell: Cell, mean: float, libraries: Collection[str] = EVERY_PEER, *, small: bool = False
) -> dict[str, dict[str, Runner]]:
    """By library and pass, the copy of as many bytes as the input has among them. The
    input is normally distributed, of that mean and deviation one."""
    rng = np.random.default_rng(0)
    data, cotangent = (rng.standard_normal(cell.shape, np.float32) for _ in range(2))
    data += mean
    x, dy = (jnp.asarray(array, cell.dtype) for array in (data, cotangent))
    layers = available(cell.case, cell.num_features, cell.dtype, cell.layout)
    per_example = ours(
        cell.case, cell.num_features, cell.dtype, cell.layout, per_example=True
    )
    layers = {**dict(zip(OURS, (layers.pop(OURS[0]), per_example), strict=True)), **layers}
    # Integers, which no processor converts in between.
    words = jnp.zeros(x.nbytes // 4, jnp.uint32)
    made = {"copy": {"forward": _jax_runner(lambda words: words + 1, words)}}
    for library, layer in layers.items():
        if library in (*OURS, *libraries):
            made[library] = _jax_runners(layer, x, dy, small=small)
    device = torch_device()
    if device is not None and set(libraries) & set(PEERS["PyTorch"]):
        made |= _torch_runners(cell, data, cotangent, device, libraries)
    return made


def measure(
    made: dict[str, dict[str, Runner]], *, rounds: int, seconds: float, small: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one call, by library and pass, one for each round. There are fewer rounds,
    but five at least, if they take longer than `seconds`."""
    calls = 1 if jax.default_backend() == "cpu" and not small else QUEUED_CALLS
    order = [(library, name) for library, passes in made.items() for name in passes]
    times = {library: {name: [] for name in made[library]} for library in made}
    for library, name in order:
        for number in (1, calls):
            made[library][name](number)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for library, name in order:
            begin = time.perf_counter()
            out = made[library][name](calls)
            times[library][name].append((time.perf_counter() - begin) / calls)
            del out
    return times


def _quartiles(values: Any) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return float(median), float(high - low)


def compare(
    times: Mapping[str, Any], copy: Any, copies: float
) -> dict[str, dict[str, Any]]:
    """By library, from the times of one pass, round by round: ratios to the floor and, for
    eqx_norms, to the fastest of each kind of peer."""
    compared = {}
    for library, seconds in times.items():
        to_floor, floor_spread = _quartiles(np.divide(seconds, copy) / copies)
        compared[library] = {
            "seconds": _quartiles(seconds)[0],
            "to_floor": to_floor,
            "to_floor_iqr": floor_spread,
            "of_bandwidth": 1 / to_floor,
            "to_peers": {},
        }
    for library in set(OURS) & set(times):
        for kind, names in PEERS.items():
            peers = [name for name in names if name in times]
            if peers:
                best = min(peers, key=lambda name: compared[name]["seconds"])
                ratio, spread = _quartiles(np.divide(times[library], times[best]))
                compared[library]["to_peers"][kind] = {
                    "peer": best,
                    "ratio": ratio,
                    "iqr": spread,
                }
    return compared


def records(
    layers: Iterable[str],
    libraries: Collection[str],
    *,
    mean: float,
    rounds: int,
    quick: bool,
    first_shape: bool,
    small: bool = False,
    track: Callable[..., Iterable[Cell]],
) -> Iterator[dict[str, Any]]:
    """One for each cell and pass, fit for JSON."""
    chosen = list(cells(layers, quick=quick, first_shape=first_shape, small=small))
    for cell in track(chosen, "speed"):
        made = runners(cell, mean, libraries, small=small)
        times = measure(made, rounds=rounds, seconds=0.3 if quick else 8.0, small=small)
        copy = times.pop("copy")["forward"]
        nbytes = math.prod(cell.shape) * jnp.dtype(cell.dtype).itemsize
        for name in times[OURS[0]]:
            yield {
                "layer": cell.case.name,
                "shape": list(cell.shape),
                "layout": cell.layout,
                "dtype": jnp.dtype(cell.dtype).name,
                "pass": name,
                "copy": {
                    "seconds": _quartiles(copy)[0],
                    "gb_per_second": 2 * nbytes / _quartiles(copy)[0] / 1e9,
                },
                "libraries": compare(
                    {
                        library: passes[name]
                        for library, passes in times.items()
                        if name in passes
                    },
                    copy,
                    PASSES[name],
                ),
            }


def label(record: dict[str, Any]) -> str:
    return "x".join(map(str, record["shape"])) + " " + record["layout"]


def libraries(speed: list[dict[str, Any]]) -> list[str]:
    """Those in any of the records, ours first."""
    found = {library for record in speed for library in record["libraries"]}
    return [name for name in (*OURS, *EVERY_PEER) if name in found]


def table(speed: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = libraries(speed)
    kinds = [kind for kind, peers in PEERS.items() if set(peers) & set(names)]
    ratios = [(library, kind) for kind in kinds for library in OURS]
    columns = ["shape", "dtype", "pass", "copy GB/s", *names]
    columns += [f"{library} / {kind}" for library, kind in ratios]
    columns.append("of bandwidth")
    rows = []
    for record in speed:
        given = record["libraries"]
        row = [label(record), record["dtype"], record["pass"]]
        row.append(f"{record['copy']['gb_per_second']:.1f}")
        row += [
            f"{given[name]['to_floor']:.2f}" if name in given else "-" for name in names
        ]
        for library, kind in ratios:
            ratio = given[library]["to_peers"].get(kind)
            row.append(f"{ratio['ratio']:.2f} ±{ratio['iqr'] / 2:.2f}" if ratio else "-")
        row.append(f"{given[OURS[0]]['of_bandwidth']:.0%}")
        rows.append(row)
    return columns, rows


def summary(speed: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Of all cells, against the faster of Flax and Equinox. Level is a ratio above one by
    no more than half of its interquartile range."""
    rows = []
    for library in OURS:
        for name in PASSES:
            ratios = [
                given["to_peers"]["JAX"]
                for given in (r["libraries"][library] for r in speed if r["pass"] == name)
                if "JAX" in given["to_peers"]
            ]
            if not ratios:
                continue
            level = sum(each["ratio"] - each["iqr"] / 2 <= 1 for each in ratios)
            median = _quartiles([each["ratio"] for each in ratios])[0]
            rows.append([library, name, str(len(ratios)), str(level), f"{median:.2f}"])
    return ["", "pass", "cells", "faster or level", "median of a / JAX"], rows


def keep_freed_memory(size: int = 2**31) -> str:
    """Has the C library keep what is freed, and `size` bytes from the start.

    Otherwise each large result lies in fresh pages, or not, as its history has it; and
    those take several times as long to be zeroed as a layer takes to fill them. To be
    called before there are threads, which take memory of their own.
    """
    if not sys.platform.startswith("linux"):
        return "the allocator's default"
    lib = ctypes.CDLL(None)
    if not hasattr(lib, "mallopt"):
        return "the allocator's default"
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    for option, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
        lib.mallopt(option, value)
    lib.malloc.restype, lib.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    lib.free.argtypes = [ctypes.c_void_p]
    block = lib.malloc(size)
    if block:
        ctypes.memset(block, 0, size)
        lib.free(block)
    return "kept when freed"
