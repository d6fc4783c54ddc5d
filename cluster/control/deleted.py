"""Which of the adapters that groups hold were deleted: those that no catalogue names."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from ...adapter_store import DocumentError

logger = logging.getLogger(__name__)


class Names(Protocol):
    """What is asked of `adapter_store.Catalogue`."""

    def blobs_in_use(self, tenant_id: str) -> set[tuple[str, str]]:
        """(digest, blob id) of every kept version; none for a tenant that isn't there."""
        ...


def deleted_adapters(catalogue: Names, keys: Iterable[str]) -> list[str]:
    """Those of the adapters (`AdapterRef.key`) that were deleted. Blocks on the store.

    The keys must have been reported before this is called: groups load what a catalogue names,
    so one that isn't named any more was deleted, and none is only about to be published.

    Raises:
        StoreUnavailable: it can't be told now.
    """
    digests: dict[str, list[str]] = {}
    for key in sorted(keys):
        tenant_id, _, digest = key.partition("/")
        digests.setdefault(tenant_id, []).append(digest)
    deleted: list[str] = []
    for tenant_id, held in digests.items():
        try:
            named = {digest for digest, _ in catalogue.blobs_in_use(tenant_id)}
        except DocumentError as error:
            logger.warning("can't tell which adapters of %s were deleted: %s", tenant_id, error)
            continue
        deleted += [f"{tenant_id}/{digest}" for digest in held if digest not in named]
    return deleted
