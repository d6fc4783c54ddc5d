"""Small JSON documents in the object store, changed by conditional writes.

Beside its model's fields a document holds `schema_version`, the `write_id` of its newest write and
`recent_writes`, those of the writes before it: a writer whose response got lost finds its own id
there and knows that it succeeded, also when others have written since.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DocumentError, NotFound, PreconditionFailed, StoreUnavailable
from .object_store import ObjectStore

SCHEMA_VERSION = 1
RECENT_WRITES = 16
# How long a writer goes on losing races: with one winner each 5 ms that is thousands of writes.
CONTENTION_S = 20.0
MAX_UNKNOWN = 2  # writes of unknown outcome in one update, each after the store's own retries

_ENVELOPE = ("schema_version", "write_id", "recent_writes")

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")


class Document(BaseModel):
    """Base of stored models. Fields of the next schema version survive a rewrite by this one."""

    model_config = ConfigDict(extra="allow")


class Record(BaseModel):
    """Base of immutable parts of documents."""

    model_config = ConfigDict(extra="allow", frozen=True)


def read(store: ObjectStore, key: str, model: type[Model]) -> Model:
    """Raises NotFound, and DocumentError when it can't be understood."""
    return _parse(store.get(key)[0], key, model)[0]


def create(store: ObjectStore, key: str, document: BaseModel) -> None:
    """Writes a new document. Raises PreconditionFailed when there is one already."""

    def refuse(_: BaseModel) -> None:
        raise PreconditionFailed(f"document {key} exists already")

    update(store, key, type(document), refuse, create=lambda: document, then=False)


def update(
    store: ObjectStore,
    key: str,
    model: type[Model],
    change: Callable[[Model], T],
    *,
    create: Callable[[], Model] | None = None,
    then: bool = True,
) -> T:
    """Reads, changes and writes a document so that no concurrent change gets lost.

    Args:
        change: alters the document in place; called anew on a fresh copy after each lost race, so
            it must do nothing else. What it raises ends the update. Nothing is written when it
            alters nothing.
        create: the document to start from when there is none.
        then: whether `change` is called on what `create` made, too.

    Returns:
        What `change` returned in the attempt that was written.

    Raises:
        NotFound: there is no document, and no `create`.
        StoreUnavailable: the store can't be reached, or the document is changed all the time.
    """
    results: dict[str, Any] = {}  # by write id
    unknown: list[StoreUnavailable] = []
    deadline = time.monotonic() + CONTENTION_S
    attempt = 0
    while True:
        try:
            data, etag = store.get(key)
        except NotFound:
            if create is None:
                raise
            document, envelope, etag, before = create(), {}, None, None
        else:
            document, envelope = _parse(data, key, model)
            for write_id in (envelope["write_id"], *envelope["recent_writes"]):
                if write_id in results:
                    return results[write_id]
            before = document.model_dump(mode="json")
        if len(unknown) >= MAX_UNKNOWN:
            raise unknown[-1]
        result: Any = change(document) if etag is not None or then else None
        if before is not None and document.model_dump(mode="json") == before:
            return result
        write_id = uuid.uuid4().hex
        data = _encode(document, envelope, write_id)
        results[write_id] = result
        try:
            store.put(key, data, if_match=etag, if_none_match=etag is None)
            return result
        except PreconditionFailed:
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"document {key} could not be changed within {CONTENTION_S:.0f} s: others "
                    "change it all the time. Try again"
                ) from None
        except StoreUnavailable as error:
            unknown.append(error)  # it may have been written all the same: the next read tells
        attempt += 1
        time.sleep(random.uniform(0, min(0.2, 0.005 * 2**attempt)))


def _parse(data: bytes, key: str, model: type[Model]) -> tuple[Model, dict[str, Any]]:
    try:
        raw = json.loads(data)
        version = raw["schema_version"]
        if not 1 <= version <= SCHEMA_VERSION + 1:
            raise DocumentError(
                f"document {key} has schema version {version}; this version of Loraplex reads "
                f"1 to {SCHEMA_VERSION + 1}. Upgrade Loraplex"
            )
        envelope = {
            "schema_version": version,
            "write_id": raw.get("write_id", ""),
            "recent_writes": raw.get("recent_writes", []),
        }
        fields = model.model_fields
        body = {k: v for k, v in raw.items() if k not in _ENVELOPE or k in fields}
        return model.model_validate(body), envelope
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DocumentError(f"document {key} can't be read: {error}") from error


def _encode(document: BaseModel, envelope: dict[str, Any], write_id: str) -> bytes:
    recent = [envelope["write_id"], *envelope["recent_writes"]] if envelope else []
    raw = document.model_dump(mode="json")
    raw |= {
        "schema_version": max(SCHEMA_VERSION, envelope.get("schema_version", 0)),
        "write_id": write_id,
        "recent_writes": recent[:RECENT_WRITES],
    }
    return json.dumps(raw, separators=(",", ":")).encode()
