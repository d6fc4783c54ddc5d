"""The simulator's time: events in order, ties in the order in which they were set."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """A queue of (time, call). `now` is the time of the event that runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Sets an event; one in the past runs now."""
        heapq.heappush(self._events, (max(time_s, self.now), next(self._numbers), call))

    def run(self, until: Callable[[], bool]) -> None:
        """Runs events until none is left or `until()` holds."""
        while self._events and not until():
            self.now, _, call = heapq.heappop(self._events)
            call()
