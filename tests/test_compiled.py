"""The command `python -m tests.benchmarks.compiled`: how it counts, on programs written by
hand, and that it runs where the compilers are installed."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .benchmarks import compiled, hlo, speed
from .benchmarks.hlo import Cost
from .helpers import all_norms


def program(lines, before=""):
    """Of one computation, after others."""
    return f"HloModule jit_f\n\n{before}\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


# 128 bytes, as an argument that each program takes.
X = "  %x = f32[8,4]{1,0} parameter(0)\n"

PROGRAMS = {
    "one operation": (
        program(X + '  ROOT %y = f32[8,4]{1,0} exponential(%x), metadata={op_name="exp"}'),
        Cost(128 + 128, kernels=1),
    ),
    "the same operand twice": (
        program(X + "  ROOT %y = f32[8,4]{1,0} multiply(%x, %x)"),
        Cost(128 + 128, kernels=1),
    ),
    "dtypes": (
        program(
            X
            + "  %half = bf16[8,4]{1,0:T(8,128)(2,1)} convert(%x)\n"
            + "  %small = s4[8,4]{1,0} convert(%half)\n"
            + "  ROOT %y = pred[8,4]{1,0} compare(%half, %small), direction=LT"
        ),
        Cost((128 + 64) + (64 + 16) + (64 + 16 + 32), kernels=3),
    ),
    "names and tuples are free": (
        program(
            X
            + "  %flat = f32[32]{0} bitcast(%x)\n"
            + "  %both = (f32[32]{0}, f32[8,4]{1,0}) tuple(%flat, %x)\n"
            + "  %one = f32[32]{0} get-tuple-element(%both), index=0\n"
            + "  ROOT %y = f32[32]{0} negate(%one)"
        ),
        Cost(128 + 128, kernels=1),
    ),
    "a fusion with two results": (
        program(
            X + "  ROOT %f = (f32[8]{0}, /*index=1*/f32[8,4]{1,0}) fusion(%x), kind=kLoop,"
            " calls=%inside",
            before="""%inside (p: f32[8,4]) -> (f32[8], f32[8,4]) {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %sum = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
  %square = f32[8,4]{1,0} multiply(%p, %p)
  ROOT %t = (f32[8]{0}, f32[8,4]{1,0}) tuple(%sum, %square)
}""",
        ),
        Cost(128 + 32 + 128, kernels=1),
    ),
    "a fusion that slices": (
        program(
            X + "  ROOT %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%inside",
            before="""%inside (p: f32[8,4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %named = f32[8,4]{1,0} bitcast(%p)
  %first = f32[1,4]{1,0} slice(%named), slice={[0:1], [0:4]}
  %last = f32[1,4]{1,0} slice(%p), slice={[7:8], [0:4]}
  ROOT %sum = f32[4]{0} add(%first, %last)
}""",
        ),
        Cost(16 + 16 + 16, kernels=1),
    ),
    "a fusion that slices and reads all": (
        program(
            X + "  ROOT %f = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%inside",
            before="""%inside (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %first = f32[1,4]{1,0} slice(%p), slice={[0:1], [0:4]}
  %wide = f32[8,4]{1,0} broadcast(%first), dimensions={0,1}
  ROOT %d = f32[8,4]{1,0} subtract(%p, %wide)
}""",
        ),
        Cost(128 + 128, kernels=1),
    ),
    "a slice within a fusion within a fusion": (
        program(
            X + "  ROOT %f = f32[1,4]{1,0} fusion(%x), kind=kLoop, calls=%outer",
            before="""%inner (a: f32[8,4]) -> f32[1,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %s = f32[1,4]{1,0} slice(%a), slice={[0:1], [0:4]}
}

%outer (p: f32[8,4]) -> f32[1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %f.1 = f32[1,4]{1,0} fusion(%p), kind=kLoop, calls=%inner
  ROOT %n = f32[1,4]{1,0} negate(%f.1)
}""",
        ),
        Cost(16 + 16, kernels=1),
    ),
    "an update in place": (
        program(
            X
            + "  %row = f32[1,4]{1,0} parameter(1)\n  %at = s32[] parameter(2)\n"
            + "  ROOT %u = f32[8,4]{1,0} dynamic-update-slice(%x, %row, %at, %at)"
        ),
        Cost(16 + 4 + 16, kernels=1),
    ),
    "an update in place, fused": (
        program(
            X
            + "  %row = f32[1,4]{1,0} parameter(1)\n  %at = s32[] parameter(2)\n"
            + "  ROOT %u = f32[8,4]{1,0} fusion(%x, %row, %at), kind=kLoop, calls=%inside",
            before="""%inside (p: f32[8,4], r: f32[1,4], i: s32[]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %r = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %n = f32[1,4]{1,0} negate(%r)
  %u.1 = f32[8,4]{1,0} dynamic-update-slice(%p, %n, %i, %i)
  ROOT %b = f32[8,4]{1,0} bitcast(%u.1)
}""",
        ),
        Cost(16 + 4 + 16, kernels=1),
    ),
    "an update that is not in place": (
        program(
            X
            + "  %row = f32[1,4]{1,0} parameter(1)\n  %at = s32[] parameter(2)\n"
            + "  ROOT %u = f32[8,4]{1,0} fusion(%x, %row, %at), kind=kLoop, calls=%inside",
            before="""%inside (p: f32[8,4], r: f32[1,4], i: s32[]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %r = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %u.1 = f32[8,4]{1,0} dynamic-update-slice(%p, %r, %i, %i)
  ROOT %n = f32[8,4]{1,0} negate(%u.1)
}""",
        ),
        Cost(128 + 16 + 4 + 128, kernels=1),
    ),
    "memory on the chip": (
        program(
            "  %x = f32[8,4]{1,0:T(8,128)} parameter(0)\n"
            "  %copy-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)},"
            " u32[]{:S(2)}) copy-start(%x)\n"
            "  %slice-start = ((f32[8,4]{1,0:T(8,128)}), f32[2,4]{1,0:T(8,128)S(1)},"
            " s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:4]}\n"
            "  %there = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%copy-start)\n"
            "  %part = f32[2,4]{1,0:T(8,128)S(1)} slice-done(%slice-start)\n"
            "  %y = f32[8,4]{1,0:T(8,128)S(1)} exponential(%there)\n"
            "  ROOT %z = f32[8,4]{1,0:T(8,128)} dot(%y, %part),"
            ' backend_config={"window_config":{"estimated_cycles":"700"}}'
        ),
        Cost(128 + 32 + 0 + 128, kernels=4, cycles=700),
    ),
    "buffers that are set aside": (
        program(
            '  %a = f32[8,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"\n'
            '  ROOT %b = f32[8,4]{1,0} custom-call(%a), custom_call_target="product"'
        ),
        Cost(128 + 128, kernels=1),
    ),
    "a loop that says how often": (
        program(
            X + "  ROOT %w = f32[8,4]{1,0} while(%x), condition=%go, body=%step,"
            ' backend_config={"known_trip_count":{"n":"5"}}',
            before="""%go (a: f32[8,4]) -> pred[] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %c = pred[] constant(true)
}

