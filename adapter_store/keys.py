"""API keys. The store holds their sha256 only: they are random, so nothing slower is needed."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable

from . import layout
from .documents import Document, create, read, update
from .errors import KeyNotFound, LimitExceeded, NotFound, TenantNotFound
from .generation import Generation
from .object_store import ObjectStore
from .quoting import show
from .records import KeyRecord
from .tenants import KeyEntry, TenantDocument, Tenants

MAX_KEYS = 1000  # of one tenant: they are listed in its document

_PREFIX = "lpx-"
_ADMIN_PREFIX = "lpx-admin-"
_RANDOM_BYTES = 32
_KEY = re.compile(r"lpx-(?:admin-)?[A-Za-z0-9_-]{43}")


class KeyDocument(Document):
    """keys/<sha256>.json."""

    key_id: str
    tenant_id: str
    label: str
    created: int
    admin: bool = False


class AdminDocument(Document):
    """meta/admin.json: the one admin key that counts."""

    sha256: str = ""
    created: int = 0


class Keys:
    """Makes, finds and revokes keys. Thread-safe."""

    def __init__(
        self,
        store: ObjectStore,
        tenants: Tenants,
        generation: Generation,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._tenants = tenants
        self._generation = generation
        self._clock = clock

    def create(self, tenant_id: str, label: str) -> tuple[str, str]:
        """(key id, plaintext)."""
        plaintext, now = _new_key(_PREFIX), int(self._clock())
        key_id = "key-" + secrets.token_hex(6)
        entry = KeyEntry(sha256=_sha256(plaintext), label=label, created=now)

        def enter(document: TenantDocument) -> None:
            if len(document.keys) >= MAX_KEYS:
                raise LimitExceeded(
                    f"tenant {document.name!r} has {MAX_KEYS} keys, as many as it may; revoke one",
                    "keys",
                )
            document.keys[key_id] = entry

        # Entered first: whatever happens then, deleting the tenant finds the key.
        self._tenants.change(tenant_id, enter)
        key = layout.api_key_key(entry.sha256)
        record = KeyDocument(key_id=key_id, tenant_id=tenant_id, label=label, created=now)
        create(self._store, key, record)
        try:
            if key_id not in self._tenants.document(tenant_id).keys:
                raise KeyNotFound(f"key {key_id} was revoked while it was made")
        except (TenantNotFound, KeyNotFound):
            self._store.delete(key)  # who removed the entry may have been too early to see it
            raise
        self._generation.try_move()
        return key_id, plaintext

    def of_tenant(self, tenant_id: str) -> list[KeyRecord]:
        keys = self._tenants.document(tenant_id).keys
        return [
            KeyRecord(key_id=key_id, tenant_id=tenant_id, label=k.label, created=k.created)
            for key_id, k in keys.items()
        ]

    def revoke(self, tenant_id: str, key_id: str) -> None:
        """Raises KeyNotFound, TenantNotFound."""
        entry = self._tenants.document(tenant_id).keys.get(key_id)
        if entry is None:
            raise KeyNotFound(f"tenant {tenant_id} has no key {show(key_id)}")

        def remove(document: TenantDocument) -> None:
            document.keys.pop(key_id, None)

        self._store.delete(layout.api_key_key(entry.sha256))
        self._generation.move()
        self._tenants.change(tenant_id, remove)

    def find(self, plaintext: str) -> KeyRecord | None:
        if not _KEY.fullmatch(plaintext):
            return None
        sha256 = _sha256(plaintext)
        try:
            found = read(self._store, layout.api_key_key(sha256), KeyDocument)
            if found.admin and read(self._store, layout.ADMIN, AdminDocument).sha256 != sha256:
                return None
        except NotFound:
            return None
        return KeyRecord(
            key_id=found.key_id,
            tenant_id=found.tenant_id,
            label=found.label,
            created=found.created,
            admin=found.admin,
        )

    def ensure_admin(self, rotate: bool) -> str | None:
        """The plaintext when this call made the key, None when there is one already."""
        if not rotate and self._admin_sha256():
            return None
        plaintext, now = _new_key(_ADMIN_PREFIX), int(self._clock())
        sha256 = _sha256(plaintext)
        record = KeyDocument(key_id="admin", tenant_id="", label="admin", created=now, admin=True)
        create(self._store, layout.api_key_key(sha256), record)

        def replace(document: AdminDocument) -> str:
            old = document.sha256
            if rotate or not old:
                document.sha256, document.created = sha256, now
            return old

        # Which key counts is decided here; a record that lost is worth nothing.
        old = update(self._store, layout.ADMIN, AdminDocument, replace, create=AdminDocument)
        won = rotate or not old
        loser = old if won else sha256
        if loser:
            self._store.delete(layout.api_key_key(loser))
        if won:
            self._generation.move()
        return plaintext if won else None

    def _admin_sha256(self) -> str:
        try:
            return read(self._store, layout.ADMIN, AdminDocument).sha256
        except NotFound:
            return ""


def _new_key(prefix: str) -> str:
    return prefix + secrets.token_urlsafe(_RANDOM_BYTES)


def _sha256(plaintext: str) -> str:
    return hashlib.sha256(plaintext.encode()).hexdigest()
