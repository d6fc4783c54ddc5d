"""A gateway on doubles: groups that answer at once, an ingest without an actor."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI
from loraplex.adapter_store import (
    AdapterRefused,
    AdapterStoreError,
    Catalogue,
    TenantLimits,
    UploadSizes,
    VersionMeta,
)
from loraplex.cluster.adapter_json import version_json
from loraplex.cluster.gateway.app import build_gateway
from loraplex.cluster.gateway.deps import GatewayDeps
from loraplex.cluster.ingest import finish_upload
from loraplex.cluster.leases import LocalLeases
from loraplex.cluster.limiter import Limiter
from loraplex.cluster.metrics import GatewayMetrics, new_registry
from loraplex.cluster.settings import Settings
from loraplex.cluster.uploads import Uploads
from loraplex.workers import GenerationRequest, TokenLogprob, TokenOutput

from tests.cluster.gateway_texts import EOS, text_tokenizer

BASE = "base-model"


def default_answer(request: GenerationRequest) -> list[int]:
    """Text that depends on prompt, adapter and seed, then the end of the turn."""
    key = f"{request.prompt_ids}{request.adapter}{request.sampling.seed}".encode()
    digest = hashlib.sha256(key).hexdigest()[:12]
    return [*text_tokenizer().encode(f"answer {digest} é日本 stop."), EOS]


@dataclass
class FakeDispatcher:
    """Yields `answer(request)` in portions of `step` tokens, as an engine would.

    `error_after`: tokens after which an error output follows. `gate`: set it to let outputs go.
    """

    answer: Callable[[GenerationRequest], list[int]] = default_answer
    step: int = 1
    error_after: int | None = None
    error: tuple[str, str] = ("engine_failed", "the engine broke")
    gate: asyncio.Event | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    up: bool = True

    def ready(self) -> bool:
        return self.up

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        done = False
        try:
            async for output in self._outputs(request):
                done = output.finish_reason is not None
                yield output
        finally:
            if not done:
                self.aborted.append(request.request_id)

    async def _outputs(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        sampling = request.sampling
        ids = self.answer(request)[: sampling.max_tokens]
        sent = 0
        first = True
        while sent < len(ids) or first:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            if self.error_after is not None and sent >= self.error_after:
                yield TokenOutput(
                    request.request_id,
                    finish_reason="error",
                    error_code=self.error[0],
                    error=self.error[1],
                )
                return
            part = ids[sent : sent + self.step]
            sent += len(part)
            output = TokenOutput(request.request_id, part)
            if sampling.logprobs is not None:
                output.logprobs = [_logprob(i, sampling.logprobs) for i in part]
            if first:
                output.tier = "gpu" if request.adapter else "base"
                output.cached_tokens = 3
                if sampling.prompt_logprobs is not None:
                    rest = request.prompt_ids[1:]
                    output.prompt_logprobs = [
                        None,
                        *(_logprob(i, sampling.prompt_logprobs) for i in rest),
                    ]
            first = False
            if sent >= len(ids):
                output.finish_reason = "stop" if ids and ids[-1] == EOS else "length"
            yield output


def _logprob(token_id: int, count: int) -> TokenLogprob:
    top = tuple((k + 5, -0.25 * (k + 1)) for k in range(count))
    return TokenLogprob(token_id, -token_id / 100, 2, top)


@dataclass
class FakeIngest:
    """Publishes whatever was staged, its digest being that of the weights' bytes.

    Weights that begin with "bad" are refused.
    """

    store: Any
    catalogue: Catalogue
    uploads: Uploads
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def ingest(self, tenant_id: str, name: str, upload_id: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._ingest, tenant_id, name, upload_id)

    def _ingest(self, tenant_id: str, name: str, upload_id: str) -> dict[str, Any]:
        keys = [o.key for o in self.store.list(f"quarantine/{tenant_id}/{upload_id}/")]
        weights_key = next(k for k in keys if k.endswith(".safetensors"))
        weights = self.store.get(weights_key)[0]
        for key in keys:
            self.store.delete(key)
        if weights.startswith(b"bad"):
            raise AdapterRefused("unknown_key", "tensor 'x.y' is unknown", key="x.y")
        digest = hashlib.sha256(weights).hexdigest()
        version = publish(self.catalogue, tenant_id, name, digest)
        return version_json(version)

    async def start(self, tenant_id: str, name: str, upload_id: str) -> None:
        async def work() -> None:
            try:
                result: Any = await self.ingest(tenant_id, name, upload_id)
            except AdapterStoreError as error:
                result = error
            finish_upload(self.uploads, tenant_id, name, upload_id, result)

        self.tasks.append(asyncio.create_task(work()))


def publish(catalogue: Catalogue, tenant_id: str, name: str, digest: str) -> Any:
    meta = VersionMeta(nbytes=1000, rank_max=8, format="per-expert", targets=("q_proj",))
    return catalogue.publish(tenant_id, name, digest, meta, uuid.uuid4().hex)


@dataclass
class FakeControl:
    purged: list[str] = field(default_factory=list)
    up: bool = True

    async def status(self) -> dict[str, Any]:
        if not self.up:
            raise ConnectionError("the controller is away")
        return {"groups": []}

    async def purge(self, keys: list[str]) -> None:
        if not self.up:
            raise ConnectionError("the controller is away")
        self.purged += keys


class LocalLimiter:
    """The limiter actor without an actor."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.limiter = Limiter(clock)

    async def lease(self, *args: Any) -> Any:
        return self.limiter.lease(*args)

    async def give_back(self, *args: Any) -> None:
        self.limiter.give_back(*args)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A gateway and what it stands on."""

    app: FastAPI
    deps: GatewayDeps
    dispatcher: FakeDispatcher
    catalogue: Catalogue
    store: Any
    control: FakeControl
    ingest: FakeIngest
    clock: Clock
    admin_key: str

    def tenant(self, name: str, **limits: int) -> SimpleNamespace:
        """A tenant with a key."""
        tenant = self.catalogue.create_tenant(name, TenantLimits(**limits))
        key_id, key = self.catalogue.create_key(tenant.id, "test")
        return SimpleNamespace(id=tenant.id, name=name, key=key, key_id=key_id)

    def adapter(self, tenant: SimpleNamespace, name: str, content: str = "") -> str:
        """Publishes a version; its digest."""
        digest = hashlib.sha256((content or name).encode()).hexdigest()
        publish(self.catalogue, tenant.id, name, digest)
        return digest

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


def make_bench(store: Any, **settings: Any) -> Bench:
    chosen = Settings.load(**{"kv_tokens": 400, **settings})
    catalogue = Catalogue(store)
    dispatcher = FakeDispatcher()
    sizes = UploadSizes(weights=chosen.presigned_max_bytes)
    uploads = Uploads(store, store, sizes, chosen.presigned_expires_s)
    clock = Clock()
    ingest = FakeIngest(store, catalogue, uploads)
    control = FakeControl()
    deps = GatewayDeps(
        settings=chosen,
        catalogue=catalogue,
        uploads=uploads,
        tokenizer=text_tokenizer(),
        base_model=SimpleNamespace(name=BASE, fingerprint="f" * 64),  # type: ignore[arg-type]
        dispatcher=dispatcher,
        ingest=ingest,
        limits=LocalLeases(LocalLimiter(clock), clock),
        control=control,
        metrics=GatewayMetrics(new_registry()),
    )
    admin_key = catalogue.ensure_admin_key()
    assert admin_key is not None
    return Bench(
        app=build_gateway(deps),
        deps=deps,
        dispatcher=dispatcher,
        catalogue=catalogue,
        store=store,
        control=control,
        ingest=ingest,
        clock=clock,
        admin_key=admin_key,
    )
