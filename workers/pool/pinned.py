"""Host memory that a GPU copies from directly: mappings that are registered as pinned, once."""

from __future__ import annotations

import ctypes
import logging
import threading

import numpy as np
import torch

from ...adapter_store import Pack

log = logging.getLogger(__name__)

_PORTABLE, _READ_ONLY = 1, 8  # cudaHostRegisterPortable, cudaHostRegisterReadOnly


class PinnedMemory:
    """Which memory of this process is pinned. Several threads may ask."""

    def __init__(self, device: torch.device):
        self._device = device
        self._ranges: tuple[tuple[int, int], ...] = ()  # first address, end
        self._tried: set[int] = set()  # by address: one warning each is enough
        self._lock = threading.Lock()

    def register(self, memory: np.ndarray) -> bool:
        """Pins a mapping for as long as this process lives: it must be mapped as long.

        Without a GPU there is nothing to do. Where the system refuses, a warning says why, and
        packs in that memory take the way of all others, through a small pinned buffer.

        Args:
            memory: uint8 [n].

        Returns:
            Whether `holds(memory)` is true from now on.
        """
        if self._device.type != "cuda":
            return False
        with self._lock:
            if self.holds(memory):
                return True
            if memory.ctypes.data in self._tried:
                return False
            self._tried.add(memory.ctypes.data)
            flags = _PORTABLE if memory.flags.writeable else _PORTABLE | _READ_ONLY
            start = memory.ctypes.data
            runtime = torch.cuda.cudart()
            assert runtime is not None
            code = int(runtime.cudaHostRegister(start, memory.nbytes, flags))
            if code:
                self._forget_error()
                log.warning(
                    "%d bytes of host memory can't be pinned (CUDA error %d): adapters are copied "
                    "to the GPU through a buffer, at about half the speed. Raise the limit of "
                    "locked memory (ulimit -l unlimited; in a container --ulimit memlock=-1)",
                    memory.nbytes, code,
                )  # fmt: skip
                return False
            self._ranges = (*self._ranges, (start, start + memory.nbytes))
            return True

    def holds_pack(self, pack: Pack) -> bool:
        """Whether the pack's bytes are pinned. The first of those in the node's host tier has
        all of that pinned, unless it was at start: that takes a while."""
        arena = pack.arena
        if arena is not None and not self.holds(arena):
            self.register(arena)
        return self.holds(pack.memory)

    def holds(self, memory: np.ndarray) -> bool:
        """Whether all of `memory` is pinned."""
        start = memory.ctypes.data
        return any(low <= start and start + memory.nbytes <= high for low, high in self._ranges)

    def _forget_error(self) -> None:
        """CUDA would report the failure again, to whoever launches next."""
        try:
            torch.zeros(1, device=self._device)
        except RuntimeError as error:
            log.debug("after a refused registration: %s", error)


def as_tensor(memory: np.ndarray) -> torch.Tensor:
    """The same bytes, to be read only. torch takes no read-only arrays, as which packs come."""
    array = (ctypes.c_uint8 * memory.nbytes).from_address(memory.ctypes.data)
    return torch.frombuffer(array, dtype=torch.uint8)
