"""The commands of `tests.benchmarks` run, compare like with like, and count what they say.

What they measure is not tested here.
"""

import contextlib
import importlib.util
import io
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .benchmarks import __main__ as command
from .benchmarks import blocks, compiled, hlo, speed
from .benchmarks.hlo import Cost
from .helpers import reference


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_measured(tmp_path, capsys):
    """A small run: its tables, its plot, and the same tables again from its file."""
    file, picture = tmp_path / "results.json", tmp_path / "plot.png"
    argv = ["--quick", "--layers", "RMSNorm", "--rounds", "2", "--json", str(file)]
    results = command.main([*argv, *["--plot", str(picture)] * HAS_MATPLOTLIB])
    printed = capsys.readouterr().out
    assert json.loads(file.read_text()) == results
    assert command.main(["--from", str(file)]) == results
    assert capsys.readouterr().out == printed
    assert not HAS_MATPLOTLIB or picture.read_bytes().startswith(b"\x89PNG")
    libraries = {"eqx_norms", "flax", "equinox"}
    assert len(results["speed"]) == 4  # two dtypes, two passes
    for record in results["speed"]:
        assert libraries | {"vmap"} <= set(record["libraries"])
        assert f"{record['libraries']['eqx_norms']['to_floor']:.2f}" in printed
    for part in ("memory", "size"):
        assert {record["library"] for record in results[part]} == libraries
    with pytest.raises(SystemExit, match="nothing of LayerNorm"):
        command.main(["--from", str(file), "--layers", "LayerNorm"])


def test_the_record_of_a_cpu_can_be_shown(capsys):
    source = pathlib.Path(command.__file__).with_name("cpu.json")
    command.main(["--from", str(source), "--markdown"])
    printed = capsys.readouterr().out
    assert printed.count(": time in units of the floor") == 5
    assert "| eqx_norms | both | 42 |" in printed


def test_all_reduces_are_counted_in_a_process_with_eight_devices():
    ours, *others = command.all_reduces(["RMSNorm"])
    assert isinstance(ours, dict), ours
    assert (ours["batch: forward"], ours["features: forward"]) == (0, 1)
    assert len(others) == 2


def test_steps_of_blocks(monkeypatch):
    for name, value in {"WIDTH": 16, "HIDDEN": 16, "BLOCKS": 1}.items():
        monkeypatch.setattr(compiled, name, value)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        records = blocks.main(["--layers", "RMSNorm", "--tokens", "8", "--rounds", "2"])
    assert len(records) == 2 * 4
    assert "1 blocks, 8 tokens of 16 features" in out.getvalue()


COMPILERS = {"gpu": "jax_plugins.xla_cuda12", "tpu": "libtpu"}


def is_installed(platform):
    try:
        return importlib.util.find_spec(COMPILERS[platform]) is not None
    except ModuleNotFoundError:
        return False


