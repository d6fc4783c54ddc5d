"""Keeps the packs that the controller wants in this node's memory, before anybody asks for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from ...adapter_store import AdapterStoreError
from ..request import AdapterRef
from .packs import PackSource

log = logging.getLogger(__name__)

_LOOK_S = 5.0  # what has left memory although it was kept is brought back that soon
_RETRY_S = 30.0  # until a pack that couldn't be brought is tried again


class HostKeeper:
    """One pack at a time, in a thread of its own: requests' fetches come first.

    It may be told again and again; the thread lives while there is something to keep.
    """

    def __init__(self, source: PackSource, clock: Callable[[], float] = time.monotonic):
        self._source, self._clock = source, clock
        self._kept: dict[str, AdapterRef] = {}  # the most wanted first
        self._told = False  # since the packs to keep were last written down
        self._retry_at: dict[str, float] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def keep(self, refs: Iterable[AdapterRef]) -> None:
        """From now on these and no others, the most wanted first. Returns at once."""
        with self._changed:
            self._kept = {ref.key: ref for ref in refs}
            self._retry_at = {k: at for k, at in self._retry_at.items() if k in self._kept}
            self._tell()

    def forget(self, key: str) -> None:
        """The adapter was deleted."""
        with self._changed:
            if self._kept.pop(key, None) is not None:
                self._tell()

    def close(self) -> None:
        """Ends a fetch under way. What is kept stays so."""
        with self._changed:
            self._kept, self._told = {}, False
            self._changed.notify()

    def _tell(self) -> None:
        self._told = True
        self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="host-keeper", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                told, self._told = self._told, False
                kept = dict(self._kept)
                if not (told or kept):
                    self._thread = None
                    return
            try:
                if told:
                    self._source.keep_packs(kept)
                self._bring_missing(kept)
            except Exception as error:  # or nothing would ever be kept again
                log.warning("packs can't be kept in this node's memory: %r", error)
            with self._changed:
                self._changed.wait_for(lambda: self._told or not self._kept, _LOOK_S)

    def _bring_missing(self, kept: dict[str, AdapterRef]) -> None:
        """Ends early when there is other advice."""
        here = self._source.host_resident()
        for key, ref in kept.items():
            if self._told or key not in self._kept:
                return
            if key in here or self._clock() < self._retry_at.get(key, 0.0):
                continue
            try:
                self._source.ensure(ref.tenant_id, ref.digest, lambda key=key: key in self._kept)
            except (AdapterStoreError, OSError) as error:
                # Who asks for it is told the reason; here it is one of many.
                log.info("pack %s can't be brought to memory: %s", key, error)
            # Also when it came: memory may have had no room for it.
            self._retry_at[key] = self._clock() + _RETRY_S
