"""The object store that the settings mean, for commands: the embedded one also while it rests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ..adapter_store import EmbeddedS3, ObjectStore, StoreUnavailable
from .errors import ClusterError
from .local_dir import DataDir
from .settings import Settings


class NoStore(ClusterError):
    """The settings name no store, and there is no embedded one."""


def is_embedded(settings: Settings) -> bool:
    """Whether the store is the one in the data folder."""
    return not settings.model_fields_set & {"store_url", "store_endpoint"}


@contextlib.contextmanager
def open_store(settings: Settings) -> Iterator[ObjectStore]:
    """The store, reachable while the context lasts.

    Raises:
        NoStore: no store was named, and the data folder has none.
        DataDirError: a service is just starting on the data folder.
        StoreUnavailable: it can't be reached.
    """
    if not is_embedded(settings):
        store = ObjectStore(**settings.store_options())
        store.check()
        yield store
        return
    data = DataDir(settings.data_dir)
    if not (data.store / "port").is_file():
        raise NoStore(
            f"no store is named, and {data.root} holds no embedded one: use --store or "
            "LORAPLEX_STORE_URL (s3://bucket/prefix), or --data-dir for another folder"
        )
    if (running := _running(data.store)) is not None:
        yield running
        return
    data.open()  # nothing serves from it now, and nothing shall start to meanwhile
    try:
        with EmbeddedS3(data.store) as server:
            yield server.store()
    finally:
        data.close()


def _running(folder: Path) -> ObjectStore | None:
    """The embedded store of a service that runs."""
    try:
        keys = json.loads((folder / "keys.json").read_text())
        endpoint = f"http://127.0.0.1:{int((folder / 'port').read_text())}"
        store = ObjectStore(EmbeddedS3.url, endpoint=endpoint, attempts=1, **keys)
        store.check()
    except (OSError, ValueError, TypeError, StoreUnavailable):
        return None
    return ObjectStore(EmbeddedS3.url, endpoint=endpoint, **keys)
