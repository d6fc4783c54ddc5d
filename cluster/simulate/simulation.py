"""Runs a trace against a policy: deterministic, without a clock of its own or global state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ClusterError
from .clock import Clock
from .cores import Cores
from .group import SimGroup
from .hardware import Hardware
from .policy import Policy
from .queues import Fair, Fifo, Queue
from .run import Run
from .tiers import NodeTiers
from .trace import Fault, Trace


class SimulationError(ClusterError):
    """The trace can't be run on this hardware."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request's end. `groups`: those that worked on it; more than one after a group's death."""

    adapter: str | None
    tenant: str
    at_s: float
    ttft_s: float
    end_s: float
    output_tokens: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `moved`: bytes copied into pools ("gpu"), read from disks ("disk") and
    fetched from the object store ("s3"), after the warm-up."""

    policy: str
    served: list[Served]
    moved: Mapping[str, int]
    loads: Mapping[str, int] = field(default_factory=dict)


class _World:
    def __init__(self, trace: Trace, policy: Policy, hardware: Hardware, groups: int) -> None:
        self.clock = Clock()
        self._policy, self._hardware = policy, hardware
        self._sizes = trace.sizes
        self._ranks = {a.key: a.rank for a in trace.adapters}
        self._cores = Cores(hardware)
        nodes = [
            NodeTiers(_name(i), self.clock, hardware, self._sizes, self._cores)
            for i in range(1 if hardware.shared_node else groups)
        ]
        self._tiers = {_name(i): nodes[i % len(nodes)] for i in range(groups)}
        self._dead: list[SimGroup] = []  # their counters still count
        self._stranded: list[Run] = []  # came while no group lived
        self.groups: dict[str, SimGroup] = {}
        self.served: list[Served] = []
        for name in self._tiers:
            self._raise_group(name)

    def _raise_group(self, name: str) -> None:
        self.groups[name] = SimGroup(
            name,
            self.clock,
            self._hardware,
            self._sizes,
            self._tiers[name],
            self._ended,
            self._cores,
            self._queue,
        )
        self.groups = dict(sorted(self.groups.items()))
        stranded, self._stranded = self._stranded, []
        for run in stranded:
            self.send(run)

    def _queue(self) -> Queue:
        return Fair(self._hardware.max_running, self._ranks) if self._policy.fair else Fifo()

    def arrive(self, run: Run) -> None:
        """The request reaches the gateway."""
        front_s = self._hardware.front_s * self._cores.slowed
        self.clock.at(self.clock.now + front_s, lambda: self.send(run))

    def send(self, run: Run) -> None:
        if not self.groups:
            self._stranded.append(run)
            return
        name = self._policy.route(self.clock.now, run.request, self.groups)
        self.groups[name].submit(run)

    def tick(self) -> None:
        assert self._policy.tick_s is not None
        advice = self._policy.tick(self.clock.now, self.groups.values())
        held: dict[NodeTiers, list[str]] = {}
        for name, told in advice.items():
            if name in self.groups:
                held.setdefault(self._tiers[name], []).extend(told.host)
        for node, keys in held.items():
            node.hold(keys)
        for name, told in advice.items():
            if name in self.groups:
                self.groups[name].pool.advise(told.desired)
        self.clock.at(self.clock.now + self._policy.tick_s, self.tick)

    def fail(self, fault: Fault) -> None:
        name = _name(fault.group)
        group = self.groups.pop(name, None)
        if group is None:
            return
        self._dead.append(group)
        self.clock.at(fault.at_s + fault.down_s, lambda: self._raise_group(name))
        for run in group.kill():
            self.send(run)

    def moved(self) -> dict[str, int]:
        groups = [*self.groups.values(), *self._dead]
        moved = {"gpu": sum(g.pool.bytes_loaded for g in groups)}
        for tier in ("disk", "s3"):
            moved[tier] = sum(t.bytes_from[tier] for t in set(self._tiers.values()))
        return moved

    def loads(self) -> dict[str, int]:
        loads: dict[str, int] = {}
        for group in [*self.groups.values(), *self._dead]:
            for tier, n in group.pool.loads.items():
                loads[tier] = loads.get(tier, 0) + n
        return dict(sorted(loads.items()))

    def _ended(self, run: Run) -> None:
        r = run.request
        assert run.first_token_s is not None
        self.served.append(
            Served(
                r.adapter,
                r.tenant,
                r.at_s,
                run.first_token_s - r.at_s,
                self.clock.now,
                run.done,
                tuple(run.groups),
            )
        )


def simulate(
    trace: Trace,
    policy: Policy,
    groups: int,
    hardware: Hardware | None = None,
    warmup_s: float = 0.0,
) -> Outcome:
    """Runs the whole trace until every request has ended.

    Args:
        warmup_s: bytes that move before that aren't counted; requests are all returned.

    Raises:
        SimulationError: an adapter is larger than a pool, or a request than the KV cache.
    """
    hardware = hardware or Hardware()
    _check(trace, hardware, groups)
    world = _World(trace, policy, hardware, groups)
    before: dict[str, int] = {}
    world.clock.at(warmup_s, lambda: before.update(world.moved()))
    for fault in trace.faults:
        world.clock.at(fault.at_s, lambda fault=fault: world.fail(fault))
    if policy.tick_s is not None:
        world.clock.at(0.0, world.tick)
    for number, request in enumerate(trace.requests):
        run = Run(request, number)
        world.clock.at(request.at_s, lambda run=run: world.arrive(run))
    world.clock.run(lambda: len(world.served) == len(trace.requests))
    moved = {tier: n - before.get(tier, 0) for tier, n in world.moved().items()}
    return Outcome(policy.name, world.served, moved, world.loads())


def _name(number: int) -> str:
    return f"g{number:03d}"


def _check(trace: Trace, hardware: Hardware, groups: int) -> None:
    if groups < 1:
        raise SimulationError(f"groups is {groups}; it must be at least 1")
    for adapter in trace.adapters:
        if adapter.nbytes > hardware.pool_bytes:
            raise SimulationError(
                f"adapter {adapter.key} has {adapter.nbytes} bytes, a pool {hardware.pool_bytes}; "
                "use a larger pool or smaller adapters"
            )
    for number, r in enumerate(trace.requests):
        if r.prompt_tokens + r.output_tokens > hardware.kv_tokens:
            raise SimulationError(
                f"request {number} has {r.prompt_tokens} + {r.output_tokens} tokens, "
                f"the KV cache {hardware.kv_tokens}"
            )
