"""Reading a pack file: numpy views over one mapping, no copy but where chunks are joined."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .canonical import NUMPY_DTYPES, DtypeName
from .errors import PackCorrupt, PackLayoutError
from .host_entry import ENTRY_BYTES, is_entry, map_entry
from .pack_head import PackHead
from .pack_layout import (
    DenseEntry,
    ExpertEntry,
    Geometry,
    LayerSpans,
    PackLayer,
    Span,
    lay_out,
)


class Pack:
    """An open pack. Arrays are read-only; those without a copy stay valid while anyone holds them.

    BF16 comes as uint16 bits. Where a method takes `layer`, give the PackLayer or its model index.

    Attributes:
        path: the file. nbytes: its size.
        digest: of the adapter, sha256 hex. base_fingerprint: of the model that it is made for.
        dtype: of every factor. hidden: H. intermediate: I. chunks: parts that I is stored in,
            the largest tensor-parallel size that it can be cut for.
        layers: the adapted layers, ascending by index.
        memory: the whole pack as it is stored, [nbytes] uint8: one range of addresses, for who
            copies layers at a time. Read-only; keep the Pack, `memory` or a view of it until a
            copy has ended.
        arena: of a pack in the host tier, this process's one mapping of all of that tier, which
            `memory` is a part of: who pins it once has pinned every pack. Else None.
    """

    def __init__(self, path: Path, memory: np.ndarray, head: PackHead, arena: np.ndarray | None):
        header = head.fields
        self.path = path
        self.memory = memory
        self.arena = arena
        self.nbytes = len(memory)
        self.digest: str = header["digest"]
        self.base_fingerprint: str = header["base_fingerprint"]
        self.dtype: DtypeName = header["dtype"]
        self.hidden: int = header["hidden"]
        self.intermediate: int = header["intermediate"]
        self._numpy_dtype = NUMPY_DTYPES[self.dtype]
        self._geometry = Geometry(self.hidden, self.intermediate, self._numpy_dtype.itemsize)
        self.chunks = self._geometry.chunks
        self.layers = tuple(_layer_from_json(entry) for entry in header["layers"])
        self._data_start = head.data_start
        self._spans: dict[int, LayerSpans] = {}  # of layers that were asked for
        self._starts: dict[int, tuple[PackLayer, int]] = {}
        self._stops: dict[int, int] = {}
        self._entries = {layer.index: layer.experts for layer in self.layers}
        at = 0
        sizes: dict[Any, LayerSpans] = {}  # layers are alike, mostly: what one takes, all take
        for layer, entry in zip(self.layers, header["layers"], strict=True):
            shape = _shape(layer)
            if shape not in sizes:
                sizes[shape] = lay_out(layer, self._geometry, 0)
            sections = [*sizes[shape].replicated, *sizes[shape].cut]
            if [at + n for n in sections] != [*entry["replicated"], *entry["cut"]]:
                raise PackCorrupt(f"{path}: the sections of layer {layer.index} don't add up")
            self._starts[layer.index] = layer, at
            at += sections[-1]
            self._stops[layer.index] = at
        if at != header["data_bytes"]:
            raise PackCorrupt(f"{path}: layers end at byte {at} of {header['data_bytes']}")

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Pack:
        """Maps a pack: a file, or one in the host tier, where it stays for as long as anyone
        holds the Pack or a view of it.

        Args:
            verify: check every block's CRC32, which reads the whole file. The header's is always
                checked, and so is the file's size.

        Raises:
            PackCorrupt: the bytes aren't those that were written.
            PackVersionError: another format version; remake the pack from its source.
            FileNotFoundError: it was evicted. OSError: the file can't be read.
        """
        path = Path(path)
        memory, arena = _map(path)
        head = PackHead.parse(memory.data, len(memory), path)
        if verify:
            head.check(memory.data, head.data_start, head.nbytes)
        try:
            return cls(path, memory, head, arena)
        except (KeyError, TypeError, ValueError) as error:
            raise PackCorrupt(f"{path}: the header lacks or mistypes {error}") from error

    def layer_span(self, layer: PackLayer | int) -> tuple[int, int]:
        """Start and stop of all of a layer's bytes in `memory`: section R, then section C."""
        index = _index(layer)
        if index not in self._stops:
            self._layer(layer)  # says what there is
        return self._data_start + self._starts[index][1], self._data_start + self._stops[index]

    def spans(self, layer: PackLayer | int) -> LayerSpans:
        """Where the layer's tensors lie; its first byte is at `replicated[0]`."""
        return self._layer(layer)

    def dense_a(
        self, layer: PackLayer | int, target: str, rows: tuple[int, int] | None = None
    ) -> np.ndarray:
        """A of a dense target: [r, in]; transposed, [in, r], where cut is "row".

        Args:
            rows: (low, high) takes that part of dimension 0.
        """
        return self._rows(self._dense(layer, target).dense_a[target], rows)

    def dense_b(
        self, layer: PackLayer | int, target: str, rows: tuple[int, int] | None = None
    ) -> np.ndarray:
        """B of a dense target, [out, r]. Arguments as for `dense_a`."""
        return self._rows(self._dense(layer, target).dense_b[target], rows)

    def a13(self, layer: PackLayer | int, i: int) -> np.ndarray:
        """A of gate and up of expert ids[i]: [r_gate + r_up, H], gate first; fused: [r_gate, H]."""
        spans, experts = self._experts(layer, i)
        return self._view(spans.a13[0 if experts.shared_a13 else i])

    def b2(self, layer: PackLayer | int, i: int) -> np.ndarray:
        """B of down of expert ids[i], [H, r_down]."""
        spans, experts = self._experts(layer, i)
        return self._view(spans.b2[0 if experts.shared_b2 else i])

    def b13(
        self,
        layer: PackLayer | int,
        i: int,
        part: Literal["gate", "up"],
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> np.ndarray:
        """B of gate or up of expert ids[i]: this rank's rows, [I / tp_size, r]. A copy.

        Raises:
            PackLayoutError: tp_size doesn't divide the number of chunks.
        """
        spans, _ = self._experts(layer, i)
        chunk = spans.chunk[i]
        return self._join(spans, chunk.gate if part == "gate" else chunk.up, tp_rank, tp_size)

    def a2(self, layer: PackLayer | int, i: int, tp_rank: int = 0, tp_size: int = 1) -> np.ndarray:
        """A of down of expert ids[i], transposed: this rank's rows, [I / tp_size, r]. A copy.

        Raises:
            PackLayoutError: tp_size doesn't divide the number of chunks.
        """
        spans, _ = self._experts(layer, i)
        return self._join(spans, spans.chunk[i].a2, tp_rank, tp_size)

    def _dense(self, layer: PackLayer | int, target: str) -> LayerSpans:
        spans = self._layer(layer)
        if target not in spans.dense_a:
            raise PackLayoutError(
                f"{self.path}: layer {_index(layer)} has no {target!r}; it has "
                f"{', '.join(spans.dense_a) or 'no dense target'}"
            )
        return spans

    def _experts(self, layer: PackLayer | int, i: int) -> tuple[LayerSpans, ExpertEntry]:
        spans = self._layer(layer)
        experts = self._entries[_index(layer)]
        if experts is None or not 0 <= i < len(experts.ids):
            raise PackLayoutError(
                f"{self.path}: layer {_index(layer)} has {len(experts.ids) if experts else 0} "
                f"adapted experts, position {i} was asked for"
            )
        return spans, experts

    def _layer(self, layer: PackLayer | int) -> LayerSpans:
        index = _index(layer)
        if index not in self._starts:
            raise PackLayoutError(
                f"{self.path}: layer {index} isn't adapted; adapted: {sorted(self._starts)}"
            )
        if index not in self._spans:
            own, start = self._starts[index]
            self._spans[index] = lay_out(own, self._geometry, start)
        return self._spans[index]

    def _view(self, span: Span, shift: int = 0) -> np.ndarray:
        rows, columns = span.shape
        start = self._data_start + span.offset + shift
        stop = start + rows * columns * self._numpy_dtype.itemsize
        return self.memory[start:stop].view(self._numpy_dtype).reshape(span.shape)

    def _rows(self, span: Span, rows: tuple[int, int] | None) -> np.ndarray:
        view = self._view(span)
        if rows is None:
            return view
        low, high = rows
        if not 0 <= low <= high <= span.shape[0]:
            raise PackLayoutError(f"rows {low}:{high} of a tensor of {span.shape[0]} rows")
        return view[low:high]

    def _join(self, spans: LayerSpans, span: Span, tp_rank: int, tp_size: int) -> np.ndarray:
        if tp_size < 1 or self.chunks % tp_size or not 0 <= tp_rank < tp_size:
            raise PackLayoutError(
                f"rank {tp_rank} of {tp_size} can't be cut: this pack stores the intermediate "
                f"size {self.intermediate} in {self.chunks} chunks, so the tensor-parallel size "
                f"must divide {self.chunks}"
            )
        mine = self.chunks // tp_size
        first = spans.chunk_start + tp_rank * mine * spans.chunk_bytes
        parts = [self._view(span, first + c * spans.chunk_bytes) for c in range(mine)]
        return np.concatenate(parts)


def _shape(layer: PackLayer) -> Any:
    """Equal of layers whose tensors have the same places."""
    x = layer.experts
    dense = tuple((name, e.rank, e.cut, e.out, e.in_) for name, e in layer.dense.items())
    return dense, x and (x.rank, x.fused_gate_up, x.shared_a13, x.shared_b2)


def _index(layer: PackLayer | int) -> int:
    return layer if isinstance(layer, int) else layer.index


def _map(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The pack's bytes, and the arena that they are in."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise PackCorrupt(f"{path} has 0 bytes, too few for a pack")
        if not is_entry(file.read(ENTRY_BYTES)):
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(data, np.uint8), None
    return map_entry(path)


def layer_to_json(layer: PackLayer, spans: LayerSpans) -> dict[str, Any]:
    """The header's entry of one layer; `_layer_from_json` reads it."""
    entry: dict[str, Any] = {
        "index": layer.index,
        "replicated": spans.replicated,
        "cut": spans.cut,
        "dense": {name: vars(e) for name, e in layer.dense.items()},
    }
    if layer.experts is not None:
        entry["experts"] = vars(layer.experts)
    return entry


def _layer_from_json(entry: dict[str, Any]) -> PackLayer:
    experts = entry.get("experts")
    return PackLayer(
        index=entry["index"],
        dense={name: DenseEntry(**e) for name, e in sorted(entry["dense"].items())},
        experts=experts
        and ExpertEntry(
            **experts
            | {
                "ids": tuple(experts["ids"]),
                "rank": tuple(tuple(r) for r in experts["rank"]),
                "scale": tuple(tuple(s) for s in experts["scale"]),
            }
        ),
    )
