"""Bytes of a pack to the device, and from there to their places in the pool.

A stage of bytes is copied to one of two buffers on the device and scattered by one launch, while
the next is copied to the other. Nothing here waits for the compute stream, nor it for this.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ...kernels import PIECE_FIELDS, scatter_pieces_
from ..host_copies import to_device
from .pinned import PinnedMemory, as_tensor

# Holds a layer of Qwen3-30B-A3B at rank 16 (35 MB). Two of them on the device, and two pinned.
_GPU_STAGE_BYTES = 48 << 20
_CPU_STAGE_BYTES = 4 << 20
# Tables of pieces are in pinned memory until they are copied, a quarter of a megabyte each.
_MOST_AHEAD = 64  # stages that are launched and not done


@dataclass(frozen=True)
class Transfer:
    """One stage's worth of a layer.

    Attributes:
        memory: uint8, of the layer.
        copies: (start, stop, at): bytes of `memory`, and where they are staged.
        nbytes: staged.
        dtype: of the elements there.
        pieces, flat: as `kernels.scatter_pieces_` has them.
        layer: its index, where this is all or the last of it.
    """

    memory: np.ndarray
    copies: tuple[tuple[int, int, int], ...]
    nbytes: int
    dtype: torch.dtype
    pieces: np.ndarray
    flat: bool
    layer: int | None


class Moment(Protocol):
    """When all that was launched before is done."""

    def query(self) -> bool: ...
    def synchronize(self) -> None:
        """The host waits."""
        ...

    def wait(self) -> None:
        """Later launches of the current stream wait."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Both have passed."""
        ...


class Stager(Protocol):
    room: int  # bytes of a stage

    def fence(self) -> Moment:
        """What was launched on the current stream so far: see `move`."""
        ...

    def begin(self) -> Moment:
        """What `move` has launched so far."""
        ...

    def move(self, transfer: Transfer, after: Moment) -> Moment:
        """Copies and scatters; returns at once where a device can. Pages are written only `after`
        what named them last."""
        ...

    def warm_up(self) -> None:
        """Compiles what `move` launches."""
        ...


class CpuStager:
    """Without a device: two copies in memory."""

    room = _CPU_STAGE_BYTES

    def __init__(self, pool: torch.Tensor):
        self._pool = pool
        self._stage: torch.Tensor | None = None  # many pools of a test never load

    def fence(self) -> Moment:
        return _Passed()

    def begin(self) -> Moment:
        return _Passed()

    def move(self, transfer: Transfer, after: Moment) -> Moment:
        if self._stage is None:
            self._stage = torch.empty(self.room, dtype=torch.uint8)
        stage = self._stage.numpy()
        for start, stop, at in transfer.copies:
            stage[at : at + stop - start] = transfer.memory[start:stop]
        staged = _elements(self._stage, transfer)
        scatter_pieces_(self._pool, staged, torch.from_numpy(transfer.pieces), transfer.flat)
        return _Passed()

    def warm_up(self) -> None:
        pass


class _Passed:
    """On a CPU, what was launched is done."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: _Passed) -> float:
        return self._at - earlier._at


class _Event:
    """A CUDA event, recorded on the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)
        self._event.record()

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def wait(self) -> None:
        self._event.wait()

    def seconds_since(self, earlier: _Event) -> float:
        return earlier._event.elapsed_time(self._event) / 1e3


class GpuStager:
    """Copies on one stream, scatters on another. One thread calls `move`."""

    room = _GPU_STAGE_BYTES

    def __init__(self, pool: torch.Tensor, pinned: PinnedMemory):
        self._pool, self._pinned, self._device = pool, pinned, pool.device
        self._copies, self._scatters = (torch.cuda.Stream(pool.device) for _ in range(2))
        self._buffers = [
            torch.empty(self.room, dtype=torch.uint8, device=pool.device) for _ in range(2)
        ]
        self._bounce: list[torch.Tensor] = []  # pinned; made when memory comes that isn't
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]
        self._scattered = [torch.cuda.Event() for _ in range(2)]
        self._ahead: deque[Moment] = deque()
        self._turn = 0

    def fence(self) -> Moment:
        with torch.cuda.device(self._device):
            return _Event()

    def begin(self) -> Moment:
        with torch.cuda.stream(self._copies):
            return _Event()

    def move(self, transfer: Transfer, after: Moment) -> Moment:
        if len(self._ahead) >= _MOST_AHEAD:
            self._ahead.popleft().synchronize()
        turn, self._turn = self._turn, 1 - self._turn
        buffer, copied, scattered = self._buffers[turn], self._copied[turn], self._scattered[turn]
        sources = self._sources(transfer, turn)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(scattered)  # what was here before
            for start, source in sources:
                buffer[start : start + source.numel()].copy_(source, non_blocking=True)
            pieces = to_device({"pieces": transfer.pieces}, self._device)["pieces"]
            copied.record(self._copies)
        with torch.cuda.stream(self._scatters):
            self._scatters.wait_event(copied)
            after.wait()
            scatter_pieces_(self._pool, _elements(buffer, transfer), pieces, transfer.flat)
            pieces.record_stream(self._scatters)
            scattered.record(self._scatters)
            arrival = _Event()
        self._ahead.append(arrival)
        return arrival

    def warm_up(self) -> None:
        pieces = torch.zeros(1, PIECE_FIELDS, dtype=torch.int64, device=self._device)
        pieces[:, 3:] = 1  # of no elements
        for buffer in self._buffers:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for flat in (True, False):
                    scatter_pieces_(self._pool, buffer.view(dtype), pieces, flat)
        torch.cuda.synchronize(self._device)

    def _sources(self, transfer: Transfer, turn: int) -> list[tuple[int, torch.Tensor]]:
        """Places in the buffer, and pinned bytes that belong there."""
        if self._pinned.holds(transfer.memory):
            return [(at, as_tensor(transfer.memory[a:b])) for a, b, at in transfer.copies]
        if not self._bounce:
            self._bounce = [
                torch.empty(self.room, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
        self._copied[turn].synchronize()  # what was here before has left
        host = self._bounce[turn]
        array = host.numpy()
        for start, stop, at in transfer.copies:
            array[at : at + stop - start] = transfer.memory[start:stop]
        return [(0, host[: transfer.nbytes])] if transfer.nbytes else []


def _elements(stage: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    nbytes = -(-transfer.nbytes // transfer.dtype.itemsize) * transfer.dtype.itemsize
    return stage[:nbytes].view(transfer.dtype)


def make_stager(pool: torch.Tensor, pinned: PinnedMemory) -> Stager:
    return GpuStager(pool, pinned) if pool.is_cuda else CpuStager(pool)
