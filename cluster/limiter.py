"""Requests and tokens per minute of each tenant: pure token buckets, and all tenants' book."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MINUTE_S = 60.0
IDLE_S = 3600.0  # a tenant's full buckets are forgotten after this
# Of a minute's budget, what all gateways together may hold unspent: so much they may grant beyond
# the rate in some minute, and so much one may refuse although another still holds it.
HELD_SHARE = 0.05
HOLD_S = 12.0  # a gateway that hasn't leased for so long has given back what it held


@dataclass(frozen=True)
class Rates:
    """A tenant's limits; None: unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def unlimited(self) -> bool:
        return self.requests_per_minute is None and self.tokens_per_minute is None


class TokenBucket:
    """Holds up to `per_minute` units and refills at that rate, without steps.

    The level may fall below zero when more was used than reserved; nothing is granted until it
    is paid back. In any window of t minutes no more than `per_minute * (1 + t)` units are taken,
    and what `give` returned.

    Args:
        per_minute: capacity, and units added a minute.
        now: seconds of any clock that doesn't go back.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = float(per_minute)
        self._level = self.per_minute
        self._updated = now

    def level(self, now: float) -> float:
        if now > self._updated:
            refill = (now - self._updated) * self.per_minute / MINUTE_S
            self._level = min(self.per_minute, self._level + refill)
            self._updated = now
        return self._level

    def set_rate(self, per_minute: float, now: float) -> None:
        """Another limit; the level is only ever cut, so that a change grants nothing by itself."""
        self.level(now)
        self.per_minute = float(per_minute)
        self._level = min(self._level, self.per_minute)

    def take(self, amount: float, now: float) -> bool:
        if self.level(now) < amount:
            return False
        self._level -= amount
        return True

    def give(self, amount: float, now: float) -> None:
        """Returns what wasn't used; a negative amount takes more, also below zero."""
        self._level = min(self.per_minute, self.level(now) + amount)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; infinite when it exceeds the capacity."""
        missing = amount - self.level(now)
        if missing <= 0:
            return 0.0
        if amount > self.per_minute or self.per_minute == 0:
            return math.inf
        return missing * MINUTE_S / self.per_minute


@dataclass(frozen=True)
class Ask:
    """What a gateway needs now. `holder` is the gateway's own name, and no other's."""

    requests: int
    tokens: int
    holder: str


@dataclass(frozen=True)
class Lease:
    """What a gateway may spend without asking again: what it needs, and some to hold.

    `requests` and `tokens` are None where the tenant has no such limit, and nothing was taken where
    `wait_s` is above zero. `requests_left` and `tokens_left` are what the buckets hold after the
    lease. What a gateway holds of either beyond `hold_requests` and `hold_tokens` it is to give
    back at once, and the rest when it isn't used for some seconds.
    """

    wait_s: float = 0.0
    requests: int | None = None
    tokens: int | None = None
    requests_left: int | None = None
    tokens_left: int | None = None
    hold_requests: int = 0
    hold_tokens: int = 0


class Limiter:
    """Every tenant's buckets, on one clock.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[str, TokenBucket] = {}
        self._tokens: dict[str, TokenBucket] = {}
        self._used: dict[str, float] = {}  # tenant -> last use, oldest first
        # tenant -> gateway -> when it leased last, and the share of a minute that it may hold
        self._holds: dict[str, dict[str, tuple[float, float]]] = {}

    def lease(self, tenant_id: str, rates: Rates, ask: Ask) -> Lease:
        """Takes what is needed, and what the gateway may hold if the buckets have it.

        Returns:
            The lease, or one with `wait_s` above zero and nothing taken.
        """
        now = self._clock()
        self._touch(tenant_id, now)
        by_request = _bucket(self._requests, tenant_id, rates.requests_per_minute, now)
        by_token = _bucket(self._tokens, tenant_id, rates.tokens_per_minute, now)
        wait_s = max(
            by_request.wait(ask.requests, now) if by_request else 0.0,
            by_token.wait(ask.tokens, now) if by_token else 0.0,
        )
        share = self._share(tenant_id, ask.holder, now)
        hold_requests = int(share * (rates.requests_per_minute or 0))
        hold_tokens = int(share * (rates.tokens_per_minute or 0))
        requests = tokens = None
        if wait_s == 0:
            requests = _take(by_request, ask.requests, hold_requests, now)
            tokens = _take(by_token, ask.tokens, hold_tokens, now)
        return Lease(
            wait_s,
            requests,
            tokens,
            requests_left=_left(by_request, now),
            tokens_left=_left(by_token, now),
            hold_requests=hold_requests,
            hold_tokens=hold_tokens,
        )

    def give_back(self, tenant_id: str, requests: int, tokens: int) -> None:
        """Unused parts of a lease; negative: more was used than leased."""
        now = self._clock()
        for buckets, amount in ((self._requests, requests), (self._tokens, tokens)):
            if (bucket := buckets.get(tenant_id)) is not None:
                bucket.give(amount, now)

    def _share(self, tenant_id: str, holder: str, now: float) -> float:
        """Of a minute's budget, what a gateway may hold: half of what others leave of HELD_SHARE.

        So there is some for a newcomer at once, and n busy ones come to HELD_SHARE / (n + 1) each.
        """
        holds = self._holds.setdefault(tenant_id, {})
        holds.pop(holder, None)
        for other, (seen, _) in list(holds.items()):
            if now - seen > HOLD_S:
                del holds[other]
        share = max(0.0, HELD_SHARE - sum(share for _, share in holds.values())) / 2
        holds[holder] = now, share
        return share

    def _touch(self, tenant_id: str, now: float) -> None:
        self._used.pop(tenant_id, None)
        self._used[tenant_id] = now
        while (oldest := next(iter(self._used))) and now - self._used[oldest] > IDLE_S:
            del self._used[oldest]
            self._requests.pop(oldest, None)
            self._tokens.pop(oldest, None)
            self._holds.pop(oldest, None)


def _bucket(
    buckets: dict[str, TokenBucket], tenant_id: str, per_minute: int | None, now: float
) -> TokenBucket | None:
    if per_minute is None:
        buckets.pop(tenant_id, None)
        return None
    bucket = buckets.get(tenant_id)
    if bucket is None:
        bucket = buckets[tenant_id] = TokenBucket(per_minute, now)
    elif bucket.per_minute != per_minute:
        bucket.set_rate(per_minute, now)
    return bucket


def _take(bucket: TokenBucket | None, needed: int, extra: int, now: float) -> int | None:
    if bucket is None:
        return None
    amount = min(needed + extra, math.floor(bucket.level(now)))
    amount = max(amount, needed)
    bucket.take(amount, now)
    return amount


def _left(bucket: TokenBucket | None, now: float) -> int | None:
    return None if bucket is None else max(0, math.floor(bucket.level(now)))
