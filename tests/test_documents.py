"""Every Python block of the README, the pages and the docstrings runs as its reader would
run it; the reference has every public name, field and type; links lead to what they name; a
table says what no other does."""

import contextlib
import dataclasses
import inspect
import json
import pathlib
import re
import textwrap
import tomllib
from collections import Counter

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


REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))


@pytest.mark.parametrize("name", [n for n in PUBLIC if dataclasses.is_dataclass(PUBLIC[n])])
def test_the_reference_explains_every_public_field(name):
    explained = f"{REFERENCE}\n{inspect.getdoc(PUBLIC[name])}"
    listed = re.findall(r"^- ((?:`\w+`(?:, )?)+):", explained, re.M)
    listed = set(re.findall(r"\w+", " ".join(listed)))
    assert {field.name for field in dataclasses.fields(PUBLIC[name])} <= listed


def test_the_reference_explains_every_type():
    names = [
        name
        for module in ("_types", "_dtypes")
        for name in re.findall(
            r"^(?:class )?(\w+)(?:: TypeAlias|\(Protocol)",
            (ROOT / "eqx_norms" / f"{module}.py").read_text(),
            re.M,
        )
    ]
    # Others are what arguments become.
    inside = {"Groups", "Names", "Shape", "Size"}
    explained = re.findall(r"^## (\w+) {", REFERENCE, re.M)
    assert {"Axes", "AxisName", "Initializer"} <= set(names) - inside <= set(explained)


def markdown(path: pathlib.Path) -> str:
    """The text of a page or a notebook, without its code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    ROOT / "tests" / "benchmarks" / "README.md",
]


def test_no_row_of_a_table_stands_twice():
    rows = Counter()
    for path in DOCUMENTS[:-1]:  # In a record of figures rows may well be equal.
        lines = markdown(path).splitlines()
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            # Neither headings nor what divides them from the rest.
            if re.match(r"\|.*\w", line) and not re.match(r"\|[ :|-]+$", below):
                rows[line] += 1
    assert len(rows) > 100
    assert not [row for row, n in rows.items() if n > 1]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


LINK = re.compile(r"\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_what_they_name(path):
    """To a file that a release has; and to a whole page by the heading of that page."""
    released = config()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for text, target, anchor in LINK.findall(markdown(path)):
        linked = (path.parent / target).resolve()
        assert linked.exists(), target
        inside = f"/{linked.relative_to(ROOT)}"
        assert any(f"{inside}/".startswith(f"{name}/") for name in released), target
        if linked.suffix in (".md", ".ipynb") and not anchor:
            heading = markdown(linked).lstrip().partition("\n")[0]
            assert f"# {' '.join(text.split())}" == heading, target


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("eqx.nn.inference_mode(model)", "inference_mode"),
        ('`mode="ema"`', "ema"),
        ("import jax2onnx.onnx", "onnx"),
        ("eqx.tree_serialise_leaves(file, model)", "tree_serialise_leaves"),
        ("`BatchNorm1d`, `SyncBatchNorm`", "SyncBatchNorm"),
        ("Array[str]", "str"),
        ("key=jax.random.key(0)", "random"),
    ],
)
def test_search_finds_the_words_of_code(text, word):
    (separator,) = re.findall(
        r"separator: '(.*)'$", (ROOT / "mkdocs.yml").read_text(), re.M
    )
    assert word in re.split(separator.replace("''", "'"), text)


def config():
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def project():
    return config()["project"]


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
