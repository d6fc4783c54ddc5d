"""Memory, disk, shared memory, limits and ports of this machine."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from .. import up_checks
from ..local_ray import OBJECT_STORE_BYTES
from ..settings import Settings
from .check import Check

SHM = Path("/dev/shm")
# Each rank of a group wider than one shares buffers with the others; NCCL takes some 10 MB a pair.
_SHM_RANK_BYTES = 64 << 20
# Sockets of gateways, ranks and clients, and Ray's own. Ray's documents ask for 65,536.
_FILES_LEAST, _FILES_ENOUGH = 4096, 65_536


def look_at_machine(settings: Settings) -> Iterator[Check]:
    yield _memory(settings)
    yield _disk(settings)
    yield shm(SHM, settings)
    yield memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], settings)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield port(settings.host, settings.port, "port")
    if settings.metrics_port:
        yield port(settings.metrics_host, settings.metrics_port, "metrics port")


def _memory(settings: Settings) -> Check:
    free = up_checks.available_memory()
    detail = f"{_gb(free)} of {_gb(psutil.virtual_memory().total)} are free"
    path = settings.model_path
    weights = up_checks.model_bytes(Path(path)) if path and Path(path).is_dir() else 0
    try:
        up_checks.check_memory(settings, weights)
    except up_checks.CheckError as error:
        return Check("memory", "fail", detail, str(error))
    return Check("memory", "ok", detail)


def _disk(settings: Settings) -> Check:
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{_gb(free)} free for {settings.data_dir}"
    if not os.access(folder, os.W_OK):
        advice = "choose a folder that you may write, with --data-dir or LORAPLEX_DATA_DIR"
        return Check("disk", "fail", f"{folder} can't be written", advice)
    if free < up_checks.DISK_BYTES:
        advice = f"free at least {_gb(up_checks.DISK_BYTES)}, or choose another --data-dir"
        return Check("disk", "fail", detail, advice)
    if free < settings.disk_cache_bytes:
        cache = _gb(settings.disk_cache_bytes)
        advice = f"packs may take {cache}: lower LORAPLEX_DISK_CACHE_BYTES, or free disk space"
        return Check("disk", "warn", detail, advice)
    return Check("disk", "ok", detail)


def shm(folder: Path, settings: Settings) -> Check:
    """Shared memory: Ray's objects and the ranks' buffers."""
    if not folder.is_dir():
        return Check("shared memory", "fail", f"there is no {folder}", f"mount a tmpfs at {folder}")
    size = shutil.disk_usage(folder).total
    ranks = settings.groups * settings.tp if settings.tp > 1 else 0
    need = OBJECT_STORE_BYTES + ranks * _SHM_RANK_BYTES
    detail = f"{folder} has {size >> 20} MiB"
    if size < need:
        advice = (
            f"at least {(need >> 20) + 1} MiB are needed: docker run --shm-size=1g, compose's "
            "shm_size, or on Kubernetes an emptyDir of medium Memory at /dev/shm"
        )
        return Check("shared memory", "fail", detail, advice)
    return Check("shared memory", "ok", detail)


def memlock(limit: int, settings: Settings) -> Check:
    """How many bytes may be pinned: adapters on their way to a GPU lie in pinned memory."""
    if limit == resource.RLIM_INFINITY:
        return Check("memlock", "ok", "unlimited")
    detail = f"limited to {limit >> 10} KiB"
    if settings.device == "cpu" or not up_checks.gpu_count():
        return Check("memlock", "ok", f"{detail}; nothing is pinned without a GPU")
    advice = (
        "lift it where a driver or fabric counts pinned memory against it: docker run --ulimit "
        "memlock=-1, LimitMEMLOCK=infinity in systemd, the container runtime's own on Kubernetes"
    )
    return Check("memlock", "warn", detail, advice)


def open_files(limit: int) -> Check:
    if limit == resource.RLIM_INFINITY or limit >= _FILES_ENOUGH:
        return Check("open files", "ok", f"up to {limit} may be open")
    advice = f"raise the hard limit (ulimit -Hn) to {_FILES_ENOUGH}: each stream takes some"
    verdict = "fail" if limit < _FILES_LEAST else "warn"
    return Check("open files", verdict, f"at most {limit} may be open", advice)


def port(host: str, number: int, name: str) -> Check:
    try:
        up_checks.check_port(host, number)
    except up_checks.CheckError as error:
        if _is_loraplex(host, number):
            return Check(name, "ok", f"a Loraplex answers at {host}:{number}")
        return Check(name, "fail", f"{host}:{number} can't be had", str(error))
    return Check(name, "ok", f"{host}:{number} is free" if number else "any free one")


def _is_loraplex(host: str, number: int) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        url = f"http://{f'[{host}]' if ':' in host else host}:{number}/health"
        answer = httpx.get(url, timeout=2.0, trust_env=False)
        return answer.status_code == 200 and answer.json() == {"status": "ok"}
    except (httpx.HTTPError, ValueError):
        return False


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
