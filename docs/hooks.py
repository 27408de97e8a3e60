"""What MkDocs does besides: notebooks become pages, and formulas MathML, which browsers
render without a script."""

import html
import re
from pathlib import PurePosixPath

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


FORMULA = re.compile(r'(<(span|div) class="arithmatex">)\\[(\[](.*?)\\[)\]]', re.DOTALL)


def on_files(files: Files, config) -> None:
    """A page for each notebook, with the outputs that are in it, and a link to it."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(file.src_uri)
        names = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
        text, resources = MarkdownExporter().from_filename(file.abs_src_path, names)
        text = re.sub(r"`(\w+)\.ipynb`", r"[`\1.ipynb`](\1.md)", text)
        text = re.sub(r"`(\w+\.py)`", r"[`\1`](\1)", text)
        text += f"\n\n[This page as a notebook]({path.name})\n"
        made = {path.with_suffix(".md"): text}
        made |= {path.parent / name: data for name, data in resources["outputs"].items()}
        for name, content in made.items():
            files.append(File.generated(config, str(name), content=content))


def on_page_content(content: str, **_) -> str:
    def render(match: re.Match) -> str:
        display = "block" if match[2] == "div" else "inline"
        formula = convert(html.unescape(match[3]), display=display)
        # A bar is a fence here, and no relation, which would have room around it.
        return match[1] + formula.replace(">&#x0007C;<", ' lspace="0" rspace="0">|<')

    return FORMULA.sub(render, content)
