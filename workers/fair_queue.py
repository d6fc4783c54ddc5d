"""The requests that wait to start, in the order in which they may.

Between tenants the Virtual Token Counter decides (`fairness`), within a tenant the priority, then
the deadline, then the arrival.

A request may have to wait for room (in the adapter pool, or in a step's adapters), while others,
whose adapters are there, could go on. They may, within the queue's slack: tenants not further ahead
than that, and until work worth the slack was done since it waits. From then on it is *overdue*: it
goes first, and nobody else starts before it. So tenants with resident adapters get a bounded
advantage, and a stream of their requests keeps nobody out.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, TypeVar

from .fairness import VirtualTokenCounter

T = TypeVar("T", bound=Hashable)


@dataclass(eq=False)
class _Entry(Generic[T]):
    item: T
    tenant: str
    key: tuple[int, float, int]  # priority, deadline, arrival
    parked: bool = False  # its adapter is on the way
    # Work done when it first waited for room (`VirtualTokenCounter.total`).
    blocked_at: float | None = None

    @property
    def blocked(self) -> bool:
        return self.blocked_at is not None and not self.parked


class FairQueue(Generic[T]):
    """Waiting requests of all tenants.

    To start some: go through `candidates`, and `admit`, `remove`, `park`, `block` or `pass_over`
    each before taking the next.
    """

    def __init__(self, vtc: VirtualTokenCounter, slack: float):
        """
        Args:
            slack: price of the work that may be done while a request waits for room.
        """
        self._vtc, self._slack = vtc, slack
        self._entries: dict[T, _Entry[T]] = {}
        self._tenants: dict[str, list[_Entry[T]]] = {}  # each by key
        self._blocked: dict[T, _Entry[T]] = {}  # that waited for room, the longest first
        self._passed: set[str] = set()  # tenants that start nothing more in this round

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def by_tenant(self) -> dict[str, int]:
        """Waiting requests of each tenant, longest queue first."""
        sizes = {tenant: len(entries) for tenant, entries in self._tenants.items()}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def add(
        self, item: T, tenant: str, arrival: int, priority: int = 0, deadline: float | None = None
    ) -> None:
        """
        Args:
            arrival: a number that grows; that of a request that comes back is its first.
            priority: lower goes first.
            deadline: of any clock; None: last.
        """
        entry = _Entry(
            item, tenant, (priority, math.inf if deadline is None else deadline, arrival)
        )
        self._entries[item] = entry
        insort(self._tenants.setdefault(tenant, []), entry, key=lambda e: e.key)
        self._vtc.join(tenant)

    def remove(self, item: T) -> None:
        """It doesn't wait any more, nor has it started."""
        entry = self._entries.pop(item)
        self._blocked.pop(item, None)
        entries = self._tenants[entry.tenant]
        entries.remove(entry)
        if not entries:
            del self._tenants[entry.tenant]
        self._leave_if_idle(entry.tenant)

    def park(self, item: T) -> None:
        """It can't start until its adapter has come; nobody has to wait for that.

        If it waited for room before, that counts on: the room is taken for its adapter's load, and
        must not be another's when that has ended.
        """
        entry = self._entries[item]
        entry.parked = True
        self._leave_if_idle(entry.tenant)

    def ready(self, item: T) -> None:
        """Its adapter has come. To be said before its tenant is charged for anything."""
        entry = self._entries[item]
        entry.parked = False
        self._vtc.join(entry.tenant)

    def block(self, item: T) -> None:
        """It is ready, and waits for room."""
        self.ready(item)
        entry = self._entries[item]
        if entry.blocked_at is None:
            entry.blocked_at = self._vtc.total
            self._blocked[item] = entry

    def pass_over(self, item: T) -> None:
        """Its tenant has all that it may have for now: others come next, within the slack."""
        self._passed.add(self._entries[item].tenant)

    def admit(self, item: T) -> None:
        """It is ready, and starts. Its work is to be charged before the next is taken."""
        self._vtc.admit(self._entries[item].tenant)
        self.remove(item)

    def candidates(self) -> Iterator[T]:
        """Requests to try, each at most once."""
        self._passed.clear()
        tried: set[T] = set()
        for entry in self._overdue():
            tenant = entry.tenant
            if tenant in self._passed:
                continue
            if self._vtc.counter(tenant) > self._vtc.lowest() + self._slack:
                continue  # too far ahead: it goes on waiting
            yield entry.item
            tried.add(entry.item)
            if entry.item in self._entries and entry.blocked and tenant not in self._passed:
                return
        heap = [(*self._vtc.order(tenant), tenant, 0) for tenant in self._tenants]
        heapq.heapify(heap)
        lowest: float | None = None  # counter of those that wait although it is their turn
        while heap:
            counter, _, tenant, index = heapq.heappop(heap)
            if lowest is not None and counter > lowest + self._slack:
                return
            entry = self._tenants[tenant][index]
            if entry.item not in tried:
                yield entry.item
            passed = tenant in self._passed
            if entry.item in self._entries:
                index += 1
                if lowest is None and (passed or entry.blocked):
                    lowest = self._vtc.counter(tenant)
            if passed:
                continue
            if index < len(self._tenants.get(tenant, ())):
                heapq.heappush(heap, (*self._vtc.order(tenant), tenant, index))

    def _overdue(self) -> list[_Entry[T]]:
        """Longest waiting first."""
        latest = self._vtc.total - self._slack
        overdue = takewhile(lambda e: (e.blocked_at or 0.0) <= latest, self._blocked.values())
        return sorted(overdue, key=lambda e: (e.blocked_at, e.key))

    def _leave_if_idle(self, tenant: str) -> None:
        if all(e.parked for e in self._tenants.get(tenant, ())):
            self._vtc.leave(tenant)
