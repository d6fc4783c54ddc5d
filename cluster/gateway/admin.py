"""/admin/v1: tenants, their keys and limits, and where adapters are placed. Admin key only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import Field, StrictInt, StrictStr
from starlette.responses import Response

from ...adapter_store import KeyNotFound, TenantExists, TenantLimits, TenantNotFound, check_name
from ..adapter_json import iso_time
from ..errors import ApiError
from .adapters import purge
from .answers import JsonResponse
from .closed_model import ClosedModel
from .deps import GatewayDeps
from .freshness import GenerationWatch

if TYPE_CHECKING:
    from ...adapter_store import KeyRecord, Tenant


MAX_LIMIT = 10**15  # within it, floats count one by one


class LimitsBody(ClosedModel):
    """Absent: unchanged (unlimited for a new tenant). null: unlimited."""

    requests_per_minute: StrictInt | None = Field(None, ge=1, le=MAX_LIMIT)
    tokens_per_minute: StrictInt | None = Field(None, ge=1, le=MAX_LIMIT)
    max_adapters: StrictInt | None = Field(None, ge=0, le=MAX_LIMIT)
    max_bytes: StrictInt | None = Field(None, ge=0, le=MAX_LIMIT, description="of all packs")
    weight: float = Field(1.0, ge=0.001, le=1000, description="share of the compute")


class TenantBody(ClosedModel):
    name: StrictStr
    limits: LimitsBody | None = None


class TenantChange(ClosedModel):
    limits: LimitsBody


class KeyBody(ClosedModel):
    label: StrictStr = Field("", max_length=100)


def tenant_body(tenant: Tenant) -> dict[str, Any]:
    limits = tenant.limits
    return {
        "object": "tenant",
        "id": tenant.id,
        "name": tenant.name,
        "created": iso_time(tenant.created),
        "limits": {name: getattr(limits, name) for name in LimitsBody.model_fields},
    }


def key_body(key: KeyRecord) -> dict[str, Any]:
    return {"object": "key", "id": key.key_id, "label": key.label, "created": iso_time(key.created)}


def admin_router(deps: GatewayDeps, watch: GenerationWatch) -> APIRouter:
    router = APIRouter(prefix="/admin/v1", tags=["admin"])
    catalogue = deps.catalogue

    async def find(tenant_id: str) -> Tenant:
        try:
            return await deps.in_thread(catalogue.get_tenant, tenant_id)
        except TenantNotFound as error:
            raise _no_tenant(error) from None

    @router.post("/tenants", status_code=201, summary="Make a tenant")
    async def create(request: Request, body: TenantBody) -> Response:
        check_name(body.name, "tenant")
        given = body.limits.model_dump(exclude_unset=True) if body.limits else {}
        limits = TenantLimits(**given)
        try:
            tenant = await deps.in_thread(catalogue.create_tenant, body.name, limits)
        except TenantExists as error:
            raise ApiError(409, "tenant_exists", str(error), param="name") from None
        await watch.poll()
        return JsonResponse(tenant_body(tenant), status_code=201)

    @router.get("/tenants", summary="All tenants")
    async def list_tenants() -> Response:
        tenants = await deps.in_thread(catalogue.list_tenants)
        data = [tenant_body(tenant) for tenant in sorted(tenants, key=lambda t: t.name)]
        return JsonResponse({"object": "list", "data": data})

    @router.get("/tenants/{tenant_id}", summary="One tenant")
    async def get(tenant_id: str) -> Response:
        return JsonResponse(tenant_body(await find(tenant_id)))

    @router.patch("/tenants/{tenant_id}", summary="Change limits")
    async def change(tenant_id: str, body: TenantChange) -> Response:
        tenant = await find(tenant_id)
        changes = body.limits.model_dump(exclude_unset=True)
        limits = TenantLimits.model_validate({**tenant.limits.model_dump(), **changes})
        try:
            tenant = await deps.in_thread(catalogue.update_tenant, tenant_id, limits=limits)
        except TenantNotFound as error:
            raise _no_tenant(error) from None
        await watch.poll()
        return JsonResponse(tenant_body(tenant))

    @router.delete(
        "/tenants/{tenant_id}", status_code=204, summary="Delete a tenant and all it has"
    )
    async def delete(tenant_id: str) -> Response:
        tenant = await find(tenant_id)
        aliases = await deps.in_thread(catalogue.adapters, tenant_id)
        digests = {v.digest for alias in aliases.values() for v in alias.versions}
        await deps.in_thread(catalogue.delete_tenant, tenant_id)
        await watch.poll()
        await purge(deps, [f"{tenant_id}/{digest}" for digest in sorted(digests)])
        deps.metrics.tenant_removed(tenant.name)
        return Response(status_code=204)

    @router.post("/tenants/{tenant_id}/keys", status_code=201, summary="Make a key")
    async def create_key(tenant_id: str, body: KeyBody | None = None) -> Response:
        await find(tenant_id)
        label = body.label if body else ""
        key_id, key = await deps.in_thread(catalogue.create_key, tenant_id, label)
        await watch.poll()
        # The only time that the key is shown: the store keeps its hash.
        return JsonResponse(
            {"object": "key", "id": key_id, "label": label, "key": key}, status_code=201
        )

    @router.get("/tenants/{tenant_id}/keys", summary="A tenant's keys, without their text")
    async def list_keys(tenant_id: str) -> Response:
        await find(tenant_id)
        keys = await deps.in_thread(catalogue.list_keys, tenant_id)
        return JsonResponse({"object": "list", "data": [key_body(key) for key in keys]})

    @router.delete("/tenants/{tenant_id}/keys/{key_id}", status_code=204, summary="Revoke a key")
    async def revoke_key(tenant_id: str, key_id: str) -> Response:
        await find(tenant_id)
        try:
            await deps.in_thread(catalogue.revoke_key, tenant_id, key_id)
        except KeyNotFound as error:
            raise ApiError(404, "key_not_found", str(error), param="key_id") from None
        await watch.poll()
        return Response(status_code=204)

    @router.get("/placement", summary="Which groups hold which adapters")
    async def placement() -> Response:
        try:
            return JsonResponse(await deps.control.status())
        except Exception as error:
            raise ApiError(
                503,
                "controller_unavailable",
                f"the controller doesn't answer: {error}",
                kind="server_error",
                headers={"retry-after": "2"},
            ) from error

    return router


def _no_tenant(error: TenantNotFound) -> ApiError:
    return ApiError(404, "tenant_not_found", str(error), param="tenant_id")
