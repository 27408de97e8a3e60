"""Printing: by rich where it is installed, or else, or for a README, in Markdown."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar


T = TypeVar("T")
HAS_RICH = importlib.util.find_spec("rich") is not None


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: int,
    markdown: bool = False,
) -> None:
    """The first `text` columns are text, the others numbers."""
    if not markdown and HAS_RICH:
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table

        table = Table(title=title)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < text else "right")
        for row in rows:
            table.add_row(*row)
        # Redirected to a file, rich would take the terminal for a narrow one.
        console = Console(width=1000)
        width = Measurement.get(console, console.options, table).maximum
        Console(width=max(Console().width, width)).print(table)
        return
    print(title, "", sep="\n")
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" if n < text else "--:" for n in range(len(columns))), "|")
    for row in rows:
        print("|", " | ".join(row), "|", flush=True)
    # Or the next title would be one more row.
    print()


def show_records(
    title: str, records: Sequence[dict[str, Any]], *, text: int, markdown: bool = False
) -> None:
    """Records of the same keys, which are the columns."""

    def to_text(value):
        if value is None:
            return "-"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    rows = [[to_text(value) for value in record.values()] for record in records]
    show(title, list(records[0]), rows, text=text, markdown=markdown)


def track(items: Sequence[T], title: str) -> Iterable[T]:
    """Shows on the terminal how far one is, apart from what is printed."""
    if not HAS_RICH:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, console=Console(stderr=True))
