"""Liveness, readiness and the merged metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ..metrics import fan_in, http_sd
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

    @router.get("/metrics", summary="All processes' metrics, for one machine (admin key)")
    async def metrics() -> Response:
        targets = await deps.control.metrics_targets()
        text = await deps.in_thread(fan_in, targets, _token(deps))
        return Response(text, media_type="text/plain; version=0.0.4")

    @router.get("/metrics/targets", summary="Prometheus http_sd (admin key)")
    async def metrics_targets() -> Response:
        targets = await deps.control.metrics_targets()
        return Response(http_sd(targets), media_type="application/json")

    return router


def _token(deps: GatewayDeps) -> str | None:
    token = deps.settings.metrics_token
    return token.get_secret_value() if token else None
