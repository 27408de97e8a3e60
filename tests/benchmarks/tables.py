"""Printing: by rich where it is installed, or else, or for a README, in Markdown."""

import importlib.util
from collections.abc import Iterable, Sequence


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: int,
    markdown: bool = False,
) -> None:
    """The first `text` columns are text, the others numbers."""
    if not markdown and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < text else "right")
        for row in rows:
            table.add_row(*row)
        # Redirected to a file, rich would take the terminal for a narrow one.
        Console(width=max(Console().width, 120)).print(table)
        return
    print(title, "", sep="\n")
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" if n < text else "--:" for n in range(len(columns))), "|")
    for row in rows:
        print("|", " | ".join(row), "|", flush=True)
