"""A stored pack made anew from the source beside it: one that is damaged or of another version."""

from __future__ import annotations

from pathlib import Path

from .base_model import BaseModel
from .blobs import Blobs
from .errors import AdapterNotFound, NotFound
from .make_pack import make_pack
from .object_store import ObjectStore
from .workspace import workspace


def remake_pack(
    blobs: Blobs, base: BaseModel, scratch: Path, tenant_id: str, digest: str, blob: str
) -> None:
    """Replaces the pack of one blob.

    Raises:
        AdapterNotFound: the source is gone, is damaged, or was made for another base model.
        AdapterRefused: the source can't be read as an adapter.
        LocalDiskError: the scratch folder is full.
    """
    with workspace(scratch) as folder:
        weights, pack = folder / "weights", folder / "pack"
        try:
            config = blobs.read_source(tenant_id, digest, blob, weights)
        except NotFound as error:
            raise AdapterNotFound(f"the source of {digest} is gone: {error}") from None
        info = make_pack(config, weights, base, pack)
        if info.digest != digest:
            raise AdapterNotFound(
                f"the source stored for {digest} has the digest {info.digest} on base model "
                f"{base.name}: it is damaged, or belongs to another base model; publish the "
                "adapter again"
            )
        blobs.replace_pack(tenant_id, digest, blob, pack)


class Repacker:
    """What a tier calls for an adapter that is stored in another pack version than it reads.

    Nodes that come to it at the same time write the same bytes.

    Args:
        scratch: folder of this machine with room for two files of the largest adapter.
    """

    def __init__(self, store: ObjectStore, base: BaseModel, scratch: Path) -> None:
        self._blobs = Blobs(store)
        self._base = base
        self._scratch = scratch

    def __call__(self, tenant_id: str, digest: str) -> None:
        """Raises what `remake_pack` raises."""
        found = sorted(self._blobs.ids(tenant_id, digest))
        if not found:
            raise AdapterNotFound(
                f"adapter {digest} of tenant {tenant_id} is stored without its source: publish it "
                "again"
            )
        remake_pack(self._blobs, self._base, self._scratch, tenant_id, digest, found[0])
