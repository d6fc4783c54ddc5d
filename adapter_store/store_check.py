"""Does the object store hold what its catalogues promise? Reads everything, changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from . import layout
from .base_model import BaseModel
from .blobs import Blobs
from .catalogue import Catalogue
from .digest import adapter_digest
from .errors import (
    AdapterRefused,
    DocumentError,
    NotFound,
    PackCorrupt,
    PackVersionError,
)
from .object_store import ObjectStore
from .pack import Pack
from .peft_format import load_adapter
from .weights_file import WeightsFile
from .workspace import workspace

FindingKind = Literal[
    "missing_pack",  # a version's pack isn't there
    "damaged_pack",  # it is, with other bytes than were written, or another adapter's
    "missing_source",  # what a pack is remade from isn't there: the version is served, for now
    "damaged_source",
    "other_base",  # a version made for another base model than the one given
    "orphan_blob",  # content that no version names: a publish broke off, or is under way
    "abandoned_upload",  # quarantine: nobody completed it, or the ingest died, or it is under way
    "half_deleted",  # a tenant's deletion broke off
    "unreadable_document",  # a tenant's own, or its catalogue
]


@dataclass(frozen=True)
class Finding:
    """One thing that isn't as it should be.

    Attributes:
        key: the object, or the folder of objects (ends in "/").
        digest, blob: of the blob, where it is one.
        modified: of orphans and uploads: when the newest of their objects was written.
    """

    kind: FindingKind
    tenant_id: str
    key: str
    message: str
    digest: str = ""
    blob: str = ""
    modified: datetime | None = None


def check_store(
    store: ObjectStore,
    catalogue: Catalogue,
    scratch: Path,
    base: BaseModel | None = None,
    *,
    contents: bool = True,
) -> Iterator[Finding]:
    """Compares the store with its catalogues. May run beside everything else.

    Args:
        scratch: folder with room for the largest pack, or source.
        base: the served model. Without it, a source's digest can't be computed: only its
            form is looked at.
        contents: read every object; False: only see that it is there.
    """
    yield from _uploads(store)
    try:
        for tenant_id in catalogue.half_deleted_tenants():
            key = layout.tenant_folder(tenant_id)
            yield Finding("half_deleted", tenant_id, key, "the tenant's deletion broke off")
    except DocumentError as error:
        yield Finding("unreadable_document", "", layout.TENANTS, str(error))
    with workspace(scratch) as folder:
        for tenant_id in list(store.list_folders(layout.TENANTS)):
            checker = _TenantCheck(store, catalogue, tenant_id, folder, base, contents)
            yield from checker.findings()


def _uploads(store: ObjectStore) -> Iterator[Finding]:
    newest: dict[tuple[str, str], datetime] = {}
    for item in store.list(layout.QUARANTINE):
        tenant_id, upload_id = item.key.split("/")[1:3]
        known = newest.get((tenant_id, upload_id), item.modified)
        newest[tenant_id, upload_id] = max(known, item.modified)
    for (tenant_id, upload_id), modified in newest.items():
        key = layout.quarantine_folder(tenant_id, upload_id)
        message = f"an upload of {modified:%Y-%m-%d %H:%M} UTC waits to be completed"
        yield Finding("abandoned_upload", tenant_id, key, message, modified=modified)


class _TenantCheck:
    def __init__(
        self,
        store: ObjectStore,
        catalogue: Catalogue,
        tenant_id: str,
        folder: Path,
        base: BaseModel | None,
        contents: bool,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._tenant = tenant_id
        self._folder = folder
        self._base = base
        self._contents = contents

    def findings(self) -> Iterator[Finding]:
        # Listed before the catalogue is read: what is published in between isn't an orphan.
        listed = list(Blobs(self._store).list(self._tenant))
        try:
            used = self._catalogue.blobs_in_use(self._tenant)
        except DocumentError as error:
            key = layout.catalogue_key(self._tenant)
            yield Finding("unreadable_document", self._tenant, key, str(error))
            return
        for digest, blob in sorted(used):
            found = list(self._blob(digest, blob))
            # What a delete took away meanwhile is no finding.
            if found and (digest, blob) in self._catalogue.blobs_in_use(self._tenant):
                yield from found
        for item in listed:
            if (item.digest, item.blob) not in used:
                message = f"no version names this blob of {item.modified:%Y-%m-%d %H:%M} UTC"
                yield self._found("orphan_blob", item.digest, item.blob, "", message, item.modified)

    def _blob(self, digest: str, blob: str) -> Iterator[Finding]:
        look = self._read if self._contents else self._head
        for name, kind in ((layout.PACK_FILE, "pack"), (layout.SOURCE_FILE, "source")):
            try:
                wrong = look(digest, blob, name)
            except NotFound as error:
                missing: FindingKind = "missing_pack" if kind == "pack" else "missing_source"
                yield self._found(missing, digest, blob, name, str(error))
                continue
            if wrong is not None:
                yield self._found(wrong[0], digest, blob, name, wrong[1])
                if wrong[0] == "other_base":
                    return  # its source is of that model, too

    def _head(self, digest: str, blob: str, name: str) -> None:
        folder = layout.blob_folder(self._tenant, digest, blob)
        self._store.head(folder + name)
        if name == layout.SOURCE_FILE:
            self._store.head(folder + layout.CONFIG_FILE)

    def _read(self, digest: str, blob: str, name: str) -> tuple[FindingKind, str] | None:
        folder, path = layout.blob_folder(self._tenant, digest, blob), self._folder / name
        try:
            self._store.download(folder + name, path)
            if name == layout.PACK_FILE:
                return self._pack(path, digest)
            config = self._store.get(folder + layout.CONFIG_FILE)[0]
            return self._source(config, path, digest)
        finally:
            path.unlink(missing_ok=True)

    def _pack(self, path: Path, digest: str) -> tuple[FindingKind, str] | None:
        try:
            pack = Pack.open(path)
        except (PackCorrupt, PackVersionError) as error:
            return "damaged_pack", str(error).replace(str(path), "the pack")
        if pack.digest != digest:
            return "damaged_pack", f"the pack is that of {pack.digest}"
        if self._base is not None and pack.base_fingerprint != self._base.fingerprint:
            return "other_base", f"made for another base model than {self._base.name}"
        return None

    def _source(self, config: bytes, path: Path, digest: str) -> tuple[FindingKind, str] | None:
        try:
            if self._base is None:
                WeightsFile(path)
                return None
            found = adapter_digest(load_adapter(config, path, self._base).adapter)
        except AdapterRefused as error:
            if error.code == "wrong_base":
                return "other_base", error.message
            return "damaged_source", error.message
        if found != digest:
            return "damaged_source", f"the source's digest is {found}"
        return None

    def _found(
        self,
        kind: FindingKind,
        digest: str,
        blob: str,
        name: str,
        message: str,
        modified: datetime | None = None,
    ) -> Finding:
        key = layout.blob_folder(self._tenant, digest, blob) + name
        return Finding(kind, self._tenant, key, message, digest, blob, modified)
