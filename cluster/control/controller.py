"""The controller's core: from what groups report to routing table, advice and purges.

Level-triggered: every tick looks at what is, not at what changed, so a restarted controller finds
its way from the groups' next reports. No Ray, no I/O; the clock is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...workers import GroupReport
from ..metrics import Target
from .demand import DemandTracker
from .hand_off import is_handed_off, is_ready
from .placement import plan
from .plan import PlacementConfig, Plan
from .purges import Purges
from .table import GroupEntry, RoutingTable

# Between two ticks, when half a second is usual: this process itself was held up, and what groups
# said meanwhile isn't read yet.
_HELD_UP_S = 1.5


@dataclass(frozen=True)
class ControllerConfig:
    """
    Args:
        group_timeout_s: a group that hasn't reported for so long leaves the table.
        target_timeout_s: an exporter that hasn't been registered for so long is forgotten.
        settle_s: how long after its start a controller waits for reports before it plans, or
            replaces a table that a gateway has from its predecessor.
        demand_tau_s: age at which work counts 1/e in an adapter's demand.
        join_s: a new group gets requests once it holds what it should, and after so long anyway.
    """

    group_timeout_s: float = 3.0
    target_timeout_s: float = 15.0
    settle_s: float = 1.5
    demand_tau_s: float = 60.0
    join_s: float = 20.0
    placement: PlacementConfig = field(default_factory=PlacementConfig)


@dataclass
class _Totals:
    """Counts since the controller's start."""

    groups_lost: int = 0
    moves_planned: int = 0
    moves_done: int = 0
    moves_dropped: int = 0
    moved_bytes: int = 0


