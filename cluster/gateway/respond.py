"""Runs prepared work and sends its answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .answers import to_json
from .completion import Work
from .deps import GatewayDeps
from .event_stream import DONE, ClientGone, EventStream, unless_gone
from .generation import ChoiceEvent, run
from .middleware import CLIENT_CLOSED

# A stream's status line waits so long for the first token, so that a request that fails before it
# gets a true status; after this the stream begins anyway.
FIRST_EVENT_S = 10.0


async def respond(deps: GatewayDeps, request: Request, work: Work) -> Response:
    """The answer, or the stream of it. A client that goes away ends the work."""
    deps.metrics.generation_started()
    events = _observed(
        deps, work, run(deps.dispatcher, deps.tokenizer, work.plan, work.jobs, work.usage)
    )
    try:
        if work.stream:
            return await _stream(deps, request, work, events)
        body = await unless_gone(request, _collect(work, events))
    except ClientGone:
        _close(deps, work)
        return Response(status_code=CLIENT_CLOSED)
    except BaseException:
        _close(deps, work)
        raise
    _close(deps, work)
    return Response(body, media_type="application/json", headers=work.headers)


def _close(deps: GatewayDeps, work: Work) -> None:
    # A prompt that no group has begun isn't charged.
    prompt_tokens = work.usage.prompt_tokens if work.usage.began else 0
    work.reservation.settle(prompt_tokens + work.usage.completion_tokens)
    caller, adapter = work.caller, work.target.adapter_name
    deps.metrics.generation_ended(caller.tenant_name, caller.tenant_id, adapter)
    deps.metrics.tokens(caller.tenant_name, adapter, prompt_tokens, work.usage.completion_tokens)


async def _observed(
    deps: GatewayDeps, work: Work, events: AsyncGenerator[ChoiceEvent, None]
) -> AsyncGenerator[ChoiceEvent, None]:
    """Passes events on and measures the time to the first token and between tokens."""
    last: dict[int, float] = {}
    async with aclosing(events):
        async for item in events:
            now = time.monotonic()
            before = last.get(item.job.index)
            if before is None and not last:
                tenant = work.caller.tenant_name
                deps.metrics.first_token(tenant, work.usage.tier, now - work.started)
            elif before is not None and item.tokens:
                deps.metrics.next_tokens(item.tokens, now - before)
            last[item.job.index] = now
            yield item


async def _collect(work: Work, events: AsyncGenerator[ChoiceEvent, None]) -> bytes:
    by_choice: list[list[ChoiceEvent]] = [[] for _ in work.jobs]
    async with aclosing(events):
        async for item in events:
            by_choice[item.job.index].append(item)
    choices = []
    for items in by_choice:
        choices.append(to_json(work.shape.whole(items)))
        await asyncio.sleep(0)  # one with its prompt's logprobs takes its time, and others wait
    head = {
        "id": work.request_id,
        "object": work.shape.full_object,
        "created": work.created,
        "model": work.target.name,
    }
    tail = {
        **work.shape.beside(by_choice[0]),
        "usage": work.usage.body(),
        "loraplex": work.extension(),
    }
    parts = to_json(head)[:-1], b",".join(choices), to_json(tail)[1:]
    return b'%b,"choices":[%b],%b' % parts


async def _stream(
    deps: GatewayDeps,
    request: Request,
    work: Work,
    events: AsyncGenerator[ChoiceEvent, None],
) -> Response:
    first = asyncio.ensure_future(_next(events))

    async def end() -> None:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()

    async def close() -> None:
        try:
            await end()
        finally:
            _close(deps, work)

    try:
        await unless_gone(request, asyncio.wait({first}, timeout=FIRST_EVENT_S))
        if first.done():
            first.result()
    except BaseException:
        await end()
        raise
    return EventStream(
        _chunks(work, first, events), work.headers, deps.settings.stream_keepalive_s, close
    )


async def _next(events: AsyncGenerator[ChoiceEvent, None]) -> ChoiceEvent | None:
    return await anext(events, None)


class _ChunkWriter:
    """A stream's chunks as events. What all of them share is written once."""

    def __init__(self, work: Work) -> None:
        head = {
            "id": work.request_id,
            "object": work.shape.chunk_object,
            "created": work.created,
            "model": work.target.name,
        }
        self._front = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._back = b'],"usage":null' if work.include_usage else b"]"

    def choice(self, piece: dict[str, Any], extension: bytes = b"") -> bytes:
        return b"%b%b%b%b}\n\n" % (self._front, to_json(piece), self._back, extension)

    def usage(self, usage: dict[str, Any], extension: bytes) -> bytes:
        return b'%b],"usage":%b%b}\n\n' % (self._front, to_json(usage), extension)


async def _chunks(
    work: Work,
    first: asyncio.Future[ChoiceEvent | None],
    events: AsyncGenerator[ChoiceEvent, None],
) -> AsyncGenerator[bytes, None]:
    writer = _ChunkWriter(work)
    for job in work.jobs:
        opening = work.shape.opening(job)
        if opening is not None:
            yield writer.choice(opening)
    begun: set[int] = set()

    def chunk(item: ChoiceEvent) -> bytes | None:
        """The extension comes with the first one."""
        piece = work.shape.piece(item, item.job.index not in begun)
        if piece is None:
            return None
        data = writer.choice(piece, b"" if begun else _extension(work))
        begun.add(item.job.index)
        return data

    item = await first
    if item is not None:
        if (data := chunk(item)) is not None:
            yield data
        async for item in events:
            if (data := chunk(item)) is not None:
                yield data
    if work.include_usage:
        yield writer.usage(work.usage.body(), _extension(work))
    yield DONE


def _extension(work: Work) -> bytes:
    return b',"loraplex":' + to_json(work.extension())
