"""Writing a pack file in one sequential pass. docs/pack-format.md describes the format."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .canonical import NUMPY_DTYPES, CanonicalAdapter, CanonicalLayer, ExpertFactors, to_dtype
from .digest import adapter_digest
from .errors import AdapterRefused
from .pack import layer_to_json
from .pack_layout import (
    BLOCK_BYTES,
    DATA_ALIGN,
    MAGIC,
    PACK_VERSION,
    PREAMBLE,
    TENSOR_ALIGN,
    DenseEntry,
    ExpertEntry,
    Geometry,
    PackLayer,
    align,
    lay_out,
)


def write_pack(
    path: str | os.PathLike[str], adapter: CanonicalAdapter, digest: str | None = None
) -> int:
    """Writes `adapter` as a pack. The file appears whole or not at all.

    Args:
        path: replaced when it exists.
        digest: of `adapter`, when it is known already.

    Returns:
        The file's size in bytes.

    Raises:
        AdapterRefused: no projection has a rank above 0, so there is nothing to serve.
    """
    path = Path(path)
    base = adapter.base
    itemsize = NUMPY_DTYPES[adapter.dtype].itemsize
    geometry = Geometry(base.hidden, base.moe_intermediate, itemsize)
    pack_layers = [_pack_layer(layer, adapter) for layer in adapter.layers]
    entries, at = [], 0
    for pack_layer in pack_layers:
        spans = lay_out(pack_layer, geometry, at)
        entries.append(layer_to_json(pack_layer, spans))
        at = spans.cut[1]
    if at == 0:
        raise AdapterRefused(
            "empty_adapter",
            "the adapter changes nothing: it has no layers, or all of its ranks are 0; train it "
            "with r of 1 or more",
        )
    header = {
        "digest": digest or adapter_digest(adapter),
        "base_fingerprint": base.fingerprint,
        "dtype": adapter.dtype,
        "hidden": base.hidden,
        "intermediate": base.moe_intermediate,
        "data_bytes": at,
        # Of fixed width: the header's length must be known before the data are.
        "crc32": "0" * 8 * -(-at // BLOCK_BYTES),
        "layers": entries,
    }
    data_start = align(struct.calcsize(PREAMBLE) + len(_encode(header)), DATA_ALIGN)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.seek(data_start)
            data = _DataWriter(file, adapter.dtype)
            for layer, pack_layer in zip(adapter.layers, pack_layers, strict=True):
                for tensor in _tensors(layer, pack_layer, geometry):
                    data.write(tensor)
            written = data.finish()
            if written != at:
                raise RuntimeError(f"{path}: wrote {written} bytes of data, planned {at}")
            header["crc32"] = "".join(f"{crc:08x}" for crc in data.crcs)
            raw = _encode(header)
            preamble = struct.pack("<8sII", MAGIC, PACK_VERSION, len(raw))
            crc = zlib.crc32(raw, zlib.crc32(preamble))
            file.seek(0)
            file.write(preamble + struct.pack("<I", crc) + raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return data_start + at


def _encode(header: dict[str, object]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _pack_layer(layer: CanonicalLayer, adapter: CanonicalAdapter) -> PackLayer:
    targets = adapter.base.dense_targets
    dense = {
        name: DenseEntry(
            f.rank, f.scale, targets[name].cut, out=targets[name].out, in_=targets[name].in_
        )
        for name, f in layer.dense.items()
    }
    if not layer.experts:
        return PackLayer(layer.index, dense, None)
    experts = ExpertEntry(
        ids=tuple(layer.experts),
        rank=tuple(e.rank for e in layer.experts.values()),
        scale=tuple(e.scale for e in layer.experts.values()),
        fused_gate_up=layer.fused_gate_up,
        shared_a13=layer.shared_a13,
        shared_b2=layer.shared_b2,
    )
    return PackLayer(layer.index, dense, experts)


def _tensors(layer: CanonicalLayer, entry: PackLayer, geometry: Geometry) -> Iterator[np.ndarray]:
    """The layer's tensors in the order of `lay_out`, each as it is stored."""
    column = [f for name, f in layer.dense.items() if entry.dense[name].cut == "column"]
    row = [f for name, f in layer.dense.items() if entry.dense[name].cut == "row"]
    experts = list(layer.experts.values())
    yield from (f.a for f in column)
    yield from (f.b for f in row)
    for expert in experts[:1] if layer.shared_a13 else experts:
        yield from _a13(expert, layer.fused_gate_up)
    for expert in experts[:1] if layer.shared_b2 else experts:
        if expert.down is not None:
            yield expert.down.b

    yield from (f.b for f in column)
    yield from (f.a.T for f in row)
    for chunk in range(geometry.chunks):
        rows = slice(chunk * geometry.chunk_rows, (chunk + 1) * geometry.chunk_rows)
        for expert in experts:
            if expert.gate is not None:
                yield expert.gate.b[rows]
            if expert.up is not None:
                yield expert.up.b[rows]
            if expert.down is not None:
                yield expert.down.a[:, rows].T


def _a13(expert: ExpertFactors, fused: bool) -> Iterator[np.ndarray]:
    """Gate's and up's A as one tensor; a missing one has no rows."""
    parts = (expert.gate,) if fused else (expert.gate, expert.up)
    arrays = [f.a for f in parts if f is not None]
    if arrays:
        yield np.concatenate(arrays)


class _DataWriter:
    """Appends tensors, each padded to the alignment, and keeps the CRC32 of every block."""

    def __init__(self, file: BinaryIO, dtype: str) -> None:
        self.crcs: list[int] = []
        self._file = file
        self._dtype = dtype
        self._block = bytearray()
        self._flushed = 0

    def write(self, tensor: np.ndarray) -> None:
        data = np.ascontiguousarray(to_dtype(tensor, self._dtype))
        self._block += data.data.cast("B") if data.size else b""
        self._block += bytes(-len(self._block) % TENSOR_ALIGN)
        while len(self._block) >= BLOCK_BYTES:
            self._flush()

    def finish(self) -> int:
        """Writes what is left; returns the number of bytes of data."""
        if self._block:
            self._flush()
        return self._flushed

    def _flush(self) -> None:
        block = self._block[:BLOCK_BYTES]
        del self._block[:BLOCK_BYTES]
        self.crcs.append(zlib.crc32(block))
        self._file.write(block)
        self._flushed += len(block)
