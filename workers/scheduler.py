"""Decides what the next step computes: continuous batching with chunked prefill.

First come, first served, with one bounded exception: while a request waits for room in the
adapter pool, at most `overtake_limit` later ones may start, so that a rare adapter's tenant is
never starved by a stream of requests for resident ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from .kv_blocks import KVBlocks
from .pool.residency import Residency, Waiting
from .sequence import Sequence


@dataclass
class Scheduled:
    """A sequence's share of a step: its next `count` tokens, from position `start` on."""

    seq: Sequence
    start: int
    count: int


@dataclass
class Refusal:
    """A waiting request that can't ever start, and why."""

    seq: Sequence
    error: Exception


class Scheduler:
    """Queues and the KV blocks of the sequences in them. Not thread-safe."""

    def __init__(
        self,
        kv: KVBlocks,
        residency: Residency,
        max_batch_tokens: int,
        max_running: int,
        overtake_limit: int,
    ):
        self._kv, self._residency = kv, residency
        self._max_batch_tokens, self._max_running = max_batch_tokens, max_running
        self._overtake_limit = overtake_limit
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        """Queues a sequence; its adapter starts moving to this node at once."""
        if seq.request.adapter is not None:
            self._residency.want(seq.request.adapter)
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a finished, failed or aborted sequence out.

        Its blocks and slot are free once no launched step names it.
        """
        seq.removed = True
        if seq.slot is None:
            self.waiting.remove(seq)
            return
        self.running.remove(seq)
        if seq.flights == 0:
            self._free(seq)

    def prompt_tokens_pending(self) -> int:
        """Of prompts that wait or are begun: tokens that aren't computed yet."""
        return sum(s.pending for s in (*self.waiting, *self.running) if s.pending > 1)

    def may_preempt(self) -> bool:
        """Whether the next `schedule` might take blocks from a running sequence.

        It must not be called then while a launched step still writes to them.
        """
        budget, needed = self._max_batch_tokens, 0
        for seq in self._decodes_first():
            count = min(seq.pending, budget)
            needed += self._missing_blocks(seq, count)
            budget -= count
        return needed > self._kv.free

    def schedule(self) -> tuple[list[Scheduled], list[Refusal]]:
        """Picks the next step's work; admits, and preempts when KV blocks run out."""
        budget = self._max_batch_tokens
        work: list[Scheduled] = []
        for seq in self._decodes_first():
            if budget == 0:
                break
            if seq.slot is None:
                continue  # preempted a moment ago
            count = min(seq.pending, budget)
            if self._reserve(seq, count):
                work.append(Scheduled(seq, seq.computed, count))
                budget -= count
        work = [w for w in work if w.seq.slot is not None]
        budget = self._max_batch_tokens - sum(w.count for w in work)
        refusals: list[Refusal] = []
        self._admit(budget, work, refusals)
        return work, refusals

    def launched(self, w: Scheduled) -> None:
        """Books a step that is on its way: it holds what its sequences hold."""
        w.seq.computed += w.count
        w.seq.flights += 1
        if w.count > 1:
            # While the device works: a long prompt's names take longer than its launch may.
            w.seq.extend_hashes(self._kv.block_size)

    def landed(self, w: Scheduled) -> None:
        """Books a step's result: the tokens are in the cache, full blocks may be found again."""
        seq, size = w.seq, self._kv.block_size
        seq.flights -= 1
        if seq.removed:
            if seq.flights == 0:
                self._free(seq)
            return
        if seq.purged:
            return
        first, full = w.start // size, (w.start + w.count) // size
        if first < full:
            seq.extend_hashes(size)
        for i in range(first, full):
            self._kv.publish(seq.blocks[i], seq.hashes[i], seq.owner)

    def _decodes_first(self) -> list[Sequence]:
        """Running sequences that have something to compute: a long prompt must not delay tokens
        that users wait for."""
        active = [s for s in self.running if not s.ending]
        return [s for s in active if s.pending == 1] + [s for s in active if s.pending != 1]

    def _admit(self, budget: int, work: list[Scheduled], refusals: list[Refusal]) -> None:
        blocked: Sequence | None = None  # the oldest that waits for room in the pool
        for seq in list(self.waiting):
            if budget == 0 or len(self.running) >= self._max_running:
                return
            if blocked is not None and blocked.overtaken >= self._overtake_limit:
                return
            try:
                slot, tier = self._acquire(seq, min(seq.pending, budget))
            except Waiting as wait:
                if wait.for_room and blocked is None:
                    blocked = seq
                continue
            except Exception as error:
                self.waiting.remove(seq)
                refusals.append(Refusal(seq, error))
                continue
            seq.slot = slot
            if seq.tier is None:
                seq.tier = tier
            self._match_prefix(seq)
            count = min(seq.pending, budget)
            if not self._take_blocks(seq, count, spare=len(self.running)):
                # No KV space: nobody younger gets it either.
                self._free(seq)
                return
            if seq.cached_tokens is None:
                # Once: later, after a preemption, it may find what it has computed itself.
                seq.cached_tokens = min(seq.computed, len(seq.request.prompt_ids))
                self.prefix_hit_tokens += seq.cached_tokens
            self.waiting.remove(seq)
            self.running.append(seq)
            work.append(Scheduled(seq, seq.computed, count))
            budget -= count
            if blocked is not None:
                blocked.overtaken += 1

    def _acquire(self, seq: Sequence, tokens: int) -> tuple[int, str]:
        if seq.request.adapter is None:
            return -1, "base"
        return self._residency.acquire(seq.request.adapter, tokens)

    def _match_prefix(self, seq: Sequence) -> None:
        if seq.prompt_logprobs is not None:
            return  # every prompt position's logits are asked for
        # At least one token must go through the model: its logits choose the next.
        limit = (len(seq.tokens) - 1) // self._kv.block_size
        seq.blocks = self._kv.match(islice(seq.block_hashes(self._kv.block_size), limit))
        seq.computed = len(seq.blocks) * self._kv.block_size

    def _take_blocks(self, seq: Sequence, count: int, spare: int) -> bool:
        """Blocks for `count` more tokens, if `spare` more stay free."""
        need = self._missing_blocks(seq, count)
        if need > 0 and self._kv.free < need + (spare if self.running else 0):
            return False
        if need > 0:
            seq.blocks += self._kv.allocate(need)
        return True

    def _missing_blocks(self, seq: Sequence, count: int) -> int:
        return -(-(seq.computed + count) // self._kv.block_size) - len(seq.blocks)

    def _reserve(self, seq: Sequence, count: int) -> bool:
        """Blocks for a running sequence; younger ones give theirs up when there are none."""
        while not self._take_blocks(seq, count, spare=0):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue; what it had computed will be computed again."""
        assert seq.flights == 0, "a launched step still writes to the blocks"
        self.running.remove(seq)
        self._free(seq)
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _free(self, seq: Sequence) -> None:
        self._kv.release(seq.blocks)
        seq.blocks = []
        seq.computed = 0
        if seq.slot is not None and seq.slot >= 0:
            self._residency.release(seq.slot, drop=seq.purged)
        seq.slot = None
