"""Tables as plain lines: ids and keys stay whole, for copying and for `grep`, at any width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape


def print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints columns as wide as their longest cell; the terminal may wrap lines, nothing is cut."""
    cells = [[str(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    for number, row in enumerate(cells):
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        line = escape(text.rstrip())
        console.print(
            f"[bold]{line}[/bold]" if number == 0 else line, highlight=False, soft_wrap=True
        )
