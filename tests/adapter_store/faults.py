"""Stores that fail in the ways that networks do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from loraplex.adapter_store import ObjectStore, StoreUnavailable


class FaultyStore:
    """Passes everything to a real store, with a fault where a test asks for one.

    Attributes:
        lose_responses: this many of the next writes happen, but their response gets lost.
        before_put: called with the key before each write.
        damage: called with each part of a pack that was read: its key, place and bytes.
        fail: `fail(action, key)` tells whether the store is unreachable for this call.
        downloads: keys that were downloaded, a pack at its first part.
        parts: key, start and length of each part that was read.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.lose_responses = 0
        self.before_put: Callable[[str], None] = lambda key: None
        self.damage: Callable[[str, int, memoryview], None] = lambda key, start, view: None
        self.fail: Callable[[str, str], bool] = lambda action, key: False
        self.download_delay_s = 0.0
        self.downloads: list[str] = []
        self.parts: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def get(self, key: str):
        self._check("get", key)
        return self._store.get(key)

    def put(self, key: str, data: bytes, **conditions) -> str:
        self._check("put", key)
        self.before_put(key)
        etag = self._store.put(key, data, **conditions)
        with self._lock:
            lost = self.lose_responses > 0
            self.lose_responses -= lost
        if lost:
            raise StoreUnavailable(f"the response to the write of {key} got lost")
        return etag

    def list(self, prefix: str):
        self._check("list", prefix)
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        self._check("delete", key)
        self._store.delete(key)

    def delete_all(self, keys) -> None:
        for key in keys:
            self.delete(key)

    def upload(self, path: Path, key: str) -> None:
        self._check("upload", key)
        self._store.upload(path, key)

    def download(self, key: str, path: Path) -> int:
        self._check("download", key)
        self.downloads.append(key)
        time.sleep(self.download_delay_s)
        return self._store.download(key, path)

    def read_into(self, key: str, etag: str, start: int, view: memoryview) -> None:
        self._check("download", key)
        with self._lock:
            self.parts.append((key, start, len(view)))
            if start == 0:
                self.downloads.append(key)
        time.sleep(self.download_delay_s)
        self._store.read_into(key, etag, start, view)
        self.damage(key, start, view)

    def _check(self, action: str, key: str) -> None:
        if self.fail(action, key):
            raise StoreUnavailable(f"cannot {action} {key}: the store can't be reached")
