"""A tenant's adapters out of the object store, into a folder that PEFT, or Loraplex, reads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from . import layout
from .catalogue import Catalogue
from .errors import AdapterNotFound, LocalDiskError
from .object_store import ObjectStore
from .pack import Pack
from .quoting import show
from .records import AdapterVersion


def export_adapters(
    store: ObjectStore,
    catalogue: Catalogue,
    tenant_id: str,
    target: Path,
    names: Collection[str] = (),
    *,
    all_versions: bool = False,
    packs: bool = False,
) -> Iterator[Path]:
    """Writes each adapter's uploaded files to `target`/NAME, as PEFT's save_pretrained does.

    Args:
        names: these alone; none: every adapter of the tenant.
        all_versions: every kept version, to NAME@VERSION.
        packs: write the packed files instead, checked, to NAME@VERSION.pack.

    Yields:
        what was written, one by one; never a half one.

    Raises:
        TenantNotFound, AdapterNotFound, NotFound. PackCorrupt: a pack is damaged.
        LocalDiskError: something of that name is there already, or can't be written.
    """
    aliases = catalogue.adapters(tenant_id)
    if unknown := sorted(set(names) - set(aliases)):
        raise AdapterNotFound(
            f"the tenant has no adapter {', '.join(map(show, unknown))}; it has "
            f"{', '.join(sorted(aliases)) or 'none'}"
        )
    for name in sorted(names or aliases):
        alias = aliases[name]
        for version in alias.versions if all_versions else (alias.current,):
            label = f"{name}@{version.version}"
            if packs:
                path = target / f"{label}.pack"
            else:
                path = target / (label if all_versions else name)
            try:
                _export(store, tenant_id, version, path, packs)
            except OSError as error:
                raise LocalDiskError(f"cannot write {path}: {error.strerror or error}") from error
            yield path


def _export(
    store: ObjectStore, tenant_id: str, version: AdapterVersion, path: Path, packs: bool
) -> None:
    if path.exists():
        raise LocalDiskError(f"{path} is there already; move it away, or export elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = layout.blob_folder(tenant_id, version.digest, version.blob)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".export-"))
    try:
        if packs:
            store.download(folder + layout.PACK_FILE, temporary / "pack")
            Pack.open(temporary / "pack")
            os.rename(temporary / "pack", path)
        else:
            store.download(folder + layout.SOURCE_FILE, temporary / layout.WEIGHTS_FILE)
            config = store.get(folder + layout.CONFIG_FILE)[0]
            (temporary / layout.CONFIG_FILE).write_bytes(config)
            temporary.chmod(0o755)
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
