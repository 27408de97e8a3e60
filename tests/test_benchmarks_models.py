"""The command `python -m tests.benchmarks.models`: that it runs, and that the norms of each
library make the same model. What it measures is not tested here."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np

from .benchmarks import models, speed


WRITTEN = ("eqx_norms", "vmap", "flax", "equinox")


def test_command(tmp_path):
    argv = ["--models", "MLP", "--platform", "cpu", "--dtype", "float32"]
    argv += ["--json", str(tmp_path / "models.json")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        results = models.main(argv)
    assert json.loads((tmp_path / "models.json").read_text()) == results
    records = {record["norms"]: record for record in results["models"]}
    assert tuple(records) == WRITTEN
    for library, record in records.items():
        for name in ("ms a step", "of equinox", "s to trace", "s to compile"):
            assert record[name] > 0, library
    assert records["equinox"]["of equinox"] == 1
    assert "a step of training" in out.getvalue()
    assert "python -m tests.benchmarks.models --models MLP" in out.getvalue()


def test_the_same_step_whatever_the_norms():
    made, data = models.mlp(jnp.float32, small=True)
    assert tuple(made) == WRITTEN
    steps = {
        library: jax.jit(models.step_of(model))(
            model.params, model.state, jnp.asarray(data)
        )
        for library, model in made.items()
    }
    (wanted, _), new = steps["equinox"]
    for library, ((value, _), parameters) in steps.items():
        np.testing.assert_allclose(value, wanted, rtol=1e-4, err_msg=library)
        for a, b in zip(parameters[0], new[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=library)


def test_table():
    def record(norms, kernels):
        named = {"platform": "gpu", "model": "MLP", "dtype": "float32", "norms": norms}
        return named | {"kernels": kernels, "million cycles": 0.0}

    columns, rows = models.table([record("eqx_norms", 150), record("equinox", 120)])
    assert columns[3:] == ["kernels"]
    assert [row[3:] for row in rows] == [["150 (1.250)"], ["120"]]


def test_small_rows():
    """Of layers over rows alone; the gradient of the input besides, but not in PyTorch."""
    names = [case.name for case in speed.CASES]
    small = list(speed.cells(names, quick=False, small=True))
    assert {cell.case.name for cell in small} == {"LayerNorm", "RMSNorm"}
    assert {cell.shape for cell in small} == set(speed.SMALL_SHAPES)
    cell = small[0]._replace(shape=(2, 8))
    for library, passes in speed.runners(cell, 1.0, ["flax"], small=True).items():
        assert ("of x" in passes) == (library != "copy")
        if library != "copy":
            _, wanted, *_ = passes["both"](1)
            (given,) = passes["of x"](2)
            assert given.dtype == wanted.dtype
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)
