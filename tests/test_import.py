"""`import eqx_norms` costs what `import equinox` does."""

import subprocess
import sys


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
    """Importing starts no backend, so that it may still be configured afterwards."""
    program = (
        "import eqx_norms, jax; jax.config.update('jax_num_cpu_devices', 3);"
        "print(len(jax.devices('cpu')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert run.stdout.strip() == "3"
