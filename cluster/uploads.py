"""Uploads by presigned URL: their state lies in the store, so that any gateway can answer."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

from ..adapter_store import (
    Document,
    NotFound,
    ObjectStore,
    UploadSizes,
    create_document,
    quarantine_keys,
    read_document,
    show,
    stage_upload,
    update_document,
)

Status = Literal["waiting", "processing", "ready", "refused", "failed"]

# A record that has been processing for longer lost its worker, and may be completed again.
STUCK_S = 900
_ID = re.compile(r"[0-9a-f]{32}")


class UploadRecord(Document):
    """One upload of one tenant, in tenants/<id>/uploads/<upload id>.json. Times since 1970.

    waiting: the URLs may be used. processing: complete was called. ready: `adapter` is served.
    refused: the adapter can't be served, `error` says why. failed: something else went wrong, and
    the files may be uploaded and completed again.
    """

    upload_id: str
    name: str
    status: Status = "waiting"
    created: int
    updated: int
    error: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None


class Uploads:
    """Staged files and upload records. Blocks on the store.

    Args:
        store: where both lie.
        signer: the same store as uploading clients reach it; its URLs are handed out.
        sizes: largest files.
        expires_s: life of the URLs.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        store: ObjectStore,
        signer: ObjectStore,
        sizes: UploadSizes,
        expires_s: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._signer = signer
        self._sizes = sizes
        self._expires_s = expires_s
        self._clock = clock

    def stage(self, tenant_id: str, upload_id: str, config: bytes, weights: bytes) -> None:
        """Writes the two files of an upload that came through the gateway."""
        stage_upload(self._store, tenant_id, upload_id, config, weights)

    def create(
        self, tenant_id: str, name: str, weights_bytes: int | None = None
    ) -> tuple[UploadRecord, dict[str, str]]:
        """A new upload, and the URLs to PUT its `config` and `weights` to.

        Args:
            weights_bytes: the weights' size if it is known; no other size can be uploaded then.

        Raises:
            LimitExceeded: it is larger than what is taken.
        """
        now = int(self._clock())
        record = UploadRecord(upload_id=uuid.uuid4().hex, name=name, created=now, updated=now)
        config_key, weights_key = quarantine_keys(tenant_id, record.upload_id)
        urls = {
            "config": self._signer.presign_put(config_key, self._sizes.config, self._expires_s),
            "weights": self._signer.presign_put(
                weights_key, self._sizes.weights, self._expires_s, nbytes=weights_bytes
            ),
        }
        create_document(self._store, _key(tenant_id, record.upload_id), record)
        return record, urls

    @property
    def headers(self) -> dict[str, str]:
        """What a PUT to one of the URLs must carry."""
        return self._signer.put_headers

    def get(self, tenant_id: str, upload_id: str) -> UploadRecord:
        """Raises NotFound."""
        return read_document(self._store, _checked_key(tenant_id, upload_id), UploadRecord)

    def missing(self, tenant_id: str, upload_id: str) -> list[str]:
        """Which of "config" and "weights" hasn't been uploaded."""
        keys = dict(zip(("config", "weights"), quarantine_keys(tenant_id, upload_id), strict=True))
        return [field for field, key in keys.items() if not self._exists(key)]

    def begin(self, tenant_id: str, upload_id: str) -> tuple[UploadRecord, bool]:
        """Moves an upload to "processing"; False when another call did so, or it has ended.

        Raises:
            NotFound: there is no such upload.
        """
        now = int(self._clock())

        def change(record: UploadRecord) -> tuple[UploadRecord, bool]:
            stuck = record.status == "processing" and now - record.updated > STUCK_S
            if record.status not in ("waiting", "failed") and not stuck:
                return record, False
            record.status, record.updated, record.error = "processing", now, None
            return record, True

        return update_document(
            self._store, _checked_key(tenant_id, upload_id), UploadRecord, change
        )

    def finish(
        self,
        tenant_id: str,
        upload_id: str,
        status: Status,
        *,
        error: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        """Writes how an upload ended. Raises NotFound when its tenant was deleted meanwhile.

        What is ready stays so: of two workers on one upload, the second finds no files.
        """
        now = int(self._clock())

        def change(record: UploadRecord) -> None:
            if record.status == "ready":
                return
            record.status, record.updated = status, now
            record.error, record.adapter = error, adapter

        update_document(self._store, _checked_key(tenant_id, upload_id), UploadRecord, change)

    def _exists(self, key: str) -> bool:
        try:
            self._store.head(key)
        except NotFound:
            return False
        return True


def _key(tenant_id: str, upload_id: str) -> str:
    return f"tenants/{tenant_id}/uploads/{upload_id}.json"


def _checked_key(tenant_id: str, upload_id: str) -> str:
    if not _ID.fullmatch(upload_id):  # it becomes a key
        raise NotFound(f"{show(upload_id)} is no upload's id")
    return _key(tenant_id, upload_id)
