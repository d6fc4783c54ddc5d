"""Errors and JSON as they leave the gateway."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...adapter_store import (
    AdapterRefused,
    AdapterStoreError,
    InvalidName,
    LimitExceeded,
    StoreUnavailable,
    UploadNotFound,
)
from ..errors import ActorUnavailable, ApiError

if TYPE_CHECKING:
    from ..metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_MAX_PARAM_CHARS = 200  # names within a body may be as long as the body


class JsonResponse(Response):
    """JSON without escapes for other scripts; never NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


# Made once: json.dumps makes one for each call that doesn't use its defaults.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)


def to_json(content: Any) -> bytes:
    return _ENCODER.encode(content).encode("utf-8", "replace")


def error_response(error: ApiError) -> JsonResponse:
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers)


def store_unavailable(error: Exception) -> ApiError:
    return ApiError(
        503,
        "store_unavailable",
        str(error),
        kind="server_error",
        headers={"retry-after": "2"},
    )


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body or a query, as one sentence."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}".rstrip(": "))
    if isinstance(first.get("input"), bytes):  # FastAPI leaves other content types unread
        return ApiError(
            400,
            "invalid_json",
            "the body isn't marked as JSON; send `Content-Type: application/json`",
        )
    # A field of several types has an error for each of them: the one that fits best went deepest.
    root = _path(first["loc"])
    paths = [_path(item["loc"]) for item in errors]
    best = max((p for p in paths if p[: len(root)] == root), key=len)
    param = ".".join(best)[:_MAX_PARAM_CHARS] or None
    if first["type"] == "missing":
        if param is None:
            return ApiError(400, "missing_body", "a JSON body is needed")
        return ApiError(400, "missing_parameter", f"{param} is missing", param=param)
    reasons = [item["msg"] for item, path in zip(errors, paths, strict=True) if path == best]
    message = " or ".join(dict.fromkeys(m[0].lower() + m[1:] for m in reasons))
    return ApiError(400, "invalid_value", f"{param or 'the body'}: {message}", param=param)


def _path(location: Sequence[str | int]) -> list[str]:
    """A field's path without the place in the request and without pydantic's names of types."""
    parts = [str(part) for part in location[1:]]
    return [part for part in parts if part not in ("str", "int") and "[" not in part]


def _from_http(error: HTTPException) -> ApiError:
    codes = {
        404: ("not_found", "there is no such path; see /docs"),
        405: ("method_not_allowed", "this path doesn't take this method; see /docs"),
        408: ("body_too_slow", str(error.detail)),
        413: ("body_too_large", str(error.detail)),
    }
    code, message = codes.get(error.status_code, ("invalid_request", str(error.detail)))
    return ApiError(error.status_code, code, message, headers=error.headers)


def install_error_handlers(app: FastAPI, metrics: GatewayMetrics) -> None:
    """Every error leaves as an OpenAI error object."""

    async def answer(request: Request, error: Exception) -> Response:
        caller = getattr(request.state, "caller", None)
        told = _translate(error)
        if told.code == "limit_exceeded" and told.param is not None and caller is not None:
            metrics.limit_hit(caller.tenant_name, told.param)
        return error_response(told)

    for kind in (
        ApiError,
        ActorUnavailable,
        RequestValidationError,
        HTTPException,
        AdapterStoreError,
    ):
        app.add_exception_handler(kind, answer)


def _translate(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return from_validation(error)
        case HTTPException():
            return _from_http(error)
        case AdapterRefused():
            return ApiError(422, error.code, error.message, param=error.key)
        case InvalidName():
            return ApiError(422, "invalid_name", str(error), param="name")
        case LimitExceeded(limit="upload_bytes"):
            return ApiError(413, "body_too_large", error.message)
        case LimitExceeded():
            return ApiError(
                403, "limit_exceeded", error.message, kind="permission_error", param=error.limit
            )
        case UploadNotFound():
            return ApiError(409, "upload_incomplete", str(error))
        case StoreUnavailable():
            return store_unavailable(error)
        case ActorUnavailable():
            return ApiError(
                503,
                "service_unavailable",
                str(error),
                kind="server_error",
                headers={"retry-after": "2"},
            )
        case _:
            logger.error("a request failed", exc_info=error)
            return ApiError(500, "internal_error", str(error), kind="server_error")
