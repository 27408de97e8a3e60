"""What MkDocs does besides: notebooks become pages, and formulas MathML, which browsers
render without a script."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


FORMULA = re.compile(r'(<(span|div) class="arithmatex">)\\[(\[](.*?)\\[)\]]', re.DOTALL)


def on_files(files: Files, config) -> None:
    """What is in the folder of notebooks, and a page for each of them, with its outputs."""
    for path in (Path(config.config_file_path).parent / "notebooks").iterdir():
        if path.suffix not in (".ipynb", ".py"):
            continue
        made = {path.name: path.read_bytes()}
        if path.suffix == ".ipynb":
            names = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
            text, resources = MarkdownExporter().from_filename(str(path), names)
            text = re.sub(r"`(\w+)\.ipynb`", r"[`\1.ipynb`](\1.md)", text)
            text = re.sub(r"`(\w+\.py)`", r"[`\1`](\1)", text)
            text += f"\n\n[This page as a notebook]({path.name})\n"
            made |= {f"{path.stem}.md": text, **resources["outputs"]}
        for name, content in made.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))


def on_page_markdown(markdown: str, **_) -> str:
    """The pages link to the notebooks as they are in the repository."""
    markdown = re.sub(r"\]\(\.\./(notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    return markdown.replace("](../notebooks/", "](notebooks/")


def on_page_content(content: str, **_) -> str:
    def render(match: re.Match) -> str:
        display = "block" if match[2] == "div" else "inline"
        formula = convert(html.unescape(match[3]), display=display)
        # A bar is a fence here, and no relation, which would have room around it.
        return match[1] + formula.replace(">&#x0007C;<", ' lspace="0" rspace="0">|<')

    return FORMULA.sub(render, content)
