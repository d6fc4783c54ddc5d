"""Where uploads wait to be checked. Nothing in here is trusted, and nothing is served from here."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from . import layout
from .errors import AdapterRefused, InvalidName, NotFound, StoreUnavailable, UploadNotFound
from .layout import quarantine_keys
from .object_store import ObjectStore
from .quoting import show
from .tenants import check_tenant_id

logger = logging.getLogger(__name__)

_UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class UploadSizes:
    """Largest files that are taken from the quarantine, in bytes."""

    config: int = 1 << 20
    weights: int = 16_000_000_000


def stage_upload(
    store: ObjectStore, tenant_id: str, upload_id: str, config: bytes, weights: bytes
) -> None:
    """Writes the two files of an upload.

    Raises:
        TenantNotFound: the id can't be a tenant's. InvalidName: nor can this be an upload's.
    """
    check_upload_id(tenant_id, upload_id)
    config_key, weights_key = quarantine_keys(tenant_id, upload_id)
    store.put(config_key, config)
    store.put(weights_key, weights)


def take_upload(
    store: ObjectStore, tenant_id: str, upload_id: str, weights: Path, sizes: UploadSizes
) -> bytes:
    """Copies an upload: its weights to a file, its config is returned.

    Whoever holds a presigned URL may still replace the objects; the copy stays what it is.

    Raises:
        AdapterRefused: a file is too large (code "too_large").
        UploadNotFound: a file isn't there.
    """
    config_key, weights_key = quarantine_keys(tenant_id, upload_id)
    try:
        _check_size(store, config_key, sizes.config, layout.CONFIG_FILE)
        _check_size(store, weights_key, sizes.weights, layout.WEIGHTS_FILE)
        config, _ = store.get(config_key)
        if len(config) > sizes.config:
            raise _too_large(layout.CONFIG_FILE, len(config), sizes.config)
        nbytes = store.download(weights_key, weights)
        if nbytes > sizes.weights:
            raise _too_large(layout.WEIGHTS_FILE, nbytes, sizes.weights)
    except NotFound as error:
        raise UploadNotFound(f"upload {upload_id} isn't complete: {error}") from None
    return config


def discard_upload(store: ObjectStore, tenant_id: str, upload_id: str) -> None:
    """Removes an upload's files; what can't be removed now is left to the sweep."""
    try:
        for item in list(store.list(layout.quarantine_folder(tenant_id, upload_id))):
            store.delete(item.key)
    except StoreUnavailable as error:
        logger.warning("upload %s stays in quarantine until the next sweep: %s", upload_id, error)


def check_upload_id(tenant_id: str, upload_id: str) -> None:
    """Ids become keys: these can't lead out of their folder."""
    check_tenant_id(tenant_id)
    if not _UPLOAD_ID.fullmatch(upload_id):
        raise InvalidName(
            f"upload id {show(upload_id)} isn't allowed; it is 1 to 64 of a-z, A-Z, 0-9, "
            "'_' and '-'"
        )


def _check_size(store: ObjectStore, key: str, most: int, file: str) -> None:
    nbytes = store.head(key).nbytes
    if nbytes > most:
        raise _too_large(file, nbytes, most)


def _too_large(file: str, nbytes: int, most: int) -> AdapterRefused:
    return AdapterRefused(
        "too_large", f"{file} has {nbytes} bytes, at most {most} are allowed", file
    )
