"""A pack's place in the host tier: a small file that names it, and its bytes as an array.

The file stands for the pack: it is there when the pack is, its lock pins the pack, and its path is
what processes of the node tell each other. Layout: magic, offset and size of the pack in the file
`arena` of the folder above.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import weakref
from pathlib import Path

import numpy as np

from .errors import PackCorrupt
from .pins import PackPin

ARENA = "arena"
_MAGIC = b"LRPXHOST"
_ENTRY = "<8sQQ"
ENTRY_BYTES = struct.calcsize(_ENTRY)

_lock = threading.Lock()
_mappings: dict[tuple[int, int], np.ndarray] = {}  # by the arena's device and inode


def entry(offset: int, nbytes: int) -> bytes:
    return struct.pack(_ENTRY, _MAGIC, offset, nbytes)


def is_entry(data: bytes) -> bool:
    return len(data) == ENTRY_BYTES and data.startswith(_MAGIC)


def parse_entry(data: bytes) -> tuple[int, int]:
    """(offset, bytes)."""
    _, offset, nbytes = struct.unpack(_ENTRY, data)
    return offset, nbytes


def map_entry(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A pack's bytes [nbytes] uint8, read-only, and the arena that they are in.

    The pack is pinned until nobody holds that array or a view of it any more.

    Raises:
        FileNotFoundError: it was evicted.
    """
    pin = PackPin(path)
    try:
        offset, nbytes = parse_entry(os.pread(pin.fd, ENTRY_BYTES, 0))
        arena = map_arena(path.parent.parent / ARENA)
        if offset + nbytes > len(arena):
            raise PackCorrupt(f"{path} names bytes {offset} to {offset + nbytes} of {len(arena)}")
        # Straight from the mapping, so that numpy keeps this array as the base of all its views.
        assert arena.base is not None
        memory = np.frombuffer(arena.base, np.uint8, nbytes, offset)
        memory.flags.writeable = False
        weakref.finalize(memory, pin.close)
    except BaseException:
        pin.close()
        raise
    return memory, arena


def host_memory(folder: Path) -> np.ndarray:
    """All of the memory of the host tier in `folder`, [bytes] uint8: for who pins it for a GPU.

    Raises:
        FileNotFoundError: no tier uses the folder.
    """
    return map_arena(folder / ARENA)


def map_arena(path: Path) -> np.ndarray:
    """All of an arena, [bytes] uint8, writeable: one mapping in this process, for good, as it may
    have been pinned for a GPU."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        stat = os.fstat(fd)
        with _lock:
            found = _mappings.get((stat.st_dev, stat.st_ino))
            if found is None:
                data = mmap.mmap(fd, stat.st_size)
                found = np.frombuffer(data, np.uint8)
                _mappings[stat.st_dev, stat.st_ino] = found
        return found
    finally:
        os.close(fd)
