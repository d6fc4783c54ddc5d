"""What an operator sees of a service under load, through its admin API."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

POLL_S = 0.1
EMPTY_S = 10.0  # after the load, the engines must have nothing open by then


@dataclass(frozen=True)
class View:
    """What the admin API tells at one moment; seconds are monotonic."""

    at: float
    epoch: int
    serving: frozenset[str]
    open_requests: int
    groups: Mapping[str, dict[str, Any]]  # all that it says of each, by name


class Watch:
    """Looks again and again."""

    def __init__(self, url: str, admin_key: str) -> None:
        self.views: list[View] = []
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {admin_key}"},
            timeout=5.0,
            trust_env=False,
        )

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                response = await self._http.get("/admin/v1/placement")
                if response.is_success:
                    self.views.append(_view(response.json()))
            self.look()
            await asyncio.sleep(POLL_S)

    def look(self) -> None:
        """What else there is to see each time."""

    async def wait_for(self, condition: Callable[[View], bool], timeout_s: float = 120.0) -> bool:
        """Whether it holds, as seen from now on, in time."""
        began = time.monotonic()
        while time.monotonic() < began + timeout_s:
            if self.views and (view := self.views[-1]).at > began and condition(view):
                return True
            await asyncio.sleep(POLL_S)
        return False

    async def wait_serving(self, groups: int, timeout_s: float = 120.0) -> bool:
        """Whether so many groups serve, as seen from now on, in time."""
        return await self.wait_for(lambda view: len(view.serving) >= groups, timeout_s)

    async def wait_empty(self, timeout_s: float) -> float | None:
        """Seconds until no engine has anything open; None: it took longer."""
        began = time.monotonic()
        empty = await self.wait_for(lambda view: not view.open_requests, timeout_s)
        return self.views[-1].at - began if empty else None

    async def close(self) -> None:
        await self._http.aclose()


def changes_of_groups(views: Sequence[View]) -> tuple[list[float], list[float]]:
    """When groups were first seen to serve no longer, and when new ones did."""
    left: list[float] = []
    came: list[float] = []
    gone: set[str] = set()
    known = set(views[0].serving)
    for before, view in itertools.pairwise(views):
        lost = before.serving - view.serving - gone
        new = view.serving - known
        gone |= lost
        known |= new
        left += [view.at] * len(lost)
        came += [view.at] * len(new)
    return left, came


def _view(status: dict[str, Any]) -> View:
    groups = status["groups"]
    serving = frozenset(g["group"] for g in groups if not g["draining"])
    open_requests = sum(g["running"] + g["queued"] for g in groups)
    by_name = {g["group"]: g for g in groups}
    return View(time.monotonic(), status["epoch"], serving, open_requests, by_name)


def conclude(path: Path, fault: str, figures: dict[str, Any]) -> None:
    """Prints a run's figures and keeps them beside those of other faults; exits with an error if
    an answer was wrong or an engine still works on one."""
    print(json.dumps(figures, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {fault: figures}, indent=1) + "\n")
    print(f"written to {path}")
    if bad := figures["altered"] + figures["failed"]:
        sys.exit(f"error: {bad} answers failed or were altered")
    if figures["engines_empty_s"] is None:
        sys.exit(f"error: engines had requests open {EMPTY_S:.0f} s after the last answer")
