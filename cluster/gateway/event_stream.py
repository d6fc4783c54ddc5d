"""Server-sent events, and noticing that the client went away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import ApiError
from .answers import to_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def event(content: Any) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    The body must have been read. Raises ClientGone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends each item of an async generator as it comes.

    The generator is closed in every case: at its end, when the client goes away, when the server
    cancels the request; then `on_close` is awaited. An error inside becomes an event, since the
    status has been sent already.

    Args:
        events: whole events, as bytes.
        keepalive_s: a comment is sent on a stream silent for so long.
        on_close: frees what stands behind the generator, which may never have been started.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        keepalive_s: float,
        on_close: Callable[[], Awaitable[None]],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._keepalive_s = keepalive_s
        self._on_close = on_close
        # Proxies such as nginx hold back streams unless told not to.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producer = asyncio.create_task(self._produce(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({producer, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            producer.cancel()
            try:
                await asyncio.gather(producer, watch, return_exceptions=True)
                await self._events.aclose()
            finally:
                await self._on_close()
        if not producer.cancelled() and (error := producer.exception()) is not None:
            raise error

    async def _produce(self, send: Send) -> None:
        last = time.monotonic()

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal last
            last = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(self._keepalive_s)
                if time.monotonic() - last >= self._keepalive_s:
                    await write(b": keep-alive\n\n")

        pulse = None
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            pulse = asyncio.create_task(keep_alive())
            try:
                async for data in self._events:
                    await write(data)
            except ApiError as error:
                await write(event(error.body()))
            except OSError:
                return  # the client went away between two events
            except Exception:
                logger.exception("a stream failed")
                error = ApiError(500, "internal_error", "the gateway failed", kind="server_error")
                await write(event(error.body()))
        finally:
            if pulse is not None:
                pulse.cancel()
                await asyncio.gather(pulse, return_exceptions=True)
        await write(b"", more=False)
