"""Gateways' handles on the cluster's named actors."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from ..adapter_store import AdapterStoreError
from .control.actor import CONTROLLER_NAME
from .errors import ActorUnavailable
from .ingest import INGEST_ACTOR, Result
from .limiter import Lease, Rates
from .limiter_actor import LIMITER_ACTOR
from .metrics import Target
from .settings import RAY_NAMESPACE

CALL_S = 5.0
LEASE_S = 1.0  # requests wait for it
INGEST_S = 600.0


class NamedActor:
    """Calls one named actor, which may be restarted or not be there yet."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: Any = None

    async def call(self, method: str, *args: Any, timeout_s: float = CALL_S) -> Any:
        """Raises ActorUnavailable when there is no such actor or it doesn't answer in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(await self._find(), method).remote(*args)
        except (RayError, TimeoutError) as error:
            self._handle = None  # a new one of that name may be there next time
            reason = str(error).splitlines()[0] if str(error) else f"no answer in {timeout_s:g} s"
            raise ActorUnavailable(f"the actor {self._name!r} failed: {reason}") from error

    async def send(self, method: str, *args: Any) -> None:
        """Begins a call and doesn't wait for its end. Raises ActorUnavailable."""
        getattr(await self._find(), method).remote(*args)

    async def _find(self) -> Any:
        if self._handle is None:
            try:
                self._handle = await asyncio.to_thread(
                    ray.get_actor, self._name, namespace=RAY_NAMESPACE
                )
            except ValueError:
                raise ActorUnavailable(f"there is no actor named {self._name!r} yet") from None
        return self._handle


class LimiterClient:
    """`leases.RemoteLimiter` over the limiter actor."""

    def __init__(self) -> None:
        self._actor = NamedActor(LIMITER_ACTOR)

    async def lease(
        self,
        tenant_id: str,
        rates: Rates,
        requests: int,
        tokens: int,
        extra_requests: int,
        extra_tokens: int,
    ) -> Lease:
        args = (tenant_id, rates, requests, tokens, extra_requests, extra_tokens)
        return await self._actor.call("lease", *args, timeout_s=LEASE_S)

    async def give_back(self, tenant_id: str, requests: int, tokens: int) -> None:
        await self._actor.call("give_back", tenant_id, requests, tokens, timeout_s=LEASE_S)


class IngestClient:
    """`gateway.deps.Ingest` over the ingest actor."""

    def __init__(self) -> None:
        self._actor = NamedActor(INGEST_ACTOR)

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

    async def metrics_targets(self) -> list[Target]:
        return await self._actor.call("metrics_targets")

    async def register_target(self, target: Target) -> None:
        """Names this process's exporter."""
        await self._actor.call(
            "register_target", target.kind, dict(target.labels), target.host, target.port
        )

    async def table(self, since: tuple[int, int]) -> dict[str, Any] | None:
        return await self._actor.call("table", since)
