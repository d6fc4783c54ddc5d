"""A client that costs next to nothing: the load of benchmarks/simulator_live.py runs beside the
service on its two cores."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

_REPORT_S = 0.5  # between two reports of a group


@dataclass(frozen=True)
class Adapter:
    """`key`: as the controller names it. `auth`: its tenant's."""

    key: str
    model: str
    auth: str


@dataclass(frozen=True)
class Answer:
    """Times are of `time.perf_counter`; `tier`: where the adapter came from."""

    sent: float
    ttft_s: float
    tier: str


class Client:
    """
    Args:
        facts: of the service's demo.json.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        parts = urlsplit(facts["url"])
        self._host, self._port = parts.hostname, parts.port
        self.admin = httpx.Client(
            base_url=facts["url"],
            headers={"authorization": f"Bearer {facts['admin_key']}"},
            timeout=60.0,
            trust_env=False,
        )

    @contextmanager
    def published(
        self, name: str, folders: dict[str, Path], tenants: int
    ) -> Iterator[list[Adapter]]:
        """So many new tenants with each of these adapters; all are deleted at the end."""
        made: list[str] = []
        try:
            yield [
                adapter
                for i in range(tenants)
                for adapter in self._tenant(f"{name}-{i}", folders, made)
            ]
        finally:
            for tenant in made:
                self.admin.delete(f"/admin/v1/tenants/{tenant}").raise_for_status()
            time.sleep(2 * _REPORT_S)  # until the groups have dropped them

    def _tenant(self, name: str, folders: dict[str, Path], made: list[str]) -> list[Adapter]:
        body = {"name": name}
        id_ = self.admin.post("/admin/v1/tenants", json=body).raise_for_status().json()["id"]
        made.append(id_)
        path = f"/admin/v1/tenants/{id_}/keys"
        auth = f"Bearer {self.admin.post(path, json={}).raise_for_status().json()['key']}"
        adapters = []
        for name, folder in folders.items():
            files = {
                part: (folder / file).read_bytes()
                for part, file in (
                    ("config", "adapter_config.json"),
                    ("weights", "adapter_model.safetensors"),
                )
            }
            version = self.admin.post(
                "/v1/adapters", headers={"authorization": auth}, data={"name": name}, files=files
            )
            digest = version.raise_for_status().json()["digest"]
            adapters.append(Adapter(f"{id_}/{digest}", name, auth))
        return adapters

    async def ask(self, adapter: Adapter, prompt: Sequence[int], tokens: int) -> Answer:
        """One streamed completion of exactly so many tokens, read to its end."""
        body = json.dumps(
            {
                "model": adapter.model,
                "prompt": list(prompt),
                "max_tokens": tokens,
                "min_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"authorization: {adapter.auth}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        sent = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(head.encode() + body)
        seen, first = b"", 0.0
        try:
            while piece := await reader.read(1 << 16):
                if not first:
                    seen += piece
                    if b'data: {"' in seen and b"\n\n" in seen.partition(b'data: {"')[2]:
                        first = time.perf_counter()
        finally:
            writer.close()
        if not first:
            raise RuntimeError(f"{adapter.model}: no token came: {seen[:300]!r}")
        event = json.loads(seen.partition(b"data: ")[2].partition(b"\n\n")[0])
        return Answer(sent, first - sent, event["loraplex"]["tier"])

    def placement(self) -> dict[str, Any]:
        """The controller's status."""
        return self.admin.get("/admin/v1/placement").raise_for_status().json()

    def counters(self) -> dict[str, dict[str, float]]:
        """Steps, their seconds and tokens of every group that has done all it was asked for."""
        time.sleep(2 * _REPORT_S)
        # Never on the tenants' port.
        url = f"http://{self._host}:{self.placement()['metrics_port']}/metrics"
        text = httpx.get(url, trust_env=False).raise_for_status().text
        names = {
            "loraplex_engine_steps_total": "steps",
            "loraplex_engine_step_seconds_total": "seconds",
            "loraplex_engine_output_tokens_total": "output",
        }
        found: dict[str, dict[str, float]] = {}
        for line in text.splitlines():
            name, _, rest = line.partition("{")
            if name in names:
                labels, _, value = rest.rpartition("} ")
                group = labels.partition('group="')[2].partition('"')[0]
                counts = found.setdefault(group, dict.fromkeys(names.values(), 0.0))
                counts[names[name]] += float(value.split()[0])
        return found
