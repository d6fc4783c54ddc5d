"""A simulated worker group: continuous batching with chunked prefill, step by step.

A stretch of steps in which nothing comes, starts or ends is one event, so a run's cost grows with
its requests and not with their tokens; an arrival cuts the stretch at the next step's end.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ...workers import EngineReport, GroupReport, Pace
from ..routing import GroupLoad
from .clock import Clock
from .cores import Cores
from .hardware import Hardware
from .pool import SimPool
from .tiers import NodeTiers
from .trace import TracedRequest

PREFIX_CACHE_TOKENS = 50_000
OVERTAKE_LIMIT = 8  # as in EngineConfig


@dataclass(eq=False)
class Run:
    """A request on its way. `done`: output tokens so far, over all groups that worked on it."""

    request: TracedRequest
    number: int
    done: int = 0
    first_token_s: float | None = None
    prefill_left: int = 0
    holds_adapter: bool = False
    begun_at: int = 0  # the group's step count when it began to decode
    groups: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """KV that it takes at most."""
        return self.request.prompt_tokens + self.request.output_tokens


class Queue(Protocol):
    """Requests that wait. First come first served here; a fair queue has the same methods."""

    def push(self, run: Run) -> None: ...
    def remove(self, run: Run) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Run]:
        """In the order in which they should start; runs may be removed meanwhile."""
        ...


class Fifo:
    """In the order of arrival."""

    def __init__(self) -> None:
        self._runs: dict[int, Run] = {}

    def push(self, run: Run) -> None:
        self._runs[run.number] = run

    def remove(self, run: Run) -> None:
        del self._runs[run.number]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))


class SimGroup:
    """
    Args:
        sizes: adapter key -> bytes.
        tiers: of its node.
        ended: told of each run that has all its tokens.
        cores: that it shares with other groups; None: it has its own.
        queue: makes the waiting queue.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        hardware: Hardware,
        sizes: dict[str, int],
        tiers: NodeTiers,
        ended: Callable[[Run], None],
        cores: Cores | None = None,
        queue: Callable[[], Queue] = Fifo,
    ) -> None:
        self.name, self.hardware, self.tiers = name, hardware, tiers
        self._clock, self._ended = clock, ended
        self._cores = cores or Cores(hardware)
        self.pool = SimPool(clock, hardware, sizes, tiers, self._adapter_came, self._cores)
        self.pace = Pace()
        self.report = EngineReport(
            pool_bytes_total=hardware.pool_bytes, max_running=hardware.max_running
        )
        self.report.gpu = self.pool.resident
        self.report.host, self.report.disk = tiers.host.entries, tiers.disk.entries
        self.report.host_bytes_total = hardware.host_bytes
        self.queue = queue()
        self._waiting_for: dict[str, list[Run]] = {}  # adapters that come
        self._prefilling: list[Run] = []
        self._decoding: list[tuple[int, int, Run]] = []  # heap by the step at whose end it ends
        self._rows: Counter[str | None] = Counter()  # decoding, by adapter
        self._adapters: Counter[str] = Counter()  # in steps, by adapter
        self._kv_used = 0
        self._prompt_waiting = 0
        self._waiting = 0
        self._overtaken = 0
        self._prefixes: OrderedDict[tuple[str | None, int], int] = OrderedDict()
        self._steps = 0
        self._stretch: _Stretch | None = None
        self._load: GroupLoad | None = None  # until something changes
        self.alive = True

    # What routing and the controller see

    @property
    def requests(self) -> int:
        return self._waiting + self.running

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def load(self) -> GroupLoad:
        if self._load is None:
            self._load = self._load_now()
        return self._load

    def _load_now(self) -> GroupLoad:
        pending = self._prompt_waiting + sum(r.prefill_left for r in self._prefilling)
        free = self.hardware.max_running - self.running
        return GroupLoad(
            requests=self.requests,
            wait_s=self.pace.wait_s(pending, self._waiting, free),
            token_s=self.pace.token_s,
            resident=self.pool.resident,
        )

    def group_report(self) -> GroupReport:
        """Live: its dictionaries are the group's own."""
        load = self.load()
        r = self.report
        r.queued, r.running, r.steps = self._waiting, self.running, self._steps
        r.wait_s, r.token_s = load.wait_s, load.token_s
        return GroupReport("sim", self.name, self.tiers.name, 1, 0, False, r)

    # Events

    def submit(self, run: Run) -> None:
        run.groups.append(self.name)
        self._load = None
        self._waiting += 1
        self._prompt_waiting += run.request.prompt_tokens + run.done
        self.queue.push(run)
        self._interrupt()

    def kill(self) -> list[Run]:
        """The group dies; its unfinished runs, with the tokens that they got."""
        self.alive = False
        self.pool.shut()
        done = self._steps
        if self._stretch is not None:
            done += self._stretch.whole_steps(self._clock.now)
        self._stretch = None
        self._cores.idle(self)
        for _, _, run in self._decoding:
            run.done += min(done - run.begun_at, run.request.output_tokens - 1 - run.done)
        blocked = [run for runs in self._waiting_for.values() for run in runs]
        runs = [*self.queue, *blocked, *self._prefilling, *(r for _, _, r in self._decoding)]
        for run in runs:
            run.holds_adapter = False
        return sorted(runs, key=lambda r: r.number)

    def _adapter_came(self, key: str) -> None:
        runs = self._waiting_for.pop(key, [])
        if runs and self.pool.acquire(key):
            # Who waited longest has it at once: else another's load might evict it unused.
            runs[0].holds_adapter = True
        for run in runs:
            self.queue.push(run)
        self._interrupt()

    def _interrupt(self) -> None:
        """Something may start: a stretch of steps ends with the one that runs."""
        if self._stretch is None:
            self._begin()
        else:
            self.pace_changed()

    def pace_changed(self) -> None:
        """The steps after the one that runs will take longer or shorter."""
        if self._stretch is not None and self._stretch.steps > 1:
            self._stretch = self._stretch.cut(self._clock.now)
            self._schedule(self._stretch)

    # Steps

    def _begin(self) -> None:
        self._load = None
        self._admit()
        prompt_tokens = self._prefill_chunk()
        rows = len(self._decoding)
        if not rows and not prompt_tokens:
            self._cores.idle(self)
            return
        slowed = self._cores.busy(self)
        steps = 1 if prompt_tokens else max(1, self._decoding[0][0] - self._steps)
        seconds = self.hardware.step_s(rows, prompt_tokens, len(self._adapters)) * slowed
        self._stretch = _Stretch(self._clock.now, steps, seconds, prompt_tokens)
        self._schedule(self._stretch)

    def _schedule(self, stretch: _Stretch) -> None:
        self._clock.at(stretch.end_s, lambda: self._step_ended(stretch))

    def _step_ended(self, stretch: _Stretch) -> None:
        if stretch is not self._stretch:
            return  # cut short, or the group died
        self._stretch = self._load = None
        self._steps += stretch.steps
        for key, rows in self._rows.items():
            self._count(self.report.output_tokens, key, rows * stretch.steps)
        ended: list[Run] = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            run = heapq.heappop(self._decoding)[2]
            self._leave(run)
            ended.append(run)
        while self._prefilling and not self._prefilling[0].prefill_left:
            run = self._prefilling.pop(0)
            self._first_token(run)
            if run.done >= run.request.output_tokens:
                self._free(run)
                ended.append(run)
        self.pace.stepped(stretch.seconds, stretch.prompt_tokens, len(ended))
        for run in ended:
            self._ended(run)
        if self._stretch is None and self.alive:
            self._begin()

    def _first_token(self, run: Run) -> None:
        """The prompt's last chunk gave a token; the others come a step each."""
        if run.first_token_s is None:
            run.first_token_s = self._clock.now
        key = run.request.adapter
        run.done += 1
        self._count(self.report.output_tokens, key, 1)
        run.begun_at = self._steps
        left = run.request.output_tokens - run.done
        if left:
            heapq.heappush(self._decoding, (self._steps + left, run.number, run))
            self._rows[key] += 1

    def _leave(self, run: Run) -> None:
        run.done = run.request.output_tokens
        key = run.request.adapter
        self._rows[key] -= 1
        if not self._rows[key]:
            del self._rows[key]
        self._free(run)

    def _free(self, run: Run) -> None:
        key = run.request.adapter
        self._kv_used -= run.tokens
        if key is not None:
            self._adapters[key] -= 1
            if not self._adapters[key]:
                del self._adapters[key]
            self.pool.release(key)

    def _admit(self) -> None:
        if not len(self.queue):
            return
        blocked = self.pool.blocked
        if not blocked:
            self._overtaken = 0
        for run in self.queue:
            if self.running >= self.hardware.max_running:
                return
            if self._kv_used and self._kv_used + run.tokens > self.hardware.kv_tokens:
                return
            key = run.request.adapter
            if not run.holds_adapter:
                if blocked and self._overtaken >= OVERTAKE_LIMIT:
                    continue
                if key is not None and not self.pool.acquire(key):
                    self.queue.remove(run)
                    self._waiting_for.setdefault(key, []).append(run)
                    continue
                self._overtaken += blocked
            self.queue.remove(run)
            self._start(run)

    def _start(self, run: Run) -> None:
        r = run.request
        self._waiting -= 1
        self._prompt_waiting -= r.prompt_tokens + run.done
        self._kv_used += run.tokens
        if r.adapter is not None:
            self._adapters[r.adapter] += 1
        run.holds_adapter = False
        run.prefill_left = max(1, r.prompt_tokens + run.done - self._cached(r))
        self._count(self.report.prompt_tokens, r.adapter, run.prefill_left)
        self._prefilling.append(run)

    def _prefill_chunk(self) -> int:
        budget = max(0, self.hardware.max_batch_tokens - len(self._decoding))
        taken = 0
        for run in self._prefilling:
            if taken == budget:
                break
            chunk = min(run.prefill_left, budget - taken)
            run.prefill_left -= chunk
            taken += chunk
        return taken

    def _cached(self, r: TracedRequest) -> int:
        """Tokens of the prompt that are in the cache; the shared part is there from now on."""
        if not r.prefix_tokens:
            return 0
        name = (r.adapter, r.prefix)
        cached = self._prefixes.pop(name, 0)
        self._prefixes[name] = r.prefix_tokens
        while len(self._prefixes) * r.prefix_tokens > PREFIX_CACHE_TOKENS:
            self._prefixes.popitem(last=False)
        self.report.prefix_hit_tokens += cached
        return cached

    def _count(self, counts: dict[str, int], key: str | None, tokens: int) -> None:
        owner = key or "base/base"
        counts[owner] = counts.get(owner, 0) + tokens


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Equal steps, one after the other."""

    start_s: float
    steps: int
    seconds: float  # of one step
    prompt_tokens: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.steps * self.seconds

    def whole_steps(self, now_s: float) -> int:
        return min(self.steps, math.floor((now_s - self.start_s) / self.seconds))

    def cut(self, now_s: float) -> _Stretch:
        """The same, ending with the step that runs at `now_s`."""
        steps = min(self.steps, max(1, math.ceil((now_s - self.start_s) / self.seconds)))
        return _Stretch(self.start_s, steps, self.seconds, self.prompt_tokens)
