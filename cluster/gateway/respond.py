"""Runs prepared work and sends its answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .answers import JsonResponse
from .completion import Work
from .deps import GatewayDeps
from .event_stream import DONE, ClientGone, EventStream, event, unless_gone
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
    return JsonResponse(body, headers=work.headers)


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


async def _collect(work: Work, events: AsyncGenerator[ChoiceEvent, None]) -> dict[str, Any]:
    by_choice: list[list[ChoiceEvent]] = [[] for _ in work.jobs]
    async with aclosing(events):
        async for item in events:
            by_choice[item.job.index].append(item)
    return {
        "id": work.request_id,
        "object": work.shape.full_object,
        "created": work.created,
        "model": work.target.name,
        "choices": [work.shape.whole(items) for items in by_choice],
        **work.shape.beside(by_choice[0]),
        "usage": work.usage.body(),
        "loraplex": work.extension(),
    }


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


async def _chunks(
    work: Work,
    first: asyncio.Future[ChoiceEvent | None],
    events: AsyncGenerator[ChoiceEvent, None],
) -> AsyncGenerator[bytes, None]:
    head = {
        "id": work.request_id,
        "object": work.shape.chunk_object,
        "created": work.created,
        "model": work.target.name,
    }
    no_usage: dict[str, Any] = {"usage": None} if work.include_usage else {}
    begun: set[int] = set()
    for job in work.jobs:
        opening = work.shape.opening(job)
        if opening is not None:
            yield event({**head, "choices": [opening], **no_usage})
    item = await first
    extension: dict[str, Any] = {"loraplex": work.extension()}
    while item is not None:
        piece = work.shape.piece(item, item.job.index not in begun)
        if piece is not None:
            begun.add(item.job.index)
            yield event({**head, "choices": [piece], **no_usage, **extension})
            extension = {}
        item = await _next(events)
    if work.include_usage:
        usage = work.usage.body()
        yield event({**head, "choices": [], "usage": usage, "loraplex": work.extension()})
    yield DONE
