"""How long new requests would wait in a group that serves tenants by turns.

Who floods a group delays itself: the others' requests go before (see `fairness`). So a group tells
one wait for everybody, and apart from that the few tenants who have most waiting, with their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nlargest

from .fairness import VirtualTokenCounter
from .pace import Pace

TOLD_FLOODS = 4  # tenants that are told apart


@dataclass(slots=True)
class Backlog:
    """A tenant's open requests.

    Attributes:
        open: all of them.
        queued: those that wait.
        tokens: of their prompts, those that aren't computed yet.
        weight: the tenant's.
    """

    open: int = 0
    queued: int = 0
    tokens: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Waits:
    """Seconds until a new request's prompt is begun.

    Attributes:
        all_s: if it came after everything that waits.
        turn_s: by turns, of a tenant with nothing waiting that stands at the floor; who is below
            its share comes sooner.
        floods: tenant -> (its open requests, seconds), of at most TOLD_FLOODS that have used their
            share and have most waiting.
    """

    all_s: float
    turn_s: float
    floods: dict[str, tuple[int, float]]


def expected_waits(
    backlogs: Mapping[str, Backlog],
    vtc: VirtualTokenCounter,
    pace: Pace,
    max_running: int,
    step_tokens: int,
) -> Waits:
    """
    A request's turn has come when its tenant's counter, which the tenant's own backlog raises
    first, is the lowest; until then the others' backlogs are worked on as far as that raises their
    counters to the same level. Answers aren't counted in this: their lengths aren't known. What
    comes after a request may still fill its step up.

    Whoever isn't a flood competes with its like for places. As many are taken to be before it as
    are in a queue under this load (r / (1 - r) where they have r of the places), so that routing
    spreads them before any has to wait.

    Args:
        max_running: the group's places.
        step_tokens: that a step computes at most.
    """
    pending = {t: b for t, b in backlogs.items() if b.tokens}
    total = sum(b.tokens for b in pending.values())
    free = max_running - sum(b.open - b.queued for b in backlogs.values())

    def at(level: float, own: str | None) -> float:
        tokens = queued = 0.0
        for tenant, b in pending.items():
            rise = max(0.0, level - vtc.counter(tenant))
            share = 1.0 if tenant == own else min(1.0, rise * b.weight / b.tokens)
            tokens += share * b.tokens
            queued += share * b.queued
        return pace.wait_s(tokens + min(total - tokens, step_tokens), queued, free)

    used = (t for t, b in pending.items() if b.queued and not vtc.behind(t))
    floods: dict[str, tuple[int, float]] = {}
    for tenant in nlargest(TOLD_FLOODS, used, key=lambda t: pending[t].tokens):
        b = pending[tenant]
        floods[tenant] = b.open, at(vtc.counter(tenant) + b.tokens / b.weight, tenant)
    taken = sum(b.open - b.queued for t, b in backlogs.items() if t not in floods)
    before = taken / max(1, max_running - taken)
    queued = sum(b.queued for b in pending.values())
    return Waits(
        pace.wait_s(total, queued, free), at(vtc.floor, None) + before * pace.end_s, floods
    )
