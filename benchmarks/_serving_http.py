"""`loraplex up` over HTTP, for benchmarks/serving.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from _serving_load import NEW_TOKENS, DemoFacts, Request, Round
from idle_memory import start, wait_ready
from tokenizers import Tokenizer

_TIMEOUT_S = 300.0
_STOP_S = 60.0


@contextmanager
def service(up_args: list[str]) -> Iterator[dict[str, Any]]:
    """A `loraplex up` on a free port and a fresh data folder; yields what demo.json says."""
    with tempfile.TemporaryDirectory() as folder:
        data, log = Path(folder) / "data", Path(folder) / "up.log"
        up = start(data, log, up_args)
        try:
            wait_ready(up, data, log)
            yield json.loads((data / "demo.json").read_text())
        finally:
            if up.poll() is None:
                os.killpg(up.pid, signal.SIGINT)
            up.wait(_STOP_S)


class HttpRounds:
    """Sends rounds to a service, each request under its tenant's key."""

    def __init__(self, demo: DemoFacts, facts: dict[str, Any]):
        self._base_name = demo.base_name
        self._url = facts["url"]
        self._keys = {name: t["key"] for t in facts["tenants"] for name in t["adapters"]}
        self._base_key = facts["tenants"][0]["key"]
        self._tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))

    def run(self, round_: Round) -> tuple[list[str], float]:
        """All requests at once. Texts by request, and seconds from the first to the last."""
        return asyncio.run(self._run(round_))

    def texts(self, answers: list[list[int]]) -> list[str]:
        """What the service must answer for these ids."""
        return [self._tokenizer.decode(ids) for ids in answers]

    async def _run(self, round_: Round) -> tuple[list[str], float]:
        limits = httpx.Limits(max_connections=len(round_.requests))
        async with httpx.AsyncClient(
            base_url=self._url, limits=limits, timeout=_TIMEOUT_S, trust_env=False
        ) as client:
            began = time.perf_counter()
            texts = await asyncio.gather(*(self._ask(client, r) for r in round_.requests))
            return list(texts), time.perf_counter() - began

    async def _ask(self, client: httpx.AsyncClient, request: Request) -> str:
        name = request.adapter
        key = self._keys[name] if name else self._base_key
        response = await client.post(
            "/v1/completions",
            headers={"authorization": f"Bearer {key}"},
            json={
                "model": name or self._base_name,
                "prompt": list(request.prompt),
                "max_tokens": NEW_TOKENS,
                "min_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            },
        )
        if response.status_code != 200:
            raise RuntimeError(f"{name}: {response.status_code} {response.text}")
        body = response.json()
        if body["usage"]["completion_tokens"] != NEW_TOKENS:
            raise RuntimeError(f"{name}: {body['usage']} instead of {NEW_TOKENS} tokens")
        return body["choices"][0]["text"]


def first_token_times(demo: DemoFacts, facts: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Uploads an adapter for a tenant made just now, `count` times, and asks it at once.

    Returns:
        Per upload: the adapter, seconds of the upload itself (until 201, servable), and seconds
        from then to the first streamed token.
    """
    names = list(demo.adapters)
    with httpx.Client(base_url=facts["url"], timeout=_TIMEOUT_S, trust_env=False) as client:
        return [_first_token(client, facts, demo, names[i % len(names)], i) for i in range(count)]


def _first_token(
    client: httpx.Client, facts: dict[str, Any], demo: DemoFacts, adapter: str, number: int
) -> dict[str, Any]:
    admin = {"authorization": f"Bearer {facts['admin_key']}"}

    def admin_call(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return client.post(path, headers=admin, json=body).raise_for_status().json()

    tenant = admin_call("/admin/v1/tenants", {"name": f"bench-{number}"})
    key = admin_call(f"/admin/v1/tenants/{tenant['id']}/keys", {"label": "bench"})["key"]
    headers = {"authorization": f"Bearer {key}"}
    files = {
        part: (demo.adapters[adapter] / file).read_bytes()
        for part, file in (
            ("config", "adapter_config.json"),
            ("weights", "adapter_model.safetensors"),
        )
    }
    name = f"fresh-{number}"
    began = time.perf_counter()
    uploaded = client.post("/v1/adapters", headers=headers, data={"name": name}, files=files)
    returned = time.perf_counter()
    if uploaded.status_code != 201:
        raise RuntimeError(f"upload of {adapter}: {uploaded.status_code} {uploaded.text}")
    body = {
        "model": name,
        "prompt": "In the beginning",
        "max_tokens": 8,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    first = None
    with client.stream("POST", "/v1/completions", headers=headers, json=body) as stream:
        # To the end: a request that goes on would disturb the next measurement.
        for line in stream.iter_lines():
            event = line.removeprefix("data: ")
            if first is None and event.startswith("{") and json.loads(event)["choices"][0]["text"]:
                first = time.perf_counter() - returned
    if first is None:
        raise RuntimeError(f"no text of {name} came: {stream.status_code}")
    return {
        "adapter": adapter,
        "upload_s": round(returned - began, 3),
        "first_token_s": round(first, 3),
    }
