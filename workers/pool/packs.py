"""Brings packs to this node in background threads, so that no step waits for S3."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, Protocol

from ...adapter_store import PackPin
from ..request import AdapterRef

# How long a pack stays on the disk after the step message that names it went out: the other ranks
# open it as they come to that message, and don't say when. For one that took longer it might be
# gone; that rank would fail, and its group start anew.
HANDOVER_S = 5.0


class PackSource(Protocol):
    """Where packs come from: `loraplex.adapter_store.HostTier` or `DiskTier` in a cluster."""

    def ensure(self, tenant_id: str, digest: str, wanted: Callable[[], bool]) -> tuple[Path, str]:
        """What opens the verified pack on this node, and the tier it came from ("host", "disk" or
        "s3").

        Blocks; may be called from several threads. It may end with an error when `wanted`, asked
        now and then, says no.
        """
        ...

    def resident(self) -> dict[str, int]:
        """Bytes of every pack on this node's disk, by adapter key."""
        ...

    def host_resident(self) -> dict[str, int]:
        """Bytes of every pack in this node's memory, by adapter key."""
        ...

    def remove(self, key: str) -> None:
        """Drops a pack from this node, if not now, then when asked again; one that isn't there is
        no error."""
        ...


class Fetched(NamedTuple):
    """A pack that is on this node now, the tier that it came from, and how long that took."""

    path: Path
    tier: str
    seconds: float


class PackFetcher:
    """One fetch per adapter at a time; `poll` never blocks."""

    def __init__(self, source: PackSource, threads: int):
        self._source = source
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pack-fetch")
        self._futures: dict[str, Future[Fetched]] = {}
        self._given_up: dict[str, threading.Event] = {}  # of the fetches under way

    def start(self, ref: AdapterRef) -> None:
        """Starts a fetch for a new request, unless one runs already or has brought the pack.

        One that failed before, for a request that has gone meanwhile, says nothing of this one.
        """
        future = self._futures.get(ref.key)
        if future is None or (future.done() and future.exception() is not None):
            gone = self._given_up[ref.key] = threading.Event()
            self._futures[ref.key] = self._pool.submit(self._fetch, ref, lambda: not gone.is_set())

    def _fetch(self, ref: AdapterRef, wanted: Callable[[], bool]) -> Fetched:
        started = time.perf_counter()
        path, tier = self._source.ensure(ref.tenant_id, ref.digest, wanted)
        return Fetched(path, tier, time.perf_counter() - started)

    def poll(self, ref: AdapterRef) -> Fetched | None:
        """What came when the pack is there, None while it comes.

        Raises:
            Whatever `ensure` raised. Either way the fetch is forgotten.
        """
        if ref.key not in self._futures:
            self.start(ref)
        future = self._futures[ref.key]
        if not future.done():
            return None
        del self._futures[ref.key], self._given_up[ref.key]
        return future.result()

    def rest(self, seconds: float) -> None:
        """Waits until a fetch has ended, or for so long."""
        wait([f for f in self._futures.values() if not f.done()], seconds, FIRST_COMPLETED)

    def failed(self, ref: AdapterRef) -> bool:
        """Whether `poll` would raise."""
        future = self._futures.get(ref.key)
        return future is not None and future.done() and future.exception() is not None

    def give_up(self, key: str) -> None:
        """Nobody here waits for the pack any more: a fetch under way may end."""
        future = self._futures.get(key)
        if future is not None and not future.done():
            future.cancel()
            self._given_up.pop(key).set()
            del self._futures[key]

    @property
    def loading(self) -> list[str]:
        return [k for k, f in self._futures.items() if not f.done()]

    def close(self) -> None:
        for gone in self._given_up.values():
            gone.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def close_later(pins: Iterable[PackPin], seconds: float) -> None:
    """Closes pins in the background."""

    def close() -> None:
        for pin in pins:
            pin.close()

    timer = threading.Timer(seconds, close)
    timer.daemon = True
    timer.start()