def test_compiled(tmp_path):
    """With the compilers that are installed; the others are left out, and that is said."""
    argv = ["--layers", "RMSNorm", "--dtype", "float32", "--parts", "layers"]
    argv += ["--json", str(tmp_path / "out.json")]
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.compiled", *argv],
        capture_output=True,
        cwd=pathlib.Path(__file__).parents[1],
        text=True,
    )
    assert run.returncode == 0, run.stderr
    records = json.loads((tmp_path / "out.json").read_text())["layers"]
    for platform in COMPILERS:
        found = [record for record in records if record["platform"] == platform]
        if is_installed(platform):
            assert {"eqx_norms", "flax"} <= {record["library"] for record in found}
            assert all(record["inference"]["units"] >= 1.99 for record in found)
        else:
            assert f"{compiled.PLATFORMS[platform]} is left out: " in run.stdout
            assert not found


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (command.parse, ["--from", "missing.json"], "there is no file missing.json"),
        (command.parse, ["--json", "missing/a.json"], "no folder for missing/a.json"),
        (command.parse, ["--layers", "Unknown"], "['Unknown'] are none of"),
        (compiled.parse, ["--platform", "Unknown"], "['Unknown'] are none of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_at_once(main, argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err


CELLS = {
    f"{cell.case.name}-{cell.layout}": cell
    for cell in speed.cells([case.name for case in speed.CASES], quick=True)
    if cell.dtype == jnp.float32
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_all_libraries_compute_the_same(cell):
    """The output, against float64; the gradient of the input, against each other; and what
    two programs return, forward and backward, is what one returns."""
    cell = cell._replace(shape=(8, 64) if cell.layout == "NC" else (4, 64, 3, 3))
    first = cell.layout == "NCHW"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        patch.setattr(speed, "torch_device", lambda: "cpu" if HAS_TORCH else None)
        made = speed.runners(cell, mean=1.0)
    del made["copy"]
    assert len(made) >= 3
    x = 1 + np.random.default_rng(0).standard_normal(cell.shape, np.float32)
    x = np.moveaxis(x, 1, -1) if first else x
    expected = reference(x, cell.case.reduction_axes(x.ndim), **cell.case.formula)[0]
    gradient = None
    for library, passes in made.items():
        y, dx, *_ = (np.asarray(a) for a in jax.tree.leaves(passes["both"](1)))
        gradient = dx if gradient is None else gradient
        y = np.moveaxis(y, 1, -1) if first else y
        for found, wanted in ((y, expected), (dx, gradient)):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3, err_msg=library)
        if library in ("eqx_norms", "vmap", "flax", "equinox"):
            apart = jax.tree.leaves(passes["apart"](2))
            np.testing.assert_allclose(apart[0], dx, rtol=1e-5, atol=1e-4, err_msg=library)


HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_ratios_are_formed_within_a_round():
    """The machine is three times slower in the second round, which changes no ratio."""
    machine = np.array([1.0, 3.0, 1.0, 1.0, 1.0])
    times = {"eqx_norms": 4 * machine, "flax": 8 * machine, "equinox": 5 * machine}
    times["vmap"] = np.array([5.0, 15.0, 6.0, 7.0, 8.0])
    compared = speed.compare(times, machine, copies=2)
    ours, vmap = compared["eqx_norms"], compared["vmap"]["to_peers"]["JAX"]
    assert (ours["seconds"], ours["to_floor"], ours["to_floor_iqr"]) == (4.0, 2.0, 0.0)
    assert ours["to_peers"] == {"JAX": {"peer": "equinox", "ratio": 0.8, "iqr": 0.0}}
    # Ratios 1, 1, 1.2, 1.4, 1.6 to Equinox.
    assert (vmap["ratio"], vmap["iqr"]) == (pytest.approx(1.2), pytest.approx(0.4))


# A program of one computation, after others. `x` is 128 bytes.
PROGRAM = """HloModule jit_f

{}

ENTRY %main () -> f32[] {{
  %x = f32[8,4]{{1,0}} parameter(0)
{}
}}
"""
PROGRAMS = {
    "free names, dtypes, the same operand twice": (
        "",
        "  %flat = bf16[32]{0} bitcast(%x)\n  %half = bf16[8,4]{1,0} convert(%x)\n"
        "  ROOT %y = f32[8,4]{1,0} multiply(%half, %half)",
        Cost((128 + 64) + (64 + 128), kernels=2),
    ),
    "a fusion that slices": (
        """%inside (p: f32[8,4]) -> (f32[4], f32[8]) {
  %p = f32[8,4]{1,0} parameter(0)
  %named = f32[8,4]{1,0} bitcast(%p)
  %first = f32[1,4]{1,0} slice(%named), slice={[0:1], [0:4]}
  %last = f32[1,4]{1,0} slice(%p), slice={[7:8], [0:4]}
  %sum = f32[4]{0} add(%first, %last)
  ROOT %t = (f32[4]{0}, f32[8]{0}) tuple(%sum, %sum)
}""",
        "  ROOT %f = (f32[4]{0}, /*index=1*/f32[8]{0}) fusion(%x), calls=%inside",
        Cost(16 + 16 + 16 + 32, kernels=1),
    ),
    "a fusion that slices, and reads all": (
        """%inside (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %first = f32[1,4]{1,0} slice(%p), slice={[0:1], [0:4]}
  ROOT %d = f32[8,4]{1,0} subtract(%p, %first)
}""",
        "  ROOT %f = f32[8,4]{1,0} fusion(%x), calls=%inside",
        Cost(128 + 128, kernels=1),
    ),
    "an update in place": (
        "",
        "  %row = f32[1,4]{1,0} parameter(1)\n  %at = s32[] parameter(2)\n"
        "  ROOT %u = f32[8,4]{1,0} dynamic-update-slice(%x, %row, %at, %at)",
        Cost(16 + 4 + 16, kernels=1),
    ),
    "memory on the chip": (
        "",
        "  %start = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%x)\n"
        "  %there = f32[8,4]{1,0:S(1)} copy-done(%start)\n"
        "  ROOT %y = f32[8,4]{1,0} exponential(%there),"
        ' backend_config={"estimated_cycles":"700"}',
        Cost(128 + 128, kernels=2, cycles=700),
    ),
    "a loop": (
        """%go (a: f32[8,4]) -> pred[] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %c = pred[] constant(true)
}

%step (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %e = f32[8,4]{1,0} exponential(%b)
}""",
        "  ROOT %w = f32[8,4]{1,0} while(%x), condition=%go, body=%step,"
        ' backend_config={"known_trip_count":{"n":"5"}}',
        Cost(5 * 256, kernels=5),
    ),
    "a conditional, and collectives": (
        """%dear (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%a), to_apply=%add
  ROOT %n = f32[8,4]{1,0} negate(%r)
}

%cheap (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %m = f32[8,4]{1,0} negate(%b)
}""",
        "  %i = s32[] parameter(1)\n  %e = f32[8,4]{1,0} all-reduce(%x), to_apply=%add\n"
        "  ROOT %c = f32[8,4]{1,0} conditional(%i, %e, %x),"
        " branch_computations={%dear, %cheap}",
        Cost(512, kernels=2, conditionals=1, collectives={"all-reduce": (2, 256)}),
    ),
}


@pytest.mark.parametrize(("before", "lines", "cost"), PROGRAMS.values(), ids=PROGRAMS)
def test_what_a_program_reads_and_writes(before, lines, cost):
    assert hlo.count(PROGRAM.format(before, lines)) == cost
