"""Series of adapters and tenants that were deleted through another gateway replica."""

from __future__ import annotations

import asyncio

from ...adapter_store import StoreUnavailable, TenantNotFound
from .deps import GatewayDeps
from .freshness import GenerationWatch

SWEEP_S = 5.0


async def sweep_forever(deps: GatewayDeps, watch: GenerationWatch) -> None:
    """Looks for them after each change of the store's generation, every SWEEP_S at most."""
    seen = watch.generation
    while True:
        await asyncio.sleep(SWEEP_S)
        if watch.generation != seen:
            generation = watch.generation
            if await sweep(deps):
                seen = generation


async def sweep(deps: GatewayDeps) -> bool:
    """Drops series of what the store doesn't know any more; False: it can't be reached.

    It reads one document for each tenant that has series, and those are bounded.
    """
    for (tenant, tenant_id), adapters in deps.metrics.shown().items():
        try:
            there = await deps.in_thread(deps.catalogue.adapters, tenant_id)
        except TenantNotFound:
            deps.metrics.tenant_removed(tenant)
        except StoreUnavailable:
            return False
        else:
            for adapter in adapters - there.keys() - {"base"}:
                deps.metrics.adapter_removed(tenant, adapter)
    return True
