"""Small tensors between host and device: one copy each way, and no wait but the reader's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGN = 4  # elements: every part starts at 16 bytes, so that kernels are compiled once


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int32 tensors of the values of `arrays`, on the device, of the same shapes.

    They share one buffer, which one copy fills; the host doesn't wait for it.
    """
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.size // _ALIGN) * _ALIGN
    on_gpu = device.type == "cuda"
    # torch's pinned memory isn't handed out again before the copies that read it are done.
    host = torch.empty(total, dtype=torch.int32, pin_memory=on_gpu)
    flat = host.numpy()
    for array, start in zip(arrays, starts, strict=True):
        flat[start : start + array.size] = array.reshape(-1)
    buffer = host.to(device, non_blocking=True) if on_gpu else host
    return [
        buffer[start : start + array.size].view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


class Readback:
    """Tensors on their way to the host, asked for without waiting."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._event: torch.cuda.Event | None = None
        self._host = list(tensors)
        if any(t.device.type == "cuda" for t in tensors):
            self._host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        """The values, when the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._host]
