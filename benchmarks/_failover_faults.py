"""Deaths of a service's processes, and what its operator sees of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

# The title of the processes that a fault picks one of, and the signal that it gets.
FAULTS = {
    "rank-kill": ("ray::RankActor", signal.SIGKILL),
    "rank-stop": ("ray::RankActor", signal.SIGSTOP),
    "front-kill": ("ray::ServeReplica:groups", signal.SIGKILL),
    "controller-kill": ("ray::ControllerActor", signal.SIGKILL),
    "gateway-kill": ("ray::ServeReplica:gateway", signal.SIGKILL),
}
POLL_S = 0.1
_GIVE_UP_S = 120.0
_UNSEEN_S = 5.0  # a death that nobody has seen by then never shows


@dataclass
class Death:
    """
    Args:
        at: seconds, monotonic.
        seen_s: until the controller's status shows it (a group fewer, another epoch); for a
            gateway, until its process's replacement runs. None: the group didn't serve yet.
        gone_s: until the process has ended; one that was stopped is ended by its group.
        ready_s: until all groups (or gateways) are there again.
    """

    at: float
    pid: int
    seen_s: float | None = None
    gone_s: float | None = None
    ready_s: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {
            name: value if value is None else round(value, 2)
            for name, value in asdict(self).items()
            if name.endswith("_s")
        }


@dataclass(frozen=True)
class View:
    """What the admin API tells."""

    epoch: int
    serving: frozenset[str]
    open_requests: int


class Operator:
    """Watches a service through its admin API, and its processes."""

    def __init__(self, url: str, admin_key: str, root: psutil.Process) -> None:
        self._root = root
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {admin_key}"},
            timeout=5.0,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def view(self) -> View | None:
        """None while the controller, or the gateway that is asked, doesn't answer."""
        with contextlib.suppress(httpx.HTTPError):
            response = await self._http.get("/admin/v1/placement")
            if response.is_success:
                return _view(response.json())
        return None

    async def wait_serving(self, groups: int) -> View:
        deadline = time.monotonic() + _GIVE_UP_S
        while time.monotonic() < deadline:
            view = await self.view()
            if view is not None and len(view.serving) >= groups:
                return view
            await asyncio.sleep(POLL_S)
        raise TimeoutError(f"not {groups} groups in {_GIVE_UP_S:.0f} s; last seen: {view}")

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in self._root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    async def harm(self, fault: str, groups: int, rng: random.Random) -> Death:
        """Makes one death and watches until all `groups` serve again."""
        title, number = FAULTS[fault]
        before = await self.wait_serving(1)
        present = self.processes(title)
        victim = rng.choice(present)
        death = Death(time.monotonic(), victim.pid)
        victim.send_signal(number)
        deadline = death.at + _GIVE_UP_S
        while death.ready_s is None or death.gone_s is None:
            await asyncio.sleep(POLL_S)
            now = time.monotonic() - death.at
            if death.gone_s is None and not _alive(victim):
                death.gone_s = now
            if fault == "gateway-kill":
                back = {p.pid for p in self.processes(title)} - {p.pid for p in present}
                if back and death.seen_s is None:
                    death.seen_s = now
                if back and await self.view() is not None:
                    death.ready_s = now
            elif (view := await self.view()) is not None:
                lost = before.serving - view.serving
                if death.seen_s is None and (lost or view.epoch != before.epoch):
                    death.seen_s = now
                since = death.seen_s if death.gone_s is None else death.gone_s + _UNSEEN_S
                if since is not None and now >= since and len(view.serving) >= groups:
                    death.ready_s = death.ready_s or now
            if time.monotonic() > deadline:
                raise TimeoutError(f"{fault}: {death} after {_GIVE_UP_S:.0f} s")
        return death


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _view(status: dict[str, Any]) -> View:
    groups = status["groups"]
    serving = frozenset(g["group"] for g in groups if not g["draining"])
    return View(status["epoch"], serving, sum(g["running"] + g["queued"] for g in groups))
