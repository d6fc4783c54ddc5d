"""How long new requests would wait in a group that serves tenants by turns.

A tenant's backlog delays itself: the others' requests go in between (see `fairness`). So a group
tells one wait for whoever has nothing waiting, and others for the few tenants who have most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import nlargest

from .fairness import VirtualTokenCounter

TOLD_WAITS = 4  # tenants whose own wait is told


@dataclass(slots=True)
class Backlog:
    """A tenant's open work.

    Attributes:
        queued: requests that wait.
        tokens: of these and of begun prompts, those that aren't computed yet; above 0.
        weight: the tenant's.
    """

    queued: int = 0
    tokens: int = 0
    weight: float = 1.0


def expected_waits(
    backlogs: Mapping[str, Backlog],
    vtc: VirtualTokenCounter,
    step_tokens: int,
    wait_s: Callable[[float, float], float],
) -> tuple[float, dict[str, float]]:
    """Seconds until a new request's prompt is begun.

    A request's turn has come when its tenant's counter, which the tenant's own backlog raises
    first, is the lowest; until then the others' backlogs are worked on as far as that raises their
    counters to the same level. Answers aren't counted in this: their lengths aren't known. A tenant
    that has nothing waiting is taken to stand at the floor, above all who are below their share.
    What comes after a request may still fill its step up.

    Args:
        step_tokens: that a step computes at most.
        wait_s: of so many prompt tokens and queued requests before it (`Pace.wait_s`).

    Returns:
        That of a tenant with nothing waiting, and those of the TOLD_WAITS with the most.
    """
    total = sum(b.tokens for b in backlogs.values())

    def at(level: float, own: str | None) -> float:
        tokens = queued = 0.0
        for tenant, backlog in backlogs.items():
            share = 1.0
            if tenant != own:
                rise = backlog.tokens / backlog.weight
                share = min(1.0, max(0.0, level - vtc.counter(tenant)) / rise)
            tokens += share * backlog.tokens
            queued += share * backlog.queued
        return wait_s(tokens + min(total - tokens, step_tokens), queued)

    most = nlargest(
        TOLD_WAITS, (t for t, b in backlogs.items() if b.queued), key=lambda t: backlogs[t].tokens
    )
    own = {t: at(vtc.counter(t) + backlogs[t].tokens / backlogs[t].weight, t) for t in most}
    return at(vtc.floor, None), own
