"""How a layer of a pack comes into the pool: bytes to stage, and pieces to scatter from there.

A piece is rows that lie side by side in the pack. Bytes between the pieces that a rank needs are
left out where they are many: other ranks' chunks and experts. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...adapter_store import LayerSpans, PackLayoutError
from .pool_blocks import BlockGroup, LayerBlocks, Part

# Of the pool: one program writes a piece, so the largest shouldn't take much longer than the rest.
_PIECE_BYTES = 64 << 10
# What two copies to a GPU cost more than one, in bytes: a few microseconds at 50 GB/s.
_GAP_BYTES = 64 << 10
_STAGE_ALIGN = 16  # bytes


@dataclass(frozen=True)
class Stage:
    """As much of a layer as is staged at a time.

    Attributes:
        copies: (start, stop, at): bytes from the layer's start, and where they are staged.
        nbytes: staged.
        low, high: the pieces.
    """

    copies: tuple[tuple[int, int, int], ...]
    nbytes: int
    low: int
    high: int


@dataclass(frozen=True)
class LayerPieces:
    """Of layers of one shape.

    Attributes:
        table: int64 [P, 5], as `kernels.scatter_pieces_` has them, but that a piece's place is
            counted from its block.
        block: int64 [P], of the layer's blocks.
        flat: as `kernels.scatter_pieces_` has it, where all blocks begin at multiples of 8.
    """

    table: np.ndarray
    block: np.ndarray
    stages: tuple[Stage, ...]
    flat: bool


@dataclass(frozen=True)
class Chunks:
    """Chunks of I that a rank reads: `count` from `first` on, of `rows` rows each."""

    first: int
    count: int
    rows: int

    @classmethod
    def of(cls, intermediate: int, chunks: int, tp_rank: int, tp_size: int) -> Chunks:
        """
        Raises:
            PackLayoutError: tp_size doesn't divide the number of chunks.
        """
        if chunks % tp_size:
            raise PackLayoutError(
                f"rank {tp_rank} of {tp_size} can't be cut: packs of this model store the "
                f"intermediate size {intermediate} in {chunks} chunks, so the tensor-parallel size "
                f"of experts must divide {chunks}"
            )
        mine = chunks // tp_size
        return cls(tp_rank * mine, mine, intermediate // chunks)


def layer_pieces(
    blocks: LayerBlocks, spans: LayerSpans, itemsize: int, chunks: Chunks, room: int
) -> LayerPieces:
    """
    Args:
        spans: where the tensors lie in a pack of such a layer.
        itemsize: bytes of an element there.
        room: bytes that can be staged.

    Raises:
        PackLayoutError: the pack's tensors have other shapes than the model's.
    """
    found = [_pieces(part, spans, itemsize, chunks) + nth for part, nth in _numbered(blocks.groups)]
    pieces = np.concatenate(found, axis=1) if found else np.zeros((6, 0), np.int64)
    pieces = _split(pieces[:, pieces[2] > 0], itemsize)
    start, shift, rows, columns, stored, block = pieces[:, np.argsort(pieces[0], kind="stable")]
    nbytes = rows * columns * itemsize
    reads = np.flatnonzero(nbytes)
    at = np.zeros_like(start)
    stages = tuple(_stages(start, nbytes, reads, at, room))
    table = np.stack([at // itemsize, shift, rows * stored, columns, stored], axis=1)
    straight = (columns == stored) | (columns == 0)
    flat = bool(straight.all()) and not (table[:, :3] % 8).any()
    return LayerPieces(np.ascontiguousarray(table), block, stages, flat)


def _numbered(groups: tuple[BlockGroup, ...]) -> Iterator[tuple[Part, np.ndarray]]:
    """Every part, with [6, 1] that adds its group's first block to the last row."""
    first = 0
    for group in groups:
        for part in group.parts:
            yield part, np.array([[0], [0], [0], [0], [0], [first]])
        first += group.entries.size


