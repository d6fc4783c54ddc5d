"""Packs for engines that run without the adapter store's tiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


class LocalPacks:
    """Packs that are on this disk already.

    Args:
        paths: by adapter key; none for an engine whose adapters are written into its pool.
    """

    host_bytes = 0

    def __init__(self, paths: Mapping[str, Path] | None = None):
        self._paths = dict(paths or {})

    def ensure(self, tenant_id: str, digest: str, wanted: object = None) -> tuple[Path, str]:
        return self._paths[f"{tenant_id}/{digest}"], "disk"

    def resident(self) -> dict[str, int]:
        return {key: path.stat().st_size for key, path in self._paths.items()}

    def host_resident(self) -> dict[str, int]:
        return {}

    def keep_packs(self, keys: Iterable[str]) -> None:
        pass

    def remove(self, key: str) -> None:
        self._paths.pop(key, None)
