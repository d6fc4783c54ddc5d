"""Reads slices of tensors of a safetensors file, by plain reads instead of page faults.

A read of megabytes at once runs at the disk's rate, and many run beside each other: no lock of
Python's is held meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import ModelFilesInvalid

_MAX_HEADER_BYTES = 128 << 20
# A slice whose runs are shorter is cut from longer ones: a disk reads this much as fast as a page.
_MIN_RUN_BYTES = 64 << 10
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file


class SafetensorsFile:
    """An open file. Any thread may read."""

    def __init__(self, path: Path):
        """
        Raises:
            ModelFilesInvalid: the file can't be read, isn't safetensors, or is cut short.
        """
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.tensors = self._read_header()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            self.close()
            raise ModelFilesInvalid(f"{path} can't be read as safetensors: {e}") from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(
        self, name: str, slices: Sequence[slice], allocate: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        """A part of a tensor, on the CPU and in the file's dtype.

        Args:
            slices: start and end for each dimension.
            allocate: gives so many bytes, uint8 [n]; the result is a view of them.

        Raises:
            ModelFilesInvalid: the file ends too early.
        """
        entry = self.tensors[name]
        shape, itemsize = entry.shape or (1,), entry.dtype.itemsize
        slices = slices or (slice(0, 1),)
        sizes = [s.stop - s.start for s in slices]
        # Before dimension `cut`, each index is a run of its own; those after it are read whole.
        cut = max((d for d, n in enumerate(shape) if sizes[d] != n), default=0)
        while cut > 0 and sizes[cut] * prod(shape[cut + 1 :]) * itemsize < _MIN_RUN_BYTES:
            cut -= 1
        inner = prod(shape[cut + 1 :])
        run = sizes[cut] * inner * itemsize
        outer = [range(s.start, s.stop) for s in slices[:cut]]
        data = allocate(prod(sizes[:cut]) * run)
        view = data.numpy().data
        strides = [prod(shape[d + 1 :]) for d in range(cut)]
        first = slices[cut].start * inner
        for n, index in enumerate(product(*outer)):
            element = first + sum(i * stride for i, stride in zip(index, strides, strict=True))
            self._fill(view[n * run : (n + 1) * run], entry.start + element * itemsize)
        read = data.view(entry.dtype).view([*sizes[: cut + 1], *shape[cut + 1 :]])
        part = read[(slice(None),) * (cut + 1) + tuple(slices[cut + 1 :])]
        return part if entry.shape else part[0]

    def _fill(self, view: memoryview, at: int) -> None:
        while len(view):
            n = os.preadv(self._fd, [view], at)
            if n == 0:
                raise ModelFilesInvalid(f"{self.path} ends before byte {at + len(view)}")
            view, at = view[n:], at + n

    def _read_header(self) -> dict[str, TensorEntry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        header: dict[str, dict[str, Any]] = json.loads(os.pread(self._fd, length, 8))
        tensors = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            if info["dtype"] not in _DTYPES:
                raise ValueError(f"tensor {name!r} has the dtype {info['dtype']}")
            dtype, shape = _DTYPES[info["dtype"]], tuple(info["shape"])
            start, end = (8 + length + offset for offset in info["data_offsets"])
            if end - start != prod(shape) * dtype.itemsize or end > size:
                raise ValueError(
                    f"tensor {name!r} would be bytes {start} to {end} of {size}; is the file cut "
                    "short?"
                )
            tensors[name] = TensorEntry(dtype, shape, start)
        return tensors
