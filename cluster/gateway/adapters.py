"""/v1/adapters: a tenant's adapters, their versions, and uploads through the gateway."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from pydantic import Field, StrictInt
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from ...adapter_store import AdapterNotFound, AdapterRefused, check_name, show
from ..adapter_json import alias_json
from ..errors import ApiError
from .answers import JsonResponse
from .auth import Caller
from .closed_model import ClosedModel
from .deps import GatewayDeps
from .generation import RETRY_AFTER_S
from .resolve import ModelResolver

if TYPE_CHECKING:
    from ...adapter_store import AdapterAlias

CONFIG_MAX_BYTES = 1 << 20
# Each holds its body in memory while it goes to the store.
UPLOADS_AT_ONCE = 2
# Of one tenant: a body lies on the gateway's disk until it is whole and its turn has come.
TENANTS_UPLOADS = 8


_FORM = {
    "type": "object",
    "required": ["name", "config", "weights"],
    "properties": {
        "name": {"type": "string", "description": "what requests will name as `model`"},
        "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
        "weights": {
            "type": "string",
            "format": "binary",
            "description": "adapter_model.safetensors",
        },
    },
}


class RollbackBody(ClosedModel):
    version: StrictInt | None = Field(None, ge=1, description="none: the one before")


async def check_new_name(
    deps: GatewayDeps, resolver: ModelResolver, caller: Caller, name: str
) -> None:
    """Whether this tenant may publish under this name.

    Raises:
        InvalidName: answered as 422.
        ApiError: 422 name_reserved, 403 limit_exceeded.
    """
    check_name(name)
    if name == deps.base_model.name:
        raise ApiError(
            422, "name_reserved", f"{name!r} is the base model's name; choose another", param="name"
        )
    if caller.max_adapters is None:
        return
    aliases = await resolver.aliases(caller.tenant_id)
    if name not in aliases and len(aliases) >= caller.max_adapters:
        raise ApiError(
            403,
            "limit_exceeded",
            f"you have {len(aliases)} adapters, as many as you may; delete one first",
            kind="permission_error",
            param="max_adapters",
        )


def no_adapter(name: str) -> ApiError:
    return ApiError(
        404,
        "adapter_not_found",
        f"you have no adapter named {show(name)}; GET /v1/adapters lists yours",
        param="name",
    )


def adapters_router(deps: GatewayDeps, resolver: ModelResolver) -> APIRouter:
    router = APIRouter(tags=["adapters"])
    uploading = asyncio.Semaphore(UPLOADS_AT_ONCE)
    open_uploads: Counter[str] = Counter()  # by tenant

    @contextmanager
    def place(caller: Caller) -> Iterator[None]:
        if open_uploads[caller.tenant_id] >= TENANTS_UPLOADS:
            raise ApiError(
                429,
                "too_many_uploads",
                f"you have {TENANTS_UPLOADS} uploads open at this gateway, as many as you may; "
                "try again when one has ended",
                kind="rate_limit_error",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        open_uploads[caller.tenant_id] += 1
        try:
            yield
        finally:
            open_uploads[caller.tenant_id] -= 1
            if not open_uploads[caller.tenant_id]:
                del open_uploads[caller.tenant_id]

    async def find(caller: Caller, name: str) -> AdapterAlias:
        alias = (await resolver.aliases(caller.tenant_id)).get(name)
        if alias is None:
            resolver.forget(caller.tenant_id)  # it may have come a moment ago, elsewhere
            alias = (await resolver.aliases(caller.tenant_id)).get(name)
        if alias is None:
            raise no_adapter(name)
        return alias

    @router.post(
        "/v1/adapters",
        status_code=201,
        summary="Upload a PEFT LoRA adapter",
        openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": _FORM}}}},
    )
    async def upload(request: Request) -> Response:
        caller: Caller = request.state.caller
        upload_id = uuid.uuid4().hex
        with place(caller):
            async with request.form(max_files=2, max_fields=4) as form, uploading:
                name, config, weights = await _read_form(form, deps.settings.upload_max_bytes)
                await check_new_name(deps, resolver, caller, name)
                staged = caller.tenant_id, upload_id, config, weights
                await deps.in_thread(deps.uploads.stage, *staged)
        del config, weights, staged
        try:
            version = await deps.ingest.ingest(caller.tenant_id, name, upload_id)
        except AdapterRefused as error:
            deps.metrics.upload(error.code)
            raise
        finally:
            resolver.forget(caller.tenant_id)
        deps.metrics.upload("published")
        return JsonResponse(
            {"object": "adapter", "name": name, **version},
            status_code=201,
            headers={"location": f"/v1/adapters/{name}"},
        )

    @router.get("/v1/adapters", summary="Your adapters")
    async def list_adapters(request: Request) -> Response:
        aliases = await resolver.aliases(request.state.caller.tenant_id)
        data = [alias_json(aliases[name]) for name in sorted(aliases)]
        for entry in data:
            del entry["versions"]
        return JsonResponse({"object": "list", "data": data})

    @router.get("/v1/adapters/{name}", summary="One adapter and its versions")
    async def get_adapter(request: Request, name: str) -> Response:
        return JsonResponse(alias_json(await find(request.state.caller, name)))

    @router.post("/v1/adapters/{name}/rollback", summary="Serve an earlier version")
    async def rollback(request: Request, name: str, body: RollbackBody | None = None) -> Response:
        caller: Caller = request.state.caller
        await find(caller, name)
        version = body.version if body else None
        try:
            await deps.in_thread(deps.catalogue.rollback, caller.tenant_id, name, version)
        except AdapterNotFound as error:
            raise ApiError(404, "version_not_found", str(error), param="version") from None
        finally:
            resolver.forget(caller.tenant_id)
        return JsonResponse(alias_json(await find(caller, name)))

    @router.delete("/v1/adapters/{name}", status_code=204, summary="Delete an adapter")
    async def delete(request: Request, name: str) -> Response:
        caller: Caller = request.state.caller
        alias = await find(caller, name)
        try:
            await deps.in_thread(deps.catalogue.delete_adapter, caller.tenant_id, name)
        except AdapterNotFound:
            raise no_adapter(name) from None
        finally:
            resolver.forget(caller.tenant_id)
        remaining = {
            version.digest
            for other in (await resolver.aliases(caller.tenant_id)).values()
            for version in other.versions
        }
        gone = {version.digest for version in alias.versions} - remaining
        await purge(deps, [f"{caller.tenant_id}/{digest}" for digest in sorted(gone)])
        deps.metrics.adapter_removed(caller.tenant_name, name)
        return Response(status_code=204)

    return router


async def purge(deps: GatewayDeps, keys: list[str]) -> None:
    """Frees what deleted adapters take. With the controller away, the next one finds out by
    itself; until then they lie idle, for no name leads to them any more."""
    if keys:
        with suppress(Exception):
            await deps.control.purge(keys)


async def _read_form(form: FormData, max_bytes: int) -> tuple[str, bytes, bytes]:
    """name, adapter_config.json, adapter_model.safetensors. Raises ApiError 400 or 413."""
    if wrong := sorted(set(form) - {"name", "config", "weights"}):
        raise ApiError(
            400,
            "unknown_parameter",
            f"unknown form field {show(wrong[0])}; the fields are name, config and weights",
            param=wrong[0],
        )
    name = form.get("name")
    if not isinstance(name, str):
        raise ApiError(400, "missing_parameter", "the form field name is missing", param="name")
    config = await _read_part(form, "config", CONFIG_MAX_BYTES, "adapter_config.json")
    weights = await _read_part(form, "weights", max_bytes, "adapter_model.safetensors")
    return name, config, weights


async def _read_part(form: FormData, field: str, limit: int, file: str) -> bytes:
    part = form.get(field)
    if part is None:
        raise ApiError(
            400, "missing_parameter", f"the form field {field} ({file}) is missing", param=field
        )
    data = await part.read(limit + 1) if isinstance(part, UploadFile) else part.encode()
    if len(data) > limit:
        raise ApiError(413, "body_too_large", f"{field} is larger than {limit} bytes", param=field)
    return data
