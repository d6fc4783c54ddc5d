"""The service of benchmarks/serving_gpu.py: started, filled with tenants and adapters, watched."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from _serving_gpu_client import Adapter
from _serving_gpu_plan import CONFIG, WEIGHTS, Plan
from idle_memory import ROOT, kind_of
from loraplex.cluster.cli_client import Client
from loraplex.cluster.ports import free_port

_READY_S = 300.0
_STOP_S = 60.0
_POLL_S = 0.2
_PIECE_BYTES = 4 << 20
_LOG_LINES = 40


@dataclass(frozen=True)
class Service:
    url: str
    admin_key: str
    pid: int

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time of all its processes so far, by kind."""
        kinds: dict[str, float] = {}
        root = psutil.Process(self.pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                kind = kind_of(process)
            except psutil.NoSuchProcess:
                continue
            kinds[kind] = kinds.get(kind, 0.0) + times.user + times.system
        return kinds


@contextmanager
def service(plan: Plan, haproxy: bool) -> Iterator[Service]:
    """`loraplex serve` on a free port; ends with the block. What it keeps is there for the next.

    Args:
        haproxy: stands before the gateways, instead of Ray Serve's own proxy.
    """
    data, log, port = plan.folder / "data", plan.folder / "serve.log", free_port()
    command = [sys.executable, "-m", "loraplex.cluster.cli", "serve"]
    command += ["--port", str(port), "--data-dir", str(data)]
    for name, value in {**plan.all_settings(), "haproxy": str(haproxy)}.items():
        command += ["--set", f"{name}={value}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, url, log)
        yield Service(url, (data / "admin.key").read_text().strip(), process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its watchdog ends what it has started
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    # Its last words before it serves; until then /ready may be true of a part of it.
    while b"Ctrl-C stops it" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise RuntimeError(f"loraplex serve is not ready at {url}. The end of its log:\n{end}")
        time.sleep(_POLL_S)


def publish(plan: Plan, service: Service) -> list[Adapter]:
    """New tenants with all adapters, which differ in their last numbers; each tenant uploads its
    own one after another, beside the others. In order of their names."""
    weights = memoryview((plan.adapter / WEIGHTS).read_bytes())
    config = (plan.adapter / CONFIG).read_bytes()

    def tenant(number: int) -> list[tuple[int, Adapter]]:
        with Client(service.url, service.admin_key) as admin:
            made = admin.call("POST", "/admin/v1/tenants", json={"name": f"tenant-{number}"})
            key = admin.call("POST", f"/admin/v1/tenants/{made['id']}/keys", json={})["key"]
        own = []
        with Client(service.url, key) as client:
            for i in range(number, plan.adapters, plan.tenants):
                # The last two of the weights, in bfloat16: 0.0078 and a little more.
                last = (0x3C00 + i).to_bytes(2, "little") * 2
                began = time.monotonic()
                _upload(client, f"adapter-{i}", config, [weights[: -len(last)], memoryview(last)])
                print(f"  adapter-{i}: {time.monotonic() - began:.1f} s", flush=True)
                own.append((i, Adapter(f"adapter-{i}", key)))
        return own

    with ThreadPoolExecutor(plan.tenants) as pool:
        groups = list(pool.map(tenant, range(plan.tenants)))
    return [adapter for _, adapter in sorted((pair for own in groups for pair in own), key=_first)]


def _first(pair: tuple[int, Adapter]) -> int:
    return pair[0]


def _upload(client: Client, name: str, config: bytes, weights: list[memoryview]) -> None:
    """By presigned URLs, whatever its size; returns when it can be used.

    Raises:
        RuntimeError: the store or the service refused it.
    """
    body = {"name": name, "weights_bytes": sum(map(len, weights))}
    begun = client.call("POST", "/v1/adapters/uploads", json=body)
    path = f"/v1/adapters/uploads/{begun['upload_id']}"
    _put(begun["urls"]["config"], [memoryview(config)])
    _put(begun["urls"]["weights"], weights)
    client.call("POST", f"{path}/complete")
    while (record := client.call("GET", path))["status"] == "processing":
        time.sleep(_POLL_S)
    if record["status"] != "ready":
        raise RuntimeError(f"{name} wasn't published: {record}")


def _put(url: str, parts: list[memoryview]) -> None:
    target = urlsplit(url)
    assert target.hostname is not None
    pieces = (p[i : i + _PIECE_BYTES] for p in parts for i in range(0, len(p), _PIECE_BYTES))
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=300.0)
    try:
        length = {"content-length": str(sum(map(len, parts)))}
        connection.request("PUT", f"{target.path}?{target.query}", pieces, length)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"the object store refused an upload: {response.status} {text[:300]!r}")


def engine_counters(service: Service) -> dict[str, float]:
    """Of the one group: steps, seconds in them, tokens put out and kernels compiled too late."""
    time.sleep(1.0)  # groups report every 0.5 s
    with Client(service.url, service.admin_key) as admin:
        port = admin.call("GET", "/admin/v1/placement")["metrics_port"]
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    wanted = {
        "loraplex_engine_steps_total": "steps",
        "loraplex_engine_step_seconds_total": "step_s",
        "loraplex_engine_output_tokens_total": "tokens",
        "loraplex_engine_late_compiles_total": "late_compiles",
    }
    found = dict.fromkeys(wanted.values(), 0.0)
    for line in page.raise_for_status().text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in wanted:
            found[wanted[name]] += float(line.rpartition("} ")[2].split()[0])
    return found
