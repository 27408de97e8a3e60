"""A step of training of whole models, with the norms that they have and with eqx_norms.

    python -m tests.benchmarks.models [--models ViT,MLP] [--platform gpu,tpu,cpu]
                                      [--dtype float32,bfloat16] [--json FILE] [--markdown]

ViT: ViT-S of equimo. ESM2: the smallest of esm2quinox, a scan over its blocks. U-Net:
ModernUNet of pdequinox, with GroupNorms. Their norms are those of `equinox.nn`, which
`replace_norms` replaces. ConvNet: five convolutions, a BatchNorm after each but the last.
MLP: four products, of 64 features, a LayerNorm after each but the last. These two are
written here, with the norms of Flax too. All parameters are in the dtype, and so is the
input. A model whose package is not installed is left out.

gpu, tpu: compiled, not run, as in `compiled.py`. cpu: smaller models, run on JAX's default
device, in turns; a ratio is formed within each round, and given is the median. Times are of
processors, all together, of this process alone: to trace and lower, the least of three; to
compile, one.
"""

import argparse
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any


if __name__ == "__main__":
    # JAX, once imported, is not to look for an accelerator.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_norms as en
from tests.benchmarks import compiled, hlo, speed
from tests.benchmarks.rivals import Functional
from tests.benchmarks.tables import track


KEYS = ("model", "dtype", "norms")
PACKAGES = (*compiled.PACKAGES, "equimo", "esm2quinox", "pdequinox")
TRACES, ROUNDS = 3, 30
# Those to be compiled, and those to be run.
SIZES = {
    "ViT": [(64, 224, 16, 384, 6, 12), (8, 32, 4, 64, 4, 3)],
    "ESM2": [(32, 256, 6, 320, 20), (8, 64, 3, 64, 4)],
    "U-Net": [(16, 128, 32), (4, 32, 8)],
    "ConvNet": [(128, 64, 64), (8, 32, 8)],
}
Made = tuple[dict[str, Functional], np.ndarray]  # by library; and the input


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def with_norms_replaced(model: Any, dtype: Any) -> dict[str, Functional]:
    def functional(model):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def apply(params, state, x):
            return jax.vmap(eqx.combine(params, static))(x), state

        return Functional(apply, jax.tree.map(lambda a: a.astype(dtype), params), ())

    return {"eqx_norms": functional(en.replace_norms(model)), "equinox": functional(model)}


def vit(dtype: Any, *, small: bool) -> Made:
    from equimo.models.vit import VisionTransformer

    n, size, patch, width, heads, depth = SIZES["ViT"][small]
    key = jax.random.key(0)
    model = VisionTransformer(size, 3, width, patch, heads, [depth], reg_tokens=0, key=key)  # pyright: ignore
    return with_norms_replaced(model, dtype), normal(n, 3, size, size)


def esm2(dtype: Any, *, small: bool) -> Made:
    from esm2quinox import ESM2

    n, length, depth, width, heads = SIZES["ESM2"][small]
    model = ESM2(depth, width, heads, token_dropout=False, key=jax.random.key(0))
    tokens = np.random.default_rng(0).integers(4, 24, (n, length), np.int32)
    return with_norms_replaced(model, dtype), tokens


def unet(dtype: Any, *, small: bool) -> Made:
    from pdequinox.arch import ModernUNet

    n, size, width = SIZES["U-Net"][small]
    kwargs = {"hidden_channels": width, "num_levels": 3, "num_blocks": 1}
    model = ModernUNet(2, 3, 3, **kwargs, key=jax.random.key(0))
    return with_norms_replaced(model, dtype), normal(n, 3, size, size)


def written(
    name: str, layout: str, product: Callable[..., Any], shapes: Any, dtype: Any
) -> dict[str, Functional]:
    """Products with weights of these shapes, `(outputs, inputs, ...)`, each but the last
    followed by a norm and a relu."""
    (case,) = (case for case in speed.CASES if case.name == name)
    scaled = [normal(*shape) / math.prod(shape[1:]) ** 0.5 for shape in shapes]
    weights = [jnp.asarray(w, dtype) for w in scaled]
    inputs = [(1, width, 1, 1)[: len(layout)] for width, *_ in shapes[:-1]]
    norms = [compiled.libraries(speed.Cell(case, x, layout, dtype)) for x in inputs]

    def functional(library):
        layers = [norm[library] for norm in norms]

        def apply(params, states, x):
            made = []
            for layer, w, own, state in zip(layers, *params, states, strict=False):
                y, state = layer.apply(own, state, product(x, w))
                x, made = jax.nn.relu(y), [*made, state]
            return product(x, params[0][-1]), made

        params = (weights, [layer.params for layer in layers])
        return Functional(apply, params, [layer.state for layer in layers])

    return {library: functional(library) for library in norms[0]}


def convnet(dtype: Any, *, small: bool) -> Made:
    def convolve(x, w):
        stride = 2 if w.shape[0] == 2 * w.shape[1] else 1
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME")

    n, size, width = SIZES["ConvNet"][small]
    widths = [3, width, width, 2 * width, 2 * width, 10]
    shapes = [(b, a, 3, 3) for a, b in itertools.pairwise(widths)]
    return written("BatchNorm", "NCHW", convolve, shapes, dtype), normal(n, 3, size, size)


