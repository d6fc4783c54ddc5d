"""Brings packs to this node in background threads, so that no step waits for S3."""

from __future__ import annotations

import heapq
import itertools
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
_MOST_TENANTS = 1000  # whose turns are remembered; those that are forgotten had theirs long ago


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

    @property
    def host_bytes(self) -> int:
        """Size of this node's memory for packs; 0: there is none."""
        ...

    def keep_packs(self, keys: Iterable[str]) -> None:
        """Evicts others before the packs of these adapters, and no longer those of before."""
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


class Turns:
    """Whose adapter comes next: that of the tenant whose last turn was longest ago."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # by tenant, the longest ago first
        self._turns = itertools.count(1)

    def order(self, refs: Iterable[AdapterRef]) -> list[AdapterRef]:
        """The same, the next one first; of one tenant as they come."""
        return sorted(refs, key=lambda ref: self._last.get(ref.tenant_id, 0))

    def take(self, tenant_id: str) -> None:
        """It is this tenant's turn now."""
        self._last.pop(tenant_id, None)
        self._last[tenant_id] = next(self._turns)
        if len(self._last) > _MOST_TENANTS:
            del self._last[next(iter(self._last))]


class PackFetcher:
    """One fetch per adapter at a time, tenants in turn: who asks for a thousand adapters at once
    keeps nobody waiting for all of them. `poll` never blocks."""

    def __init__(self, source: PackSource, threads: int):
        self._source = source
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pack-fetch")
        self._futures: dict[str, Future[Fetched]] = {}
        self._given_up: dict[str, threading.Event] = {}  # of the fetches under way
        self._lock = threading.Lock()  # of what the threads share
        self._queue: dict[str, AdapterRef] = {}  # not begun, by key, oldest first
        self._turns = Turns()

    def start(self, ref: AdapterRef) -> None:
        """Starts a fetch for a new request, unless one runs already or has brought the pack.

        One that failed before, for a request that has gone meanwhile, says nothing of this one.
        """
        future = self._futures.get(ref.key)
        if future is None or (future.done() and future.exception() is not None):
            self._given_up[ref.key] = threading.Event()
            with self._lock:
                self._futures[ref.key] = Future()
                self._queue[ref.key] = ref
            self._pool.submit(self._fetch_next)

    def _fetch_next(self) -> None:
        with self._lock:
            if not self._queue:
                return  # given up
            ref = self._turns.order(self._queue.values())[0]
            self._turns.take(ref.tenant_id)
            del self._queue[ref.key]
            future, gone = self._futures[ref.key], self._given_up[ref.key]
        try:
            future.set_result(self._fetch(ref, lambda: not gone.is_set()))
        except BaseException as error:
            future.set_exception(error)

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
        """Nobody here waits for the pack any more: a fetch under way may end, and what one has
        brought is forgotten."""
        with self._lock:
            self._queue.pop(key, None)
        if self._futures.pop(key, None) is not None:
            self._given_up.pop(key).set()

    @property
    def loading(self) -> list[str]:
        return [k for k, f in self._futures.items() if not f.done()]

    def close(self) -> None:
        for gone in self._given_up.values():
            gone.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Closer:
    """Closes pins when their time has come. Its thread lives while there are any."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, tuple[PackPin, ...]]] = []  # a heap
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, pins: Iterable[PackPin], seconds: float) -> None:
        with self._changed:
            heapq.heappush(
                self._due, (time.monotonic() + seconds, next(self._numbers), tuple(pins))
            )
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pack-unpin", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        with self._changed:
            while self._due:
                left = self._due[0][0] - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                for pin in heapq.heappop(self._due)[2]:
                    pin.close()
            self._thread = None


_closer = _Closer()


def close_later(pins: Iterable[PackPin], seconds: float) -> None:
    """Closes pins in the background."""
    _closer.add(pins, seconds)
