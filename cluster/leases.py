"""A gateway's side of the limiter: budget leased in chunks, so that most requests ask nobody."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .limiter import Ask, Lease, Limiter, Rates

logger = logging.getLogger(__name__)

KEEP_S = 5.0  # what is held and not used goes back after this
# How long an actor that failed isn't asked: it may hang, and a tenant's requests wait for its
# answer one after the other.
AWAY_S = 2.0
RETURN_S = 0.25  # what is over the share that may be held goes back after this


class RemoteLimiter(Protocol):
    """The limiter actor. Any exception means that it can't be reached."""

    async def lease(self, tenant_id: str, rates: Rates, ask: Ask) -> Lease: ...

    async def give_back(self, tenant_id: str, requests: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class Grant:
    """The answer for one request. `wait_s` 0: go on; infinite: it can never be granted.

    The `*_left` figures are what is left of the minute's budget, None where there is no limit.
    """

    wait_s: float
    requests_left: int | None = None
    tokens_left: int | None = None


@dataclass
class _Purse:
    """What this gateway holds of one tenant's budget."""

    lock: asyncio.Lock
    requests: int = 0
    tokens: int = 0
    hold_requests: int = 0  # that it may keep
    hold_tokens: int = 0
    requests_left: int | None = None  # of the actor's buckets, when last heard
    tokens_left: int | None = None
    used: float = 0.0


class LocalLeases:
    """Spends leased budget, and leases more when it runs out.

    All gateways together hold at most HELD_SHARE of a minute's budget (see `limiter`), and what
    their requests gave back in the last RETURN_S: by no more do their grants differ from those of
    one bucket. A gateway that dies takes what it held with it.

    With the limiter actor away, each gateway goes on with buckets of its own at the full rates:
    tenants are served, and together get at most their rate times the number of gateways.

    Args:
        remote: the limiter actor.
        clock: seconds, never going back.
    """

    def __init__(self, remote: RemoteLimiter, clock: Callable[[], float]) -> None:
        self._remote = remote
        self._clock = clock
        self._purses: dict[str, _Purse] = {}
        self._fallback = Limiter(clock)
        self._name = uuid.uuid4().hex
        self._warned = False
        self._away_until = -math.inf

    async def acquire(self, tenant_id: str, rates: Rates, requests: int, tokens: int) -> Grant:
        """Reserves budget for one HTTP request. Unlimited tenants never reach the actor."""
        if rates.unlimited:
            return Grant(0.0)
        if requests > (rates.requests_per_minute or math.inf) or tokens > (
            rates.tokens_per_minute or math.inf
        ):
            return Grant(math.inf)
        purse = self._purse(tenant_id)
        async with purse.lock:  # one question to the actor at a time, for each tenant
            purse.used = self._clock()
            if not self._covers(purse, rates, requests, tokens):
                lease = await self._lease(tenant_id, purse, rates, requests, tokens)
                purse.requests_left, purse.tokens_left = lease.requests_left, lease.tokens_left
                purse.hold_requests, purse.hold_tokens = lease.hold_requests, lease.hold_tokens
                if lease.wait_s > 0:
                    return Grant(lease.wait_s, lease.requests_left, lease.tokens_left)
                purse.requests += lease.requests or 0
                purse.tokens += lease.tokens or 0
            if rates.requests_per_minute is not None:
                purse.requests -= requests
            if rates.tokens_per_minute is not None:
                purse.tokens -= tokens
            return Grant(
                0.0,
                _sum(rates.requests_per_minute, purse.requests_left, purse.requests),
                _sum(rates.tokens_per_minute, purse.tokens_left, purse.tokens),
            )

    def settle(self, tenant_id: str, unused_tokens: int) -> None:
        """Puts back what a request reserved and didn't use; negative: it used more."""
        self._purse(tenant_id).tokens += unused_tokens

    async def sweep(self) -> None:
        """Returns what is over the share, what wasn't used lately, and debts; to be called every
        RETURN_S."""
        now = self._clock()
        returned = []
        for tenant_id, purse in list(self._purses.items()):
            if purse.lock.locked():
                continue
            idle = now - purse.used >= KEEP_S
            requests, tokens = purse.requests, purse.tokens
            if not idle:
                requests = max(0, requests - purse.hold_requests)
                tokens = min(tokens, max(0, tokens - purse.hold_tokens))  # all of a debt
            if requests or tokens:
                purse.requests -= requests
                purse.tokens -= tokens
                returned.append(self._give_back(tenant_id, requests, tokens))
            elif idle:
                del self._purses[tenant_id]
        await asyncio.gather(*returned)

    async def run(self) -> None:
        """Sweeps until cancelled; then gives everything back."""
        try:
            while True:
                await asyncio.sleep(RETURN_S)
                await self.sweep()
        finally:
            purses, self._purses = self._purses, {}
            held = {t: p for t, p in purses.items() if p.requests or p.tokens}
            await asyncio.gather(
                *(self._give_back(t, p.requests, p.tokens) for t, p in held.items())
            )

    def _purse(self, tenant_id: str) -> _Purse:
        purse = self._purses.get(tenant_id)
        if purse is None:
            purse = self._purses[tenant_id] = _Purse(asyncio.Lock(), used=self._clock())
        return purse

    @staticmethod
    def _covers(purse: _Purse, rates: Rates, requests: int, tokens: int) -> bool:
        return (rates.requests_per_minute is None or purse.requests >= requests) and (
            rates.tokens_per_minute is None or purse.tokens >= tokens
        )

    async def _lease(
        self, tenant_id: str, purse: _Purse, rates: Rates, requests: int, tokens: int
    ) -> Lease:
        if purse.tokens < 0:  # owed to the buckets, where time pays it
            owed, purse.tokens = purse.tokens, 0
            await self._give_back(tenant_id, 0, owed)
        # What is still held goes towards the need.
        ask = Ask(
            max(0, requests - purse.requests) if rates.requests_per_minute is not None else 0,
            max(0, tokens - purse.tokens) if rates.tokens_per_minute is not None else 0,
            self._name,
        )
        if self._clock() >= self._away_until:
            try:
                lease = await self._remote.lease(tenant_id, rates, ask)
                self._warned = False
                return lease
            except Exception as error:
                self._away(error)
        return self._fallback.lease(tenant_id, rates, ask)

    async def _give_back(self, tenant_id: str, requests: int, tokens: int) -> None:
        if self._clock() >= self._away_until:
            try:
                await self._remote.give_back(tenant_id, requests, tokens)
                return
            except Exception as error:
                self._away(error)
        self._fallback.give_back(tenant_id, requests, tokens)

    def _away(self, error: Exception) -> None:
        self._away_until = self._clock() + AWAY_S
        if not self._warned:
            logger.warning("the limiter can't be reached, limits are kept here: %r", error)
            self._warned = True


def _sum(limit: int | None, left: int | None, held: int) -> int | None:
    return None if limit is None else max(0, min(limit, (left or 0) + held))
