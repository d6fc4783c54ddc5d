"""Reads streamed answers as OpenAI's clients do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream, up to its end.

    Raises:
        ValueError: the stream tells of an error, or ends before it says so.
        httpx.HTTPError: the connection broke.
    """
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if line.startswith("data: "):
            chunk = json.loads(data)
            if "error" in chunk:
                raise ValueError(f"in the stream: {chunk['error']}")
            yield chunk
    raise ValueError("the stream broke before its end")
