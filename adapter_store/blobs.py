"""The stored content of adapters: a pack to serve, and the source to make a pack anew from."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from . import layout
from .errors import NotFound, PackVersionError, StoreUnavailable
from .object_store import ObjectInfo, ObjectStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlobInfo:
    """One blob in a listing; `modified` is the time of its newest object."""

    digest: str
    blob: str
    modified: datetime


class Blobs:
    """Writes, finds and removes blobs. Thread-safe."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @staticmethod
    def new_id() -> str:
        return secrets.token_hex(8)

    def write(
        self, tenant_id: str, digest: str, blob: str, pack: Path, weights: Path, config: bytes
    ) -> None:
        """Stores a blob. The pack goes last: where it is, all is."""
        folder = layout.blob_folder(tenant_id, digest, blob)
        self._store.put(folder + layout.CONFIG_FILE, config)
        self._store.upload(weights, folder + layout.SOURCE_FILE)
        self._store.upload(pack, folder + layout.PACK_FILE)

    def replace_pack(self, tenant_id: str, digest: str, blob: str, pack: Path) -> None:
        self._store.upload(pack, layout.blob_folder(tenant_id, digest, blob) + layout.PACK_FILE)

    def read_source(self, tenant_id: str, digest: str, blob: str, weights: Path) -> bytes:
        """Writes the source's weights to a file, returns its config. Raises NotFound."""
        folder = layout.blob_folder(tenant_id, digest, blob)
        self._store.download(folder + layout.SOURCE_FILE, weights)
        return self._store.get(folder + layout.CONFIG_FILE)[0]

    def remove(self, tenant_id: str, digest: str, blob: str) -> None:
        """The pack goes first, so that nobody finds half a blob."""
        folder = layout.blob_folder(tenant_id, digest, blob)
        for name in (layout.PACK_FILE, layout.SOURCE_FILE, layout.CONFIG_FILE):
            self._store.delete(folder + name)
        for left in list(self._store.list(folder)):  # packs of other format versions
            self._store.delete(left.key)

    def try_remove(self, tenant_id: str, digest: str, blob: str) -> None:
        """Like `remove`; what can't be removed now is left to the sweep."""
        try:
            self.remove(tenant_id, digest, blob)
        except StoreUnavailable as error:
            logger.warning("blob %s of %s stays until the next sweep: %s", blob, digest, error)

    def list(self, tenant_id: str) -> Iterator[BlobInfo]:
        """Every blob of a tenant, complete or not."""
        folder = layout.blobs_folder(tenant_id)
        found: dict[tuple[str, str], datetime] = {}
        for item in self._store.list(folder):
            digest, blob, _ = item.key.removeprefix(folder).split("/", 2)
            found[digest, blob] = max(found.get((digest, blob), item.modified), item.modified)
        for (digest, blob), modified in found.items():
            yield BlobInfo(digest, blob, modified)

    def find_pack(self, tenant_id: str, digest: str) -> ObjectInfo:
        """A stored pack of the digest.

        Raises:
            PackVersionError: there are packs of other format versions only.
            NotFound: the digest has none (its adapter was deleted, or never was).
        """
        others = set()
        for item in self._store.list(layout.blobs_folder(tenant_id, digest)):
            name = item.key.rpartition("/")[2]
            if name == layout.PACK_FILE:
                return item
            if layout.is_pack(name):
                others.add(name)
        if others:
            raise PackVersionError(
                f"adapter {digest} of tenant {tenant_id} is stored as {', '.join(sorted(others))}, "
                f"this program reads {layout.PACK_FILE}; remake it from its source, or publish the "
                "adapter again"
            )
        raise NotFound(f"tenant {tenant_id} has no stored adapter {digest}")

    def exists(self, tenant_id: str, digest: str) -> bool:
        """Whether the digest has any object."""
        return any(True for _ in self._store.list(layout.blobs_folder(tenant_id, digest)))

    def ids(self, tenant_id: str, digest: str) -> set[str]:
        """Ids of a digest's blobs that have a source."""
        folder = layout.blobs_folder(tenant_id, digest)
        keys = (o.key.removeprefix(folder).partition("/") for o in self._store.list(folder))
        return {blob for blob, _, name in keys if name == layout.SOURCE_FILE}
