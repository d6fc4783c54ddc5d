"""`loraplex doctor`: the checks as lines, each with its advice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from .doctor import examine
from .settings import Settings

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def show_examination(settings: Settings, as_json: bool) -> bool:
    """Prints each check as it ends; whether none has failed."""
    checks = []
    console = Console(highlight=False, soft_wrap=True)
    for check in examine(settings):
        checks.append(check)
        if as_json:
            continue
        colour = _COLOURS[check.verdict]
        console.print(
            f"[{colour}]{check.verdict:<4}[/{colour}]  {escape(f'{check.name}: {check.detail}')}"
        )
        if check.advice:
            console.print(f"      {escape(check.advice)}")
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        counts = Counter(check.verdict for check in checks)
        console.print(", ".join(f"{counts[v]} {v}" for v in _COLOURS if counts[v]))
    return all(check.verdict != "fail" for check in checks)
