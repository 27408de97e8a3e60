"""The command `python -m tests.benchmarks`: that it runs, and that it compares like with
like. What it measures is not tested here."""

import contextlib
import importlib.util
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .benchmarks import __main__ as command
from .benchmarks import blocks, compiled, size, speed
from .benchmarks.rivals import LAYOUTS
from .helpers import reference


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
ALL = [case.name for case in speed.CASES]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a small run returns, what it prints, and the folder of its files."""
    folder, out = tmp_path_factory.mktemp("benchmarks"), io.StringIO()
    argv = ["--quick", "--layers", "RMSNorm", "--rounds", "2", "--mean", "3"]
    argv += ["--json", str(folder / "results.json")]
    if HAS_MATPLOTLIB:
        argv += ["--plot", str(folder / "plot.png")]
    with contextlib.redirect_stdout(out):
        results = command.main(argv)
    return results, out.getvalue(), folder


def test_json(quick):
    results, _, folder = quick
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results) == {"run", "speed", "memory", "size", "all_reduces"}
    run = results["run"]
    assert run["platform"] == "cpu"
    assert run["threads"] >= 1
    assert run["command"].startswith("python -m tests.benchmarks --quick --layers RMSNorm")
    assert {"python", "jax", "equinox", "flax", "torch"} <= set(run["versions"])
    keys = [(r["layer"], r["shape"], r["dtype"], r["pass"]) for r in results["speed"]]
    assert keys == [
        ("RMSNorm", [512, 256], dtype, name)
        for dtype in ("float32", "bfloat16")
        for name in ("forward", "both")
    ]
    for record in results["speed"]:
        libraries = record["libraries"]
        assert {"eqx_norms", "vmap", "flax", "equinox"} <= set(libraries)
        assert ("torch" in libraries) == (run["torch_device"] is not None)
        assert len(record["copy"]["rounds"]) == 2
        for library, given in libraries.items():
            assert len(given["rounds"]) == 2
            assert given["seconds"] > 0
            assert bool(given["to_peers"]) == (library in speed.OURS)
    assert [r["library"] for r in results["size"]] == ["eqx_norms", "flax", "equinox"]
    assert all(r["kept"] > 0.9 for r in results["memory"])


def test_tables(quick):
    results, printed, _ = quick
    for text in ("RMSNorm: time in units of the floor", "512x256 NC", "Memory", "Size"):
        assert text in printed
    assert results["run"]["device"] in printed
    for record in results["speed"]:
        assert f"{record['libraries']['eqx_norms']['to_floor']:.2f}" in printed


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_plot(quick):
    path = quick[2] / "plot.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_an_earlier_run_is_shown_as_it_was(quick, tmp_path, capsys):
    results, printed, folder = quick
    source = str(folder / "results.json")
    assert command.main(["--from", source]) == results
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="nothing of LayerNorm"):
        command.main(["--from", source, "--layers", "LayerNorm"])


def test_summary():
    def record(ratio, iqr):
        given = {"to_peers": {"JAX": {"ratio": ratio, "iqr": iqr}}}
        return {"pass": "both", "libraries": {"eqx_norms": given, "vmap": given}}

    records = [record(0.9, 0.1), record(1.1, 0.3), record(1.1, 0.1)]
    _, rows = speed.summary(records)
    assert ["eqx_norms", "both", "3", "2", "1.10"] in rows


def test_ratios_are_formed_within_a_round():
    """The machine is three times slower in the second round, which changes no ratio."""
    machine = np.array([1.0, 3.0, 1.0, 1.0, 1.0])
    times = {
        "eqx_norms": 4 * machine,
        "vmap": np.array([5.0, 15.0, 6.0, 7.0, 8.0]),
        "flax": 8 * machine,
        "equinox": 5 * machine,
        "torch": 2 * machine,
    }
    compared = speed.compare(times, machine, copies=2)
    ours = compared["eqx_norms"]
    assert (ours["seconds"], ours["to_floor"], ours["to_floor_iqr"]) == (4.0, 2.0, 0.0)
    assert ours["of_bandwidth"] == 0.5
    assert ours["to_peers"] == {
        "JAX": {"peer": "equinox", "ratio": 0.8, "iqr": 0.0},
        "PyTorch": {"peer": "torch", "ratio": 2.0, "iqr": 0.0},
    }
    # Ratios 1, 1, 1.2, 1.4, 1.6 to Equinox.
    vmap = compared["vmap"]["to_peers"]["JAX"]
    assert vmap["ratio"] == pytest.approx(1.2)
    assert vmap["iqr"] == pytest.approx(0.4)
    assert compared["torch"]["to_peers"] == {}
    assert compared["torch"]["to_floor"] == 1.0


def test_a_missing_library_is_left_out():
    compared = speed.compare({"eqx_norms": [2.0], "vmap": [3.0]}, [1.0], copies=1)
    assert compared["vmap"]["to_peers"] == {}
    assert compared["vmap"]["to_floor"] == 3.0


def test_rounds_end_early_but_not_too_early():
    made = {"a": {"forward": lambda calls: None}, "b": {"forward": lambda calls: None}}
    for seconds, expected in ((0.0, speed.FEWEST_ROUNDS), (60.0, 9)):
        times = speed.measure(made, rounds=9, seconds=seconds)
        assert {len(passes["forward"]) for passes in times.values()} == {expected}


def test_cells():
    every = list(speed.cells(ALL, quick=False))
    shapes = {(c.case.name, c.layout): set() for c in every}
    for cell in every:
        shapes[cell.case.name, cell.layout].add(cell.shape)
        assert cell.num_features == cell.shape[1 if cell.layout == "NCHW" else -1]
    assert shapes["LayerNorm", "NC"] == {(8192, 1024), (4096, 4096), (65536, 128)}
    assert shapes["GroupNorm", "NCHW"] == {(64, 64, 32, 32), (32, 512, 16, 16)}
    assert shapes["BatchNorm", "NHWC"] == {(64, 32, 32, 64), (32, 16, 16, 512)}
    assert len(every) == 2 * sum(map(len, shapes.values()))
    few = list(speed.cells(["LayerNorm", "InstanceNorm"], quick=True))
    assert [(c.case.name, c.layout) for c in few[::2]] == [
        ("LayerNorm", "NC"),
        ("InstanceNorm", "NCHW"),
    ]


def laid_out(cell):
    small = {"NC": (8, 64), "NHWC": (4, 3, 3, 64), "NCHW": (4, 64, 3, 3)}
    return cell._replace(shape=small[cell.layout])


CELLS = {
    f"{cell.case.name}-{cell.layout}-{jnp.dtype(cell.dtype).name}": laid_out(cell)
    for cell in speed.cells(ALL, quick=False)
    if cell.dtype == jnp.float32
    or (cell.layout == "NC" and cell.case.name != "RMSNorm")  # it is in the run above
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_all_libraries_compute_the_same(cell):
    """The output, against float64; the gradient of the input and the dtype of all,
    against each other."""
    made = speed.runners(cell, mean=1.0)
    made.pop("copy")
    assert len(made) >= 3
    channels_first = cell.layout == "NCHW"
    half = cell.dtype == jnp.bfloat16
    x = 1 + np.random.default_rng(0).standard_normal(cell.shape, np.float32)
    x = np.asarray(jnp.asarray(x, cell.dtype), np.float64)
    x = np.moveaxis(x, 1, -1) if channels_first else x
    axes = cell.case.reduction_axes(x.ndim)
    expected = reference(x, axes, **cell.case.formula)[0]
    gradient = None
    for library, passes in made.items():
        y, dx, *rest = passes["both"](1)
        assert len(rest) >= 1
        for array in (y, dx):
            assert str(array.dtype).endswith(jnp.dtype(cell.dtype).name), library
        if library.startswith("torch"):
            y, dx = (a.float().numpy() for a in (y, dx))
            if cell.layout == "NHWC":
                y, dx = (np.moveaxis(a, 1, -1) for a in (y, dx))
        y, dx = (np.asarray(a, np.float64) for a in (y, dx))
        gradient = dx if gradient is None else gradient
        y = np.moveaxis(y, 1, -1) if channels_first else y
        tolerance = 0.1 if half else 1e-3
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance, err_msg=library)
        np.testing.assert_allclose(dx, gradient, rtol=0, atol=tolerance, err_msg=library)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--from", "missing.json"], "there is no file missing.json"),
        (
            ["--from", __file__, "--mean", "3"],
            "--mean: what --from reads has been measured",
        ),
        (["--json", "missing/a.json"], "there is no folder for missing/a.json"),
        (["--plot", "a.txt"], "--plot writes a PNG file, and a.txt is none"),
    ],
    ids=["from", "mean", "json", "plot"],
)
def test_what_cannot_be_done_is_said_at_once(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.parse(argv)
    assert message in capsys.readouterr().err


def test_layouts_are_known():
    assert {cell.layout for cell in speed.cells(ALL, quick=False)} == set(LAYOUTS)


def test_first_result_of_images():
    case = next(case for case in speed.CASES if case.name == "InstanceNorm")
    program = size.make_program("eqx_norms", case.name, stateful=False, shape=size.IMAGES)
    imported, first = size.seconds(program, repeats=1)
    assert 0 < imported < first


def test_all_reduces_are_counted_in_a_process_with_eight_devices():
    counted = command.all_reduces(["RMSNorm"])
    assert isinstance(counted, list), counted
    assert [record["library"] for record in counted] == ["eqx_norms", "flax", "equinox"]
    ours = counted[0]
    assert ours["batch: forward"] == 0
    assert ours["features: forward"] == 1
    assert ours["features: both"] >= 1


def test_unknown_layer(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--layers", "LayerNorm,Unknown"])
    assert "'Unknown'" in capsys.readouterr().err


def test_some_parts_and_libraries():
    out = io.StringIO()
    argv = ["--quick", "--rounds", "2", "--layers", "RMSNorm", "--first-shape"]
    with contextlib.redirect_stdout(out):
        results = command.main([*argv, "--parts", "speed", "--libraries", "flax"])
    for record in results["speed"]:
        assert set(record["libraries"]) == {"eqx_norms", "vmap", "flax"}
    assert not results["memory"]
    assert not results["size"]
    assert "Memory of the backward pass" not in out.getvalue()


def test_forward_and_backward_as_two_programs(monkeypatch):
    """As on an accelerator. What the two return is what one program returns."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cell = next(speed.cells(["LayerNorm"], quick=True))
    made = speed.runners(cell, mean=1.0, libraries=["equinox"])
    for library in ("eqx_norms", "vmap", "equinox"):
        _, *wanted = jax.tree.leaves(made[library]["both"](1))
        given = jax.tree.leaves(made[library]["apart"](2))
        assert len(given) == 3
        for one, other in zip(given, wanted, strict=False):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_blocks(monkeypatch):
    for name in ("WIDTH", "HIDDEN"):
        monkeypatch.setattr(compiled, name, 16)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        records = blocks.main(["--layers", "RMSNorm", "--tokens", "8", "--rounds", "2"])
    norms = ["eqx_norms", "flax", "equinox", "no norm", "prevent_cse=False"]
    assert [r["norm"] for r in records] == 2 * norms
    assert "3 blocks, 8 tokens of 16 features" in out.getvalue()
