"""`import eqx_norms` costs what `import equinox` does."""

import importlib.metadata
import subprocess
import sys

import eqx_norms


HEAVY = (
    "beartype",
    "flax",
    "hypothesis",
    "IPython",
    "matplotlib",
    "optax",
    "pytest",
    "rich",
    "sklearn",
    "torch",
    "tqdm",
)


def modules_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    # A process of its own: here the test libraries are loaded already.
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    return set(run.stdout.split())


def test_adds_nothing_to_equinox():
    ours, equinox = modules_after("import eqx_norms"), modules_after("import equinox")
    added = {name.partition(".")[0] for name in ours - equinox}
    # Thin modules of JAX itself may differ between versions of Equinox.
    assert added - {"jax"} == {"eqx_norms"}
    packages = {name.partition(".")[0] for name in ours}
    assert not packages & set(HEAVY)


def test_needs_no_device():
    """Importing and tracing start no backend, so that it may be configured afterwards."""
    program = (
        "import equinox as eqx, eqx_norms as en, jax, jax.numpy as jnp\n"
        "x = jax.ShapeDtypeStruct((2, 8), jnp.float32)\n"
        "eqx.filter_eval_shape(lambda x: en.RMSNorm(8, use_scale=False)(x), x)\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(len(jax.devices('cpu')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert run.stdout.strip() == "3"


PROGRAMS = """
import equinox as eqx
import jax
import jax.numpy as jnp
{hook}
import eqx_norms as en

x, key = jnp.ones((4, 2, 8)), jax.random.key(0)
linear = eqx.nn.Linear(8, 2, key=key)
for layer in (en.LayerNorm(8), en.GroupNorm(8, 2)):
    print(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(x))
for make, x in (
    (lambda: en.BatchNorm(8), x),
    (lambda: en.SpectralNorm(linear, key=key), x[0, 0]),
):
    layer, state = eqx.nn.make_with_state(make)()
    print(jax.make_jaxpr(lambda x: layer(x, state))(x))
"""


def test_runtime_checks_leave_no_trace():
    """The same programs with them and without: they are done while JAX traces."""
    hook = (
        "from jaxtyping import install_import_hook\n"
        "install_import_hook('eqx_norms', 'beartype.beartype')"
    )
    off, on = (
        subprocess.run(
            [sys.executable, "-c", PROGRAMS.format(hook=hook)],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hook in ("", hook)
    )
    assert off == on
    assert off.count("lambda") >= 4


def test_version():
    """That of the metadata; where there are none, the import works all the same."""
    assert eqx_norms.__version__ == importlib.metadata.version("eqx-norms")
    program = (
        "import equinox, importlib.metadata as metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "import eqx_norms; print(eqx_norms.__version__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert run.stdout.strip() == "unknown"
