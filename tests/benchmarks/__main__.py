"""Speed, memory and size of each layer, beside those of other libraries.

    python -m tests.benchmarks [--layers LayerNorm,BatchNorm] [--libraries flax,torch]
                               [--parts speed,memory,size,devices] [--quick]
                               [--first-shape] [--small] [--rounds N] [--mean M]
                               [--json FILE] [--plot FILE] [--markdown] [--from FILE]
                               [--fresh-memory]

It runs on JAX's default device, or with `--from` shows what an earlier run wrote. What is
in the tables is said in `speed.py`, `memory.py`, `size.py` and `devices.py`.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any


# OpenMP's idle threads would spin, PyTorch's against JAX's and the other way round.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Children and PyTorch need memory of the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from tests.benchmarks import memory, size, speed
from tests.benchmarks.rivals import versions
from tests.benchmarks.tables import show, show_records, track


NAMES = [case.name for case in speed.CASES]
PARTS = ["speed", "memory", "size", "devices"]
PACKAGES = ("jax", "jaxlib", "equinox", "flax", "torch", "numpy")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def some_of(known):
        def chosen(text):
            names = text.split(",")
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown} are none of {known}")
            return names

        return chosen

    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError("one round is the least")
        return int(text)

    for name, known in (
        ("layers", NAMES),
        ("libraries", speed.EVERY_PEER),
        ("parts", PARTS),
    ):
        parser.add_argument(
            f"--{name}", type=some_of(known), default=known, help=", ".join(known)
        )
    parser.add_argument(
        "--first-shape", action="store_true", help="of each layout, to be done sooner"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument(
        "--small", action="store_true", help="rows alone, 1 x 64 to 1024 x 256"
    )
    parser.add_argument(
        "--rounds", type=positive, help="by default 15, or 7 if quick; fewer in slow cells"
    )
    parser.add_argument(
        "--mean", type=float, help="of the input, in deviations; by default 0"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="a PNG file")
    parser.add_argument(
        "--from", type=pathlib.Path, metavar="FILE", dest="source", help="by --json"
    )
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    parser.add_argument(
        "--fresh-memory", action="store_true", help="leave the C library's memory alone"
    )
    arguments = parser.parse_args(argv)
    source = arguments.source
    if source is not None and not source.is_file():
        parser.error(f"--from: there is no file {source}")
    if source is not None and arguments.mean is not None:
        parser.error("--mean: what --from reads has been measured")
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"there is no folder for {path}")
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        parser.error(f"--plot writes a PNG file, and {arguments.plot} is none")
    return arguments


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def describe(arguments: argparse.Namespace, threads: int, allocator: str) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "command": " ".join(["python -m tests.benchmarks", *arguments.argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "torch_device": speed.torch_device(),
        "threads": threads,
        "memory": allocator,
        "versions": versions(PACKAGES),
    }


def all_reduces(layers: list[str]) -> list[dict[str, Any]] | str:
    """From a process with eight devices; or why there is nothing."""
    command = [sys.executable, "-m", "tests.benchmarks.devices", "--all-reduces"]
    run = subprocess.run(
        [*command, ",".join(layers)],
        capture_output=True,
        cwd=pathlib.Path(__file__).parents[2],
        text=True,
    )
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(run.stdout.splitlines()[-1])


def use_all_threads() -> int:
    """PyTorch as many as JAX: one for each processor that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    else:
        threads = os.cpu_count() or 1
    if speed.torch_device() is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


PASS_NAMES = {
    "forward": "forward",
    "both": "forward and backward",
    "apart": "forward and backward, two programs",
    "of x": "gradient of the input alone",
}
COLORS = {
    "eqx_norms": "#08519c",
    "vmap": "#6baed6",
    "flax": "#74c476",
    "equinox": "#fdae6b",
    "torch": "#969696",
    "torch.compile": "#525252",
}


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """A panel for each layer and pass, by dtype from left to right."""
    from matplotlib.figure import Figure

    records = results["speed"]
    names = speed.libraries(records)
    panels = list(dict.fromkeys((r["layer"], r["pass"]) for r in records))
    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    figure = Figure(
        figsize=(9 * len(dtypes), 2.9 * len(panels) + 1.2), layout="constrained"
    )
    axes = figure.subplots(len(panels), len(dtypes), squeeze=False)
    width = 0.84 / len(names)
    for row, (layer, name) in zip(axes, panels, strict=True):
        for ax, dtype in zip(row, dtypes, strict=True):
            group = [
                r
                for r in records
                if (r["layer"], r["pass"], r["dtype"]) == (layer, name, dtype)
            ]
            for number, library in enumerate(names):
                bars = [
                    (at + (number - (len(names) - 1) / 2) * width, r["libraries"][library])
                    for at, r in enumerate(group)
                    if library in r["libraries"]
                ]
                ax.bar(
                    [at for at, _ in bars],
                    [given["to_floor"] for _, given in bars],
                    width,
                    yerr=[given["to_floor_iqr"] / 2 for _, given in bars],
                    color=COLORS[library],
                    error_kw={"linewidth": 0.8},
                    label="eqx_norms in vmap" if library == "vmap" else library,
                )
            ax.axhline(1.0, color="black", linewidth=1)
            ax.set_title(f"{layer}, {PASS_NAMES[name]}, {dtype}", fontsize=11)
            labels = [speed.label(r).replace(" ", "\n") for r in group]
            ax.set_xticks(range(len(group)), labels, fontsize=9)
            ax.set_ylim(bottom=0)
            ax.grid(axis="y", alpha=0.3)
            ax.set_axisbelow(True)
        row[0].set_ylabel("time / floor")
    run = results["run"]
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
    figure.suptitle(
        f"Time in units of the floor (line: one copy of the input forward, else two)\n"
        f"{run['device']}, {run['threads']} threads, {versions}, {run['date'][:10]}\n"
        f"{run['command']}"
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=100)


