"""A simulated worker group: continuous batching with chunked prefill, step by step.

A stretch of steps in which nothing comes, starts or ends is one event, so a run's cost grows with
its requests and not with their tokens; an arrival cuts the stretch at the next step's end.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable

from ...workers import Backlog, EngineReport, GroupReport, Pace
from ..routing import GroupLoad
from .clock import Clock
from .cores import Cores
from .hardware import Hardware
from .pool import SimPool
from .queues import Fifo, Queue
from .run import Run
from .stretch import Stretch
from .tiers import NodeTiers
from .trace import TracedRequest

PREFIX_CACHE_TOKENS = 50_000


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
        self.queue = queue()
        fair = self.queue.fair
        self.pool = SimPool(clock, hardware, sizes, tiers, self._adapter_came, self._cores, fair)
        self.pace = Pace()
        self.report = EngineReport(
            pool_bytes_total=hardware.pool_bytes, max_running=hardware.max_running
        )
        self.report.gpu = self.pool.resident
        self.report.host, self.report.disk = tiers.host.entries, tiers.disk.entries
        self.report.host_bytes_total = hardware.host_bytes
        self._prefilling: list[Run] = []
        self._decoding: list[tuple[int, int, Run]] = []  # heap by the step at whose end it ends
        self._rows: Counter[tuple[str, str | None]] = Counter()  # decoding, by tenant and adapter
        self._adapters: Counter[str] = Counter()  # in steps, by adapter
        self._kv_used = 0
        self._backlogs: defaultdict[str, Backlog] = defaultdict(Backlog)  # by tenant
        self._prefixes: OrderedDict[tuple[str | None, int], int] = OrderedDict()
        self._steps = 0
        self._stretch: Stretch | None = None
        self._load: GroupLoad | None = None  # until something changes
        self.alive = True

    # What routing and the controller see

    @property
    def requests(self) -> int:
        return len(self.queue) + self.running

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def load(self) -> GroupLoad:
        if self._load is None:
            self._load = self._load_now()
        return self._load

    def _load_now(self) -> GroupLoad:
        waits = self.queue.waits(self._backlogs, self.pace, self.hardware)
        return GroupLoad(
            self.requests,
            waits.all_s,
            waits.turn_s,
            self.pace.token_s,
            self.pool.resident,
            waits.floods,
        )

    def group_report(self) -> GroupReport:
        """Live: its dictionaries are the group's own."""
        load = self.load()
        r = self.report
        r.queued, r.running, r.steps = len(self.queue), self.running, self._steps
        r.wait_s, r.token_s = load.wait_s, load.token_s
        return GroupReport("sim", self.name, self.tiers.name, 1, 0, False, r)

    # Events

    def submit(self, run: Run) -> None:
        run.groups.append(self.name)
        self._load = None
        backlog = self._backlogs[run.request.tenant]
        backlog.open += 1
        backlog.queued += 1
        backlog.tokens += run.request.prompt_tokens + run.done
        self.queue.push(run)
        if self.queue.fair and run.request.adapter is not None:
            self.pool.want(run.request.adapter)
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
        runs = [*self.queue, *self._prefilling, *(r for _, _, r in self._decoding)]
        for run in runs:
            run.holds_adapter = False
        return sorted(runs, key=lambda r: r.number)

    def _adapter_came(self, key: str) -> None:
        first = self.queue.came(key)
        if first is not None:
            first.holds_adapter = self.pool.acquire(key)
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
        rows = len(self._decoding)
        prompt_tokens = self._fill(max(0, self.hardware.max_batch_tokens - rows))
        if not rows and not prompt_tokens:
            self._cores.idle(self)
            return
        slowed = self._cores.busy(self)
        steps = 1 if prompt_tokens else max(1, self._decoding[0][0] - self._steps)
        seconds = self.hardware.step_s(rows, prompt_tokens, len(self._adapters)) * slowed
        self._stretch = Stretch(self._clock.now, steps, seconds, prompt_tokens)
        self._schedule(self._stretch)

    def _schedule(self, stretch: Stretch) -> None:
        self._clock.at(stretch.end_s, lambda: self._step_ended(stretch))

    def _step_ended(self, stretch: Stretch) -> None:
        if stretch is not self._stretch:
            return  # cut short, or the group died
        self._stretch = self._load = None
        self._steps += stretch.steps
        for owner, rows in self._rows.items():
            tokens = rows * stretch.steps
            self._count(self.report.output_tokens, owner[1], tokens)
            self.queue.decoded(owner, tokens)
        ended: list[Run] = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            run = heapq.heappop(self._decoding)[2]
            self._leave(run)
            ended.append(run)
        begun, self._prefilling = self._prefilling, []
        for run in begun:
            if run.prefill_left:
                self._prefilling.append(run)
                continue
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
            self._rows[run.owner] += 1

    def _leave(self, run: Run) -> None:
        run.done = run.request.output_tokens
        self._rows[run.owner] -= 1
        if not self._rows[run.owner]:
            del self._rows[run.owner]
        self._free(run)

    def _free(self, run: Run) -> None:
        key, tenant = run.request.adapter, run.request.tenant
        self._kv_used -= run.tokens
        self._backlogs[tenant].open -= 1
        if not self._backlogs[tenant].open:
            del self._backlogs[tenant]
        self.queue.end(run)
        if key is not None:
            self._adapters[key] -= 1
            if not self._adapters[key]:
                del self._adapters[key]
            self.pool.release(key)

    def _fill(self, left: int) -> int:
        """Spends what is left of a step on prompts, begun ones and new ones, as they come in turn.

        Returns:
            Prompt tokens that the step computes.
        """
        budget = left

        def take(run: Run) -> None:
            nonlocal left
            chunk = min(run.prefill_left, left)
            run.prefill_left -= chunk
            self._backlogs[run.request.tenant].tokens -= chunk
            left -= chunk
            self.queue.prefilled(run, chunk)

        begun = deque(self.queue.in_turn(self._prefilling))
        if left and len(self.queue) and self.running < self.hardware.max_running:
            for run in self.queue.candidates(self.pool.blocked):
                while begun and left and not self.queue.before(run, begun[0]):
                    take(begun.popleft())
                if not left or self.running >= self.hardware.max_running:
                    break
                loaded_bytes = self._acquire(run)
                if loaded_bytes is None:
                    continue
                if self._kv_used and self._kv_used + run.tokens > self.hardware.kv_tokens:
                    if run.request.adapter is not None and not run.holds_adapter:
                        self.pool.release(run.request.adapter)
                    break
                self.queue.start(run, loaded_bytes)
                self._start(run)
                take(run)
        while begun and left:
            take(begun.popleft())
        return budget - left

    def _acquire(self, run: Run) -> int | None:
        """Takes hold of its adapter; else it waits for that.

        Returns:
            Bytes that were loaded for it, if it is here.
        """
        key = run.request.adapter
        if key is None or run.holds_adapter:
            return 0
        loaded_bytes = self.pool.loaded_for_request(key)
        if self.pool.acquire(key):
            return loaded_bytes
        self.queue.wait(run, for_room=self.pool.lacks_room(key))
        return None

    def _start(self, run: Run) -> None:
        r = run.request
        self._kv_used += run.tokens
        if r.adapter is not None:
            self._adapters[r.adapter] += 1
        run.holds_adapter = False
        prompt_tokens = r.prompt_tokens + run.done
        run.prefill_left = max(1, prompt_tokens - self._cached(r))
        backlog = self._backlogs[r.tenant]
        backlog.queued -= 1
        backlog.tokens += run.prefill_left - prompt_tokens
        self._count(self.report.prompt_tokens, r.adapter, run.prefill_left)
        self._prefilling.append(run)

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
