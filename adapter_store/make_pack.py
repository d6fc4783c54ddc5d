"""Upload in, pack out: the one call that publishing makes, and remaking an outdated pack."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .base_model import BaseModel
from .digest import adapter_digest
from .pack_writer import write_pack
from .peft_format import AdapterFormat, load_adapter


@dataclass(frozen=True)
class PackInfo:
    """What the catalogue records of an adapter. `nbytes` is the pack's size."""

    digest: str
    nbytes: int
    rank_max: int
    format: AdapterFormat
    targets: tuple[str, ...]
    dtype: str


def make_pack(
    config: bytes,
    weights_path: str | os.PathLike[str],
    base: BaseModel,
    pack_path: str | os.PathLike[str],
) -> PackInfo:
    """Validates an adapter, computes its digest and writes its pack.

    The same source makes the same pack, so this also remakes a pack of an older version.

    Raises:
        AdapterRefused: nothing is written then.
        OSError: a file can't be read or written.
    """
    loaded = load_adapter(config, weights_path, base)
    adapter = loaded.adapter
    digest = adapter_digest(adapter)
    nbytes = write_pack(pack_path, adapter, digest)
    return PackInfo(digest, nbytes, adapter.rank_max, loaded.format, adapter.targets, adapter.dtype)
