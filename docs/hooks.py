"""What MkDocs does besides: the README, other files of the repository and the notebooks
become pages, with links that fit the site; formulas become MathML, which browsers render
without a script."""

import base64
import html
import posixpath
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


ROOT = Path(__file__).parent.parent
# Where files of the repository are in the site. Those in `docs` are there anyway.
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/benchmarks/README.md": "benchmarks/index.md",
    "tests/benchmarks/cpu.png": "benchmarks/cpu.png",
    "tests/benchmarks/cpu_rows.png": "benchmarks/cpu_rows.png",
    "notebooks/train_digits.py": "notebooks/train_digits.py",
}
NOTEBOOKS = {
    f"notebooks/{path.name}": path for path in (ROOT / "notebooks").glob("*.ipynb")
}
PLACES |= {name: f"{name.removesuffix('.ipynb')}.md" for name in NOTEBOOKS}
SOURCES = {place: name for name, place in PLACES.items()}

FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)]*)?\)")
FORMULA = re.compile(r'(<(span|div) class="arithmatex">)\\[(\[](.*?)\\[)\]]', re.DOTALL)


def on_files(files: Files, config) -> None:
    for name, place in PLACES.items():
        content = (ROOT / name).read_bytes()
        if name in NOTEBOOKS:
            for path, made in of_notebook(NOTEBOOKS[name]).items():
                files.append(File.generated(config, path, content=made))
        else:
            files.append(File.generated(config, place, content=content))


def title(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.partition("\n")[0].removeprefix("# ")


def of_notebook(path: Path) -> dict[str, str | bytes]:
    """A page with the outputs, and its figures. What a figure shows is said by `alt` in the
    metadata of its cell."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    )
    made = {f"notebooks/{name}": data for name, data in resources["outputs"].items()}
    figures = {
        base64.b64decode(output.data["image/png"]): (cell, output)
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    }
    for name, data in resources["outputs"].items():
        cell, output = figures[data]
        if "alt" not in cell.metadata:
            raise PluginError(f"{path.name}: {cell.id} has a figure, and no `alt`")
        # A figure has two pixels where a screen may have one.
        width = output.metadata.get("image/png", {}).get("width", "auto")
        picture = f"![{cell.metadata.alt}]({name}){{ width={width} }}"
        text = text.replace(f"![png]({name})", picture)
    # Notebooks name each other as files.
    for name, other in NOTEBOOKS.items():
        link = f"[{title(nbformat.read(other, nbformat.NO_CONVERT))}]({other.name})"
        text = text.replace(f"`{posixpath.basename(name)}`", link)
    text = re.sub(r"`(\w+\.py)`", r"[`\1`](\1)", text)
    made[f"notebooks/{path.name}"] = path.read_bytes()
    download = f'<a href="../{path.name}" download>This page as a notebook</a>'
    made[PLACES[f"notebooks/{path.name}"]] = f"{text}\n\n{download}\n"
    return made


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Links are written as they are in the repository. Those to files that are not in the
    site lead to the repository, where its address is known."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")

    def relink(match: re.Match) -> str:
        picture, text, target, anchor = match.groups("")
        text = LINK.sub(relink, text)
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / name).exists():
            return f"{picture}[{text}]({target}{anchor})"
        new = PLACES.get(name) or (name[5:] if name.startswith("docs/") else None)
        if new is not None:
            target = posixpath.relpath(new, posixpath.dirname(place) or ".")
        elif config.repo_url:
            target = f"{config.repo_url.rstrip('/')}/blob/main/{name}"
        else:
            return text
        return f"{picture}[{text}]({target}{anchor})"

    # The README's badges are pictures of another site.
    markdown = re.sub(r"^!\[.*\]\(https?:.*\)\n", "", markdown, flags=re.MULTILINE)
    # Two figures of a cell stay on a line.
    markdown = re.sub(r"(?<=\d) / (?=\d)", "\u00a0/\u00a0", markdown)
    parts = FENCED.split(markdown)
    return "".join(p if i % 2 else LINK.sub(relink, p) for i, p in enumerate(parts))


def on_page_content(content: str, **_) -> str:
    def render(match: re.Match) -> str:
        display = "block" if match[2] == "div" else "inline"
        # A formula of several parts is several, which a narrow page has below each other.
        parts = html.unescape(match[3]).split(r"\qquad")
        formula = "".join(convert(part, display=display) for part in parts)
        # A bar is a fence here, and no relation, which would have room around it.
        return match[1] + formula.replace(">&#x0007C;<", ' lspace="0" rspace="0">|<')

    content = FORMULA.sub(render, content)
    return re.sub(
        r'(<span class="arithmatex">(?:(?!</span>).)*</span>[,.;:)])',
        r'<span class="formula">\1</span>',
        content,
    )
