"""What an object store must be able to do, tried on one small object that is removed again."""

from __future__ import annotations

import os
import secrets
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from ...adapter_store import (
    EmbeddedS3,
    EmbeddedStoreError,
    ObjectStore,
    PreconditionFailed,
    StoreError,
)
from ..settings import Settings
from ..store_access import is_embedded
from .check import Check

# S3 refuses requests that are 15 minutes off; presigned URLs suffer before that.
_SKEW_WARN_S, _SKEW_FAIL_S = 30.0, 300.0
_REACH = (
    "check LORAPLEX_STORE_URL, LORAPLEX_STORE_ENDPOINT and the keys, and that the bucket is there"
)
_CONDITIONS = (
    "the store ignores If-Match or If-None-Match, on which tenants and names depend: AWS S3, "
    "SeaweedFS 4 and MinIO of 2024 or later know them"
)


def look_at_store(settings: Settings) -> Iterator[Check]:
    if is_embedded(settings):
        yield _embedded()
        return
    store = ObjectStore(**settings.store_options(), attempts=2)
    yield from try_store(store, lambda: datetime.now(UTC))


def _embedded() -> Check:
    try:
        return Check("store", "ok", f"embedded: {EmbeddedS3.program()}")
    except EmbeddedStoreError as error:
        return Check("store", "fail", "embedded", str(error))


def try_store(store: ObjectStore, now: Callable[[], datetime]) -> Iterator[Check]:
    """
    Args:
        now: this machine's clock.
    """
    key = f"meta/doctor-{secrets.token_hex(8)}"
    data = secrets.token_bytes(4096)
    try:
        etag = store.put(key, data)
    except StoreError as error:
        yield Check("store", "fail", str(error), _REACH)
        return
    try:
        for name, look in (
            ("store", lambda: _bytes(store, key, data)),
            ("clock", lambda: _skew((store.head(key).modified - now()).total_seconds())),
            ("conditional writes", lambda: _conditions(store, key, etag)),
            ("ranges", lambda: _ranges(store, key, data)),
            ("presigned uploads", lambda: _presigned(store, key)),
        ):
            try:
                yield look()
            except StoreError as error:
                yield Check(name, "fail", str(error), "check the bucket's policy for these keys")
    finally:
        store.delete(key)


def _bytes(store: ObjectStore, key: str, data: bytes) -> Check:
    if store.get(key)[0] == data:
        return Check("store", "ok", f"{store.url}: written and read")
    return Check("store", "fail", f"{store.url} gives back other bytes", "don't use it")


def _skew(seconds: float) -> Check:
    detail = f"the store's is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}"
    advice = "set this machine's clock (chrony, systemd-timesyncd)"
    if abs(seconds) > _SKEW_FAIL_S:
        return Check("clock", "fail", detail, advice)
    if abs(seconds) > _SKEW_WARN_S:
        return Check("clock", "warn", detail, advice)
    return Check("clock", "ok", detail)


def _conditions(store: ObjectStore, key: str, etag: str) -> Check:
    for what, write in (
        ("If-None-Match: *", lambda: store.put(key, b"x", if_none_match=True)),
        ("If-Match with an old ETag", lambda: store.put(key, b"x", if_match=f'"{"0" * 32}"')),
    ):
        try:
            write()
        except PreconditionFailed:
            continue
        return Check("conditional writes", "fail", f"{what} wrote all the same", _CONDITIONS)
    try:
        store.put(key, store.get(key)[0], if_match=etag)
    except PreconditionFailed:
        detail = "If-Match with the right ETag was refused"
        return Check("conditional writes", "fail", detail, _CONDITIONS)
    return Check("conditional writes", "ok", "If-Match and If-None-Match hold")


def _ranges(store: ObjectStore, key: str, data: bytes) -> Check:
    start, length = 1000, 500
    etag = store.put(key, data)
    with tempfile.TemporaryFile() as file:
        store.read_range(key, etag, start, length, file.fileno())
        right = os.pread(file.fileno(), length, start) == data[start : start + length]
    if right:
        return Check("ranges", "ok", "a part of an object is read alone")
    return Check("ranges", "fail", "a range came with other bytes", "use a store that knows Range")


def _presigned(store: ObjectStore, key: str) -> Check:
    url = store.presign_put(key, 100, 60)
    request = urllib.request.Request(url, b"presigned", store.put_headers, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=20):
            pass
        right = store.get(key)[0] == b"presigned"
    except OSError as error:
        advice = "uploads of more than 60 MB need it: check the bucket's policy and endpoint"
        return Check("presigned uploads", "fail", str(error), advice)
    if right:
        return Check("presigned uploads", "ok", "a PUT by URL arrives")
    return Check("presigned uploads", "fail", "a PUT by URL wrote other bytes", "don't use it")
