"""One thing that was looked at, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

# warn: it works, but something will be slow or unsafe. skip: not looked at; the detail says why.
Verdict = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        detail: what was found. advice: what to change; empty where nothing is wrong.
    """

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


def guarded(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks of `look`; an error that it didn't expect is one more, and ends it."""
    try:
        yield from look()
    except Exception as error:
        yield Check(name, "fail", f"{type(error).__name__}: {error}", "this check itself broke off")
