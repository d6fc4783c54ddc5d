"""Knows when cached keys and names may be out of date: one small document stands for them all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...adapter_store import StoreUnavailable
from .deps import GatewayDeps

logger = logging.getLogger(__name__)

# Without a change of the generation, everything is still read again after this: a change whose
# second write got lost must not live for ever.
KNOWN_S = 60.0


@dataclass(frozen=True)
class Stamp:
    """When something was read from the store."""

    generation: int
    at: float  # of the watch's clock


class GenerationWatch:
    """Polls the store's `auth/generation` document, which every change of a tenant moves.

    What was read while `generation` had one value is current as long as it keeps this value; the
    store is asked one conditional question a period, however many tenants there are.

    Args:
        read: blocking; the document's present value. Raises StoreUnavailable.
        period_s: seconds between polls: how stale another gateway's change may look here.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        deps: GatewayDeps,
        read: Callable[[], object],
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deps = deps
        self._read = read
        self._period_s = period_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self.generation = 0  # counts the changes that were seen
        self._value: object = None
        self.confirmed_at = clock()  # when the store last answered
        self.reachable = True

    def stamp(self) -> Stamp:
        """To be taken right before a read of the store."""
        return Stamp(self.generation, self._clock())

    def unchanged(self, stamp: Stamp, max_age_s: float = KNOWN_S) -> bool:
        """Whether nothing is known to have changed since, and the read isn't too old."""
        return stamp.generation == self.generation and self._clock() - stamp.at < max_age_s

    def in_grace(self, stamp: Stamp) -> bool:
        """Whether what was read then may go on being used with the store unreachable: for
        `auth_grace_s`, counted from when the store last answered."""
        last_sure = max(stamp.at, self.confirmed_at)
        return self._clock() - last_sure <= self._deps.settings.auth_grace_s

    def usable(self, stamp: Stamp) -> bool:
        """Whether what was read then may be used without a question to the store."""
        return self.unchanged(stamp) if self.reachable else self.in_grace(stamp)

    async def poll(self) -> None:
        """Asks the store now. An unreachable store isn't an error: `reachable` turns False."""
        async with self._lock:
            try:
                value = await self._deps.in_thread(self._read)
            except StoreUnavailable as error:
                if self.reachable:
                    logger.warning("the object store can't be reached: %s", error)
                self.reachable = False
                return
            self.reachable = True
            self.confirmed_at = self._clock()
            if value != self._value:
                self._value = value
                self.generation += 1

    async def run(self) -> None:
        """Polls until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(self._period_s)
