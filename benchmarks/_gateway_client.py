"""The one client of benchmarks/gateway.py: bare HTTP/1.1 over kept connections, for both systems.

It does as little as it can, since it shares the machine's cores with what it measures.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

_END = b"\r\n0\r\n\r\n"  # of a chunked body; JSON writes these bytes as escapes
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Target:
    """Where one system answers, and the request that it is sent.

    Args:
        body: JSON with a `%(tokens)d` and a `%(pace_us)d` in it.
    """

    host: str
    port: int
    path: str
    key: str
    body: str

    def request(self, tokens: int, pace_us: int) -> bytes:
        body = self.body % {"tokens": tokens, "pace_us": pace_us}
        return (
            f"POST {self.path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}"
        ).encode()


@dataclass(frozen=True)
class Answered:
    """One streamed answer; times in seconds after the request was sent."""

    first_s: float
    whole_s: float
    events: int
    bytes: int


async def ask(
    target: Target, at_once: int, calls: int, tokens: int, pace_us: int
) -> list[Answered]:
    """`at_once` connections, each with `calls` requests one after another.

    Raises:
        RuntimeError: an answer isn't 200, or has another number of events than tokens.
    """
    request = target.request(tokens, pace_us)

    async def connection() -> list[Answered]:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        answers = []
        for _ in range(calls):
            answer = await _answer(reader, writer, request)
            if answer.events != tokens + 1:  # the last one says [DONE]
                raise RuntimeError(
                    f"{target.path}: {answer.events - 1} events came instead of {tokens}"
                )
            answers.append(answer)
        writer.close()
        return answers

    return [
        a for some in await asyncio.gather(*(connection() for _ in range(at_once))) for a in some
    ]


async def sample(target: Target, tokens: int) -> bytes:
    """The raw body of one answer, chunk headers left in."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(target.request(tokens, 0))
    await reader.readuntil(b"\r\n\r\n")
    body = await reader.readuntil(_END)
    writer.close()
    return body


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> Answered:
    began = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError((head + await reader.read(2000)).decode(errors="replace"))
    tail, events, size = b"", 0, 0
    first_s = 0.0
    while not tail.endswith(_END):
        data = await reader.read(_READ_BYTES)
        if not data:
            raise RuntimeError("the connection was closed within an answer")
        size += len(data)
        joined = tail + data
        events += joined.count(b"data: ") - tail.count(b"data: ")
        if events and not first_s:
            first_s = time.perf_counter() - began
        tail = joined[-16:]
    return Answered(first_s, time.perf_counter() - began, events, size)
