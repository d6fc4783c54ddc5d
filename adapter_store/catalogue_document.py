"""A tenant's catalogue document, and what may be done to it. No I/O."""

from __future__ import annotations

from pydantic import Field

from .documents import Document
from .errors import AdapterNotFound, LimitExceeded
from .quoting import show
from .records import AdapterAlias, AdapterVersion, TenantLimits, VersionMeta

# Older versions of an adapter are forgotten beyond this many; the current one never.
KEEP_VERSIONS = 50
# Deleted names of which the last version is remembered; beyond this, one number stands for all.
KEEP_RETIRED = 500

Blob = tuple[str, str]  # digest, blob id


class BlobNeeded(Exception):
    """No kept version has this digest: publishing needs a blob of its own."""


class CatalogueDocument(Document):
    """tenants/<id>/catalogue.json.

    Version numbers of a name only grow, also when it was deleted meanwhile: "name@3" never comes
    to mean something else.
    """

    tenant_id: str
    adapters: dict[str, AdapterAlias] = Field(default_factory=dict)
    retired: dict[str, int] = Field(default_factory=dict)  # deleted name -> its last version
    version_floor: int = 0  # at least the last version of every deleted name not in `retired`

    def publish(
        self,
        name: str,
        digest: str,
        meta: VersionMeta,
        blob: str | None,
        limits: TenantLimits,
        now: int,
    ) -> AdapterVersion:
        """Makes `digest` the current version of `name`; does nothing when it is that already.

        Args:
            blob: the blob written for this publish; not used when a version has the digest.

        Raises:
            BlobNeeded: `blob` is None, and no version has the digest.
            LimitExceeded.
        """
        alias = self.adapters.get(name)
        if alias is not None and alias.current.digest == digest:
            return alias.current
        known = next((v for v in self._versions() if v.digest == digest), None)
        self._check_limits(name, meta, known is None, limits)
        if known is not None:
            blob = known.blob
        elif blob is None:
            raise BlobNeeded(digest)
        if alias is not None:
            versions, last = alias.versions, alias.versions[-1].version
        else:
            versions, last = (), self.retired.pop(name, self.version_floor)
        version = AdapterVersion(
            version=last + 1,
            digest=digest,
            blob=blob,
            created=now,
            nbytes=meta.nbytes,
            rank_max=meta.rank_max,
            format=meta.format,
            targets=meta.targets,
        )
        kept = (*versions, version)[-KEEP_VERSIONS:]
        self.adapters[name] = AdapterAlias(
            name=name, current_version=version.version, versions=kept
        )
        return version

    def rollback(self, name: str, version: int | None) -> AdapterVersion:
        """Moves the alias; None: to the newest version before the current one."""
        alias = self.find(name)
        if version is None:
            earlier = [v for v in alias.versions if v.version < alias.current_version]
            if not earlier:
                raise AdapterNotFound(
                    f"adapter {name!r} has no version before {alias.current_version}"
                )
            chosen = earlier[-1]
        else:
            chosen = find_version(alias, version)
        self.adapters[name] = alias.model_copy(update={"current_version": chosen.version})
        return chosen

    def delete(self, name: str) -> None:
        alias = self.find(name)
        del self.adapters[name]
        self.retired[name] = alias.versions[-1].version
        while len(self.retired) > KEEP_RETIRED:
            oldest = next(iter(self.retired))
            self.version_floor = max(self.version_floor, self.retired.pop(oldest))

    def find(self, name: str) -> AdapterAlias:
        """Raises AdapterNotFound."""
        alias = self.adapters.get(name)
        if alias is None:
            raise AdapterNotFound(f"there is no adapter {show(name)}")
        return alias

    def blobs(self) -> set[Blob]:
        """What the kept versions name."""
        return {(v.digest, v.blob) for v in self._versions()}

    def nbytes(self) -> int:
        """Bytes of packs, each digest counted once."""
        return sum({v.digest: v.nbytes for v in self._versions()}.values())

    def _versions(self) -> list[AdapterVersion]:
        return [v for alias in self.adapters.values() for v in alias.versions]

    def _check_limits(
        self, name: str, meta: VersionMeta, new_digest: bool, limits: TenantLimits
    ) -> None:
        most = limits.max_adapters
        if most is not None and name not in self.adapters and len(self.adapters) >= most:
            raise LimitExceeded(
                f"you have {len(self.adapters)} adapters, {most} are allowed; delete one first",
                "max_adapters",
            )
        if limits.max_bytes is not None and new_digest:
            total = self.nbytes() + meta.nbytes
            if total > limits.max_bytes:
                raise LimitExceeded(
                    f"the adapter's {meta.nbytes} bytes would make {total} bytes of adapters, "
                    f"{limits.max_bytes} are allowed; delete adapters first",
                    "max_bytes",
                )


def find_version(alias: AdapterAlias, version: int) -> AdapterVersion:
    """Raises AdapterNotFound, naming the versions that there are."""
    found = alias.find(version)
    if found is None:
        have = ", ".join(str(v.version) for v in alias.versions)
        raise AdapterNotFound(
            f"adapter {alias.name!r} has no version {version}; its versions: {have}"
        )
    return found