class Controller:
    """One controller's state. Not thread-safe.

    Args:
        config: its times and the planner's eagerness.
        clock: seconds, monotonic.
        epoch: what this start took; see `adapter_store.next_epoch`.
    """

    def __init__(
        self, config: ControllerConfig, clock: Callable[[], float], epoch: int = 1
    ) -> None:
        self._config = config
        self._clock = clock
        self._epoch = epoch
        self._started_s = self._ticked_s = self._listens_since_s = clock()
        self._reports: dict[str, tuple[float, GroupReport]] = {}
        self._came_s: dict[str, float] = {}  # groups that haven't joined yet
        self._released: set[str] = set()
        self._held_up = False
        self._targets: dict[tuple[str, str, int], tuple[float, Target]] = {}
        self._demand = DemandTracker(config.demand_tau_s)
        self._purges = Purges()
        self._unchecked: set[str] = set()
        self._plan = Plan()
        self._table = RoutingTable(epoch=epoch)
        self._totals = _Totals()
        self._newest_seen = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def superseded_by(self) -> int | None:
        """An epoch above this controller's that a group obeys, if one does."""
        return self._newest_seen if self._newest_seen > self._epoch else None

    def adopt_epoch(self, epoch: int) -> None:
        """Goes on under a higher epoch, after the store lost its memory of a higher one."""
        self._epoch = epoch
        self._table = replace(self._table, epoch=epoch, version=1)

    def report(self, wire: Mapping[str, Any]) -> dict[str, Any]:
        """Takes a `GroupReport` in wire form; answers {"epoch", "desired", "host", "purge",
        "release"}.

        `desired` are the adapter keys that the group should hold, the most worth first; `host`
        those whose packs its node should keep in memory, None where another group of the node is
        told; `purge` those that it must drop, once told and now and then again. `release`: a
        leaving group may stop, for others hold what it did.
        """
        return self.take(GroupReport.from_wire(dict(wire)))

    def take(self, report: GroupReport) -> dict[str, Any]:
        """`report` without the wire."""
        name, now = report.group, self._clock()
        if name not in self._reports:
            engine = report.engine
            self._unchecked.update(engine.gpu, engine.host, engine.disk, engine.loading)
            self._came_s[name] = now
        self._reports[name] = (now, report)
        self._newest_seen = max(self._newest_seen, report.seen_epoch)
        self._demand.observe(name, report.engine)
        purge = self._purges.advise(name, report.engine, now)
        purging = self._purges.pending(self._reports)
        # Before the first plan, a group should keep what it has.
        host = self._plan.host.get(name)
        held = report.engine.gpu
        desired = self._plan.desired.get(name, tuple(held))
        # What it gave up since the plan isn't to come back before the next plan has seen that.
        told = (k for k in desired if k in held or (k, name) in self._plan.waiting)
        return {
            "epoch": self._epoch,
            "desired": [key for key in told if key not in purging],
            "host": None if host is None else [key for key in host if key not in purging],
            "purge": purge,
            "release": name in self._released,
        }

    def table(self, since: Sequence[int] | None = None) -> dict[str, Any] | None:
        """The routing table in wire form; None when `since` (epoch, version) is as new.

        The version counts changes of groups and placement. Loads in the table are as of then;
        gateways have fresher ones from their connections.
        """
        known = tuple(since) if since is not None else (0, 0)
        table = self._table
        if known >= (table.epoch, table.version):
            return None
        if 0 < known[0] < table.epoch and self._settling:
            return None
        return table.to_wire()

    @property
    def routing_table(self) -> RoutingTable:
        """The newest one."""
        return self._table

    def tick(self) -> None:
        """Drops who went silent, plans, and publishes. Call it every half second or so."""
        now = self._clock()
        held_up = now - self._ticked_s > _HELD_UP_S
        if held_up and not self._held_up:  # who is always late must still find out who is gone
            self._listens_since_s = now
        self._ticked_s, self._held_up = now, held_up
        self._drop_silent(now)
        self._demand.tick(now)
        self._purges.tick(self._reports, now)
        if not self._settling:
            self._replan()
        self._admit(now)
        self._publish()

    def purge(self, keys: Iterable[str]) -> None:
        """Adapters (`AdapterRef.key`) were deleted: no group is to hold them any longer."""
        keys = list(keys)
        self._purges.ask(keys, self._clock())
        for key in keys:
            self._demand.forget_adapter(key)

    def unchecked(self) -> list[str]:
        """Adapters of groups that came newly: they may have been deleted while those were away,
        or while there was no controller to be told. Whoever finds out calls `checked`."""
        return sorted(self._unchecked)

    def checked(self, keys: Iterable[str], deleted: Iterable[str]) -> None:
        """Takes which of `keys`, from `unchecked`, were deleted."""
        self._unchecked.difference_update(keys)
        self.purge(deleted)

    def register_target(self, kind: str, labels: Mapping[str, str], host: str, port: int) -> None:
        """A process's exporter is at host:port; to be repeated every few seconds."""
        target = Target(kind, host, port, dict(labels))
        self._targets[kind, host, port] = (self._clock(), target)

    def metrics_targets(self) -> list[Target]:
        """All exporters: the groups' and the registered ones."""
        groups = [
            Target(
                "group",
                report.host,
                report.metrics_port,
                {
                    "deployment": report.deployment,
                    "group": report.group,
                    "rank": "0",
                    "replica": report.group,
                },
            )
            for _, report in self._reports.values()
            if report.metrics_port
        ]
        others = [target for _, target in self._targets.values()]
        return sorted([*groups, *others], key=lambda t: (t.kind, t.host, t.port))

    def figures(self) -> dict[str, Any]:
        """What `ControllerMetrics.tick` shows, but for the tick's time."""
        reports = [report for _, report in self._reports.values()]
        copies = [key for keys in self._plan.desired.values() for key in keys]
        placed = set(copies)
        return {
            "epoch": self._epoch,
            "serving": sum(r.stays for r in reports),
            "draining": sum(not r.stays for r in reports),
            "desired": {group: len(keys) for group, keys in self._plan.desired.items()},
            "placed": len(placed),
            "replicas": len(copies) - len(placed),
            "demand": self._demand.rates(),
            "pending_purges": len(self._purges.pending(self._reports)),
            "totals": dict(vars(self._totals)),
        }

    def status(self) -> dict[str, Any]:
        """Everything an operator may ask for, as JSON-like values."""
        now = self._clock()
        rates = self._demand.rates()
        return {
            "epoch": self._epoch,
            "version": self._table.version,
            "groups": [
                _group_status(
                    report, now - seen, self._plan.desired.get(name, ()), name in self._came_s
                )
                for name, (seen, report) in sorted(self._reports.items())
            ],
            "adapters": {
                key: {
                    "groups": list(self._table.placement.get(key, ())),
                    "replicas": self._plan.replicas.get(key, 0),
                    "demand_tokens_per_second": round(rates.get(key, 0.0), 3),
                }
                for key in sorted(self._table.placement.keys() | self._plan.replicas.keys())
            },
            "purging": sorted(self._purges.pending(self._reports)),
            "totals": dict(vars(self._totals)),
        }

    @property
    def _settling(self) -> bool:
        return self._clock() - self._started_s < self._config.settle_s

    def _drop_silent(self, now: float) -> None:
        for name, (seen, report) in list(self._reports.items()):
            if now - max(seen, self._listens_since_s) > self._config.group_timeout_s:
                del self._reports[name]
                self._came_s.pop(name, None)
                self._demand.forget_group(name)
                # A group that said that it drains was meant to leave.
                self._totals.groups_lost += report.stays
        for address, (seen, _) in list(self._targets.items()):
            if now - max(seen, self._listens_since_s) > self._config.target_timeout_s:
                del self._targets[address]

    def _admit(self, now: float) -> None:
        """Lets new groups have requests, and leaving ones go."""
        reports = {name: report for name, (_, report) in self._reports.items()}
        for name, came in list(self._came_s.items()):
            # Before the first plan, groups are new to this controller only.
            late = now - came >= self._config.join_s
            if self._settling or late or is_ready(reports[name], self._plan):
                del self._came_s[name]
        self._released = {
            name
            for name, report in reports.items()
            if report.leaving and not self._settling and is_handed_off(report, reports, self._plan)
        }

    def _replan(self) -> None:
        reports = {name: report for name, (_, report) in self._reports.items()}
        purging = self._purges.pending(reports)
        demand = {k: rate for k, rate in self._demand.rates().items() if k not in purging}
        old = self._plan
        new = plan(reports.values(), demand, old, self._config.placement)
        asked = new.waiting.keys() - old.waiting.keys()
        ended = old.waiting.keys() - new.waiting.keys()
        done = sum(g in reports and k in reports[g].engine.gpu for k, g in ended)
        self._totals.moves_planned += len(asked)
        self._totals.moves_done += done
        self._totals.moves_dropped += len(ended) - done
        self._totals.moved_bytes += sum(new.sizes.get(key, 0) for key, _ in asked)
        self._plan = new

    def _publish(self) -> None:
        groups = tuple(
            _entry(report, name in self._came_s)
            for name, (_, report) in sorted(self._reports.items())
        )
        purging = self._purges.pending(self._reports)
        placement = {k: names for k, names in self._plan.placement.items() if k not in purging}
        near = {k: names for k, names in self._plan.near.items() if k not in purging}
        sizes = {k: n for k, n in self._plan.sizes.items() if k in placement or k in near}
        old = self._table
        changed = (placement, near) != (old.placement, old.near) or [
            _identity(g) for g in groups
        ] != [_identity(g) for g in old.groups]
        self._table = RoutingTable(
            self._epoch, old.version + changed, groups, placement, near, sizes
        )


