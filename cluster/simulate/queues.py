"""Whose turn it is in a simulated group: first come first served, or fair between tenants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ...workers import (
    Backlog,
    EngineConfig,
    FairQueue,
    Pace,
    Places,
    Prices,
    VirtualTokenCounter,
    Waits,
    expected_waits,
)
from .hardware import Hardware
from .run import Run

OVERTAKE_LIMIT = 8  # requests that start while another waits for room in the pool


class Queue(Protocol):
    """The requests that wait in a group, and the order of those whose prompts are begun.

    `fair`: room in the pool, too, is given by turns, and not in the order in which adapters were
    asked for.
    """

    fair: bool

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Run]:
        """All that wait."""
        ...

    def push(self, run: Run) -> None: ...

    def candidates(self, blocked: bool) -> Iterator[Run]:
        """Those to try, each of which is started, or waits for its adapter, before the next.

        Args:
            blocked: an adapter waits for room in the pool.
        """
        ...

    def in_turn(self, begun: Sequence[Run]) -> Sequence[Run]:
        """The order in which prompts go on; `begun` is in the order of admission."""
        ...

    def before(self, waiting: Run, begun: Run) -> bool:
        """Whether the one's prompt is begun before the other's goes on."""
        ...

    def wait(self, run: Run, for_room: bool) -> None:
        """Its adapter is on the way, or has no room."""
        ...

    def came(self, key: str) -> Run | None:
        """The adapter is in the pool. Returns who is to take hold of it at once, if anybody."""
        ...

    def start(self, run: Run, loaded_bytes: int) -> None:
        """
        Args:
            loaded_bytes: of its adapter, if that was loaded for it.
        """
        ...

    def end(self, run: Run) -> None:
        """A started one has ended."""
        ...

    def prefilled(self, run: Run, tokens: int) -> None:
        """A step computes so many more of its prompt's."""
        ...

    def decoded(self, owner: tuple[str, str | None], tokens: int) -> None:
        """The requests of a tenant's adapter got so many tokens."""
        ...

    def waits(self, backlogs: Mapping[str, Backlog], pace: Pace, hardware: Hardware) -> Waits:
        """See `workers.expected_waits`."""
        ...


class Fifo:
    """In the order of arrival; a request whose adapter has come is the last to have arrived."""

    fair = False

    def __init__(self) -> None:
        self._runs: dict[int, Run] = {}
        self._waiting_for: dict[str, list[Run]] = {}  # adapters that come
        self._away = 0  # requests in there
        self._blocked = False
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._runs) + self._away

    def __iter__(self) -> Iterator[Run]:
        yield from self._runs.values()
        for runs in self._waiting_for.values():
            yield from runs

    def push(self, run: Run) -> None:
        self._runs[run.number] = run

    def candidates(self, blocked: bool) -> Iterator[Run]:
        self._blocked = blocked
        if not blocked:
            self._overtaken = 0
        for run in list(self._runs.values()):
            if run.holds_adapter or not blocked or self._overtaken < OVERTAKE_LIMIT:
                yield run

    def in_turn(self, begun: Sequence[Run]) -> Sequence[Run]:
        return begun

    def before(self, waiting: Run, begun: Run) -> bool:
        return False

    def wait(self, run: Run, for_room: bool) -> None:
        del self._runs[run.number]
        assert run.request.adapter is not None
        self._waiting_for.setdefault(run.request.adapter, []).append(run)
        self._away += 1

    def came(self, key: str) -> Run | None:
        runs = self._waiting_for.pop(key, [])
        self._away -= len(runs)
        for run in runs:
            self.push(run)
        # Who waited longest has it at once: else another's load might evict it unused.
        return runs[0] if runs else None

    def start(self, run: Run, loaded_bytes: int) -> None:
        del self._runs[run.number]
        self._overtaken += self._blocked and not run.holds_adapter

    def end(self, run: Run) -> None:
        pass

    def prefilled(self, run: Run, tokens: int) -> None:
        pass

    def decoded(self, owner: tuple[str, str | None], tokens: int) -> None:
        pass

    def waits(self, backlogs: Mapping[str, Backlog], pace: Pace, hardware: Hardware) -> Waits:
        free = hardware.max_running - sum(b.open - b.queued for b in backlogs.values())
        all_s = pace.wait_s(sum(b.tokens for b in backlogs.values()), len(self), free)
        return Waits(all_s, all_s, {})


class Fair:
    """The engine's own queue, counters, prices and places, asked as its scheduler asks them.

    Decoded tokens are charged at the end of a stretch of steps, in which nobody could start.

    Args:
        ranks: adapter key -> rank.
    """

    fair = True

    def __init__(self, max_running: int, ranks: Mapping[str, int]) -> None:
        slack = EngineConfig.overtake_slack
        self.vtc = VirtualTokenCounter(slack)
        self._queue: FairQueue[Run] = FairQueue(self.vtc, slack)
        self._places, self._prices, self._ranks = Places(max_running), Prices(), ranks

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._queue)

    def push(self, run: Run) -> None:
        self._queue.add(run, run.request.tenant, run.number)

    def candidates(self, blocked: bool) -> Iterator[Run]:
        for run in self._queue.candidates():
            tenant = run.request.tenant
            if self._places.open_to(tenant, self.vtc.behind(tenant)):
                yield run
            else:
                self._queue.pass_over(run)

    def in_turn(self, begun: Sequence[Run]) -> Sequence[Run]:
        return sorted(begun, key=lambda run: self.vtc.counter(run.request.tenant))

    def before(self, waiting: Run, begun: Run) -> bool:
        order = self.vtc.order
        return order(waiting.request.tenant) < order(begun.request.tenant)

    def wait(self, run: Run, for_room: bool) -> None:
        (self._queue.block if for_room else self._queue.park)(run)

    def came(self, key: str) -> Run | None:
        return None

    def start(self, run: Run, loaded_bytes: int) -> None:
        self._queue.ready(run)
        if loaded_bytes:
            self.vtc.charge(run.request.tenant, self._prices.load(loaded_bytes), 1.0)
        self._queue.admit(run)
        self._places.take(run.request.tenant)

    def end(self, run: Run) -> None:
        self._places.give(run.request.tenant)

    def prefilled(self, run: Run, tokens: int) -> None:
        # What a group that died has computed was charged there; the last chunk draws a token.
        inputs, outputs = 0 if run.done else tokens, 0 if run.prefill_left else 1
        self._charge(run.owner, inputs, outputs)

    def decoded(self, owner: tuple[str, str | None], tokens: int) -> None:
        self._charge(owner, 0, tokens)

    def waits(self, backlogs: Mapping[str, Backlog], pace: Pace, hardware: Hardware) -> Waits:
        rows, step_tokens = hardware.max_running, hardware.max_batch_tokens
        return expected_waits(backlogs, self.vtc, pace, rows, step_tokens)

    def _charge(self, owner: tuple[str, str | None], inputs: int, outputs: int) -> None:
        tenant, adapter = owner
        rank = self._ranks[adapter] if adapter else 0
        self.vtc.charge(tenant, self._prices.tokens(inputs, outputs, rank), 1.0)
