"""A mapped safetensors file of LoRA factors: tensors are views, nothing is loaded twice."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from .canonical import NUMPY_DTYPES
from .errors import AdapterRefused
from .quoting import safe_key, show
from .safetensors_header import TensorInfo, read_header

# Exponent bits: all ones mean infinite or NaN.
_EXPONENT = {"F32": np.uint32(0x7F800000), "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}
_SLICE = 1 << 20  # elements looked at together, so that the check needs a few MB whatever the size


class WeightsFile:
    """The tensors of a safetensors file. Views stay valid while anyone holds them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises: AdapterRefused ("not_safetensors", "bad_header", "empty_adapter"), OSError."""
        self.header = read_header(path)
        if not self.header.tensors:
            raise AdapterRefused("empty_adapter", "the weights file holds no tensor")
        with Path(path).open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, info: TensorInfo) -> np.ndarray:
        """A tensor as a read-only view; BF16 as uint16 bits."""
        dtype = NUMPY_DTYPES[info.dtype]
        count = (info.end - info.start) // dtype.itemsize
        return np.frombuffer(self._data, dtype, count, info.start).reshape(info.shape)

    def check_finite(self) -> None:
        """Raises: AdapterRefused ("non_finite"), naming the first tensor with such a value."""
        for info in self.header.tensors.values():
            mask = _EXPONENT[info.dtype]
            bits = self.array(info).reshape(-1).view(mask.dtype)
            for start in range(0, bits.size, _SLICE):
                if (bits[start : start + _SLICE] & mask).max() == mask:
                    raise AdapterRefused(
                        "non_finite",
                        f"tensor {show(info.name)} holds NaN or infinite values",
                        safe_key(info.name),
                    )


def check_dtype(info: TensorInfo) -> None:
    """Raises: AdapterRefused ("unsupported_dtype")."""
    if info.dtype not in NUMPY_DTYPES:
        raise AdapterRefused(
            "unsupported_dtype",
            f"tensor {show(info.name)} is {info.dtype}; factors are F32, F16 or BF16",
            safe_key(info.name),
        )