def mlp(dtype: Any, *, small: bool) -> Made:
    shapes = [(64, 2), (64, 64), (64, 64), (2, 64)]
    return written("LayerNorm", "NC", lambda x, w: x @ w.T, shapes, dtype), normal(256, 2)


# With the package that each comes from.
MODELS: dict[str, tuple[Callable[..., Made], str]] = {
    "ViT": (vit, "equimo"),
    "ESM2": (esm2, "esm2quinox"),
    "U-Net": (unet, "pdequinox"),
    "ConvNet": (convnet, "jax"),
    "MLP": (mlp, "jax"),
}


def step_of(model: Functional) -> Callable[..., Any]:
    def loss(params, state, x):
        y, state = model.apply(params, state, x)
        squares = (jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(y))
        return sum(map(jnp.mean, squares)), state

    def step(params, state, x):
        given, gradients = jax.value_and_grad(loss, has_aux=True)(params, state, x)
        return given, jax.tree.map(lambda leaf, d: leaf - 0.1 * d, params, gradients)

    return step


def measured(platform: str, name: str, dtype: str) -> list[dict[str, Any]]:
    as_run, wanted = platform == "cpu", compiled.DTYPES[dtype]
    models, data = MODELS[name][0](wanted, small=as_run)
    x = jnp.asarray(data, wanted if np.issubdtype(data.dtype, np.floating) else None)
    args = {library: (model.params, model.state, x) for library, model in models.items()}
    if not as_run:
        args = compiled.place(args, compiled.mesh(platform))
    tracing, lowered = dict.fromkeys(models, math.inf), {}
    for library in [*models] * TRACES:
        jax.clear_caches()
        start = time.process_time()
        lowered[library] = jax.jit(step_of(models[library])).lower(*args[library])
        tracing[library] = min(tracing[library], time.process_time() - start)
    records, made = {}, {}
    for library in models:
        start = time.process_time()
        program = lowered[library].compile(compiled.OPTIONS.get(platform))
        seconds, memory = time.process_time() - start, program.memory_analysis()
        cost = hlo.Cost() if as_run else hlo.count(program.as_text())
        if as_run:
            made[library] = {"step": speed.repeated(partial(program, *args[library]))}
        records[library] = {
            "platform": platform,
            **dict(zip(KEYS, (name, dtype, library), strict=True)),
            "MiB read and written": cost.nbytes / 2**20,
            "kernels": cost.kernels,
            "MiB of temporary memory": memory.temp_size_in_bytes / 2**20,
            "million cycles": cost.cycles / 1e6,
            "s to trace": tracing[library],
            "s to compile": seconds,
        }
    steps = speed.measure(made, rounds=ROUNDS, seconds=math.inf)
    for library, passes in steps.items():
        ratio = np.median(np.divide(passes["step"], steps["equinox"]["step"]))
        records[library]["ms a step"] = float(np.median(passes["step"])) * 1e3
        records[library]["of equinox"] = float(ratio)
    return list(records.values())


def table(records: list[dict[str, Any]]) -> compiled.Table:
    """What is not zero; in parentheses the ratio to that with the norms of Equinox."""
    base = {(r["model"], r["dtype"]): r for r in records if r["norms"] == "equinox"}

    def text(record, name):
        value, of = record[name], base[record["model"], record["dtype"]][name]
        shown = f"{value:.3g}" if value < 100 else f"{value:.0f}"
        alone = record["norms"] == "equinox" or name in ("ms a step", "of equinox")
        return (shown if alone or not of else f"{shown} ({value / of:.3f})") * bool(value)

    names = [name for name in records[0] if name not in ("platform", *KEYS)]
    rows = [[r[k] for k in KEYS] + [text(r, name) for name in names] for r in records]
    return compiled.without_empty([*KEYS, *names], rows)


PLATFORMS = {**compiled.PLATFORMS, "cpu": "CPU"}
TABLES = {"models": ("a step of training", table, len(KEYS))}
LEGEND = "In parentheses: the ratio to the figure with the norms of equinox.nn."


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    start, records = time.perf_counter(), []
    for platform in arguments.platform:
        if platform != "cpu" and (reason := compiled.why_not(platform)):
            print(f"{compiled.PLATFORMS[platform]} is left out: {reason}")
            continue
        cells = [(name, dtype) for name in arguments.models for dtype in arguments.dtype]
        for name, dtype in track(cells, f"{platform}: models"):
            if importlib.util.find_spec(MODELS[name][1]):
                records += measured(platform, name, dtype)
            else:
                print(f"{name} is left out: {MODELS[name][1]} is not installed")
    return {"run": compiled.about_run(arguments, start, PACKAGES), "models": records}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    known = {"--models": MODELS, "--platform": PLATFORMS, "--dtype": compiled.DTYPES}
    arguments = compiled.parse(argv, known, "models", __doc__)
    about = {"platforms": PLATFORMS, "tables": TABLES, "legend": LEGEND}
    return compiled.finish(arguments, run(arguments), **about)


if __name__ == "__main__":
    main()
