"""Where each tensor of a pack lies. The writer and the reader both compute it from here.

docs/pack-format.md describes the file. Offsets are bytes from the start of the data area.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .dense_targets import Cut

MAGIC = b"LRPXPACK"
PACK_VERSION = 1
PREAMBLE = "<8sIII"  # magic, version, header bytes, CRC32 of the header
DATA_ALIGN = 4096
TENSOR_ALIGN = 16
BLOCK_BYTES = 1024 * 1024  # of data under one CRC32
MAX_CHUNKS = 16


@dataclass(frozen=True)
class DenseEntry:
    """A dense projection in a pack. Weight shape [out, in_]; `cut` as in `DenseTarget`."""

    rank: int
    scale: float
    cut: Cut
    out: int
    in_: int

    @property
    def a_shape(self) -> tuple[int, int]:
        """As stored: [rank, in]; [in, rank] where the input is cut."""
        return (self.rank, self.in_) if self.cut == "column" else (self.in_, self.rank)

    @property
    def b_shape(self) -> tuple[int, int]:
        return (self.out, self.rank)


@dataclass(frozen=True)
class ExpertEntry:
    """The adapted experts of a layer. `rank` and `scale` hold (gate, up, down) per id."""

    ids: tuple[int, ...]
    rank: tuple[tuple[int, int, int], ...]
    scale: tuple[tuple[float, float, float], ...]
    fused_gate_up: bool
    shared_a13: bool
    shared_b2: bool

    def a13_rows(self, i: int) -> int:
        """Rows of the stored A13 of ids[i]: gate's then up's, or the one that both use."""
        gate, up, _ = self.rank[i]
        return gate if self.fused_gate_up else gate + up


@dataclass(frozen=True)
class PackLayer:
    """What a pack holds for one adapted layer."""

    index: int
    dense: Mapping[str, DenseEntry]
    experts: ExpertEntry | None


@dataclass(frozen=True)
class Geometry:
    """Sizes that hold for a whole pack. hidden H, intermediate I, itemsize in bytes."""

    hidden: int
    intermediate: int
    itemsize: int

    @cached_property
    def chunks(self) -> int:
        """Number of chunks that the intermediate dimension is stored in."""
        return math.gcd(self.intermediate, MAX_CHUNKS)

    @property
    def chunk_rows(self) -> int:
        return self.intermediate // self.chunks


@dataclass(frozen=True)
class Span:
    """One stored tensor: row-major `shape` at `offset`."""

    offset: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class ChunkSpans:
    """One expert's tensors in a chunk; offsets count from the start of the chunk."""

    gate: Span  # B of gate [Ic, r_gate]
    up: Span  # B of up [Ic, r_up]
    a2: Span  # A of down, transposed [Ic, r_down]


@dataclass(frozen=True)
class LayerSpans:
    """All tensors of one layer, in the order in which they are stored.

    Chunks have one size: chunk c starts at `chunk_start + c * chunk_bytes`.
    """

    replicated: tuple[int, int]  # section R: start and end
    cut: tuple[int, int]  # section C: start and end
    dense_a: Mapping[str, Span]
    dense_b: Mapping[str, Span]
    a13: tuple[Span, ...]  # one per expert; one alone when shared
    b2: tuple[Span, ...]
    chunk_start: int
    chunk_bytes: int
    chunk: tuple[ChunkSpans, ...]


class _Cursor:
    """Hands out aligned places for tensors, one after the other."""

    def __init__(self, at: int, itemsize: int) -> None:
        self.at = at
        self._itemsize = itemsize

    def take(self, shape: tuple[int, int]) -> Span:
        span = Span(self.at, shape)
        self.at = align(self.at + shape[0] * shape[1] * self._itemsize, TENSOR_ALIGN)
        return span


def align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def lay_out(layer: PackLayer, geometry: Geometry, start: int) -> LayerSpans:
    """Places the tensors of `layer`, whose first byte is at `start`."""
    cursor = _Cursor(start, geometry.itemsize)
    column = {name: e for name, e in layer.dense.items() if e.cut == "column"}
    row = {name: e for name, e in layer.dense.items() if e.cut == "row"}
    experts = layer.experts
    dense_a = {name: cursor.take(e.a_shape) for name, e in column.items()}
    dense_b = {name: cursor.take(e.b_shape) for name, e in row.items()}
    a13: list[Span] = []
    b2: list[Span] = []
    if experts is not None:
        count = len(experts.ids)
        for i in range(1 if experts.shared_a13 else count):
            a13.append(cursor.take((experts.a13_rows(i), geometry.hidden)))
        for i in range(1 if experts.shared_b2 else count):
            b2.append(cursor.take((geometry.hidden, experts.rank[i][2])))
    replicated_end = cursor.at

    dense_b |= {name: cursor.take(e.b_shape) for name, e in column.items()}
    dense_a |= {name: cursor.take(e.a_shape) for name, e in row.items()}
    chunk_start = cursor.at
    inside = _Cursor(0, geometry.itemsize)
    chunk = tuple(
        ChunkSpans(*(inside.take((geometry.chunk_rows, rank)) for rank in ranks))
        for ranks in (experts.rank if experts is not None else ())
    )
    return LayerSpans(
        replicated=(start, replicated_end),
        cut=(replicated_end, chunk_start + geometry.chunks * inside.at),
        dense_a=dense_a,
        dense_b=dense_b,
        a13=tuple(a13),
        b2=tuple(b2),
        chunk_start=chunk_start,
        chunk_bytes=inside.at,
        chunk=chunk,
    )