def _pieces(part: Part, spans: LayerSpans, itemsize: int, chunks: Chunks) -> np.ndarray:
    """int64 [6, n]: first byte, shift in the block, rows, columns, stored columns, block."""
    block = np.arange(part.rows.size)
    if part.spans is None:  # zeros; they sort before whatever is read
        start = np.full(block.size, -1)
        return np.stack([start, part.shift, part.rows, part.columns, part.stored, block])
    tensors = part.spans(spans)
    offset = np.array([t.offset for t in tensors], np.int64)
    shapes = np.array([t.shape for t in tensors], np.int64).reshape(-1, 2)
    rows = np.full_like(part.rows, chunks.rows) if part.chunked else part.rows
    if (shapes[:, 0] < part.first_row + rows).any() or (shapes[:, 1] != part.columns).any():
        raise PackLayoutError(
            f"a pack's tensors of shapes {shapes.tolist()[:3]}... are to have {rows.tolist()[:3]} "
            f"rows or more and {part.columns.tolist()[:3]} columns: it is another model's"
        )
    start = offset + part.first_row * part.columns * itemsize
    if not part.chunked:
        start -= spans.replicated[0]
        return np.stack([start, part.shift, rows, part.columns, part.stored, block])
    c = np.arange(chunks.count)[:, None]
    start = start + spans.chunk_start - spans.replicated[0]
    start = start + (chunks.first + c) * spans.chunk_bytes
    shift = part.shift + c * chunks.rows * part.stored
    each = [np.broadcast_to(x, start.shape) for x in (rows, part.columns, part.stored, block)]
    return np.stack([start, shift, *each]).reshape(6, -1)


def _split(pieces: np.ndarray, itemsize: int) -> np.ndarray:
    """The same, none larger than _PIECE_BYTES but for single runs of 8 rows."""
    _, _, rows, columns, stored, _ = pieces
    most = np.maximum(_PIECE_BYTES // (itemsize * np.maximum(stored, 1)) // 8 * 8, 8)
    count = -(-rows // most)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start, shift, rows, columns, stored, block = np.repeat(pieces, count, axis=1)
    done = nth * np.repeat(most, count)
    rows = np.minimum(rows - done, np.repeat(most, count))
    start = start + done * columns * itemsize
    return np.stack([start, shift + done * stored, rows, columns, stored, block])


def _stages(
    start: np.ndarray, nbytes: np.ndarray, reads: np.ndarray, at: np.ndarray, room: int
) -> Iterator[Stage]:
    """Cuts sorted pieces into stages of at most `room` bytes; `at` takes where each is staged.

    Args:
        reads: those pieces that aren't zeros, which go with the first stage.
    """
    low = 0
    if not reads.size and start.size:
        yield Stage((), 0, 0, start.size)
    stop = start + nbytes
    begins = start // _STAGE_ALIGN * _STAGE_ALIGN  # each could begin a range
    gaps = start[reads[1:]] - stop[reads[:-1]]
    ends = np.append(np.flatnonzero(gaps > _GAP_BYTES) + 1, reads.size)
    while low < reads.size:
        copies: list[tuple[int, int, int]] = []
        staged, nth = 0, low
        while nth < reads.size:
            # A range of pieces without large gaps, as far as there is room.
            end = int(ends[np.searchsorted(ends, nth, "right")])
            first = int(begins[reads[nth]])
            fits = int(np.searchsorted(stop[reads[nth:end]], first + room - staged, "right"))
            if fits == 0:
                break
            part = reads[nth : nth + fits]
            at[part] = staged + start[part] - first
            last = int(stop[part[-1]])
            copies.append((first, last, staged))
            staged += -(-(last - first) // _STAGE_ALIGN) * _STAGE_ALIGN
            nth += fits
            if nth < end:
                break
        if nth == low:
            raise PackLayoutError(f"a piece of {nbytes[reads[low]]} bytes, {room} can be staged")
        yield Stage(
            tuple(copies),
            staged,
            0 if low == 0 else int(reads[low]),
            start.size if nth == reads.size else int(reads[nth]),
        )
        low = nth
