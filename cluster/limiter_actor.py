"""The limiter actor: one book of budgets for all gateways."""

from __future__ import annotations

import time
from typing import Any

import ray

from .limiter import Lease, Limiter, Rates
from .settings import RAY_NAMESPACE

LIMITER_ACTOR = "limiter"
LIMITER_CPUS = 0.05


class LimiterWorker:
    """`Limiter` on this process's clock. A restart begins with full buckets."""

    def __init__(self) -> None:
        self._limiter = Limiter(time.monotonic)

    def lease(
        self,
        tenant_id: str,
        rates: Rates,
        requests: int,
        tokens: int,
        extra_requests: int,
        extra_tokens: int,
    ) -> Lease:
        return self._limiter.lease(tenant_id, rates, requests, tokens, extra_requests, extra_tokens)

    def give_back(self, tenant_id: str, requests: int, tokens: int) -> None:
        self._limiter.give_back(tenant_id, requests, tokens)


def start_limiter() -> Any:
    """The cluster's limiter actor, started if there is none."""
    actor = ray.remote(LimiterWorker).options(
        name=LIMITER_ACTOR,
        namespace=RAY_NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=LIMITER_CPUS,
    )
    return actor.remote()
