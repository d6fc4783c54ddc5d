"""Removes what crashes and abandoned uploads leave behind. May run beside everything else."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from . import layout
from .blobs import Blobs
from .catalogue import Catalogue
from .errors import StoreError, TenantNotFound
from .object_store import ObjectStore

logger = logging.getLogger(__name__)

# Longer than any upload or ingest takes: what is younger may be in use.
OLDER_THAN_S = 24 * 3600.0


@dataclass(frozen=True)
class SweepReport:
    """How many were removed; `writes` broke off in the middle of an object."""

    uploads: int
    blobs: int
    tenants: int
    writes: int


def sweep(
    store: ObjectStore,
    catalogue: Catalogue,
    older_than_s: float = OLDER_THAN_S,
    now: datetime | None = None,
    urls_live_s: float = 0.0,
) -> SweepReport:
    """Removes uploads in quarantine and blobs that no catalogue names, and ends broken deletions.

    Args:
        older_than_s: age from which on an upload or a blob counts as left behind, in seconds.
        now: the time to count from.
        urls_live_s: how much later than an upload's first file its second may come: the life of
            the URLs that are handed out.
    """
    now = now or datetime.now(UTC)

    def is_old(modified: datetime, least_s: float = older_than_s) -> bool:
        return (now - modified).total_seconds() > least_s

    newest: dict[tuple[str, ...], datetime] = {}
    for item in store.list(layout.QUARANTINE):
        upload = tuple(item.key.split("/")[1:3])
        newest[upload] = max(newest.get(upload, item.modified), item.modified)
    abandoned_s = older_than_s + urls_live_s
    old_uploads = [each for each, modified in newest.items() if is_old(modified, abandoned_s)]
    for tenant_id, upload_id in old_uploads:
        store.delete_all(
            [o.key for o in store.list(layout.quarantine_folder(tenant_id, upload_id))]
        )

    ended = 0
    for tenant_id in catalogue.half_deleted_tenants():
        try:
            catalogue.delete_tenant(tenant_id)
            ended += 1
        except TenantNotFound:
            pass  # somebody else did

    blobs, removed = Blobs(store), 0
    for tenant_id in list(store.list_folders(layout.TENANTS)):
        # Listed before the catalogue is read: what is published in between is younger than any
        # age that makes sense, and an id that isn't named now never will be.
        old = [b for b in blobs.list(tenant_id) if is_old(b.modified)]
        used = catalogue.blobs_in_use(tenant_id) if old else set()
        for item in old:
            if (item.digest, item.blob) not in used:
                blobs.remove(tenant_id, item.digest, item.blob)
                removed += 1
    writes = 0
    try:
        writes = store.end_uploads(layout.TENANTS, now - timedelta(seconds=older_than_s))
    except StoreError as error:  # not every store and policy lets us
        logger.warning("parts of writes that broke off stay in the store: %s", error)
    return SweepReport(len(old_uploads), removed, ended, writes)
