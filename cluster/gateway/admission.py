"""Rate limits of one request: reserve before, settle with the true usage after."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ApiError
from ..limiter import MINUTE_S
from .auth import Caller
from .deps import GatewayDeps, Limits

# Reserved for an answer whose length the client didn't limit, tokens.
OPEN_END_TOKENS = 256


@dataclass
class Reservation:
    """Budget taken for one request. `settle` must be called once, whatever happens."""

    limits: Limits
    caller: Caller
    tokens: int
    headers: dict[str, str]

    def settle(self, used_tokens: int) -> None:
        if self.caller.rates.tokens_per_minute is not None:
            self.limits.settle(self.caller.tenant_id, self.tokens - used_tokens)


async def reserve(deps: GatewayDeps, caller: Caller, tokens: int) -> Reservation:
    """Takes one request and `tokens` (prompt and longest answer) from the tenant's budget.

    Raises:
        ApiError: 429 rate_limit_exceeded with Retry-After, or request_too_large when the budget
            of a whole minute doesn't cover the request.
    """
    rates = caller.rates
    grant = await deps.limits.acquire(caller.tenant_id, rates, 1, tokens)
    headers = _headers("requests", rates.requests_per_minute, grant.requests_left)
    headers |= _headers("tokens", rates.tokens_per_minute, grant.tokens_left)
    if grant.wait_s == 0:
        return Reservation(deps.limits, caller, tokens, headers)
    if math.isinf(grant.wait_s):
        deps.metrics.limit_hit(caller.tenant_name, "tokens")
        raise ApiError(
            429,
            "request_too_large",
            f"this request may use {tokens} tokens, more than the {rates.tokens_per_minute} that "
            "you may use in a minute; shorten the prompt or lower max_tokens",
            kind="rate_limit_error",
            headers=headers,
        )
    short = grant.requests_left is not None and grant.requests_left < 1
    limit = "requests" if short else "tokens"
    per_minute = rates.requests_per_minute if short else rates.tokens_per_minute
    deps.metrics.limit_hit(caller.tenant_name, limit)
    retry_after = max(1, math.ceil(grant.wait_s))
    raise ApiError(
        429,
        "rate_limit_exceeded",
        f"your limit of {per_minute} {limit} per minute is reached; try again in {retry_after} s",
        kind="rate_limit_error",
        headers={**headers, "retry-after": str(retry_after)},
    )


def _headers(what: str, limit: int | None, left: int | None) -> dict[str, str]:
    if limit is None:
        return {}
    left = left or 0
    reset_s = (limit - left) * MINUTE_S / limit if limit else MINUTE_S
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(left),
        f"x-ratelimit-reset-{what}": f"{reset_s:.3f}s",
    }
