"""Decides what the next step computes: continuous batching with chunked prefill.

Who starts, whose prompt goes on and who gives way is decided by what was done for each tenant so
far: see `fairness` for the counters and their bound, `fair_queue` for the order of what waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from .errors import DeadlinePassed
from .fair_queue import FairQueue
from .fairness import Prices, VirtualTokenCounter
from .kv_blocks import KVBlocks
from .places import Places
from .pool.residency import Residency, Waiting
from .sequence import Sequence
from .turns import Backlog


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
        slack: float,
        step_adapter_bytes: int | None = None,
        prices: Prices | None = None,
    ):
        """
        Args:
            slack: see `FairQueue`.
            step_adapter_bytes: of the distinct adapters of the running sequences; one adapter
                alone may be larger. None: whatever the pool holds.
        """
        self._kv, self._residency = kv, residency
        self._max_batch_tokens = max_batch_tokens
        self._places = Places(max_running)
        self._step_adapter_bytes = step_adapter_bytes
        self._prices = prices or Prices()
        self.vtc = VirtualTokenCounter(slack)
        self.waiting: FairQueue[Sequence] = FairQueue(self.vtc, slack)
        self.running: list[Sequence] = []  # in the order of their admission
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        """Queues a sequence; its adapter starts moving to this node at once."""
        if seq.request.adapter is not None:
            self._residency.want(seq.request.adapter)
        self._queue(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a finished, failed or aborted sequence out.

        Its blocks and slot are free once no launched step names it.
        """
        seq.removed = True
        if seq.slot is None:
            self.waiting.remove(seq)
            return
        self._stop(seq)
        if seq.flights == 0:
            self._free(seq)

    def backlogs(self) -> dict[str, Backlog]:
        """By tenant."""
        backlogs: dict[str, Backlog] = {}
        for seq in (*self.waiting, *self.running):
            r = seq.request
            backlog = backlogs.setdefault(r.tenant_id, Backlog(weight=r.weight))
            waits = seq.slot is None
            backlog.open += 1
            backlog.queued += waits
            backlog.tokens += seq.pending if waits or seq.pending > 1 else 0
        return backlogs

    def may_preempt(self) -> bool:
        """Whether the next `schedule` might take blocks from a running sequence.

        It must not be called then while a launched step still writes to them.
        """
        decodes = self._decodes()[: self._max_batch_tokens]
        return sum(self._missing_blocks(seq, 1) for seq in decodes) > self._kv.free

    def schedule(self, now: float) -> tuple[list[Scheduled], list[Refusal]]:
        """Picks the next step's work; admits, and preempts when KV blocks run out.

        Args:
            now: of the clock of the sequences' deadlines, seconds.
        """
        refusals = self._expired(now)
        # Tokens that users wait for come first: a long prompt must not delay them.
        decodes = self._decodes()
        work: list[Scheduled] = []
        for seq in decodes[: self._max_batch_tokens]:
            if seq.slot is not None and self._reserve(seq):  # else preempted a moment ago
                work.append(Scheduled(seq, seq.computed, 1))
        work = [w for w in work if w.seq.slot is not None]
        for w in work:
            self._charge(w)
        self._fill(self._max_batch_tokens - len(work), work, refusals)
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

    def _queue(self, seq: Sequence) -> None:
        r = seq.request
        self.waiting.add(seq, r.tenant_id, seq.arrival, r.priority, seq.deadline)

    def _expired(self, now: float) -> list[Refusal]:
        """Takes out what should have begun by now; what was begun once may end."""
        late = [
            seq
            for seq in self.waiting
            if seq.deadline is not None and seq.deadline <= now and seq.cached_tokens is None
        ]
        for seq in late:
            self.remove(seq)
        return [Refusal(seq, DeadlinePassed(seq.request.timeout_s)) for seq in late]

    def _decodes(self) -> list[Sequence]:
        return [s for s in self.running if s.pending == 1 and not s.ending]

    def _prefills(self) -> deque[Sequence]:
        """Running sequences with a prompt to go on with, least served tenant first."""
        prefills = [s for s in self.running if s.pending > 1 and not s.ending]
        return deque(sorted(prefills, key=lambda s: self.vtc.counter(s.request.tenant_id)))

    def _fill(self, budget: int, work: list[Scheduled], refusals: list[Refusal]) -> None:
        """Spends what is left of the step on prompts: begun ones and new ones, by counter."""

        def take(seq: Sequence) -> None:
            nonlocal budget
            w = Scheduled(seq, seq.computed, min(seq.pending, budget))
            work.append(w)
            self._charge(w)
            budget -= w.count

        prefills = self._prefills()
        if budget > 0 and self._places.free > 0:
            for seq in self.waiting.candidates():
                while prefills and budget > 0 and not self._before(seq, prefills[0]):
                    take(prefills.popleft())
                if budget == 0 or self._places.free == 0:
                    break
                tenant = seq.request.tenant_id
                if not self._places.open_to(tenant, self.vtc.behind(tenant)):
                    self.waiting.pass_over(seq)
                    continue
                try:
                    if not self._admit(seq, min(seq.pending, budget)):
                        break
                except Waiting as wait:
                    (self.waiting.block if wait.for_room else self.waiting.park)(seq)
                except Exception as error:
                    self.waiting.remove(seq)
                    refusals.append(Refusal(seq, error))
                else:
                    take(seq)
        while prefills and budget > 0:
            take(prefills.popleft())

    def _before(self, waiting: Sequence, begun: Sequence) -> bool:
        order = self.vtc.order
        return order(waiting.request.tenant_id) < order(begun.request.tenant_id)

    def _admit(self, seq: Sequence, tokens: int) -> bool:
        """Starts a waiting sequence, which then holds its slot and blocks for all its tokens.

        Args:
            tokens: that this step would compute of it.

        Returns:
            False: there aren't blocks enough, so nobody that comes after it gets them either.

        Raises:
            Waiting, or what the adapter's load raised.
        """
        slot, tier = self._acquire(seq, tokens)
        self.waiting.ready(seq)
        seq.slot = slot
        seq.tier = seq.tier or tier
        if slot >= 0:
            nbytes, seq.rank = self._residency.size(slot)
            if tier != "gpu":
                self._pay(seq, self._prices.load(nbytes))
            if self._step_is_full(slot, nbytes):
                self._free(seq)
                raise Waiting(for_room=True)
        self._match_prefix(seq)
        # All blocks at once: a prompt that had to stop half-way for lack of them, and to take
        # them from others that then take them back, would be computed again and again.
        if not self._take_blocks(seq, seq.pending, spare=len(self.running)):
            self._free(seq)
            return False
        if seq.cached_tokens is None:
            # Once: later, after a preemption, it may find what it has computed itself.
            seq.cached_tokens = min(seq.computed, len(seq.request.prompt_ids))
            self.prefix_hit_tokens += seq.cached_tokens
        self.waiting.admit(seq)
        self._places.take(seq.request.tenant_id)
        self.running.append(seq)
        return True

    def _step_is_full(self, slot: int, nbytes: int) -> bool:
        """Whether a step may not hold this adapter beside those that run."""
        if self._step_adapter_bytes is None:
            return False
        others = {s.slot for s in self.running} - {-1, None}
        if not others or slot in others:
            return False
        held = sum(self._residency.size(s)[0] for s in others if s is not None)
        return held + nbytes > self._step_adapter_bytes

    def _charge(self, w: Scheduled) -> None:
        """Of a share of a step, what its tenant hasn't paid for yet: neither tokens computed again
        after a preemption, nor what another group did for a continuation."""
        seq, end = w.seq, w.start + w.count
        prompt = len(seq.request.prompt_ids)
        inputs = max(0, min(end, prompt) - max(w.start, seq.paid))
        outputs = 1 if end == seq.length >= seq.paid else 0  # the token that it draws
        if inputs or outputs:
            self._pay(seq, self._prices.tokens(inputs, outputs, seq.rank))
        seq.paid = max(seq.paid, end + outputs)

    def _pay(self, seq: Sequence, price: float) -> None:
        self.vtc.charge(seq.request.tenant_id, price, seq.request.weight)

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

    def _reserve(self, seq: Sequence) -> bool:
        """A block for a running sequence's next token; others give theirs up when there is none."""
        while not self._take_blocks(seq, 1, spare=0):
            victim = max(self.running, key=self._dispensable)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _dispensable(self, seq: Sequence) -> tuple[float, int, int]:
        """The tenant that is furthest ahead gives way with its least urgent, youngest request."""
        r = seq.request
        return self.vtc.counter(r.tenant_id), r.priority, seq.arrival

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; what it had computed will be computed again."""
        assert seq.flights == 0, "a launched step still writes to the blocks"
        self._stop(seq)
        self._free(seq)
        self._queue(seq)
        self.preemptions += 1

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._places.give(seq.request.tenant_id)

    def _free(self, seq: Sequence) -> None:
        self._kv.release(seq.blocks)
        seq.blocks = []
        seq.computed = 0
        if seq.slot is not None and seq.slot >= 0:
            self._residency.release(seq.slot, drop=seq.purged)
        seq.slot = None
