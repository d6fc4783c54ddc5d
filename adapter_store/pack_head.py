"""The first bytes of a pack: what the rest must be, known before the rest is there."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PackCorrupt, PackVersionError
from .pack_layout import BLOCK_BYTES, DATA_ALIGN, MAGIC, PACK_VERSION, PREAMBLE, align

_PREAMBLE_BYTES = struct.calcsize(PREAMBLE)


class HeadCut(Exception):
    """More of the file is needed: its first `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"the header ends at byte {nbytes}")
        self.nbytes = nbytes


@dataclass(frozen=True)
class PackHead:
    """A header whose own checksum is right.

    Args:
        fields: the header. data_start: where the data area begins. nbytes: of the whole pack.
        path: for messages.
    """

    fields: dict[str, Any]
    data_start: int
    nbytes: int
    path: Path

    @classmethod
    def parse(cls, view: memoryview, nbytes: int, path: Path) -> PackHead:
        """
        Args:
            view: the pack's first bytes, or all. nbytes: of the whole pack, as it is.

        Raises:
            HeadCut: `view` is too short. PackCorrupt, PackVersionError: see `Pack.open`.
        """
        if nbytes < _PREAMBLE_BYTES:
            raise PackCorrupt(f"{path} has {nbytes} bytes, too few for a pack")
        preamble = bytes(view[:_PREAMBLE_BYTES])
        magic, version, length, crc = struct.unpack(PREAMBLE, preamble)
        if magic != MAGIC:
            raise PackCorrupt(f"{path} isn't a pack: it begins with {magic!r}, not {MAGIC!r}")
        if version != PACK_VERSION:
            raise PackVersionError(
                f"{path} is of pack version {version}, this program reads {PACK_VERSION}; "
                "remake it from its source"
            )
        end = _PREAMBLE_BYTES + length
        if len(view) < end <= nbytes:
            raise HeadCut(end)
        raw = view[_PREAMBLE_BYTES:end]
        if len(raw) != length or zlib.crc32(raw, zlib.crc32(preamble[:-4])) != crc:
            raise PackCorrupt(f"{path}: the header doesn't match its checksum")
        try:
            fields = json.loads(bytes(raw))
            head = cls(fields, align(end, DATA_ALIGN), nbytes, path)
            expected = head.data_start + fields["data_bytes"]
            blocks, stated = -(-fields["data_bytes"] // BLOCK_BYTES), len(fields["crc32"])
        except (KeyError, TypeError, ValueError) as error:
            raise PackCorrupt(f"{path}: the header lacks or mistypes {error}") from error
        if nbytes != expected:
            raise PackCorrupt(f"{path} has {nbytes} bytes, {expected} were written")
        if stated != 8 * blocks:
            raise PackCorrupt(f"{path}: {stated // 8} checksums for {blocks} blocks")
        return head

    @property
    def digest(self) -> str:
        return self.fields["digest"]

    def spans(self, nbytes: int) -> list[tuple[int, int]]:
        """The data area in ranges (start, stop) of about `nbytes` that `check` can check."""
        step = max(nbytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        starts = range(self.data_start, self.nbytes, step)
        return [(start, min(start + step, self.nbytes)) for start in starts]

    def check(self, view: memoryview, start: int, stop: int) -> None:
        """Compares the checksums of whole blocks.

        Args:
            view: the pack. start, stop: one of `spans`, or all of the data area.

        Raises:
            PackCorrupt: naming the block.
        """
        crcs: str = self.fields["crc32"]
        for low in range(start, stop, BLOCK_BYTES):
            high = min(low + BLOCK_BYTES, stop)
            block = (low - self.data_start) // BLOCK_BYTES
            if zlib.crc32(view[low:high]) != int(crcs[8 * block :][:8], 16):
                raise PackCorrupt(f"{self.path}: bytes {low} to {high} don't match their checksum")
