"""What an engine counts of its work, beside what its parts count of theirs."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ..adapter_store import store_requests
from .kv_blocks import KVBlocks
from .planning import Plan
from .pool.residency import Residency
from .queue_time import QueueTime, cause_of
from .report import EngineReport
from .request_times import Cause
from .sequence import Sequence


class EngineAccount:
    """Figures of steps and of the queue, kept in the engine's own report."""

    def __init__(
        self, report: EngineReport, residency: Residency, kv: KVBlocks, device: torch.device
    ):
        self._report, self._residency, self._kv = report, residency, kv
        self._device = device
        self._queue = QueueTime()

    def look(self, waiting: Iterable[Sequence], running: int, max_batch_tokens: int) -> None:
        """To be called before each step is scheduled: books what the queue waits for."""
        now = time.monotonic()
        if not self._queue.due(now):
            return
        resident, loading = self._residency.resident(), self._residency.loading

        def cause(seq: Sequence) -> Cause:
            first = min(len(seq.tokens), max_batch_tokens)
            return cause_of(
                resident=seq.adapter_key is None or seq.adapter_key in resident,
                loading=seq.adapter_key in loading,
                needed_blocks=-(-first // self._kv.block_size) + running,
                free_blocks=self._kv.free,
            )

        self._queue.sample(now, waiting, cause)

    def launched(self, plan: Plan) -> None:
        """A step is on its way."""
        report = self._report
        for w in plan.work:
            if not w.seq.times.in_batch:
                self._admitted(w.seq)
        report.step_tokens += sum([w.count for w in plan.work])
        slots = {s.slot for s in plan.step.sequences} - {-1}
        report.step_adapters += len(slots)
        report.step_adapter_bytes += sum(map(self._residency.bytes_of, slots))

    def _admitted(self, seq: Sequence) -> None:
        if not seq.times.admitted_s:
            tier = seq.tier or "base"
            self._report.admissions[tier] = self._report.admissions.get(tier, 0) + 1
        self._queue.admitted(time.monotonic(), seq)

    def fill(self) -> None:
        """Brings the report up to date."""
        report, residency = self._report, self._residency
        report.queue_seconds = dict(self._queue.seconds)
        report.pool_bytes_active = residency.active_bytes
        report.tier_load_seconds = dict(residency.tier_seconds)
        report.tier_load_bytes = dict(residency.tier_bytes)
        report.store_requests = {f"{op}/{end}": n for (op, end), n in store_requests().items()}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            report.device_bytes_total, report.device_bytes_used = total, total - free
