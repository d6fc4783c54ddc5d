"""Brings packs to this node's disk in background threads, so that no step waits for S3."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ...adapter_store import PackPin
from ..request import AdapterRef

# How long a pack stays on the disk after the step message that names it went out: the other ranks
# open it as they come to that message, and don't say when. For one that took longer it might be
# gone; that rank would fail, and its group start anew.
HANDOVER_S = 5.0


class PackSource(Protocol):
    """Where packs come from: `loraplex.adapter_store.DiskTier` in a cluster."""

    def ensure(self, tenant_id: str, digest: str) -> tuple[Path, str]:
        """Path of the verified pack on this node, and the tier it came from ("disk" or "s3").

        Blocks; may be called from several threads.
        """
        ...

    def resident(self) -> dict[str, int]:
        """Bytes of every pack on this node's disk, by adapter key."""
        ...

    def remove(self, key: str) -> None:
        """Drops a pack from the disk, if not now, then when asked again; one that isn't there is
        no error."""
        ...


class PackFetcher:
    """One fetch per adapter at a time; `poll` never blocks."""

    def __init__(self, source: PackSource, threads: int):
        self._source = source
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pack-fetch")
        self._futures: dict[str, Future[tuple[Path, str]]] = {}
        self.seconds: dict[str, float] = {}  # key -> what its last fetch took; for reports

    def start(self, ref: AdapterRef) -> None:
        """Starts a fetch for a new request, unless one runs already or has brought the pack.

        One that failed before, for a request that has gone meanwhile, says nothing of this one.
        """
        future = self._futures.get(ref.key)
        if future is None or (future.done() and future.exception() is not None):
            self._futures[ref.key] = self._pool.submit(self._fetch, ref)

    def _fetch(self, ref: AdapterRef) -> tuple[Path, str]:
        started = time.perf_counter()
        found = self._source.ensure(ref.tenant_id, ref.digest)
        self.seconds[ref.key] = time.perf_counter() - started
        return found

    def poll(self, ref: AdapterRef) -> tuple[Path, str] | None:
        """(path, tier) when the pack is there, None while it comes.

        Raises:
            Whatever `ensure` raised. Either way the fetch is forgotten.
        """
        if ref.key not in self._futures:
            self.start(ref)
        future = self._futures[ref.key]
        if not future.done():
            return None
        del self._futures[ref.key]
        return future.result()

    @property
    def loading(self) -> list[str]:
        return [k for k, f in self._futures.items() if not f.done()]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def close_later(pins: Iterable[PackPin], seconds: float) -> None:
    """Closes pins in the background."""

    def close() -> None:
        for pin in pins:
            pin.close()

    timer = threading.Timer(seconds, close)
    timer.daemon = True
    timer.start()
