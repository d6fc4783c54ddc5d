"""What this node's disk and memory hold, listed beside the engine.

Thousands of packs take tens of milliseconds to list: several steps' time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from .packs import PackSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodePacks:
    """
    Attributes:
        disk, host: bytes by adapter key.
        loading: keys that were on their way when the listing began, and may have come since.
    """

    disk: dict[str, int]
    host: dict[str, int]
    loading: tuple[str, ...]


class PackLister:
    """Lists the packs again each time that it is asked, for the next who asks."""

    def __init__(self, source: PackSource):
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pack-list")
        self._held = self._list(())
        self._coming: Future[NodePacks] | None = None

    def latest(self, loading: Iterable[str]) -> NodePacks:
        """The newest listing that is there. Never blocks.

        Args:
            loading: keys that are on their way now.
        """
        if self._coming is None or self._coming.done():
            if self._coming is not None and (error := self._coming.exception()) is not None:
                log.warning("this node's packs can't be listed, those of before stand: %s", error)
            elif self._coming is not None:
                self._held = self._coming.result()
            self._coming = self._thread.submit(self._list, tuple(loading))
        return self._held

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _list(self, loading: tuple[str, ...]) -> NodePacks:
        return NodePacks(self._source.resident(), self._source.host_resident(), loading)