%step (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %e = f32[8,4]{1,0} exponential(%b), backend_config={"estimated_cycles":"3"}
}""",
        ),
        Cost(5 * 256, kernels=5, cycles=15),
    ),
    "a loop that counts": (
        program(
            "  %i = s32[] parameter(0)\n"
            "  ROOT %w = s32[] while(%i), condition=%go, body=%step",
            before="""%go (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %end = s32[] constant(7)
  ROOT %c = pred[] compare(%a, %end), direction=LT
}

%step (b: s32[]) -> s32[] {
  %b = s32[] parameter(0)
  ROOT %n = s32[] add(%b, %b)
}""",
        ),
        # The body, and the comparison with a constant of four bytes.
        Cost(7 * (8 + 9), kernels=14),
    ),
    "a call": (
        program(
            X + "  ROOT %c = f32[8,4]{1,0} call(%x), to_apply=%inside",
            before="""%inside (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %a = f32[8,4]{1,0} negate(%p)
  ROOT %b = f32[8,4]{1,0} exponential(%a)
}""",
        ),
        Cost(2 * 256, kernels=2),
    ),
    "a conditional": (
        program(
            "  %i = s32[] parameter(1)\n"
            + X
            + "  ROOT %c = f32[8,4]{1,0} conditional(%i, %x, %x),"
            " branch_computations={%dear, %cheap}",
            before="""%dear (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%a), to_apply=%add
  ROOT %n = f32[8,4]{1,0} negate(%r)
}

