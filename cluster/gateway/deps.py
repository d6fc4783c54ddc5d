"""What a gateway works with. Real parts and test doubles are both plugged in here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from ...workers import GenerationRequest, TokenOutput
from ..leases import Grant
from ..limiter import Rates
from ..settings import Settings
from .tokenizer import TextTokenizer

if TYPE_CHECKING:
    from ...adapter_store import BaseModel, Catalogue
    from ..metrics import GatewayMetrics
    from ..tracing import Tracer
    from ..uploads import Uploads

P = ParamSpec("P")
T = TypeVar("T")

STORE_THREADS = 16
# That tokenize and check grammars: apart from the store's, which every tenant's key may need.
COMPUTE_THREADS = 4


class Dispatcher(Protocol):
    """Sends requests to worker groups."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Outputs until one has a finish reason. Closing it aborts the request."""
        ...

    def ready(self) -> bool:
        """Whether at least one group can be reached."""
        ...


class Ingest(Protocol):
    """Turns a staged upload into a version of an adapter, away from the gateway."""

    async def ingest(self, tenant_id: str, name: str, upload_id: str) -> dict[str, Any]:
        """Ends when the version is servable; its fields. Raises AdapterRefused."""
        ...

    async def start(self, tenant_id: str, name: str, upload_id: str) -> None:
        """Begins in the background; the result goes into the upload's record."""
        ...


class Limits(Protocol):
    """Budgets of tenants; see `LocalLeases`."""

    async def acquire(self, tenant_id: str, rates: Rates, requests: int, tokens: int) -> Grant: ...

    def settle(self, tenant_id: str, unused_tokens: int) -> None: ...


class Control(Protocol):
    """The controller."""

    async def status(self) -> dict[str, Any]: ...

    async def purge(self, keys: list[str]) -> None:
        """Tells all groups to drop these adapters (`AdapterRef.key`)."""
        ...


@dataclass
class GatewayDeps:
    """Everything that `build_gateway` needs.

    `catalogue` and `uploads` block on the object store: call them by `in_thread`.
    `background` holds coroutine functions that run as long as the gateway does.
    """

    settings: Settings
    catalogue: Catalogue
    uploads: Uploads
    tokenizer: TextTokenizer
    base_model: BaseModel
    dispatcher: Dispatcher
    ingest: Ingest
    limits: Limits
    control: Control
    metrics: GatewayMetrics
    tracer: Tracer | None = None
    background: list[Callable[[], Any]] = field(default_factory=list)
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store")
    )
    compute_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(COMPUTE_THREADS, thread_name_prefix="compute")
    )

    async def in_thread(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Of what waits for the store."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: fn(*args, **kwargs))

    async def compute(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Of what takes long by itself, and lets other threads run meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.compute_threads, lambda: fn(*args, **kwargs))

    def close(self) -> None:
        for threads in (self.threads, self.compute_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together: what model, cache and operator allow."""
        settings = self.settings
        limits = (self.tokenizer.context_length, settings.group_kv_tokens, settings.max_context)
        return min(limit for limit in limits if limit is not None)
