"""Gateways' clients of the cluster's named actors."""

from __future__ import annotations

from typing import Any

from ..adapter_store import AdapterStoreError
from .ingest import Result
from .limiter import Ask, Lease, Rates
from .metrics import Target
from .named_actors import CONTROLLER_NAME, INGEST_NAME, LIMITER_NAME, NamedActor

LEASE_S = 1.0  # requests wait for it
INGEST_S = 600.0


class LimiterClient:
    """`leases.RemoteLimiter` over the limiter actor."""

    def __init__(self) -> None:
        self._actor = NamedActor(LIMITER_NAME)

    async def lease(self, tenant_id: str, rates: Rates, ask: Ask) -> Lease:
        return await self._actor.call("lease", tenant_id, rates, ask, timeout_s=LEASE_S)

    async def give_back(self, tenant_id: str, requests: int, tokens: int) -> None:
        await self._actor.call("give_back", tenant_id, requests, tokens, timeout_s=LEASE_S)


class IngestClient:
    """`gateway.deps.Ingest` over the ingest actor."""

    def __init__(self) -> None:
        self._actor = NamedActor(INGEST_NAME)

    async def ingest(self, tenant_id: str, name: str, upload_id: str) -> dict[str, Any]:
        result: Result = await self._actor.call(
            "ingest", tenant_id, name, upload_id, timeout_s=INGEST_S
        )
        if isinstance(result, AdapterStoreError):
            raise result
        return result

    async def start(self, tenant_id: str, name: str, upload_id: str) -> None:
        await self._actor.send("ingest_upload", tenant_id, name, upload_id)


class ControlClient:
    """`gateway.deps.Control` and `dispatch.TableSource` over the controller actor."""

    def __init__(self) -> None:
        self._actor = NamedActor(CONTROLLER_NAME)

    async def status(self) -> dict[str, Any]:
        return await self._actor.call("status")

    async def purge(self, keys: list[str]) -> None:
        await self._actor.call("purge", keys)

    async def register_target(self, target: Target) -> None:
        """Names this process's exporter."""
        await self._actor.call(
            "register_target", target.kind, dict(target.labels), target.host, target.port
        )

    async def table(self, since: tuple[int, int]) -> dict[str, Any] | None:
        return await self._actor.call("table", since)
