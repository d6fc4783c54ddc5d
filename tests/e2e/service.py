"""The running demo as its tenants see it: official `openai` clients, and the REST API beside it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from loraplex.adapter_store import ObjectStore
from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.runs import DEMO, alive

BASE = "loraplex-demo"
FILES = ("adapter_config.json", "adapter_model.safetensors")
FOLDERS: dict[str, Path] = {
    adapter["name"]: DEMO / adapter["folder"]
    for tenant in json.loads((DEMO / "demo_tenants.json").read_text())["tenants"]
    for adapter in tenant["adapters"]
}


def files_of(adapter: str) -> tuple[bytes, bytes]:
    """Config and weights of one of the demo's adapters."""
    config, weights = (FOLDERS[adapter] / name for name in FILES)
    return config.read_bytes(), weights.read_bytes()


class Tenant:
    """One tenant: `openai` is the official client without retries, `http` plain HTTP."""

    def __init__(self, url: str, name: str, key: str, id_: str = "") -> None:
        self.name = name
        self.key = key
        self.id = id_
        self.openai = OpenAI(
            base_url=f"{url}/v1",
            api_key=key,
            max_retries=0,
            timeout=120,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        self.http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=120,
            trust_env=False,
        )

    def text(self, model: str, prompt: str, max_tokens: int = 24, **options: Any) -> str:
        """The greedy continuation of a text."""
        answer = self.openai.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, **options
        )
        return answer.choices[0].text

    def upload(self, name: str, config: bytes, weights: bytes) -> httpx.Response:
        return self.http.post(
            "/v1/adapters",
            data={"name": name},
            files={"config": (FILES[0], config), "weights": (FILES[1], weights)},
        )

    def publish(self, name: str, demo_adapter: str) -> dict[str, Any]:
        """Uploads a demo adapter's files under a name; the version's JSON."""
        response = self.upload(name, *files_of(demo_adapter))
        assert response.status_code == 201, response.text
        return response.json()

    def models(self) -> list[str]:
        return [model.id for model in self.openai.models.list()]

    def adapters(self) -> list[str]:
        return [a["name"] for a in self.http.get("/v1/adapters").json()["data"]]

    def close(self) -> None:
        self.openai.close()
        self.http.close()


class Service:
    """A running `loraplex up`.

    Args:
        facts: of its demo.json.
        data: its data folder.
        pid: of its process.
    """

    def __init__(self, facts: dict[str, Any], data: Path, pid: int = 0) -> None:
        self.url: str = facts["url"]
        self.admin_key: str = facts["admin_key"]
        self.tenants = {t["name"]: Tenant(self.url, t["name"], t["key"]) for t in facts["tenants"]}
        self.owners: dict[str, Tenant] = {
            adapter: self.tenants[t["name"]] for t in facts["tenants"] for adapter in t["adapters"]
        }
        self.admin = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {self.admin_key}"},
            timeout=60,
            trust_env=False,
        )
        self._data = data
        self._pid = pid

    @property
    def any_tenant(self) -> Tenant:
        return next(iter(self.tenants.values()))

    @contextmanager
    def tenant(self, **limits: int) -> Iterator[Tenant]:
        """A new tenant, deleted at the end."""
        name = f"t-{uuid.uuid4().hex[:12]}"
        made = self.admin.post("/admin/v1/tenants", json={"name": name, "limits": limits})
        assert made.status_code == 201, made.text
        path = f"/admin/v1/tenants/{made.json()['id']}"
        key = self.admin.post(f"{path}/keys", json={}).json()["key"]
        tenant = Tenant(self.url, name, key, made.json()["id"])
        try:
            yield tenant
        finally:
            tenant.close()
            assert self.admin.delete(path).status_code == 204

    def stored(self, prefix: str) -> list[str]:
        """Keys in the embedded object store, read past the service."""
        keys = json.loads((self._data / "store/keys.json").read_text())
        port = (self._data / "store/port").read_text()
        store = ObjectStore("s3://loraplex", endpoint=f"http://127.0.0.1:{port}", **keys)
        return sorted(entry.key for entry in store.list(prefix))

    def metric(self, name: str) -> dict[str, float]:
        """A metric's values by group, added up over its other labels."""
        response = httpx.get(f"http://127.0.0.1:{self.metrics_port()}/metrics", trust_env=False)
        assert response.status_code == 200, response.text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name == name:
                    group = sample.labels["group"]
                    values[group] = values.get(group, 0.0) + sample.value
        return values

    def metrics_port(self) -> int:
        """Of the controller's admin side."""
        return self.admin.get("/admin/v1/placement").json()["metrics_port"]

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of the service that live, by the beginning of their command line."""
        return [
            p
            for p in psutil.Process(self._pid).children(recursive=True)
            if alive(p) and " ".join(p.cmdline()).startswith(title)
        ]

    def placement(self) -> dict[str, Any]:
        """What the controller tells operators; {} while there is none."""
        response = self.admin.get("/admin/v1/placement")
        return response.json() if response.is_success else {}

    def serving(self) -> set[str]:
        """Names of the groups that take requests."""
        return {g["group"] for g in self.placement().get("groups", ()) if not g["draining"]}

    def close(self) -> None:
        self.admin.close()
        for tenant in self.tenants.values():
            tenant.close()
