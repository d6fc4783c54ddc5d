"""The catalogue: who may call, and what every tenant's names stand for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from . import layout
from .blobs import Blobs
from .catalogue_document import CatalogueDocument, find_version
from .documents import read, update
from .errors import NotFound
from .generation import Generation
from .keys import Keys
from .names import check_name, split_version
from .object_store import ObjectStore
from .records import (
    AdapterAlias,
    AdapterVersion,
    KeyRecord,
    Tenant,
    TenantLimits,
    VersionMeta,
)
from .tenants import Tenants, check_tenant_id, no_tenant

T = TypeVar("T")


class Catalogue:
    """Tenants, keys and adapters in the object store. Thread-safe; every call blocks.

    Nothing is cached: callers keep what they read for as long as `generation()` stays the same.
    Every method raises StoreUnavailable when the store can't be reached; a change may or may not
    have been written then, and the call may be repeated.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self._clock = clock
        self._generation = Generation(store)
        self._tenants = Tenants(store, self._generation, clock)
        self._keys = Keys(store, self._tenants, self._generation, clock)
        self._blobs = Blobs(store)

    def generation(self) -> str:
        """A value that is another one after each change of tenants, keys or adapters."""
        return self._generation.read()

    # Tenants

    def create_tenant(self, name: str, limits: TenantLimits | None = None) -> Tenant:
        """Raises InvalidName, TenantExists."""
        return self._tenants.create(name, limits or TenantLimits())

    def get_tenant(self, tenant_id: str) -> Tenant:
        """Raises TenantNotFound."""
        return self._tenants.get(tenant_id)

    def list_tenants(self) -> list[Tenant]:
        """All of them, read one by one: for the admin side."""
        return self._tenants.all()

    def update_tenant(self, tenant_id: str, *, limits: TenantLimits) -> Tenant:
        """Raises TenantNotFound."""
        return self._tenants.set_limits(tenant_id, limits)

    def delete_tenant(self, tenant_id: str) -> None:
        """Removes its keys, adapters and documents. Raises TenantNotFound."""
        self._tenants.delete(tenant_id)

    def half_deleted_tenants(self) -> list[str]:
        """Tenants whose deletion broke off; `delete_tenant` ends it."""
        return self._tenants.half_deleted()

    # Keys

    def create_key(self, tenant_id: str, label: str = "") -> tuple[str, str]:
        """A new key: its id and its plaintext, which nobody can be told again.

        Raises:
            TenantNotFound, LimitExceeded.
        """
        return self._keys.create(tenant_id, label)

    def list_keys(self, tenant_id: str) -> list[KeyRecord]:
        """Raises TenantNotFound."""
        return self._keys.of_tenant(tenant_id)

    def revoke_key(self, tenant_id: str, key_id: str) -> None:
        """Raises TenantNotFound, KeyNotFound."""
        self._keys.revoke(tenant_id, key_id)

    def find_key(self, plaintext: str) -> KeyRecord | None:
        """Whose key it is; None for one that is unknown or revoked."""
        return self._keys.find(plaintext)

    def ensure_admin_key(self, rotate: bool = False) -> str | None:
        """The admin key's plaintext when this call made it, None when there is one already.

        Args:
            rotate: make a new one in any case; the old one stops working.
        """
        return self._keys.ensure_admin(rotate)

    # Adapters

    def adapters(self, tenant_id: str) -> dict[str, AdapterAlias]:
        """A tenant's adapters by name. Raises TenantNotFound."""
        return self._read(tenant_id).adapters

    def resolve(self, tenant_id: str, reference: str) -> AdapterVersion:
        """What "name" (its current version) or "name@3" stands for.

        Raises:
            InvalidName, TenantNotFound. AdapterNotFound: also for an unknown version.
        """
        name, version = split_version(reference)
        alias = self._read(tenant_id).find(name)
        return alias.current if version is None else find_version(alias, version)

    def publish(
        self, tenant_id: str, name: str, digest: str, meta: VersionMeta, blob: str | None = None
    ) -> AdapterVersion:
        """Makes a digest the current version of a name.

        Idempotent: when it is current already, that version is returned and nothing changes.

        Args:
            blob: the blob that was written for this publish. It isn't used, and may be removed,
                when the returned version names another.

        Raises:
            InvalidName, TenantNotFound, LimitExceeded.
            BlobNeeded: `blob` is None and no version of the tenant has this digest.
        """
        check_name(name)
        limits = self.get_tenant(tenant_id).limits
        now = int(self._clock())
        return self._change(
            tenant_id, lambda document: document.publish(name, digest, meta, blob, limits, now)
        )

    def rollback(self, tenant_id: str, name: str, version: int | None = None) -> AdapterVersion:
        """Makes an earlier (or later) version current.

        Args:
            version: None: the newest one before the current one.

        Raises:
            TenantNotFound, AdapterNotFound.
        """
        return self._change(tenant_id, lambda document: document.rollback(name, version))

    def delete_adapter(self, tenant_id: str, name: str) -> None:
        """Removes a name with all its versions, and the blobs that no version names any more.

        Raises:
            TenantNotFound, AdapterNotFound.
        """
        self._change(tenant_id, lambda document: document.delete(name))

    def blobs_in_use(self, tenant_id: str) -> set[tuple[str, str]]:
        """(digest, blob id) of every kept version; none for a tenant that isn't there."""
        try:
            return self._read(tenant_id).blobs()
        except NotFound:
            return set()

    def _read(self, tenant_id: str) -> CatalogueDocument:
        check_tenant_id(tenant_id)
        try:
            return read(self.store, layout.catalogue_key(tenant_id), CatalogueDocument)
        except NotFound:
            raise no_tenant(tenant_id) from None

    def _change(self, tenant_id: str, change: Callable[[CatalogueDocument], T]) -> T:
        """Writes a change, and removes the blobs that it left without a name.

        Blob ids are used once: what this change let go can't come back, so there is nothing that
        a concurrent publish could lose.
        """

        def apply(document: CatalogueDocument) -> tuple[T, set[tuple[str, str]], bool]:
            before, blobs = document.model_dump(), document.blobs()
            result = change(document)
            return result, blobs - document.blobs(), document.model_dump() != before

        check_tenant_id(tenant_id)
        try:
            result, gone, changed = update(
                self.store, layout.catalogue_key(tenant_id), CatalogueDocument, apply
            )
        except NotFound as error:
            if type(error) is NotFound:
                raise no_tenant(tenant_id) from None
            raise
        if changed:
            self._generation.try_move()
        for digest, blob in sorted(gone):
            self._blobs.try_remove(tenant_id, digest, blob)
        return result
