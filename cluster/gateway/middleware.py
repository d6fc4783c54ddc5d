"""What happens to every request: its id, its time, its size, and errors that nobody expected."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError
from ..logs import begin_log_fields, log_fields
from .answers import error_response
from .deps import GatewayDeps
from .generation import RETRY_AFTER_S

logger = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = frozenset({"/health", "/ready"})  # asked for every few seconds, by machines
CLIENT_CLOSED = 499  # nginx's number for a client that went away
# A body may take so long: this, and its largest allowed size at a slow client's rate.
BODY_S = 30.0
BODY_BYTES_PER_S = 100_000
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


class OpenLimitMiddleware:
    """Refuses tenants' requests beyond the number that may be open, so that memory stays bounded;
    probes and operators always get through."""

    def __init__(self, app: ASGIApp, deps: GatewayDeps) -> None:
        self._app = app
        self._limit = deps.settings.max_open_requests
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._open >= self._limit:
            error = overloaded(
                f"this gateway has {self._open} requests open, which is its limit; try again later"
            )
            await error_response(error)(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


class TenantShareMiddleware:
    """Refuses a tenant's requests beyond as many as there are places free: one alone gets half of
    them, and whatever it opens, there is room for others. Behind the check of keys."""

    def __init__(self, app: ASGIApp, deps: GatewayDeps) -> None:
        self._app = app
        self._limit = deps.settings.max_open_requests
        self._open: Counter[str] = Counter()  # by tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        tenant = scope["state"]["caller"].tenant_id
        mine, free = self._open[tenant], self._limit - self._open.total()
        if mine >= free:
            error = overloaded(
                f"you have {mine} requests open at this gateway, which is your limit while it has "
                f"{free} places left; wait for some of them to end"
            )
            await error_response(error)(scope, receive, send)
            return
        self._open[tenant] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


def overloaded(message: str) -> ApiError:
    return ApiError(
        503,
        "gateway_overloaded",
        message,
        kind="server_error",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )


class BodyLimitMiddleware:
    """Refuses bodies over the settings' caps, by their stated length or else while they are read,
    and those that don't come: who sends half a body mustn't hold a place for ever."""

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
        seen, whole = 0, False
        allowed_s = BODY_S + limit / BODY_BYTES_PER_S
        deadline = asyncio.get_running_loop().time() + allowed_s

        async def receive_on() -> Message:
            nonlocal seen, whole
            if whole:  # only a disconnect can come
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    part = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body wasn't there within {allowed_s:.0f} s; {seen} bytes came"
                ) from None
            if part["type"] == "http.request":
                whole = not part.get("more_body", False)
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
