"""What a start shows: one line a step, with its time, on a terminal and in a log alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

Note = Callable[[str], None]


class Steps:
    """Prints "what ... seconds" as each step ends; a terminal also sees the one under way."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Note]:
        """Runs one step; the function it gives changes the detail behind the title."""
        start = time.monotonic()
        detail = ""
        status = self.console.status(escape(title)) if self.console.is_terminal else None

        def note(text: str) -> None:
            nonlocal detail
            detail = text
            if status is not None:
                status.update(f"{escape(title)}  [dim]{escape(text)}[/dim]")

        try:
            with status or contextlib.nullcontext():
                yield note
        except BaseException:
            self._line("[red]x[/red]", title, detail, time.monotonic() - start)
            raise
        self.seconds[title] = time.monotonic() - start
        self._line("[green]✓[/green]", title, detail, self.seconds[title])

    def _line(self, mark: str, title: str, detail: str, seconds: float) -> None:
        self.console.print(
            f"{mark} {escape(title):<24} [dim]{seconds:5.1f} s[/dim]  {escape(detail)}",
            highlight=False,
            soft_wrap=True,
        )
