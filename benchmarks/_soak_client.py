"""A client that counts all that it does, for benchmarks/soak.py."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from _soak_ledger import Ledger
from _sse import chunks

TIMEOUT_S = 120.0
OPENINGS = ("The day was", "In the beginning", "Tell me", "A ship", "My son,", "Once")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED = (429, 503)


class Refused(Exception):
    """The service asks to come again in `after_s` seconds."""

    def __init__(self, status: int, code: str, after_s: float) -> None:
        super().__init__(f"{status} {code}, again in {after_s:g} s")
        self.code = code
        self.after_s = after_s


@dataclass(frozen=True)
class Asker:
    """Who asks which model; `adapter` is "base" for the base model."""

    tenant: str
    key: str
    model: str
    adapter: str
    per_minute: int | None = None  # requests, the tenant's limit


class Client:
    """Sends requests; every answer goes into the ledger, whatever it is."""

    def __init__(self, url: str, connections: int) -> None:
        self.ledger = Ledger()
        self.errors: list[str] = []
        self.refusals: dict[str, int] = {}  # by code
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=TIMEOUT_S, trust_env=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def call(
        self, method: str, path: str, key: str, route: str | None = None, **options: Any
    ) -> httpx.Response:
        """One request; `route` is the template of its path."""
        headers = {"authorization": f"Bearer {key}"}
        response = await self._http.request(method, path, headers=headers, **options)
        self.ledger.requests[route or path, str(response.status_code)] += 1
        return response

    async def text(self, asker: Asker, prompt: str, max_tokens: int) -> str | None:
        """A greedy answer, whole; None: 404, there is no such model. Raises Refused, ValueError."""
        body = {"model": asker.model, "prompt": prompt, "max_tokens": max_tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        began = time.monotonic()
        response = await self.call("POST", TEXT, asker.key, json=body)
        if response.status_code == 404:
            return None
        if response.is_error:
            raise self._error(asker, response)
        self._first(asker, time.monotonic() - began)
        self.ledger.answered(asker.tenant, asker.adapter, response.json()["usage"])
        return response.json()["choices"][0]["text"]

    async def stream(self, asker: Asker, route: str, body: dict[str, Any]) -> None:
        """One stream to its end. Raises Refused, ValueError, httpx.HTTPError."""
        headers = {"authorization": f"Bearer {asker.key}"}
        body |= {"model": asker.model, "stream": True, "stream_options": {"include_usage": True}}
        began = time.monotonic()
        first, usage, reason = None, None, None
        async with self._http.stream("POST", route, headers=headers, json=body) as response:
            self.ledger.requests[route, str(response.status_code)] += 1
            if response.is_error:
                await response.aread()
                raise self._error(asker, response)
            async for chunk in chunks(response):
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    said = choice.get("text") or choice.get("delta", {}).get("content")
                    if first is None and said:
                        first = time.monotonic() - began
                usage = chunk.get("usage") or usage
        if usage is None or first is None:
            raise ValueError(f"a stream of {asker.model} without text or without its usage")
        self._first(asker, first)
        self.ledger.answered(asker.tenant, asker.adapter, usage)
        if (reason, usage["completion_tokens"]) != ("length", body["max_tokens"]):
            raise ValueError(f"{asker.model}: {reason}, {usage} instead of {body['max_tokens']}")

    async def stream_on(
        self, askers: Sequence[Asker], running: Callable[[], bool], rng: random.Random
    ) -> None:
        """One stream after the other, of askers at random; what is refused comes when it may."""
        while running():
            asker, prompt = rng.choice(askers), f"{rng.randrange(10**6)} {rng.choice(OPENINGS)}"
            body: dict[str, Any] = {"max_tokens": rng.randrange(8, 32), "ignore_eos": True}
            body |= {"temperature": rng.choice((0.0, 0.8)), "seed": rng.randrange(2**31)}
            try:
                if rng.random() < 0.5:
                    await self.stream(asker, TEXT, body | {"prompt": prompt})
                else:
                    messages = [{"role": "user", "content": prompt}]
                    await self.stream(asker, CHAT, body | {"messages": messages})
            except Refused as refused:
                self.refusals[refused.code] = self.refusals.get(refused.code, 0) + 1
                await asyncio.sleep(refused.after_s)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.failed(f"{asker.model}: {type(error).__name__}: {error}")
                await asyncio.sleep(1.0)  # or a service that is gone is asked without a pause

    def failed(self, what: str) -> None:
        self.errors.append(what[:400])

    def _first(self, asker: Asker, seconds: float) -> None:
        self.ledger.first_s.setdefault(asker.tenant, []).append(seconds)

    def _error(self, asker: Asker, response: httpx.Response) -> Exception:
        after = response.headers.get("retry-after")
        if response.status_code not in REFUSED or after is None:
            return ValueError(f"status {response.status_code}: {response.text[:200]}")
        code = response.json()["error"]["code"]
        if code == "rate_limit_exceeded" and asker.per_minute is not None:
            self.ledger.limited[asker.tenant, "requests"] += 1
        return Refused(response.status_code, code, float(after))
