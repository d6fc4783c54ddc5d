"""Liveness and readiness."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from .answers import JsonResponse
from .deps import GatewayDeps


def health_router(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/health", summary="This gateway is alive")
    async def health() -> Response:
        return JsonResponse({"status": "ok"})

    @router.get("/ready", summary="At least one worker group answers")
    async def ready() -> Response:
        if deps.dispatcher.ready():
            return JsonResponse({"status": "ready"})
        return JsonResponse(
            {"status": "waiting", "reason": "no worker group is connected yet"}, status_code=503
        )

    return router
