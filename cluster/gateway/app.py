"""The gateway: all routers behind authentication, size limits and one form of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from .adapters import adapters_router
from .admin import admin_router
from .answers import install_error_handlers
from .auth import Authenticator, AuthMiddleware
from .chat import chat_router
from .completions import completions_router
from .deps import GatewayDeps
from .freshness import GenerationWatch
from .health import health_router
from .middleware import (
    BodyLimitMiddleware,
    OpenLimitMiddleware,
    RequestMiddleware,
    TenantShareMiddleware,
)
from .models import models_router
from .presigned import presigned_router
from .resolve import ModelResolver
from .series_sweep import sweep_forever

logger = logging.getLogger(__name__)

RESTART_S = 1.0
# Only tells /docs that a key is needed: AuthMiddleware checks it.
_KEY = Security(HTTPBearer(auto_error=False))


def build_gateway(deps: GatewayDeps, *, sends_request_id: bool = True) -> FastAPI:
    """The REST API on the given parts.

    Args:
        sends_request_id: False behind Ray Serve, whose own server adds `x-request-id`.
    """
    watch = GenerationWatch(deps, deps.catalogue.generation, deps.settings.catalogue_poll_s)
    resolver = ModelResolver(deps, watch)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await watch.poll()
        sweeping = partial(sweep_forever, deps, watch)
        running = (watch.run, sweeping, *deps.background)
        tasks = [asyncio.create_task(_always(run)) for run in running]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            deps.close()

    app = FastAPI(
        title="Loraplex",
        summary="OpenAI-compatible serving of many tenants' LoRA adapters over one base model",
        lifespan=lifespan,
    )
    install_error_handlers(app, deps.metrics)
    # The last one added sees a request first.
    app.add_middleware(BodyLimitMiddleware, deps=deps)
    app.add_middleware(TenantShareMiddleware, deps=deps)
    app.add_middleware(AuthMiddleware, deps=deps, authenticator=Authenticator(deps, watch))
    app.add_middleware(OpenLimitMiddleware, deps=deps)
    app.add_middleware(RequestMiddleware, deps=deps, sends_id=sends_request_id)
    app.include_router(health_router(deps))
    for router in (
        chat_router(deps, resolver),
        completions_router(deps, resolver),
        models_router(deps, resolver),
        presigned_router(deps, resolver),
        adapters_router(deps, resolver),
        admin_router(deps, watch),
    ):
        app.include_router(router, dependencies=[_KEY])
    return app


async def _always(run: Callable[[], Awaitable[None]]) -> None:
    """Begins it again when it fails: nobody else would notice that keys are never read again."""
    while True:
        try:
            await run()
        except Exception:
            logger.exception("a background task of the gateway failed")
        await asyncio.sleep(RESTART_S)
