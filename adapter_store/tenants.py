"""Tenants: their names, limits and end."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pydantic import Field

from . import layout
from .catalogue_document import CatalogueDocument
from .documents import Document, Record, create, read, update
from .errors import NotFound, TenantExists, TenantNotFound
from .generation import Generation
from .names import check_name
from .object_store import ObjectStore
from .quoting import show
from .records import Tenant, TenantLimits

READ_THREADS = 8


class KeyEntry(Record):
    """A key of a tenant, as its tenant document lists it."""

    sha256: str
    label: str
    created: int


class TenantDocument(Document):
    """tenants/<id>/tenant.json. A tenant exists from this document's writing on."""

    id: str
    name: str
    limits: TenantLimits
    created: int
    keys: dict[str, KeyEntry] = Field(default_factory=dict)
    deleting: bool = False

    def tenant(self) -> Tenant:
        return Tenant(id=self.id, name=self.name, limits=self.limits, created=self.created)


class NameDocument(Document):
    """names/<name>.json. The name is free when no tenant of this id exists."""

    tenant_id: str
    reserved: int


# A reservation without a tenant is one whose maker died, if it is older than this.
RESERVED_S = 60


class Tenants:
    """Makes, reads, changes and deletes tenants. Thread-safe."""

    def __init__(
        self, store: ObjectStore, generation: Generation, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._generation = generation
        self._clock = clock

    def create(self, name: str, limits: TenantLimits) -> Tenant:
        check_name(name, "tenant")
        now = int(self._clock())
        tenant_id = "t-" + secrets.token_hex(8)

        def reserve(document: NameDocument) -> None:
            if self._in_use(document, now):
                raise TenantExists(f"there is a tenant named {name!r} already; choose another name")
            document.tenant_id, document.reserved = tenant_id, now

        update(
            self._store,
            layout.tenant_name_key(name),
            NameDocument,
            reserve,
            create=lambda: NameDocument(tenant_id=tenant_id, reserved=now),
            then=False,
        )
        catalogue = CatalogueDocument(tenant_id=tenant_id)
        create(self._store, layout.catalogue_key(tenant_id), catalogue)
        document = TenantDocument(id=tenant_id, name=name, limits=limits, created=now)
        create(self._store, layout.tenant_key(tenant_id), document)
        self._generation.try_move()
        return document.tenant()

    def get(self, tenant_id: str) -> Tenant:
        return self.document(tenant_id).tenant()

    def document(self, tenant_id: str) -> TenantDocument:
        """Raises TenantNotFound, also for a tenant that is being deleted."""
        document = self._read(tenant_id)
        if document is None or document.deleting:
            raise no_tenant(tenant_id)
        return document

    def all(self) -> list[Tenant]:
        return [d.tenant() for d in self._documents() if not d.deleting]

    def half_deleted(self) -> list[str]:
        """Ids of the tenants whose deletion was begun and not ended."""
        return [d.id for d in self._documents() if d.deleting]

    def change(self, tenant_id: str, change: Callable[[TenantDocument], None]) -> TenantDocument:
        """Rewrites a tenant's document. Raises TenantNotFound."""

        def apply(document: TenantDocument) -> TenantDocument:
            if document.deleting:
                raise no_tenant(tenant_id)
            change(document)
            return document

        check_tenant_id(tenant_id)
        try:
            return update(self._store, layout.tenant_key(tenant_id), TenantDocument, apply)
        except TenantNotFound:
            raise
        except NotFound:
            raise no_tenant(tenant_id) from None

    def set_limits(self, tenant_id: str, limits: TenantLimits) -> Tenant:
        def apply(document: TenantDocument) -> None:
            document.limits = limits

        tenant = self.change(tenant_id, apply).tenant()
        self._generation.try_move()
        return tenant

    def delete(self, tenant_id: str) -> None:
        """Deletes a tenant and all that it has; goes on where an earlier call broke off.

        Keys stop working first; the tenant's own document goes last, so that nothing is forgotten.
        """
        check_tenant_id(tenant_id)

        def mark(document: TenantDocument) -> TenantDocument:
            document.deleting = True
            return document

        try:
            document = update(self._store, layout.tenant_key(tenant_id), TenantDocument, mark)
        except NotFound:
            raise no_tenant(tenant_id) from None
        self._store.delete_all(layout.api_key_key(key.sha256) for key in document.keys.values())
        self._generation.move()
        # From here on a publish under way fails: it needs the catalogue that it has read.
        self._store.delete(layout.catalogue_key(tenant_id))
        for folder in (layout.quarantine_folder(tenant_id), layout.tenant_folder(tenant_id)):
            keys = [o.key for o in self._store.list(folder)]
            self._store.delete_all(k for k in keys if k != layout.tenant_key(tenant_id))

        def free(name: NameDocument) -> None:
            if name.tenant_id == tenant_id:
                name.tenant_id = ""

        update(
            self._store,
            layout.tenant_name_key(document.name),
            NameDocument,
            free,
            create=lambda: NameDocument(tenant_id="", reserved=0),
        )
        self._store.delete(layout.tenant_key(tenant_id))
        self._generation.move()

    def _in_use(self, document: NameDocument, now: int) -> bool:
        if not document.tenant_id:
            return False
        return self._read(document.tenant_id) is not None or now - document.reserved < RESERVED_S

    def _read(self, tenant_id: str) -> TenantDocument | None:
        check_tenant_id(tenant_id)
        try:
            return read(self._store, layout.tenant_key(tenant_id), TenantDocument)
        except NotFound:
            return None

    def _documents(self) -> list[TenantDocument]:
        ids = list(self._store.list_folders(layout.TENANTS))
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tenants") as threads:
            return [d for d in threads.map(self._read, ids) if d is not None]


def check_tenant_id(tenant_id: str) -> None:
    """Raises TenantNotFound for what can't be an id: ids become object-store keys and paths."""
    if not tenant_id.isascii() or not tenant_id.replace("-", "").isalnum() or len(tenant_id) > 63:
        raise no_tenant(tenant_id)


def no_tenant(tenant_id: str) -> TenantNotFound:
    return TenantNotFound(f"there is no tenant {show(tenant_id)}")
