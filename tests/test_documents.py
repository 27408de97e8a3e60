"""Every Python block of the README and the docstrings runs as its reader would run it."""

import contextlib
import inspect
import pathlib
import re
import textwrap
import tomllib

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from packaging.version import Version

import eqx_norms as en


ROOT = pathlib.Path(__file__).parent.parent


@contextlib.contextmanager
def readers_settings():
    """JAX's defaults, not this suite's."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def blocks(text: str) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.S | re.M)
    return [textwrap.dedent(code) for _, code in found]


@pytest.mark.parametrize("name", ["README.md"])
def test_blocks_run(name):
    found = blocks((ROOT / name).read_text())
    assert len(found) >= 4
    namespace = {}
    with readers_settings():
        for block in found:
            exec(compile(block, name, "exec"), namespace)
    # The training loop of the README has learned a sum of four numbers.
    prediction, x = namespace["prediction"], namespace["x"]
    assert x.shape == (64, 4)
    assert abs(prediction[0] - x[0].sum()) < 1


PUBLIC = {
    name: thing
    for name, thing in {**vars(en.convert), **vars(en)}.items()
    if not name.startswith("_") and not inspect.ismodule(thing)
}


def examples():
    for name, thing in sorted(PUBLIC.items()):
        for number, block in enumerate(blocks(inspect.getdoc(thing) or "")):
            yield pytest.param(block, id=f"{name}-{number}")


@pytest.mark.parametrize("block", list(examples()))
def test_examples_run(block):
    for package in ("flax", "torch"):
        if re.search(rf"^(import|from) {package}", block, re.M):
            pytest.importorskip(package)
    namespace = {"en": en, "eqx": eqx, "jax": jax, "jnp": jnp, "P": P}
    namespace["mesh"] = jax.make_mesh((8,), ("devices",))
    with readers_settings():
        exec(compile(block, "docstring", "exec"), namespace)


def test_everything_public_is_documented():
    assert all(inspect.getdoc(thing) for thing in PUBLIC.values())
    layers = [name for name in PUBLIC if name.endswith("Norm")]
    assert len(layers) == 8
    for name in (*layers, *vars(en.convert)):
        if name in PUBLIC and name != "to_torch_state_dict":
            assert blocks(inspect.getdoc(PUBLIC[name]) or ""), name


def project():
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def test_version_is_the_same_everywhere():
    version = project()["version"]
    assert en.__version__ == version
    text = (ROOT / "CITATION.cff").read_text()
    citation = dict(re.findall(r"^([\w-]+): +(.+)$", text, re.M))
    assert citation["version"] == version
    text = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[([\d.]+)\] - ([\d-]+)$", text, re.M)
    assert released[0] == (version, citation["date-released"])


def test_the_oldest_versions_are_tested():
    text = (ROOT / ".ci" / "minimum.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==(.+)$", text, re.M))
    for requirement in project()["dependencies"]:
        name, bound = requirement.split(">=")
        assert Version(oldest[name]) == Version(bound), name
