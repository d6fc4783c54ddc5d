"""Bounded reading of a safetensors header: nothing is trusted, nothing large is allocated first.

Format: u64 little-endian header length, that many bytes of JSON, then the data, to which the
header's `data_offsets` are relative. As in the reference implementation, tensors must cover the
data exactly: no gap, no overlap, nothing left at the end.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import AdapterRefused
from .quoting import printable, safe_key, show

# 48 layers x 128 experts x 3 projections x 2 factors are 37 thousand keys and 5 MB of header.
MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 8

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

# First bytes of what people upload instead.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `start` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header; `tensors` are in the order of their data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises:
        AdapterRefused: code "not_safetensors" or "bad_header".
        OSError: the file can't be read.
    """
    with Path(path).open("rb") as file:
        return _read(file, os.fstat(file.fileno()).st_size)


def _read(file: BinaryIO, file_bytes: int) -> Header:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > file_bytes - 8:
        what = next((w for magic, w in _FOREIGN.items() if prefix.startswith(magic)), None)
        problem = (
            f"it is {what}"
            if what
            else f"its header should have {length} bytes, {file_bytes - len(prefix)} follow"
        )
        raise AdapterRefused(
            "not_safetensors",
            f"the weights aren't a whole safetensors file: {problem}; "
            "upload adapter_model.safetensors",
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterRefused(
            "bad_header", f"the header has {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    return parse_header(file.read(length), file_bytes)


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """Checks header JSON `raw` of a file of `file_bytes` bytes.

    Raises:
        AdapterRefused: code "bad_header", naming the tensor.
    """
    entries = _load_json(raw)
    metadata = _metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise AdapterRefused(
            "bad_header", f"the header lists {len(entries)} tensors, at most {MAX_TENSORS} are read"
        )
    data_start = 8 + len(raw)
    infos = [_tensor(name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda t: (t.start, t.end))
    at = data_start
    for info in infos:
        if info.start != at:
            problem = "overlaps the tensor before it" if info.start < at else "leaves a gap"
            raise _bad(info.name, f"its data starts at {info.start - data_start} and {problem}")
        at = info.end
    if at > file_bytes:
        cut = next(info.name for info in infos if info.end > file_bytes)
        raise AdapterRefused(
            "bad_header",
            f"the weights file is cut short: it has {file_bytes} bytes, and by its header {at}; "
            f"tensor {show(cut)} is the first that isn't whole. Upload all of "
            "adapter_model.safetensors",
            safe_key(cut),
        )
    if at < file_bytes:
        raise AdapterRefused(
            "bad_header", f"{file_bytes - at} bytes at the end of the file belong to no tensor"
        )
    return Header({t.name: t for t in infos}, metadata, data_start)


def _load_json(raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    # RecursionError: JSON nested deeper than the interpreter's stack.
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(
            "bad_header", f"the safetensors header isn't valid JSON: {printable(str(error))}"
        ) from None
    if not isinstance(entries, dict):
        raise AdapterRefused("bad_header", "the safetensors header isn't a JSON object")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _bad(name, "it is listed twice")
            seen.add(name)
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON value")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise AdapterRefused(
            "bad_header", "__metadata__ must map strings to strings", "__metadata__"
        )
    return value


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(name, "its entry needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    size = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        raise _bad(name, f"its dtype {show(dtype)} isn't known")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _bad(name, f"its shape must be at most {MAX_DIMENSIONS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _bad(name, "its data_offsets must be two natural numbers")
    start, end = offsets
    if end - start != math.prod(shape) * size:
        raise _bad(
            name,
            f"{dtype} of shape {show(shape)} doesn't fill its data_offsets {show(offsets)}",
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _bad(name: str, problem: str) -> AdapterRefused:
    return AdapterRefused("bad_header", f"tensor {show(name)}: {problem}", safe_key(name))
