"""/v1/adapters/uploads: large adapters go straight to the object store, by presigned URLs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field, StrictInt, StrictStr
from starlette.responses import Response

from ...adapter_store import NotFound, show
from ..adapter_json import iso_time
from ..errors import ApiError
from ..uploads import UploadRecord
from .adapters import check_new_name
from .answers import JsonResponse
from .auth import Caller
from .closed_model import ClosedModel
from .deps import GatewayDeps
from .resolve import ModelResolver


class UploadBody(ClosedModel):
    name: StrictStr
    weights_bytes: StrictInt | None = Field(
        None, ge=1, description="size of the weights; the URL then takes no other"
    )


def record_body(record: UploadRecord) -> dict[str, Any]:
    return {
        "object": "adapter.upload",
        "upload_id": record.upload_id,
        "name": record.name,
        "status": record.status,
        "created": iso_time(record.created),
        "updated": iso_time(record.updated),
        "error": record.error,
        "adapter": record.adapter,
    }


def presigned_router(deps: GatewayDeps, resolver: ModelResolver) -> APIRouter:
    router = APIRouter(tags=["adapters"])

    def no_upload(upload_id: str) -> ApiError:
        return ApiError(
            404,
            "upload_not_found",
            f"you have no upload {show(upload_id)}",
            param="upload_id",
        )

    async def find(caller: Caller, upload_id: str) -> UploadRecord:
        try:
            return await deps.in_thread(deps.uploads.get, caller.tenant_id, upload_id)
        except NotFound:
            raise no_upload(upload_id) from None

    @router.post("/v1/adapters/uploads", status_code=201, summary="Begin a large upload")
    async def begin(request: Request, body: UploadBody) -> Response:
        """PUT the two files to the `urls`, each with all of `headers`; then complete the upload."""
        caller: Caller = request.state.caller
        await check_new_name(deps, resolver, caller, body.name)
        record, urls = await deps.in_thread(
            deps.uploads.create, caller.tenant_id, body.name, body.weights_bytes
        )
        begun = {**record_body(record), "urls": urls, "headers": deps.uploads.headers}
        return JsonResponse(begun, status_code=201)

    @router.get("/v1/adapters/uploads/{upload_id}", summary="How an upload stands")
    async def status(request: Request, upload_id: str) -> Response:
        caller: Caller = request.state.caller
        record = await find(caller, upload_id)
        if record.status == "ready":
            resolver.forget(caller.tenant_id)  # whoever reads this may use it at once
        return JsonResponse(record_body(record))

    @router.post(
        "/v1/adapters/uploads/{upload_id}/complete",
        status_code=202,
        summary="Both files are there: check and publish them",
    )
    async def complete(request: Request, upload_id: str) -> Response:
        caller: Caller = request.state.caller
        record = await find(caller, upload_id)
        await check_new_name(deps, resolver, caller, record.name)
        missing = await deps.in_thread(deps.uploads.missing, caller.tenant_id, upload_id)
        if record.status == "waiting" and missing:
            raise ApiError(
                409,
                "upload_incomplete",
                f"nothing was uploaded yet to the URL of {missing[0]}",
                param=missing[0],
            )
        record, begun = await deps.in_thread(deps.uploads.begin, caller.tenant_id, upload_id)
        if begun:
            await deps.ingest.start(caller.tenant_id, record.name, upload_id)
        return JsonResponse(
            record_body(record),
            status_code=202,
            headers={"location": f"/v1/adapters/uploads/{upload_id}"},
        )

    return router
