"""Every Python block of the README, the pages and the docstrings runs as its reader would
run it, and the reference has every public name."""

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


def run(block: str, name: str, namespace: dict[str, object]) -> None:
    for package in ("flax", "torch"):
        if re.search(rf"^(import|from) {package}", block, re.M):
            pytest.importorskip(package)
    with readers_settings():
        exec(compile(block, name, "exec"), namespace)


PAGES = ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_blocks_run(name):
    text = (ROOT / name).read_text()
    found = blocks(text)
    assert len(found) == text.count("```python")
    namespace, predictions = {}, []
    for block in found:
        if name == "README.md":  # There each block stands by itself.
            namespace = {}
        run(block, name, namespace)
        predictions += [namespace] * ("prediction" in namespace)
    # The training loop of the README has learned a sum of four numbers.
    assert len(predictions) == (name == "README.md")
    for namespace in predictions:
        prediction, x = namespace["prediction"], namespace["x"]
        assert x.shape == (64, 4)
        assert abs(prediction[0] - x[0].sum()) < 0.5


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
    namespace = {"en": en, "eqx": eqx, "jax": jax, "jnp": jnp, "P": P}
    namespace["mesh"] = jax.make_mesh((8,), ("devices",))
    run(block, "docstring", namespace)


def test_everything_public_is_documented():
    assert all(inspect.getdoc(thing) for thing in PUBLIC.values())
    layers = [name for name in PUBLIC if name.endswith("Norm")]
    assert len(layers) == 8
    for name in (*layers, *vars(en.convert)):
        if name in PUBLIC and name != "to_torch_state_dict":
            assert blocks(inspect.getdoc(PUBLIC[name]) or ""), name


def test_the_reference_has_every_public_name_once():
    pages = (ROOT / "docs" / "api").glob("*.md")
    listed = [
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert sorted(listed) == sorted(
        f"eqx_norms.{name}" if hasattr(en, name) else f"eqx_norms.convert.{name}"
        for name in PUBLIC
    )


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
