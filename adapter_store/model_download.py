"""Models from S3 on this node's disk: fetched once, whole, by parallel ranges.

    <cache>/<name>-<hash of the URL>/<version>/          the model's folder, complete
    <cache>/<name>-<hash of the URL>/<version>.partial/  one that is being fetched

A version is a hash of the files' names, sizes and ETags, so a folder never changes once it has its
name, and what a broken-off download has left is of the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .disk_errors import disk_errors
from .errors import BaseModelError, LocalDiskError, PreconditionFailed, StoreUnavailable
from .object_store import ObjectInfo, ObjectStore

RANGE_BYTES = 16 << 20  # fetched by one request
THREADS = 16  # requests at a time; one gets 50 to 100 MB/s from AWS
# What a folder in Hugging Face layout is served from.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")
_PARTIAL = ".partial"
_DONE = ".ranges"
_SPARE_BYTES = 1 << 30  # left free on the disk

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def ignore(done: int, total: int) -> None:
    """The progress that nobody wants to see."""


def latest_version(url: str, cache: Path, store: Mapping[str, Any], progress: Progress) -> Path:
    """The folder of the model as it is in S3 now; what is here already, when S3 can't be reached.

    Raises:
        BaseModelError: there is no model at `url`.
        StoreError, LocalDiskError: it can't be fetched or stored.
    """
    home = _home(url, cache, store)
    remote = ObjectStore(url, **store)
    try:
        files = _files(remote)
    except StoreUnavailable as error:
        versions = [p for p in home.glob("*") if p.is_dir() and p.suffix != _PARTIAL]
        if not versions:
            raise
        newest = max(versions, key=lambda p: p.stat().st_mtime_ns)
        log.warning("%s is served from %s, as it was fetched last: %s", url, newest, error)
        return newest
    return _ensure(home, _version(files), remote, files, progress)


def model_version(
    url: str, version: str, cache: Path, store: Mapping[str, Any], progress: Progress
) -> Path:
    """The folder of one version. S3 isn't asked when it is here.

    Raises:
        BaseModelError: S3 holds another one by now.
        StoreError, LocalDiskError: it can't be fetched or stored.
    """
    home = _home(url, cache, store)
    if (home / version).is_dir():
        return home / version
    remote = ObjectStore(url, **store)
    files = _files(remote)
    if _version(files) != version:
        raise BaseModelError(
            f"the model at {url} has changed since the service was started: restart the service, "
            "or put the model's old files back"
        )
    return _ensure(home, version, remote, files, progress)


def _home(url: str, cache: Path, store: Mapping[str, Any]) -> Path:
    where = f"{store.get('endpoint')} {url.rstrip('/')}"
    name = url.rstrip("/").rpartition("/")[2]
    return cache / f"{name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def _files(remote: ObjectStore) -> list[ObjectInfo]:
    files = [
        info for info in remote.list("") if "/" not in info.key and info.key.endswith(_SUFFIXES)
    ]
    names = {info.key for info in files}
    if "config.json" not in names:
        raise BaseModelError(
            f"there is no config.json at {remote.url}: give the URL of the folder that holds "
            "config.json, tokenizer.json and *.safetensors"
        )
    return sorted(files, key=lambda info: info.key)


def _version(files: list[ObjectInfo]) -> str:
    identity = json.dumps([[info.key, info.nbytes, info.etag] for info in files])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _ensure(
    home: Path, version: str, remote: ObjectStore, files: list[ObjectInfo], progress: Progress
) -> Path:
    folder, partial = home / version, home / f"{version}{_PARTIAL}"
    with disk_errors(f"keep the model in {home}"):
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / ".lock"):
            if not folder.is_dir():
                partial.mkdir(exist_ok=True)
                _fetch(partial, remote, files, progress)
                shutil.rmtree(partial / _DONE)
                os.rename(partial, folder)
    return folder


def _fetch(folder: Path, remote: ObjectStore, files: list[ObjectInfo], progress: Progress) -> None:
    """Brings every range that isn't in `folder` yet."""
    (folder / _DONE).mkdir(exist_ok=True)
    plans = [_FilePlan(folder, info) for info in files]
    total = sum(info.nbytes for info in files)
    done = sum(plan.done_bytes for plan in plans)
    free = shutil.disk_usage(folder).free
    if total - done + _SPARE_BYTES > free:
        raise LocalDiskError(
            f"the model at {remote.url} needs {(total - done) / 1e9:.1f} GB more in {folder}, "
            f"where {free / 1e9:.1f} GB are free; free some, or choose another folder"
        )
    progress(done, total)
    lock = threading.Lock()

    def bring(job: tuple[_FilePlan, int]) -> None:
        nonlocal done
        plan, number = job
        length = plan.bring(remote, number)
        with lock:
            done += length
            progress(done, total)

    jobs = [(plan, number) for plan in plans for number in plan.missing]
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="model")
    try:
        list(threads.map(bring, jobs))
        list(threads.map(_FilePlan.flush, plans))
    except PreconditionFailed:
        raise BaseModelError(
            f"the model at {remote.url} was changed while it was fetched: start again"
        ) from None
    finally:
        threads.shutdown(cancel_futures=True)
        for plan in plans:
            plan.close()


class _FilePlan:
    """One file on its way, and a journal of the ranges that are in it.

    A journal of before the machine's last start isn't believed: it may have reached the disk when
    the range had not.
    """

    def __init__(self, folder: Path, info: ObjectInfo) -> None:
        self._info = info
        self._fd = os.open(folder / info.key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        journal = folder / _DONE / info.key
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        lines = journal.read_text().splitlines() if journal.is_file() else []
        believed = lines[1:] if lines[:1] == [boot] else []
        if not believed:
            journal.write_text(boot + "\n")
        os.ftruncate(self._fd, info.nbytes)
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        count = -(-info.nbytes // RANGE_BYTES)
        here = {int(line) for line in believed}
        self.missing = [n for n in range(count) if n not in here]
        self.done_bytes = info.nbytes - sum(self._span(n)[1] for n in self.missing)

    def _span(self, number: int) -> tuple[int, int]:
        start = number * RANGE_BYTES
        return start, min(RANGE_BYTES, self._info.nbytes - start)

    def bring(self, remote: ObjectStore, number: int) -> int:
        """Fetches one range; its bytes."""
        start, length = self._span(number)
        remote.read_range(self._info.key, self._info.etag, start, length, self._fd)
        os.write(self._journal, b"%d\n" % number)
        return length

    def flush(self) -> None:
        """Until the file is on the disk: a folder that is called complete must survive a crash."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._journal)
        os.close(self._fd)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One holder on this machine; it ends with its holder's process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
