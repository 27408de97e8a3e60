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


def printed(program: str) -> list[str]:
    """By a process of its own: here the test libraries are loaded already."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    return run.stdout.splitlines()


def test_adds_nothing_to_equinox():
    """And starts no backend, nor does tracing, so that it may be configured afterwards."""
    before, after, devices = printed(
        "import equinox, sys; print(*sys.modules)\n"
        "import eqx_norms as en; print(*sys.modules)\n"
        "import equinox as eqx, jax, jax.numpy as jnp\n"
        "x = jax.ShapeDtypeStruct((2, 8), jnp.float32)\n"
        "eqx.filter_eval_shape(lambda x: en.RMSNorm(8, use_scale=False)(x), x)\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(len(jax.devices('cpu')))"
    )
    equinox, ours = ({name for name in line.split()} for line in (before, after))
    added = {name.partition(".")[0] for name in ours - equinox}
    # Thin modules of JAX itself may differ between versions of Equinox.
    assert added - {"jax"} == {"eqx_norms"}
    packages = {name.partition(".")[0] for name in ours}
    assert not packages & set(HEAVY)
    assert devices == "3"


PROGRAMS = """
import sys
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import install_import_hook

def show():
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
    try:
        en.LayerNorm("eight")
    except Exception as error:
        print(type(error).__name__)

show()
for name in [name for name in sys.modules if name.partition(".")[0] == "eqx_norms"]:
    del sys.modules[name]
install_import_hook("eqx_norms", "beartype.beartype")
show()
"""


def test_runtime_checks_leave_no_trace():
    """The same programs with them and without: they are done while JAX traces."""
    lines = printed(PROGRAMS)
    half = len(lines) // 2
    off, on = lines[:half], lines[half:]
    assert off.pop() != on.pop() == "TypeCheckError"
    assert off == on
    assert "".join(off).count("lambda") >= 4


def test_version():
    """That of the metadata; where there are none, the import works all the same."""
    assert eqx_norms.__version__ == importlib.metadata.version("eqx-norms")
    program = (
        "import equinox, importlib.metadata as metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "import eqx_norms; print(eqx_norms.__version__)"
    )
    assert printed(program) == ["unknown"]
