"""What the catalogue tells: tenants, keys, adapters. Times are whole seconds since 1970."""

from __future__ import annotations

from pydantic import Field

from .documents import Record


class TenantLimits(Record):
    """What a tenant may do; None: unlimited.

    Attributes:
        max_adapters: names at a time.
        max_bytes: of the packs that its kept versions name, each digest counted once.
        weight: share of the compute when tenants compete, relative to the others'.
    """

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    max_adapters: int | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(default=None, ge=0)
    weight: float = Field(default=1.0, gt=0)


class Tenant(Record):
    """`id` never comes back for another tenant; `name` may, after this one's deletion."""

    id: str
    name: str
    limits: TenantLimits
    created: int


class KeyRecord(Record):
    """An API key without its text. The admin key has no tenant."""

    key_id: str
    tenant_id: str
    label: str
    created: int
    admin: bool = False


class VersionMeta(Record):
    """What is known of a packed adapter. `nbytes` is the size of its pack."""

    nbytes: int
    rank_max: int
    format: str
    targets: tuple[str, ...]


class AdapterVersion(VersionMeta):
    """One immutable version of an adapter.

    `blob` names the stored copy of the digest that belongs to this version; other versions with
    the same digest name the same one.
    """

    version: int
    digest: str
    blob: str
    created: int
    status: str = "ready"


class AdapterAlias(Record):
    """A name and the version that it stands for; `versions` ascend."""

    name: str
    current_version: int
    versions: tuple[AdapterVersion, ...]

    @property
    def current(self) -> AdapterVersion:
        found = self.find(self.current_version)
        assert found is not None
        return found

    def find(self, version: int) -> AdapterVersion | None:
        return next((v for v in self.versions if v.version == version), None)
