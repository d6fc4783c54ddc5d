"""Deaths of a service's processes, and what its operator sees of them."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from _failover_watch import View, Watch, changes_of_groups

# The title of the processes that a fault picks one of, and the signal that it gets.
FAULTS = {
    "rank-kill": ("ray::RankActor", signal.SIGKILL),
    "rank-stop": ("ray::RankActor", signal.SIGSTOP),
    "front-kill": ("ray::ServeReplica:groups", signal.SIGKILL),
    "controller-kill": ("ray::ControllerActor", signal.SIGKILL),
    "gateway-kill": ("ray::ServeReplica:gateway", signal.SIGKILL),
}


@dataclass
class Death:
    """A process that was killed or stopped at `at`; `gone_at`: seen to have ended."""

    at: float
    process: psutil.Process
    gone_at: float | None = None


@dataclass(frozen=True)
class Times:
    """Seconds after a death.

    Args:
        gone_s: until its process had ended; one that was stopped is ended by its group.
        seen_s: until the controller's status showed it: a group fewer, or another epoch.
        ready_s: until there was a group, a controller that knows the groups, or a gateway in place
            of the dead one.
    """

    gone_s: float | None = None
    seen_s: float | None = None
    ready_s: float | None = None


class Operator(Watch):
    """Watches a service through its admin API, and its processes."""

    def __init__(self, url: str, admin_key: str, root: psutil.Process, fault: str) -> None:
        super().__init__(url, admin_key)
        self.deaths: list[Death] = []
        self.replaced: list[float] = []  # when the fault's processes got a new one
        self._root = root
        self._title, self._signal = FAULTS[fault]
        self._known = {p.pid for p in self.processes()}

    def look(self) -> None:
        for death in self.deaths:
            if death.gone_at is None and not _alive(death.process):
                death.gone_at = time.monotonic()
        if self.deaths:
            new = {p.pid for p in self.processes()} - self._known
            self._known |= new
            self.replaced += [time.monotonic()] * len(new)

    def processes(self) -> list[psutil.Process]:
        """Those of the fault's kind that live."""
        found = []
        for process in self._root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _alive(process) and " ".join(process.cmdline()).startswith(self._title):
                    found.append(process)
        return found

    def harm(self, rng: random.Random) -> None:
        """Makes one death, among those that live the longest."""
        present = [p for p in self.processes() if p not in [d.process for d in self.deaths]]
        present.sort(key=lambda p: p.create_time())
        victim = rng.choice(present[: max(1, len(present) // 2)])
        self.deaths.append(Death(time.monotonic(), victim))
        victim.send_signal(self._signal)

    def times(self) -> list[Times]:
        """Of each death. Deaths are far enough apart to be told from each other by their order."""
        if self._title == FAULTS["controller-kill"][0]:
            seen = ready = _changes_of_epoch(self.views)
        else:
            seen, ready = changes_of_groups(self.views)
        if self._title == FAULTS["gateway-kill"][0]:
            seen, ready = [], self.replaced
        return [
            Times(_after(d, d.gone_at), _after(d, _at(seen, i)), _after(d, _at(ready, i)))
            for i, d in enumerate(self.deaths)
        ]


def _at(moments: Sequence[float], i: int) -> float | None:
    return moments[i] if i < len(moments) else None


def _after(death: Death, moment: float | None) -> float | None:
    return None if moment is None else round(moment - death.at, 2)


def _changes_of_epoch(views: Sequence[View]) -> list[float]:
    """When a new controller was first seen to know as many groups as the last one."""
    moments: list[float] = []
    epoch, groups = views[0].epoch, len(views[0].serving)
    for view in views:
        if view.epoch == epoch:
            groups = len(view.serving)
        elif len(view.serving) >= groups:
            moments.append(view.at)
            epoch = view.epoch
    return moments


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
