"""NVIDIA Dynamo's LoRA allocation (lib/llm/src/lora of ai-dynamo/dynamo, read in autumn 2026), as
a policy of this simulator.

Taken: the controller's tick of 3 s; load = arrivals in the last 90 s, smoothed by an exponential
average with alpha 0.3; replicas of an active adapter = its share of the load times all slots,
rounded up, at least 1 and at most the number of workers, scaled down to the number of slots by
largest remainders when they don't suffice; placement by rendezvous hashing that keeps prior
workers first, skips full ones, and charges slots as it goes, in the order of names (prior places
of all adapters first, then new ones: fewer moves than charging adapter by adapter); its scale-down
hysteresis of 3 ticks, cleared by every scale-up; one hashed worker for inactive adapters; requests
go to replicas that have the adapter loaded, else to any replica, which loads it lazily; workers
evict the least recently used.

Chosen in its favour: among those replicas the one with the fewest requests serves (Dynamo leaves
this to its KV router); a slot is the mean adapter's bytes; loads are seen without delay; a request
for an adapter that the table doesn't have yet goes to its hashed worker, where Dynamo would allow
all of them.

Left out: the min-cost-flow solver (not what its settings use by default), KV-aware scoring, and
several data-parallel ranks per worker.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..rendezvous import rank
from .group import SimGroup
from .policy import Advice
from .trace import TracedRequest

TICK_S = 3.0
WINDOW_S = 90.0
ALPHA = 0.3
COOLDOWN_TICKS = 3


@dataclass(frozen=True)
class _Entry:
    """What the routing table says of an adapter. `replicas`: the count that was asked for."""

    workers: tuple[str, ...]
    replicas: int
    active: bool


class Dynamo:
    """
    Args:
        slots: adapters that a worker holds.
    """

    name = "dynamo"
    fair = False

    def __init__(self, slots: int) -> None:
        self.tick_s: float | None = TICK_S
        self._slots = slots
        self._arrivals: deque[tuple[float, str]] = deque()
        self._counts: dict[str, int] = {}
        self._smoothed: dict[str, float] = {}
        self._table: dict[str, _Entry] = {}
        self._scaled_down_at: dict[str, int] = {}
        self._tick = 0

    def route(self, now_s: float, request: TracedRequest, groups: Mapping[str, SimGroup]) -> str:
        key = request.adapter
        if key is None:
            return _fewest(groups.values())
        self._arrivals.append((now_s, key))
        self._counts[key] = self._counts.get(key, 0) + 1
        entry = self._table.get(key)
        workers = [groups[w] for w in entry.workers if w in groups] if entry else []
        if not workers:
            return rank(key, groups)[0]
        loaded = [g for g in workers if key in g.pool.resident]
        return _fewest(loaded or workers)

    def tick(self, now_s: float, groups: Iterable[SimGroup]) -> Mapping[str, Advice]:
        self._tick += 1
        names = sorted(g.name for g in groups)
        loads = self._loads(now_s)
        active = {key: load for key, load in loads.items() if load > 0}
        counts = replica_counts(active, self._slots * len(names), len(names))
        counts = {key: self._damped(key, n) for key, n in sorted(counts.items())}
        placed = place(counts, {k: e.workers for k, e in self._table.items()}, names, self._slots)
        for key in sorted(self._table.keys() | loads.keys()):
            if key in placed:
                self._table[key] = _Entry(placed[key], counts[key], True)
            else:
                self._scaled_down_at.pop(key, None)
                self._table[key] = _Entry((rank(key, names)[0],), 1, False)
        return {}

    def _loads(self, now_s: float) -> dict[str, int]:
        """Smoothed arrivals in the window, rounded; what rounds to 0 is inactive."""
        while self._arrivals and self._arrivals[0][0] < now_s - WINDOW_S:
            key = self._arrivals.popleft()[1]
            self._counts[key] -= 1
        for key, n in self._counts.items():
            old = self._smoothed.get(key)
            self._smoothed[key] = n if old is None else ALPHA * n + (1 - ALPHA) * old
        return {key: round(value) for key, value in self._smoothed.items()}

    def _damped(self, key: str, wanted: int) -> int:
        entry = self._table.get(key)
        current = entry.replicas if entry else 0
        if wanted >= current:
            self._scaled_down_at.pop(key, None)
            return wanted
        since = self._scaled_down_at.setdefault(key, self._tick)
        return current if self._tick - since < COOLDOWN_TICKS else wanted


def replica_counts(loads: Mapping[str, int], slots: int, workers: int) -> dict[str, int]:
    """Copies of each active adapter."""
    total = sum(loads.values())
    if not total:
        return {}
    shares = {
        key: min(float(workers), max(1.0, math.ceil(load / total * slots)))
        for key, load in sorted(loads.items())
    }
    wanted = sum(shares.values())
    if wanted <= slots:
        return {key: int(share) for key, share in shares.items()}
    shares = {key: max(1.0, share * slots / wanted) for key, share in shares.items()}
    counts = {key: int(share) for key, share in shares.items()}
    left = max(0, slots - sum(counts.values()))
    for key in sorted(counts, key=lambda k: (counts[k] - shares[k], k)):
        if left and counts[key] < workers:
            counts[key] += 1
            left -= 1
    return counts


def place(
    counts: Mapping[str, int],
    prior: Mapping[str, Sequence[str]],
    workers: Sequence[str],
    slots: int,
) -> dict[str, tuple[str, ...]]:
    """Workers of each adapter; one that finds all of them full gets what hashing says."""
    used = dict.fromkeys(workers, 0)
    orders = {key: rank(key, workers) for key in sorted(counts)}
    placed: dict[str, list[str]] = {key: [] for key in orders}
    for kept in (True, False):
        for key, order in orders.items():
            for worker in order:
                if len(placed[key]) >= counts[key]:
                    break
                was_there = worker in prior.get(key, ())
                if (was_there or not kept) and worker not in placed[key] and used[worker] < slots:
                    placed[key].append(worker)
                    used[worker] += 1
    return {key: tuple(names or orders[key][: counts[key]]) for key, names in placed.items()}


def _fewest(groups: Iterable[SimGroup]) -> str:
    return min(groups, key=lambda g: (g.requests, g.name)).name
