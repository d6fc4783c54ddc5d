"""What happens to every request: its id, its time, its size, and errors that nobody expected."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError
from ..logs import begin_log_fields, log_fields
from .answers import error_response
from .deps import GatewayDeps

logger = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = frozenset({"/health", "/ready"})  # asked for every few seconds, by machines
CLIENT_CLOSED = 499  # nginx's number for a client that went away
MULTIPART_OVERHEAD = 1 << 20  # boundaries, headers and adapter_config.json


class RequestMiddleware:
    """Gives a request its id, counts and times it, and turns a crash into a 500 with the id.

    Args:
        sends_id: whether to send `x-request-id`; Ray Serve's own server does it already.
    """

    def __init__(self, app: ASGIApp, deps: GatewayDeps, sends_id: bool) -> None:
        self._app = app
        self._deps = deps
        self._sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = _request_id(scope)
        begin_log_fields(request_id=request_id)
        span = None
        if self._deps.tracer is not None:
            span = self._deps.tracer.begin(scope["method"], _header(scope, b"traceparent"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["traceparent"] = span.traceparent if span is not None else None
        status = CLIENT_CLOSED
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun = True
                status = message["status"]
                if self._sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception:
            logger.exception("request %s failed", request_id)
            if begun:
                raise
            error = ApiError(
                500,
                "internal_error",
                f"the gateway failed; its log names this request {request_id}",
                kind="server_error",
            )
            await error_response(error)(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.monotonic() - started
            self._deps.metrics.request(route, status, seconds)
            extra = {"route": route, "status": status, "seconds": round(seconds, 4)}
            level = logging.DEBUG if route in _QUIET else logging.INFO
            logger.log(level, "%s %s", scope["method"], route, extra=extra)
            if span is not None:
                fields = {f"loraplex.{name}": str(value) for name, value in log_fields().items()}
                span.end(f"{scope['method']} {route}", status, fields)


class BodyLimitMiddleware:
    """Refuses bodies over the settings' caps: by their stated length, else while they are read."""

    def __init__(self, app: ASGIApp, deps: GatewayDeps) -> None:
        self._app = app
        self._deps = deps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = self._deps.settings
        upload = scope["path"].rstrip("/") == "/v1/adapters"
        limit = (
            settings.upload_max_bytes + MULTIPART_OVERHEAD if upload else settings.body_max_bytes
        )
        hint = "; upload larger adapters by POST /v1/adapters/uploads" if upload else ""
        message = f"the body is larger than {limit} bytes{hint}"
        stated = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if not stated.isdigit() or int(stated) > limit:
            error = ApiError(413, "body_too_large", message)
            await error_response(error)(scope, receive, send)
            return
        seen = 0

        async def receive_on() -> Message:
            nonlocal seen
            part = await receive()
            if part["type"] == "http.request":
                seen += len(part.get("body", b""))
                if seen > limit:
                    raise HTTPException(413, message)
            return part

        await self._app(scope, receive_on, send)


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    return given if given and _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex


def _header(scope: Scope, name: bytes) -> str | None:
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), None)
