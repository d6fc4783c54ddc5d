"""A real Prometheus for tests, where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraplex.cluster.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy" / "prometheus"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_READY_S = 30.0


def program(name: str) -> str:
    """Path of "prometheus" or "promtool"; skips the test where there is none."""
    bin_folder = _CACHE / "loraplex/prometheus/usr/bin"
    found = shutil.which(name) or shutil.which(name, path=str(bin_folder))
    if found is None:
        pytest.skip(f"{name} is neither in PATH nor in {bin_folder}: {DEPLOY}/install.sh gets it")
    return found


class Prometheus:
    """A running server's HTTP API."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str, **params: Any) -> Any:
        """The `data` of an answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, trust_env=False, timeout=10)
        body = answer.json()
        assert body["status"] == "success", f"{path} {params}: {body}"
        return body["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of what an expression gives now."""
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def healthy(self) -> list[dict[str, Any]]:
        """Targets whose last scrape went well."""
        return [t for t in self.get("targets")["activeTargets"] if t["health"] == "up"]


@contextmanager
def running(folder: Path, metrics_port: int, scrape_s: float = 1.0) -> Iterator[Prometheus]:
    """The committed configuration, on a Loraplex whose admin side has this metrics port."""
    binary = program("prometheus")
    config = (DEPLOY / "prometheus.yml").read_text()
    assert ":9464/" in config
    config = config.replace(":9464/", f":{metrics_port}/").replace("10s", "1s")
    config = config.replace("interval: 5s", f"interval: {scrape_s:g}s")
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "rules.yml", folder)
    url = f"127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--web.listen-address={url}"]
    command += [f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: _ready(url, process, folder / "prometheus.log"), "Prometheus")
        yield Prometheus(f"http://{url}")
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = _READY_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout_s:g} s")
        time.sleep(0.2)


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"http://{url}/-/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
