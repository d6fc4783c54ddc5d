"""Packs opened and laid out beside the engine: a large one's header takes tens of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ...adapter_store import Pack
from .packs import Fetched
from .pool_account import Layouts


@dataclass(frozen=True)
class OpenedPack:
    """A pack on this node that may be loaded, and where its blocks would lie."""

    path: Path
    tier: str  # that it came from
    fetch_s: float
    pack: Pack
    layouts: Layouts


class PackOpener:
    """One opening per key at a time."""

    def __init__(self, examine: Callable[[str, Fetched], OpenedPack], threads: int = 2):
        """
        Args:
            examine: opens a key's pack. Raises what is wrong with it.
        """
        self._examine = examine
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pack-open")
        self._futures: dict[str, Future[OpenedPack]] = {}

    def start(self, key: str, fetched: Fetched) -> None:
        self._futures[key] = self._threads.submit(self._examine, key, fetched)

    def has(self, key: str) -> bool:
        return key in self._futures

    def poll(self, key: str) -> OpenedPack | None:
        """The opened pack, again and again; None while it is opened.

        Raises:
            What is wrong with it. It is forgotten then.
        """
        future = self._futures[key]
        if not future.done():
            return None
        if future.exception() is not None:
            del self._futures[key]
        return future.result()

    def forget(self, key: str) -> None:
        self._futures.pop(key, None)

    @property
    def opening(self) -> list[str]:
        return [key for key, future in self._futures.items() if not future.done()]

    def rest(self, seconds: float) -> None:
        """Waits until one is opened, or for so long."""
        pending = [future for future in self._futures.values() if not future.done()]
        wait(pending, seconds, FIRST_COMPLETED)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
