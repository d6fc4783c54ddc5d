"""Random weights in place of a checkpoint: what a model costs, from its config.json alone."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import torch

from .weights import TensorSource

_STD = 0.02  # about the `initializer_range` of published configs


class DummyCheckpoint(TensorSource):
    """Every tensor that is asked for: normal with standard deviation 0.02, ones for norms. FP8
    weights have codes of deviation 1 and scales of 0.02; of experts alone, for others would only be
    dequantised.

    Values follow from the tensor's name and the slices alone, so ranks agree on what they hold in
    common. They are made on the device, slice by slice: no more memory than the model itself.
    """

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self._lock = threading.Lock()
        self.read_bytes = 0  # of all that it gave

    def __contains__(self, name: str) -> bool:
        """Of several layouts, the loader takes the one that it asks for first."""
        return not name.endswith("_scale_inv") or ".experts." in name

    def read(
        self,
        name: str,
        shape: Sequence[int],
        slices: tuple[slice, ...],
        into: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        out = into
        if out is None:
            sizes = [s.stop - s.start for s in slices]
            out = torch.empty(sizes, dtype=dtype, device=self.device)
        with self._lock:
            self.read_bytes += out.nbytes
        if name.endswith("norm.weight"):
            return out.fill_(1)
        if name.endswith("_scale_inv"):
            return out.fill_(_STD)
        key = f"{name}{[(s.start, s.stop) for s in slices]}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
        generator = torch.Generator(self.device).manual_seed(seed)
        if out.dtype.itemsize == 1:
            values = torch.empty(out.shape, device=self.device)
            return out.copy_(values.normal_(generator=generator))
        return out.normal_(0, _STD, generator=generator)
