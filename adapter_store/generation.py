"""One document that moves with every change, so that caches need to watch nothing else."""

from __future__ import annotations

import json
import logging
import uuid

from . import layout
from .errors import NotFound, StoreUnavailable
from .object_store import ObjectStore

logger = logging.getLogger(__name__)


class Generation:
    """Reads and moves the generation. Thread-safe.

    Its value is a fresh random id, written without a condition: of two writers at once either may
    come last, since a reader compares only with what it saw before both.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._seen: tuple[str, str] | None = None  # ETag, value

    def read(self) -> str:
        """The present value; "" before the first change."""
        seen = self._seen
        try:
            if seen is None:
                found = self._store.get(layout.GENERATION)
            else:
                found = self._store.get_if_changed(layout.GENERATION, seen[0])
        except NotFound:
            return ""
        if found is None:
            assert seen is not None
            return seen[1]
        data, etag = found
        value = json.loads(data)["write_id"]
        self._seen = (etag, value)
        return value

    def move(self) -> None:
        """To be called after a change was written, and before it is acknowledged."""
        document = {"schema_version": 1, "write_id": uuid.uuid4().hex}
        self._store.put(layout.GENERATION, json.dumps(document).encode())

    def try_move(self) -> None:
        """For changes that stand by themselves: caches then see them when their entries age out."""
        try:
            self.move()
        except StoreUnavailable as error:
            logger.warning("a change was written, but caches could not be told: %s", error)
