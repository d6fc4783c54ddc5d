"""A gateway's side of the limiter: budget leased in chunks, so that most requests ask nobody."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .limiter import Ask, Lease, Limiter, Rates

logger = logging.getLogger(__name__)

CHUNK_SHARE = 0.05  # of a minute's budget, leased at once
KEEP_S = 5.0  # an unused chunk goes back after this


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
    requests_left: int | None = None  # of the actor's buckets, when last heard
    tokens_left: int | None = None
    used: float = 0.0


class LocalLeases:
    """Spends leased budget, and leases more when it runs out.

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
        self._warned = False

    async def acquire(self, tenant_id: str, rates: Rates, requests: int, tokens: int) -> Grant:
        """Reserves budget for one HTTP request. Unlimited tenants never reach the actor."""
        if rates.unlimited:
            return Grant(0.0)
        if requests > (rates.requests_per_minute or math.inf) or tokens > (
            rates.tokens_per_minute or math.inf
        ):
            return Grant(math.inf)
        purse = self._purses.get(tenant_id)
        if purse is None:
            purse = self._purses[tenant_id] = _Purse(asyncio.Lock())
        async with purse.lock:  # one question to the actor at a time, for each tenant
            purse.used = self._clock()
            if not self._covers(purse, rates, requests, tokens):
                lease = await self._lease(tenant_id, purse, rates, requests, tokens)
                purse.requests_left, purse.tokens_left = lease.requests_left, lease.tokens_left
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
        if (purse := self._purses.get(tenant_id)) is not None:
            purse.tokens += unused_tokens

    async def sweep(self) -> None:
        """Returns budget that nobody has asked for lately; to be called every few seconds."""
        now = self._clock()
        for tenant_id, purse in list(self._purses.items()):
            if now - purse.used < KEEP_S or purse.lock.locked():
                continue
            async with purse.lock:
                await self._empty(tenant_id, purse)
                if not purse.requests and not purse.tokens:
                    self._purses.pop(tenant_id, None)

    async def run(self) -> None:
        """Sweeps until cancelled; then gives everything back."""
        try:
            while True:
                await asyncio.sleep(KEEP_S)
                await self.sweep()
        finally:
            for tenant_id, purse in list(self._purses.items()):
                await self._empty(tenant_id, purse)

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
            int(CHUNK_SHARE * (rates.requests_per_minute or 0)),
            int(CHUNK_SHARE * (rates.tokens_per_minute or 0)),
        )
        try:
            lease = await self._remote.lease(tenant_id, rates, ask)
            self._warned = False
            return lease
        except Exception as error:
            if not self._warned:
                logger.warning("the limiter can't be reached, limits are kept here: %r", error)
                self._warned = True
            return self._fallback.lease(tenant_id, rates, ask)

    async def _empty(self, tenant_id: str, purse: _Purse) -> None:
        requests, tokens = purse.requests, purse.tokens
        if not requests and not tokens:
            return
        purse.requests = purse.tokens = 0
        await self._give_back(tenant_id, requests, tokens)

    async def _give_back(self, tenant_id: str, requests: int, tokens: int) -> None:
        try:
            await self._remote.give_back(tenant_id, requests, tokens)
        except Exception:
            self._fallback.give_back(tenant_id, requests, tokens)


def _sum(limit: int | None, left: int | None, held: int) -> int | None:
    return None if limit is None else max(0, min(limit, (left or 0) + held))
