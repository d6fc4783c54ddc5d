"""Decode steps at fixed addresses: captured in CUDA graphs, one for each bucket of batch sizes.

A bucket's rows behind the step's sequences are padding. Their experts are -1, so that no expert's
weights are read for them, and their keys are written nowhere.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels import TUNED_ADAPTERS
from .attention import AttentionBatch, DecodeBuffers
from .step import SequenceStep
from .step_inputs import TOKEN_FIELDS, StepInputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeRows:
    """What a decode step of B rows reads, on the device. int32 at addresses that never change."""

    token_ids: torch.Tensor  # [B]
    positions: torch.Tensor  # [B]
    token_slot: torch.Tensor  # [B], never decreases; padding has the last row's
    carried: torch.Tensor  # [B], see StepInputs
    numbers: torch.Tensor  # [B], 0, 1, 2, ...
    count: torch.Tensor  # [1], rows that aren't padding
    attention: AttentionBatch

    def padding(self) -> torch.Tensor:
        """bool [B, 1]"""
        return (self.numbers >= self.count)[:, None]


# Hidden states [B, H] of a bucket's rows, with tiles as for so many adapters (0: base model only).
Forward = Callable[[DecodeRows, int], torch.Tensor]


@dataclass
class CaptureReport:
    graphs: int
    seconds: float
    bytes: int


def batch_buckets(largest: int) -> list[int]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, then steps of 8, 16 and 32."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 32)]
    return [n for n in sizes if n < largest] + [largest]


def adapters_bucket(adapters: int) -> int:
    """The number of adapters, among those that tiles are measured for, that stands for this one."""
    if adapters == 0:
        return 0
    return min(TUNED_ADAPTERS, key=lambda n: (abs(math.log(n / adapters)), n))


class DecodeGraphs:
    """Runs decode steps in padded buckets; on a GPU, from graphs once they are captured."""

    def __init__(
        self,
        forward: Forward,
        max_rows: int,
        max_context: int,
        block_size: int,
        device: torch.device,
    ):
        """
        Args:
            forward: called with rows of one bucket; reads nothing else that changes its address.
            max_rows: most sequences of a step.
            max_context: most tokens of a sequence.
        """
        self._forward, self._device, self._max_context = forward, device, max_context
        self.buckets = batch_buckets(max_rows)
        # All fields, and the number of rows behind them, so that one copy fills them.
        stride = -(-max_rows // 4) * 4  # every field starts at 16 bytes
        self._memory = torch.zeros(len(TOKEN_FIELDS) * stride + 1, dtype=torch.int32, device=device)
        self._fields = self._memory[:-1].view(len(TOKEN_FIELDS), stride)
        self._numbers = torch.arange(max_rows, dtype=torch.int32, device=device)
        blocks = max_rows * -(-max_context // block_size)
        self._attention = DecodeBuffers(max_rows, blocks, block_size, device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def bucket(self, sequences: int) -> int:
        return self.buckets[bisect_left(self.buckets, sequences)]

    def run(self, sequences: list[SequenceStep], inputs: StepInputs) -> torch.Tensor:
        """Hidden states [B, H] of a decode step, its sequences' rows first.

        They are overwritten by a later step.
        """
        size, adapters = self.bucket(len(sequences)), adapters_bucket(inputs.num_adapters)
        self._fill(inputs)
        self._attention.fill(sequences)
        captured = self._graphs.get((size, adapters))
        if captured is None:
            return self._forward(self._rows(size), adapters)
        graph, hidden = captured
        graph.replay()
        return hidden

    @torch.inference_mode()
    def capture(self) -> CaptureReport:
        """Captures a graph for every bucket of rows and of adapters. Rows are all padding then."""
        started, free = time.perf_counter(), torch.cuda.mem_get_info(self._device)[0]
        self._memory.zero_()
        self._attention.fill([])
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        for size in reversed(self.buckets):  # smaller ones find room in what larger ones took
            rows = self._rows(size)
            for adapters in sorted({adapters_bucket(n) for n in range(size + 1)}):
                stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(stream):
                    self._forward(rows, adapters)  # compiles, and sets libraries up
                torch.cuda.current_stream(self._device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads, NCCL's watchdog among them, may ask for events meanwhile.
                with torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    hidden = self._forward(rows, adapters)
                self._graphs[size, adapters] = graph, hidden
        torch.cuda.synchronize(self._device)
        taken = free - torch.cuda.mem_get_info(self._device)[0]
        report = CaptureReport(len(self._graphs), time.perf_counter() - started, max(taken, 0))
        log.info(
            "captured %d decode graphs for up to %d sequences in %.1f s; they take %.2f GiB",
            report.graphs, self.buckets[-1], report.seconds, report.bytes / 2**30,
        )  # fmt: skip
        return report

    def _rows(self, size: int) -> DecodeRows:
        return DecodeRows(
            *self._fields[:, :size].unbind(),
            numbers=self._numbers[:size],
            count=self._memory[-1:],
            attention=self._attention.batch(size, self._max_context),
        )

    def _fill(self, inputs: StepInputs) -> None:
        n = inputs.token_ids.size
        host = torch.empty(
            self._memory.shape, dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        array = host.numpy()
        fields = array[:-1].reshape(len(TOKEN_FIELDS), -1)
        fields[:2] = 0
        fields[2] = inputs.token_slot[-1]
        fields[3] = -1
        for row, name in zip(fields, TOKEN_FIELDS, strict=True):
            row[:n] = getattr(inputs, name)
        array[-1] = n
        self._memory.copy_(host, non_blocking=True)
