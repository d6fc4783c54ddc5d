"""Bytes that rules for placement and routing don't get around, on a trace."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass
from math import inf

from .trace import Trace


@dataclass(frozen=True)
class Floor:
    """GB after the warm-up: copied into pools, fetched from the store."""

    gpu_gb: float
    s3_gb: float


def floor(trace: Trace, pool_bytes: int, warmup_s: float = 0.0) -> Floor:
    """The least that can move from `warmup_s` on, for who knows all requests beforehand and serves
    each as it comes. (Who lets requests wait for long can serve several by one load. What the
    store sends is a floor for them too, and of what is copied into pools.)

    All pools count as one, no adapter needs a second copy, and parts of adapters may stay: what
    gives way is what is asked for latest (Belady 1966), which is optimal where a miss costs its
    bytes. Whatever was asked for before `warmup_s` may be there then, as far as it fits. The store
    has to send every adapter once that is asked for after it only.

    Args:
        pool_bytes: of all groups together.
    """
    sizes = trace.sizes
    uses: dict[str, list[float]] = {}
    for r in trace.requests:
        if r.adapter is not None:
            uses.setdefault(r.adapter, []).append(r.at_s)
    position = {key: bisect_left(times, warmup_s) for key, times in uses.items()}

    def next_use(key: str) -> float:
        times, at = uses[key], position[key]
        return times[at] if at < len(times) else inf

    held = {key: sizes[key] for key, at in position.items() if at > 0}
    known = set(held)
    latest = [(-next_use(key), key) for key in held]  # first to give way first; some are outdated
    heapq.heapify(latest)
    excess = sum(held.values()) - pool_bytes

    def make_room() -> None:
        nonlocal excess
        while excess > 0:
            time, key = latest[0]
            if not held.get(key) or -time != next_use(key):
                heapq.heappop(latest)
                continue
            cut = min(held[key], excess)
            held[key] -= cut
            excess -= cut

    make_room()
    moved = first = 0
    for r in trace.requests:
        key = r.adapter
        if key is None or r.at_s < warmup_s:
            continue
        missing = sizes[key] - held.get(key, 0)
        moved += missing
        excess += missing
        held[key] = sizes[key]
        if key not in known:
            known.add(key)
            first += sizes[key]
        position[key] += 1
        heapq.heappush(latest, (-next_use(key), key))
        make_room()
    return Floor(round(moved / 1e9, 1), round(first / 1e9, 1))
