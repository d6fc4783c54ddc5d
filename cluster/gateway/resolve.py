"""From the `model` field to one immutable adapter version."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...adapter_store import InvalidName, StoreUnavailable, TenantNotFound, show, split_version
from ...workers import AdapterRef
from ..errors import ApiError
from .answers import store_unavailable
from .deps import GatewayDeps
from .freshness import GenerationWatch, Stamp
from .lru import LruCache

if TYPE_CHECKING:
    from ...adapter_store import AdapterAlias

CACHE_TENANTS = 20_000
REREAD_S = 0.1  # how often a name that isn't there may cost a read of the store


@dataclass(frozen=True)
class Target:
    """What answers a request: an adapter's version, or the base model (no adapter)."""

    name: str  # as the client asked for it
    adapter: AdapterRef | None = None
    version: int | None = None

    @property
    def adapter_name(self) -> str:
        """The adapter's name without a version, or "base"."""
        return self.name.partition("@")[0] if self.adapter else "base"

    @property
    def label(self) -> str:
        """The adapter's digest, or "base"."""
        return self.adapter.digest if self.adapter else "base"


@dataclass(frozen=True)
class _Entry:
    aliases: Mapping[str, AdapterAlias]
    stamp: Stamp


class ModelResolver:
    """Each tenant's names, cached until the store's generation moves.

    A change made through this gateway is seen at once; one made elsewhere after at most the
    watch's period. A name that isn't in the cache is looked for in the store.
    """

    def __init__(self, deps: GatewayDeps, watch: GenerationWatch) -> None:
        self._deps = deps
        self._watch = watch
        self._entries = LruCache[_Entry](CACHE_TENANTS)
        self._locks: dict[str, asyncio.Lock] = {}

    async def resolve(self, tenant_id: str, model: str) -> Target:
        """Raises ApiError 404 model_not_found, the same for all that isn't the tenant's."""
        if model == self._deps.base_model.name:
            return Target(model)
        try:
            name, version = split_version(model)
        except InvalidName:
            raise not_found(model) from None
        asked_at = self._watch.stamp().at
        found = _find(await self._aliases(tenant_id), tenant_id, model, name, version)
        if found is None:
            # It may have been published through another gateway a moment ago.
            fresh = await self._aliases(tenant_id, not_before=asked_at - REREAD_S)
            found = _find(fresh, tenant_id, model, name, version)
        if found is None:
            raise not_found(model)
        return found

    async def aliases(self, tenant_id: str) -> Mapping[str, AdapterAlias]:
        """The tenant's adapters by name."""
        return await self._aliases(tenant_id)

    def forget(self, tenant_id: str) -> None:
        """To be called after a change of this tenant's adapters through this gateway."""
        self._entries.drop(tenant_id)

    async def _aliases(
        self, tenant_id: str, not_before: float | None = None
    ) -> Mapping[str, AdapterAlias]:
        entry = self._entries.get(tenant_id)
        if entry is not None and self._usable(entry, not_before):
            return entry.aliases
        lock = self._locks.setdefault(tenant_id, asyncio.Lock())
        try:
            async with lock:  # one read for each tenant at a time
                entry = self._entries.get(tenant_id)
                if entry is not None and self._usable(entry, not_before):
                    return entry.aliases
                return (await self._load(tenant_id, entry)).aliases
        finally:
            if not lock.locked():
                self._locks.pop(tenant_id, None)

    async def _load(self, tenant_id: str, stale: _Entry | None) -> _Entry:
        stamp = self._watch.stamp()
        try:
            aliases = await self._deps.in_thread(self._deps.catalogue.adapters, tenant_id)
        except TenantNotFound:
            aliases = {}  # it was deleted while this request was on its way
        except StoreUnavailable as error:
            if stale is not None and self._watch.in_grace(stale.stamp):
                return stale
            raise store_unavailable(error) from error
        entry = _Entry(aliases, stamp)
        self._entries.put(tenant_id, entry)
        return entry

    def _usable(self, entry: _Entry, not_before: float | None) -> bool:
        too_old = not_before is not None and entry.stamp.at < not_before
        return self._watch.usable(entry.stamp) and not (too_old and self._watch.reachable)


def _find(
    aliases: Mapping[str, AdapterAlias],
    tenant_id: str,
    model: str,
    name: str,
    version: int | None,
) -> Target | None:
    alias = aliases.get(name)
    if alias is None:
        return None
    wanted = alias.current_version if version is None else version
    found = alias.find(wanted)
    if found is None:
        return None
    return Target(model, AdapterRef(tenant_id, found.digest), found.version)


def not_found(model: str) -> ApiError:
    return ApiError(
        404,
        "model_not_found",
        f"the model {show(model)} does not exist or you do not have access to it; "
        "GET /v1/models lists yours",
        param="model",
    )
