"""Which tenants' packs a tier keeps: markers in its folder, so that all processes see them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

_KEPT = ".kept"


class Kept:
    """Names of tenants ("t-...") and of adapters ("t-.../digest") whose packs aren't evicted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _KEPT
        self._folder.mkdir(parents=True, exist_ok=True)

    def set(self, name: str, keep: bool) -> None:
        path = self._folder / name.replace("/", "__")
        if keep:
            path.touch()
        else:
            path.unlink(missing_ok=True)

    def set_packs(self, keys: Iterable[str]) -> None:
        """Of single adapters, these and no others are kept from now on; tenants' stay."""
        wanted = set(keys)
        for key in {name for name in self.names() if "/" in name} - wanted:
            self.set(key, False)
        for key in wanted:
            self.set(key, True)

    def names(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {path.name.replace("__", "/") for path in self._folder.iterdir()}
        return set()
