"""From an upload in quarantine to a version that is served.

Every step may be the last one before a crash: the blob is written before the catalogue names it,
and until it is named it is garbage that `sweep` removes. What `ingest` returned stays.
"""

from __future__ import annotations

from pathlib import Path

from .base_model import BaseModel
from .blobs import Blobs
from .catalogue import Catalogue
from .catalogue_document import BlobNeeded
from .config_fields import MAX_RANK
from .errors import AdapterNotFound, AdapterRefused, InvalidName, StoreUnavailable
from .make_pack import PackInfo, make_pack
from .names import check_name
from .object_store import ObjectStore
from .quarantine import UploadSizes, check_upload_id, discard_upload, stage_upload, take_upload
from .records import AdapterVersion, VersionMeta
from .repack import remake_pack
from .workspace import sweep_workspaces, workspace


class Publisher:
    """Checks uploads and publishes them. Thread-safe; `ingest` takes as long as the adapter is big.

    Args:
        base_model: what adapters must fit.
        scratch: folder of this machine with room for two files of the largest upload.
        sizes: largest uploads.
        max_rank: largest rank that the worker groups are set up for.
    """

    def __init__(
        self,
        store: ObjectStore,
        catalogue: Catalogue,
        base_model: BaseModel,
        scratch: Path,
        sizes: UploadSizes | None = None,
        max_rank: int = MAX_RANK,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._base = base_model
        self._scratch = Path(scratch)
        self._sizes = sizes or UploadSizes()
        self._max_rank = max_rank
        self._blobs = Blobs(store)
        sweep_workspaces(self._scratch)

    def stage_upload(self, tenant_id: str, upload_id: str, config: bytes, weights: bytes) -> None:
        """Writes an upload's two files into the quarantine."""
        stage_upload(self._store, tenant_id, upload_id, config, weights)

    def ingest(self, tenant_id: str, name: str, upload_id: str) -> AdapterVersion:
        """Publishes an upload under `name`; its files leave the quarantine in every case.

        Returns:
            The version; the one that is current already when its digest is the upload's.

        Raises:
            AdapterRefused: it can't be served; nothing of it is left in the store.
            InvalidName, TenantNotFound, UploadNotFound, LimitExceeded: likewise.
            StoreUnavailable: it may or may not have been published.
            LocalDiskError: the scratch folder is full.
        """
        check_upload_id(tenant_id, upload_id)
        try:
            check_name(name)
            if name == self._base.name:
                raise InvalidName(f"{name!r} is the base model's name; choose another")
            self._catalogue.get_tenant(tenant_id)
            with workspace(self._scratch) as folder:
                weights, pack = folder / "weights", folder / "pack"
                config = take_upload(self._store, tenant_id, upload_id, weights, self._sizes)
                info = make_pack(config, weights, self._base, pack)
                if info.rank_max > self._max_rank:
                    raise AdapterRefused(
                        "rank_limit",
                        f"the adapter has rank {info.rank_max}, this service takes at most "
                        f"{self._max_rank}: train it with a smaller r, or ask the operator to "
                        f"raise LORAPLEX_MAX_LORA_RANK (up to {MAX_RANK})",
                    )
                return self._publish(tenant_id, name, info, pack, weights, config)
        finally:
            discard_upload(self._store, tenant_id, upload_id)

    def repack(self, tenant_id: str, digest: str) -> None:
        """Makes a stored adapter's pack anew from its source: one that is damaged or outdated.

        Raises:
            AdapterNotFound: no version names the digest. Or what `remake_pack` raises.
        """
        blob = dict(self._catalogue.blobs_in_use(tenant_id)).get(digest)
        if blob is None:
            raise AdapterNotFound(f"tenant {tenant_id} has no adapter with digest {digest}")
        remake_pack(self._blobs, self._base, self._scratch, tenant_id, digest, blob)

    def _publish(
        self, tenant_id: str, name: str, info: PackInfo, pack: Path, weights: Path, config: bytes
    ) -> AdapterVersion:
        meta = VersionMeta(
            nbytes=info.nbytes, rank_max=info.rank_max, format=info.format, targets=info.targets
        )
        try:
            return self._catalogue.publish(tenant_id, name, info.digest, meta)
        except BlobNeeded:
            pass  # the usual case: content that the tenant doesn't have yet
        blob = self._blobs.new_id()
        try:
            self._blobs.write(tenant_id, info.digest, blob, pack, weights, config)
            version = self._catalogue.publish(tenant_id, name, info.digest, meta, blob)
        except StoreUnavailable:
            raise  # the catalogue may name the blob by now: only the sweep can tell
        except BaseException:
            self._blobs.try_remove(tenant_id, info.digest, blob)
            raise
        if version.blob != blob:
            self._blobs.try_remove(tenant_id, info.digest, blob)
        return version
