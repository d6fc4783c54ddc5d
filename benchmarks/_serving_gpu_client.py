"""The client of benchmarks/serving_gpu.py: bare HTTP/1.1 over kept connections, which only notes
what comes when; it is taken apart when a round is over."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from _serving_gpu_plan import TEMPERATURE

_END = b"\r\n0\r\n\r\n"  # of a chunked body; JSON writes these bytes as escapes
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Adapter:
    model: str
    key: str  # of its tenant


@dataclass(frozen=True)
class Answer:
    """Times of `time.perf_counter`. `events`: when each came that has text."""

    sent: float
    events: list[float]
    ended: float
    tier: str
    reads: int


class Connection(asyncio.Protocol):
    """One request after the other."""

    def __init__(self) -> None:
        self._pieces: list[tuple[float, bytes]] = []
        self._tail = b""
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._sent = 0.0

    @classmethod
    async def open(cls, url: str) -> Connection:
        loop, parts = asyncio.get_running_loop(), urlsplit(url)
        return (await loop.create_connection(cls, str(parts.hostname), parts.port or 80))[1]

    async def ask(self, request: bytes, tokens: int) -> Answer:
        """
        Raises:
            RuntimeError: the answer isn't a whole stream of so many tokens.
        """
        assert self._transport is not None
        self._pieces, self._tail = [], b""
        self._done = asyncio.get_running_loop().create_future()
        self._sent = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(_TIMEOUT_S):
            await self._done
        return _take_apart(self._sent, self._pieces, tokens)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-len(_END) :]
        if self._done is None or self._done.done():
            return
        if self._tail == _END:
            self._done.set_result(None)
        elif len(self._pieces) == 1 and not data.startswith(b"HTTP/1.1 200"):
            self._done.set_exception(RuntimeError(f"refused: {data[:2000]!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(f"the connection ended within an answer: {exc}"))


def request(url: str, adapter: Adapter, prompt: Sequence[int], tokens: int) -> bytes:
    """A streamed completion of exactly so many tokens."""
    body = json.dumps(
        {
            "model": adapter.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": TEMPERATURE,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
        f"authorization: Bearer {adapter.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def ask_all(
    connections: list[Connection], requests: list[bytes], tokens: int
) -> list[Answer]:
    """All at once, each on its connection."""
    pairs = zip(connections, requests, strict=False)
    return list(await asyncio.gather(*(c.ask(request, tokens) for c, request in pairs)))


def _take_apart(sent: float, pieces: list[tuple[float, bytes]], tokens: int) -> Answer:
    """Raises RuntimeError unless it is a whole answer of so many tokens."""
    raw = b"".join(data for _, data in pieces)
    body = _dechunk(raw.partition(b"\r\n\r\n")[2])
    events = [e.removeprefix(b"data: ") for e in body.split(b"\n\n") if e.startswith(b"data: ")]
    whole = len(events) > 2 and events[-1] == b"[DONE]"
    parsed: list[dict[str, Any]] = [json.loads(e) for e in events[:-1]] if whole else []
    usage = parsed[-1].get("usage") if parsed else None
    if not usage or usage["completion_tokens"] != tokens:
        raise RuntimeError(
            f"an answer of {tokens} tokens was asked for, the stream ended with {body[-300:]!r}"
        )
    *texts, _ = parsed
    if texts[-1]["choices"][0]["finish_reason"] != "length" or len(texts) > tokens:
        raise RuntimeError(f"{len(texts)} events for {tokens} tokens, the last: {texts[-1]}")
    times = _event_times(pieces)[: len(texts)]
    return Answer(sent, times, pieces[-1][0], texts[0]["loraplex"]["tier"], len(set(times)))


def _event_times(pieces: list[tuple[float, bytes]]) -> list[float]:
    """When each event began to come."""
    mark = b"data: "
    times: list[float] = []
    tail = b""
    for moment, data in pieces:
        joined = tail + data
        times += [moment] * joined.count(mark)
        tail = joined[-len(mark) + 1 :]
    return times


def _dechunk(body: bytes) -> bytes:
    parts, place = [], 0
    while True:
        line = body.index(b"\r\n", place)
        size = int(body[place:line], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[line + 2 : line + 2 + size])
        place = line + 2 + size + 2