def _entry(report: GroupReport, new: bool) -> GroupEntry:
    return GroupEntry(
        deployment=report.deployment,
        group=report.group,
        host=report.host,
        port=report.port,
        draining=report.draining,
        queued=report.engine.queued,
        running=report.engine.running,
        standby=new or report.leaving,
    )


def _identity(entry: GroupEntry) -> GroupEntry:
    """Without what changes all the time."""
    return replace(entry, queued=0, running=0)


def _group_status(
    report: GroupReport, age_s: float, desired: Sequence[str], new: bool
) -> dict[str, Any]:
    engine = report.engine
    return {
        "group": report.group,
        "deployment": report.deployment,
        "address": f"{report.host}:{report.port}",
        "draining": report.draining,
        "leaving": report.leaving,
        "joining": new,
        "age_s": round(age_s, 3),
        "weights_bytes": engine.weights_bytes,
        "weights_seconds": round(engine.weights_seconds, 3),
        "ready_seconds": round(engine.ready_seconds, 3),
        "queued": engine.queued,
        "running": engine.running,
        "pool_bytes_total": engine.pool_bytes_total,
        "pool_bytes_used": engine.pool_bytes_used,
        "resident": dict(engine.gpu),
        "host_bytes_total": engine.host_bytes_total,
        "host": dict(engine.host),
        "disk": dict(engine.disk),
        "loading": list(engine.loading),
        "desired": list(desired),
        "loads": dict(engine.loads),
        "evictions": engine.evictions,
        "load_failures": engine.load_failures,
    }
