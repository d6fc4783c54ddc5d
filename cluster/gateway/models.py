"""GET /v1/models: what the caller may name as `model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .answers import JsonResponse
from .deps import GatewayDeps
from .resolve import ModelResolver, not_found

if TYPE_CHECKING:
    from ...adapter_store import AdapterAlias


def models_router(deps: GatewayDeps, resolver: ModelResolver) -> APIRouter:
    router = APIRouter(tags=["models"])
    base = deps.base_model

    def base_entry() -> dict[str, Any]:
        return {
            "id": base.name,
            "object": "model",
            "created": 0,
            "owned_by": "loraplex",
            "root": base.name,
            "parent": None,
            "max_model_len": deps.max_context,
        }

    def adapter_entry(alias: AdapterAlias, tenant_name: str) -> dict[str, Any]:
        current = alias.current
        return {
            "id": alias.name,
            "object": "model",
            "created": current.created,
            "owned_by": tenant_name,
            "root": base.name,
            "parent": base.name,
            "max_model_len": deps.max_context,
            "digest": current.digest,
            "version": current.version,
        }

    @router.get("/v1/models", summary="The base model and your adapters")
    async def list_models(request: Request) -> Response:
        caller = request.state.caller
        aliases = await resolver.aliases(caller.tenant_id)
        entries = [adapter_entry(aliases[name], caller.tenant_name) for name in sorted(aliases)]
        return JsonResponse({"object": "list", "data": [base_entry(), *entries]})

    @router.get("/v1/models/{model}", summary="One of them")
    async def get_model(request: Request, model: str) -> Response:
        caller = request.state.caller
        target = await resolver.resolve(caller.tenant_id, model)
        if target.adapter is None:
            return JsonResponse(base_entry())
        alias = (await resolver.aliases(caller.tenant_id)).get(target.adapter_name)
        if alias is None:  # deleted between the two reads
            raise not_found(model)
        entry = adapter_entry(alias, caller.tenant_name)
        return JsonResponse(
            {**entry, "id": model, "digest": target.adapter.digest, "version": target.version}
        )

    return router
