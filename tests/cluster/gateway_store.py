"""An object store in memory that can be made unreachable. The real one's conditions are its own
tests' business; here it only has to keep them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from loraplex.adapter_store import (
    LimitExceeded,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StoreUnavailable,
)


class MemoryStore:
    def __init__(self) -> None:
        self.put_headers: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.up = True
        self.reads: list[str] = []
        self._lock = threading.RLock()

    def get(self, key: str) -> tuple[bytes, str]:
        self._check()
        self.reads.append(key)
        with self._lock:
            if key not in self.objects:
                raise NotFound(key)
            return self.objects[key], _etag(self.objects[key])

    def get_if_changed(self, key: str, etag: str) -> tuple[bytes, str] | None:
        data, now = self.get(key)
        return None if now == etag else (data, now)

    def head(self, key: str) -> ObjectInfo:
        data, etag = self.get(key)
        return ObjectInfo(key, len(data), etag, datetime.now(UTC))

    def put(
        self, key: str, data: bytes, *, if_match: str | None = None, if_none_match: bool = False
    ) -> str:
        self._check()
        with self._lock:
            current = self.objects.get(key)
            if if_none_match and current is not None:
                raise PreconditionFailed(key)
            if if_match is not None and (current is None or _etag(current) != if_match):
                raise PreconditionFailed(key)
            self.objects[key] = bytes(data)
            return _etag(data)

    def delete(self, key: str) -> None:
        self._check()
        with self._lock:
            self.objects.pop(key, None)

    def delete_all(self, keys: Iterable[str]) -> None:
        for key in list(keys):
            self.delete(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._check()
        with self._lock:
            found = sorted((k, v) for k, v in self.objects.items() if k.startswith(prefix))
        for key, data in found:
            yield ObjectInfo(key, len(data), _etag(data), datetime.now(UTC))

    def list_folders(self, prefix: str) -> Iterator[str]:
        self._check()
        with self._lock:
            names = {k[len(prefix) :].split("/")[0] for k in self.objects if k.startswith(prefix)}
        yield from sorted(names)

    def presign_put(
        self, key: str, max_bytes: int, expires_s: int, *, nbytes: int | None = None
    ) -> str:
        if nbytes is not None and nbytes > max_bytes:
            raise LimitExceeded(f"{nbytes} bytes are too many", "upload_bytes")
        return f"memory://{key}"

    def _check(self) -> None:
        if not self.up:
            raise StoreUnavailable("http://store doesn't answer: is it running?")


def _etag(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()
