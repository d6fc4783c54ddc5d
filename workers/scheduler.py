"""Decides what the next step computes: continuous batching with chunked prefill.

First come, first served, with one bounded exception: while a request waits for room in the
adapter pool, at most `overtake_limit` later ones may start, so that a rare adapter's tenant is
never starved by a stream of requests for resident ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .kv_blocks import KVBlocks
from .residency import Residency, Waiting
from .sequence import Sequence


@dataclass
class Scheduled:
    """A sequence's share of the next step: its next `count` tokens."""

    seq: Sequence
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
        """Takes a finished, failed or aborted sequence out; its blocks and slot are free."""
        if seq in self.running:
            self.running.remove(seq)
            self._free(seq)
        else:
            self.waiting.remove(seq)

    def schedule(self) -> tuple[list[Scheduled], list[Refusal]]:
        """Picks the next step's work; admits, and preempts when KV blocks run out."""
        budget = self._max_batch_tokens
        work: list[Scheduled] = []
        # Decodes before prompt chunks: a long prompt must not delay tokens that users wait for.
        for seq in sorted(self.running, key=lambda s: s.pending > 1):
            if budget == 0:
                break
            if seq not in self.running:
                continue  # preempted a moment ago
            count = min(seq.pending, budget)
            if self._reserve(seq, count):
                work.append(Scheduled(seq, count))
                budget -= count
        work = [w for w in work if w.seq in self.running]
        budget = self._max_batch_tokens - sum(w.count for w in work)
        refusals: list[Refusal] = []
        self._admit(budget, work, refusals)
        return work, refusals

    def computed(self, done: Scheduled) -> None:
        """Books a step's result: the tokens are in the cache, full blocks may be found again."""
        seq = done.seq
        seq.computed += done.count
        seq.extend_hashes(self._kv.block_size)
        full = seq.computed // self._kv.block_size
        for i in range((seq.computed - done.count) // self._kv.block_size, full):
            self._kv.publish(seq.blocks[i], seq.hashes[i], seq.owner)

    def _admit(self, budget: int, work: list[Scheduled], refusals: list[Refusal]) -> None:
        blocked: Sequence | None = None  # the oldest that waits for room in the pool
        for seq in list(self.waiting):
            if budget == 0 or len(self.running) >= self._max_running:
                return
            if blocked is not None and blocked.overtaken >= self._overtake_limit:
                return
            try:
                slot, tier = self._acquire(seq)
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
            self.waiting.remove(seq)
            self.running.append(seq)
            work.append(Scheduled(seq, count))
            budget -= count
            if blocked is not None:
                blocked.overtaken += 1

    def _acquire(self, seq: Sequence) -> tuple[int, str]:
        if seq.request.adapter is None:
            return -1, "base"
        return self._residency.acquire(seq.request.adapter)

    def _match_prefix(self, seq: Sequence) -> None:
        if seq.prompt_logprobs is not None:
            return  # every prompt position's logits are asked for
        seq.extend_hashes(self._kv.block_size)
        # At least one token must go through the model: its logits choose the next.
        limit = (len(seq.tokens) - 1) // self._kv.block_size
        seq.blocks = self._kv.match(seq.hashes[:limit])
        seq.computed = len(seq.blocks) * self._kv.block_size
        if not seq.started:
            seq.cached_tokens = min(seq.computed, len(seq.request.prompt_ids))
            self.prefix_hit_tokens += seq.cached_tokens

    def _take_blocks(self, seq: Sequence, count: int, spare: int) -> bool:
        """Blocks for `count` more tokens, if `spare` more stay free."""
        size = self._kv.block_size
        need = -(-(seq.computed + count) // size) - len(seq.blocks)
        if need > 0 and self._kv.free < need + (spare if self.running else 0):
            return False
        if need > 0:
            seq.blocks += self._kv.allocate(need)
        return True

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
        self.running.remove(seq)
        self._free(seq)
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _free(self, seq: Sequence) -> None:
        self._kv.release(seq.blocks)
        seq.blocks = []
        seq.computed = 0
        if seq.slot is not None and seq.slot >= 0:
            self._residency.release(seq.slot)
        seq.slot = None
