"""Starts what benchmarks/gateway.py measures, and counts the processor time of its processes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from idle_memory import kind_of
from loraplex.adapter_store import Catalogue, ObjectStore
from loraplex.cluster.cli_client import Client, adapter_files
from loraplex.cluster.local_run import LocalRun
from loraplex.cluster.ports import free_port
from loraplex.cluster.settings import Settings
from loraplex.cluster.up_demo import Demo
from loraplex.cluster.up_steps import Steps
from rich.console import Console


@dataclass(frozen=True)
class Service:
    """What runs, and a tenant's key with an adapter of its own."""

    url: str
    key: str
    adapter: str


@contextlib.contextmanager
def service(folder: Path) -> Iterator[Service]:
    """The embedded store, Ray, the real gateway, and a group with the stand-in.

    Within it this process's standard output goes to the run's log, as that of `loraplex up`.
    """
    demo = Demo.find(None)
    settings = Settings.load(
        data_dir=folder,
        model_path=str(demo.model),
        served_model_name=demo.base_name,
        device="cpu",
        groups=1,
        port=free_port(),
    )
    with LocalRun(settings, Steps(Console(file=sys.stdout))) as run:
        run.start_store()
        run.start_ray()
        with run.steps.step("gateway, stand-in group"):
            import _gateway_deploy  # Ray is imported once its settings are made

            run.settings = run.settings.with_cluster_secret()
            _gateway_deploy.start_gateway(run)
        with run.steps.step("tenant, adapter"):
            key, adapter = _tenant(run, demo)
        yield Service(run.url, key, adapter)


class CpuClock:
    """Seconds of processor time of each kind of process below this one, since it was made."""

    def __init__(self) -> None:
        children = psutil.Process().children(recursive=True)
        self._kinds = {p.pid: kind_of(p) for p in children}
        self._before = self._read()

    def seconds(self) -> dict[str, float]:
        total = dict.fromkeys(self._kinds.values(), 0.0)
        for pid, seconds in self._read().items():
            total[self._kinds[pid]] += seconds - self._before[pid]
        return total

    def _read(self) -> dict[int, float]:
        seconds = {}
        for pid in self._kinds:
            with contextlib.suppress(OSError):  # one of Ray's spare workers has ended
                seconds[pid] = time.clock_gettime(_cpu_clock_of(pid))
        return seconds


def _cpu_clock_of(pid: int) -> int:
    """Linux's clock of a process's processor time, as clock_getcpuclockid(3) names it. /proc, and
    so psutil, has the same in ticks of 10 ms, which a round is too short for."""
    return (~pid << 3) | 2


def _tenant(run: LocalRun, demo: Demo) -> tuple[str, str]:
    """A tenant's key, and the name of the adapter that it has uploaded."""
    catalogue = Catalogue(ObjectStore(**run.settings.store_options()))
    admin_key = catalogue.ensure_admin_key()
    assert admin_key is not None  # the store is new
    adapter = demo.tenants[0].adapters[0]
    with Client(run.url, admin_key) as admin:
        tenant = admin.call("POST", "/admin/v1/tenants", json={"name": "bench"})
        path = f"/admin/v1/tenants/{tenant['id']}/keys"
        key = admin.call("POST", path, json={"label": "bench"})["key"]
    with Client(run.url, key) as client:
        client.upload(adapter.name, *adapter_files(adapter.folder))
    return key, adapter.name
