"""What an engine counts of its work, and what it tells of itself and its parts."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ..adapter_store import store_requests
from .kv_blocks import KVBlocks
from .model_runner import ModelRunner
from .pace import Pace
from .planning import Plan
from .pool.node_packs import PackLister
from .pool.packs import PackSource
from .pool.residency import Residency
from .queue_time import QueueTime, cause_of
from .report import REPORTED_TENANTS, EngineReport
from .request_times import Cause
from .scheduler import Scheduler
from .sequence import Sequence
from .turns import expected_waits


class EngineAccount:
    """An engine's own counts, and its report, which has those of its parts too."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        residency: Residency,
        kv: KVBlocks,
        packs: PackSource,
    ):
        self._runner, self._scheduler, self._residency = runner, scheduler, residency
        self._kv, self._packs = kv, packs
        self._lister = PackLister(packs)
        self._pace = Pace()
        self._ended = 0  # sequences, since the last step
        self._queue = QueueTime()
        self._purged: set[str] = set()  # whose counts go with the next report
        self._report = EngineReport(
            weights_bytes=runner.weights_bytes,
            weights_seconds=runner.weights_seconds,
            ready_seconds=runner.ready_seconds,
            max_running=runner.config.max_running,
        )

    def look(self, waiting: Iterable[Sequence], running: int) -> None:
        """To be called before each step is scheduled: books what the queue waits for."""
        now = time.monotonic()
        if not self._queue.due(now):
            return
        resident, loading = self._residency.resident(), self._residency.loading

        def cause(seq: Sequence) -> Cause:
            return cause_of(
                resident=seq.adapter_key is None or seq.adapter_key in resident,
                loading=seq.adapter_key in loading,
                needed_blocks=-(-len(seq.tokens) // self._kv.block_size) + running,
                free_blocks=self._kv.free,
            )

        self._queue.sample(now, waiting, cause)

    def launched(self, plan: Plan) -> None:
        """A step is on its way."""
        report = self._report
        report.steps += 1
        for w in plan.work:
            if not w.seq.times.in_batch:
                self._admitted(w.seq)
        report.step_tokens += sum([w.count for w in plan.work])
        slots = {s.slot for s in plan.step.sequences} - {-1}
        report.step_adapters += len(slots)
        report.step_adapter_bytes += sum(self._residency.size(slot)[0] for slot in slots)

    def _admitted(self, seq: Sequence) -> None:
        if not seq.times.admitted_s:
            tier = seq.tier or "base"
            self._report.admissions[tier] = self._report.admissions.get(tier, 0) + 1
        self._queue.admitted(time.monotonic(), seq)

    def stepped(self, seconds: float, prompt_tokens: int) -> None:
        """A step has taken so long from the host's side, with so many tokens of prompts."""
        self._report.step_seconds += seconds
        self._pace.stepped(seconds, prompt_tokens, self._ended)
        self._ended = 0

    def ended(self) -> None:
        """A sequence has."""
        self._ended += 1

    def tokens(self, seq: Sequence, prompt: int = 0, output: int = 0) -> None:
        """More tokens were computed for a sequence's owner."""
        for counts, n in (
            (self._report.prompt_tokens, prompt),
            (self._report.output_tokens, output),
        ):
            if n:
                counts[seq.owner] = counts.get(seq.owner, 0) + n

    def purged(self, key: str) -> None:
        """An adapter was deleted: its counts are told once more."""
        self._purged.add(key)

    def report(self, sequences: Iterable[Sequence]) -> EngineReport:
        """
        Args:
            sequences: that the engine works on.
        """
        report = self._fill()
        told = EngineReport.from_wire(report.to_wire())
        # Reports that never forgot would grow with every upload.
        for key in self._purged - {seq.owner for seq in sequences}:
            self._purged.discard(key)
            report.prompt_tokens.pop(key, None)
            report.output_tokens.pop(key, None)
        return told

    def close(self) -> None:
        self._lister.close()

    def _fill(self) -> EngineReport:
        r, s, res, pool = self._report, self._scheduler, self._residency, self._runner.pool
        r.queued, r.running = len(s.waiting), len(s.running)
        r.token_s, r.end_s = self._pace.token_s, self._pace.ends_every_s
        backlogs, step_tokens = s.backlogs(), self._runner.config.max_batch_tokens
        r.prompt_tokens_pending = sum(b.tokens for b in backlogs.values())
        waits = expected_waits(backlogs, s.vtc, self._pace, r.max_running, step_tokens)
        r.wait_s, r.turn_s, r.floods = waits.all_s, waits.turn_s, waits.floods
        r.kv_blocks_total, r.kv_blocks_used = self._kv.total, self._kv.used
        r.preemptions, r.prefix_hit_tokens = s.preemptions, s.prefix_hit_tokens
        waiting = s.waiting.by_tenant()
        r.tenant_leads = s.vtc.leads(waiting, REPORTED_TENANTS)
        r.tenants_waiting = {t: waiting.get(t, 0) for t in r.tenant_leads}
        r.queue_seconds = dict(self._queue.seconds)
        r.pool_bytes_total, r.pool_bytes_used = pool.total_bytes, pool.used_bytes
        r.pool_bytes_active = res.active_bytes
        loading = res.loading
        node = self._lister.latest(loading)
        r.gpu, r.disk, r.host = res.resident(), node.disk, node.host
        r.loading = [*dict.fromkeys([*loading, *node.loading])]
        r.host_bytes_total = self._packs.host_bytes
        c = res.counts
        r.loads, r.load_seconds, r.load_bytes = dict(c.loads), c.seconds, c.bytes
        r.tier_load_seconds, r.tier_load_bytes = dict(c.tier_seconds), dict(c.tier_bytes)
        r.load_failures, r.evictions = c.failures, c.evictions
        r.compiles_after_ready = len(self._runner.compiles.kernels)
        r.store_requests = {f"{op}/{end}": n for (op, end), n in store_requests().items()}
        if self._runner.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._runner.device)
            r.device_bytes_total, r.device_bytes_used = total, total - free
        return r