%cheap (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %m = f32[8,4]{1,0} negate(%b)
}""",
        ),
        Cost(256, kernels=1, conditionals=1, collectives={"all-reduce": (1, 128)}),
    ),
    "collectives": (
        program(
            X
            + "  %v = f32[4]{0:S(1)} parameter(1)\n"
            + "  %a = (f32[8,4]{1,0}, f32[4]{0:S(1)}) all-reduce-start(%x, %v)\n"
            + "  %b = (f32[8,4]{1,0}, f32[4]{0:S(1)}) all-reduce-done(%a)\n"
            + "  %c = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x)\n"
            + "  %d = f32[16,4]{1,0} all-gather-done(%c)\n"
            + "  %e = f32[8,4]{1,0} all-reduce(%x), to_apply=%add\n"
            + "  ROOT %f = f32[8,4]{1,0} collective-permute(%x)"
        ),
        Cost(
            4 * 128 + 128 + 256 + 128 + 128,
            kernels=4,
            collectives={
                "all-reduce": (2, 128 + 16 + 128),
                "all-gather": (1, 128),
                "collective-permute": (1, 128),
            },
        ),
    ),
}


@pytest.mark.parametrize(("text", "expected"), PROGRAMS.values(), ids=PROGRAMS)
def test_count(text, expected):
    assert hlo.count(text) == expected


def test_what_cannot_be_counted_is_said():
    with pytest.raises(ValueError, match="the text has no entry computation"):
        hlo.count("HloModule jit_f")
    text, _ = PROGRAMS["a loop that counts"]
    with pytest.raises(ValueError, match="does not say how often w runs"):
        hlo.count(text.replace("constant(7)", "parameter(1)"))


@all_norms
def test_two_programs_are_the_training_of_a_layer(case):
    shape, layout = ((64, 8), "NC") if case.on_vectors else ((4, 6, 6, 8), "NHWC")
    x, dy = jax.random.normal(jax.random.key(0), (2, *shape))
    cell = speed.Cell(case, shape, layout, jnp.float32)
    made = compiled.libraries(cell)
    assert {"eqx_norms", "vmap", "flax"} <= set(made)
    for library, layer in made.items():
        passes = compiled.passes(layer, x)
        forward, *args = passes.forward
        backward, *_ = passes.backward
        results = jax.jit(forward)(*args)
        gradients = jax.jit(backward)(args, results, dy)
        y, *expected, _ = jax.jit(layer.both)(*args, dy)
        written = [value - y for value in results.values() if value.shape == y.shape]
        assert min(float(jnp.max(jnp.abs(each))) for each in written) < 1e-6
        for actual, wanted in zip(
            *map(jax.tree.leaves, (gradients, expected)), strict=True
        ):
            np.testing.assert_allclose(
                actual, wanted, rtol=1e-5, atol=1e-5, err_msg=library
            )
        # What is kept is x, or not, and what the forward pass writes besides.
        assert passes.kept >= x.nbytes
        assert (passes.kept < 1.5 * x.nbytes) == (library in speed.OURS)


def command(*argv):
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.compiled", "--markdown", *argv],
        capture_output=True,
        cwd=pathlib.Path(__file__).parents[1],
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


COMPILERS = {"gpu": "jax_plugins.xla_cuda12", "tpu": "libtpu"}


def is_installed(platform):
    try:
        return importlib.util.find_spec(COMPILERS[platform]) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("platform", COMPILERS)
def test_command(platform, tmp_path):
    argv = ["--platform", platform, "--layers", "RMSNorm", "--dtype", "float32"]
    argv += ["--parts", "layers", "--json", str(tmp_path / "out.json")]
    printed = command(*argv)
    results = json.loads((tmp_path / "out.json").read_text())
    if not is_installed(platform):
        assert f"{compiled.PLATFORMS[platform]} is left out: " in printed
        assert results["layers"] == []
        return
    records = {record["library"]: record for record in results["layers"]}
    assert set(records) == {"eqx_norms", "vmap", "flax", "equinox"}
    for record in records.values():
        assert record["inference"]["units"] >= 1.99
        assert (record["inference"]["microseconds"] is None) == (platform == "gpu")
        assert f"{record['kept']:.2f}" in printed


def test_tables(capsys):
    def one(units, microseconds=None):
        given = {"units": units, "kernels": 3, "conditionals": units > 4}
        return given | {"microseconds": microseconds}

    layer = {"layer": "LayerNorm", "shape": [8, 4], "layout": "NC", "dtype": "float32"}
    layer |= {"library": "flax", "kept": 3.004}
    sent = {"collectives": {"all-reduce": (2, 2048)}, "conditionals": 1}
    block = {"layer": "RMSNorm", "dtype": "bfloat16", "blocks": "scanned"}
    results = {
        "run": {"command": "compiled", "date": "today", "seconds": 5, "versions": {}},
        "layers": [
            {"platform": platform, **layer}
            | {
                name: one(units, time)
                for name, units in (("inference", 2), ("forward", 3.5), ("backward", 5))
            }
            for platform, time in (("gpu", None), ("tpu", 1234.5))
        ],
        "blocks": [
            {"platform": "tpu", "library": "flax", "temporary": 8.0, "cycles": 2_500_000}
            | (block | one(70))
        ],
        "devices": [
            {"platform": "gpu", "layer": "BatchNorm", "way": "jit", "library": "vmap"}
            | {"forward": sent, "both": "No rule for psum"}
        ],
    }
    compiled.report(results, markdown=True)
    printed = capsys.readouterr().out
    for row in (
        "| LayerNorm | 8x4 NC | float32 | flax | 2.00 (3) | 3.50 (3) | 5.00 (3) if |",
        "| 8.50 | 3.00 | 1234 | 1234 | 1234 |",
        "| RMSNorm | bfloat16 | scanned | flax | 70.00 (3) if | 8.00 | 2.5 |",
        "| BatchNorm | jit | vmap | 2 all-reduce (2.0 KiB), 1 conditional | raises |",
    ):
        assert row in printed


def test_unknown_names_are_said_at_once(capsys):
    for option in ("--platform", "--parts", "--layers", "--dtype"):
        with pytest.raises(SystemExit, match="2"):
            compiled.parse([option, "Unknown"])
        assert "['Unknown'] are none of" in capsys.readouterr().err
