"""Small arrays between host and device: many in one copy, without waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

_ALIGN_BYTES = 16


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays on `device`, in one copy that the host doesn't wait for."""
    if not arrays:
        return {}
    starts, end = [], 0
    for array in arrays.values():
        starts.append(end)
        end += -(-array.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes_ = host.numpy()
    for start, array in zip(starts, arrays.values(), strict=True):
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        bytes_[start : start + array.nbytes] = flat
    there = host.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=True)
    }


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


class HostCopy:
    """Tensors on their way to the host, in one copy.

    Args:
        tensors: those of wider types first, which keeps every part aligned.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._like = [(t.shape, t.dtype, t.numel() * t.element_size()) for t in tensors]
        self._arrived: torch.cuda.Event | None = None
        packed = torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors])
        if packed.device.type != "cuda":
            self._host = packed.cpu()
            return
        self._host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
        self._host.copy_(packed, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors, on the host, in their order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        out, start = [], 0
        for shape, dtype, size in self._like:
            out.append(self._host[start : start + size].view(dtype).view(shape))
            start += size
        return out