LEGEND = """
The floor is one copy of the input forward, two copies forward and backward. both: forward
and backward; apart: as two programs. vmap: eqx_norms, one example inside
`jax.vmap`. a / JAX: to the faster of Flax and Equinox, with half the interquartile range.
of bandwidth: what eqx_norms reaches of that of a copy. N: batch, C: features, H and W:
space.

Memory: kept by one layer for the backward pass, and of the compiled gradient of twelve
blocks, scanned and unrolled.
"""


def report(results: dict[str, Any], *, markdown: bool) -> None:
    run = results["run"]
    for layer in dict.fromkeys(record["layer"] for record in results["speed"]):
        columns, rows = speed.table([r for r in results["speed"] if r["layer"] == layer])
        title = f"{layer}: time in units of the floor"
        show(title, columns, rows, text=3, markdown=markdown)
    if results["speed"]:
        show("All cells", *speed.summary(results["speed"]), text=2, markdown=markdown)
    print(LEGEND)
    for title, part, text in ((memory.TITLE, "memory", 3), (size.TITLE, "size", 2)):
        if results[part]:
            show_records(title, results[part], text=text, markdown=markdown)
    title = (
        "All-reduces over 8 devices, forward, and with gradients of input and parameters"
    )
    if isinstance(results["all_reduces"], str):
        print(f"{title}: left out. {results['all_reduces']}")
    else:
        show_records(title, results["all_reduces"], text=2, markdown=markdown)
    print(f"\n{run['command']}")
    print(f"{run['device']} ({run['platform']}), {run['threads']} threads, {run['date']}")
    print(", ".join(f"{k} {v}" for k, v in run["versions"].items() if v))
    if run["torch_device"] is None:
        print("PyTorch is not installed, or not for this device: left out")
    speeds = [record["copy"]["gb_per_second"] for record in results["speed"]]
    if speeds:
        print(f"a copy reaches up to {max(speeds):.1f} GB/s; memory: {run['memory']}")


def write(path: pathlib.Path, results: dict[str, Any]) -> None:
    """One record a line, for those who compare two runs."""

    def lines(value):
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"

    parts = [f' "{name}": {lines(value)}' for name, value in results.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def read(path: pathlib.Path, layers: list[str]) -> dict[str, Any]:
    """The results of an earlier run, of these layers."""
    results = json.loads(path.read_text())
    for name, records in results.items():
        if isinstance(records, list):
            results[name] = [record for record in records if record["layer"] in layers]
    if not results["speed"]:
        sys.exit(f"{path} has nothing of {', '.join(layers)}")
    return results


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    quick, layers = arguments.quick, arguments.layers
    default = quick or arguments.fresh_memory
    allocator = "the allocator's default" if default else speed.keep_freed_memory()
    described = describe(arguments, use_all_threads(), allocator)
    print(f"On {described['device']} ({described['platform']})", file=sys.stderr)
    rounds = arguments.rounds or (7 if quick else 15)
    cases = [case for case in speed.CASES if case.name in layers]
    timed = speed.records(
        layers,
        arguments.libraries,
        mean=arguments.mean or 0.0,
        rounds=rounds,
        quick=quick,
        first_shape=arguments.first_shape,
        small=arguments.small,
        track=track,
    )
    parts = arguments.parts
    return {
        "run": described,
        "memory": memory.records(cases, quick=quick) if "memory" in parts else [],
        "size": size.records(cases, repeats=0 if quick else 2) if "size" in parts else [],
        "all_reduces": all_reduces(layers) if "devices" in parts and not quick else "",
        "speed": list(timed) if "speed" in parts else [],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    if arguments.source:
        results = read(arguments.source, arguments.layers)
    else:
        results = run(arguments)
    report(results, markdown=arguments.markdown)
    if arguments.json:
        write(arguments.json, results)
    if arguments.plot and results["speed"]:
        plot(results, arguments.plot)
    return results


if __name__ == "__main__":
    main()
