"""What is done to a service on several nodes while it answers, and what is to be seen of it."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from _failover_load import Answer, Job, Load, Tally
from _failover_watch import View, Watch
from _nodes_cluster import Nodes, deploy, signal_all, wait_running
from _serving_load import DEMO
from loraplex.cluster.cli_client import Client, adapter_files
from loraplex.cluster.up_demo import Demo

WAIT_S = 180.0
# How long a service without room for all of its groups is left so.
SHORT_S = 10.0
ENDED_S = 60.0
TICK_S = 0.5  # the controller's
GROUP_TITLES = ("ray::ServeRepl", "ray::RankActor")  # a process's name is cut off


@dataclass
class Death:
    """A node's, at `at`.

    Args:
        groups: that it had.
        room: whether other nodes had room for them; else a node was added at `added_at`.
        ended_s: how long its groups' processes lived once they went on, if they were only stopped.
    """

    at: float
    groups: frozenset[str]
    room: bool
    added_at: float | None = None
    ended_s: float | None = None


@dataclass
class Run:
    """One service under load.

    Args:
        groups: as many as there should be, if their number is fixed.
        jobs, expected: requests and their answers.
    """

    nodes: Nodes
    facts: dict[str, Any]
    watch: Watch
    load: Load
    groups: int
    jobs: Sequence[Job]
    expected: Sequence[Answer]
    rng: random.Random
    tally: Tally = field(default_factory=Tally)

    async def beside(self, clients: int, act: Callable[[], Awaitable[None]]) -> None:
        """Does something while so many clients ask."""
        stop = asyncio.Event()
        keeping = asyncio.create_task(
            self.load.keep(self.jobs, self.expected, clients, stop, self.rng, self.tally)
        )
        try:
            await act()
        finally:
            stop.set()
            await keeping

    async def need(self, condition: Callable[[View], bool], what: str) -> None:
        """Waits until the operator sees it. Raises RuntimeError if that takes too long."""
        if not await self.watch.wait_for(condition, WAIT_S):
            raise RuntimeError(
                f"no {what} in {WAIT_S:.0f} s: {self.watch.views[-1]}, {self.tally.examples}"
            )


async def node_deaths(run: Run, clients: int, count: int, every: float, hangs: bool) -> Any:
    """Nodes die, in turn with room for their groups elsewhere and without.

    Args:
        hangs: a node's processes are stopped instead of killed, and go on once its groups were
            replaced. Ray may have the node back then, but its groups are to end.
    """
    deaths: list[Death] = []
    total = run.groups

    async def die() -> None:
        for _ in range(count):
            await run.need(lambda v: len(v.serving) >= total, f"{total} groups")
            await asyncio.sleep(every)
            deaths.append(await _death(run, hangs))

    await run.beside(clients, die)
    await run.need(lambda v: len(v.serving) >= total, f"{total} groups")
    views = run.watch.views
    seen = [_first(views, d.at, lambda v, d=d: not v.serving & d.groups) for d in deaths]
    # A node's groups are on others' hands from when they were seen to be gone.
    back = [
        _first(views, max(s or d.at, d.added_at or 0.0), lambda v: len(v.serving) >= total)
        for d, s in zip(deaths, seen, strict=True)
    ]
    return {
        "deaths": len(deaths),
        "groups_lost": sum(len(d.groups) for d in deaths),
        "open_at_deaths": sum(o.began < d.at < o.ended for o in run.tally.outcomes for d in deaths),
        "seen_s": _spread(s and s - d.at for d, s in zip(deaths, seen, strict=True)),
        "elsewhere_s": _spread(b and b - d.at for d, b in zip(deaths, back, strict=True) if d.room),
        "stopped_ended_s": _spread(d.ended_s for d in deaths),
        "after_node_added_s": _spread(
            b and b - d.added_at
            for d, b in zip(deaths, back, strict=True)
            if d.added_at is not None
        ),
    }


async def _death(run: Run, hangs: bool) -> Death:
    on: dict[str, set[str]] = {address: set() for address in run.nodes.addresses}
    for name, group in run.watch.views[-1].groups.items():
        on[group["address"].rpartition(":")[0]].add(name)
    address = run.rng.choice([a for a, groups in on.items() if groups])
    processes = run.nodes.processes(address)
    working = [p for p in processes if p.name().startswith(GROUP_TITLES)]
    room = run.nodes.slots * (len(on) - 1) >= run.groups
    death = Death(time.monotonic(), frozenset(on[address]), room)
    signal_all(processes, signal.SIGSTOP if hangs else signal.SIGKILL)
    run.nodes.forget(address)
    if not room:
        await asyncio.sleep(SHORT_S)
        death.added_at = time.monotonic()
        await asyncio.to_thread(run.nodes.add)
    await run.need(lambda v: len(v.serving - death.groups) >= run.groups, "groups in their place")
    if hangs:
        signal_all(processes, signal.SIGCONT)
        began = time.monotonic()
        _, left = await asyncio.to_thread(psutil.wait_procs, working, ENDED_S)
        if left:
            raise RuntimeError(f"groups that were given up live on: {left}")
        death.ended_s = time.monotonic() - began
        signal_all(processes, signal.SIGKILL)
    if not room:
        await asyncio.to_thread(run.nodes.add)  # so that the next death finds room
    return death


async def scaling(run: Run, few: int, many: int, most: int, rounds: int) -> Any:
    """From one group to `most` and back, by the load of so many clients."""
    times: dict[str, list[float]] = {"up_s": [], "down_s": []}

    async def up() -> None:
        began = time.monotonic()
        await run.need(lambda v: len(v.serving) == most, f"{most} groups")
        times["up_s"].append(time.monotonic() - began)
        await asyncio.to_thread(_spread_new_adapters, run.facts, len(times["up_s"]))
        await asyncio.sleep(SHORT_S)

    async def down() -> None:
        began = time.monotonic()
        await run.need(lambda v: len(v.groups) == 1, "one group")
        times["down_s"].append(time.monotonic() - began)

    async def change() -> None:
        for _ in range(rounds):
            await run.beside(many - few, up)
            await down()

    # The answers that were asked for before are load, too.
    await run.need(lambda v: len(v.groups) == 1, "one group")
    began = time.monotonic()
    await run.beside(few, change)
    views = [v for v in run.watch.views if v.at > began]
    return {
        "rounds": rounds,
        "clients": [few, many],
        **{name: _spread(values) for name, values in times.items()},
        "groups_added": len(set().union(*(v.serving for v in views)) - views[0].serving),
        **_hand_overs(views),
    }


def _spread_new_adapters(facts: dict[str, Any], number: int) -> None:
    """Gives each tenant another one's adapter and asks it once: the group that it is for is the
    only one to hold it."""
    demo = {a.name: a for tenant in Demo.find(DEMO).tenants for a in tenant.adapters}
    for tenant in facts["tenants"]:
        foreign = [name for name in demo if name not in tenant["adapters"]]
        adapter = demo[foreign[number % len(foreign)]]
        with Client(facts["url"], tenant["key"]) as client:
            client.upload(f"new-{number}", *adapter_files(adapter.folder))
            ask = {"model": f"new-{number}", "prompt": "The day was", "max_tokens": 4}
            client.call("POST", "/v1/completions", json=ask)


def _hand_overs(views: Sequence[View]) -> dict[str, Any]:
    """What groups that came held when they were first to have requests, and what became of the
    adapters that groups which left were the only ones to hold.

    Args:
        views: of a time in which no group dies.
    """
    brought, handed_over = 0, 0
    early: list[str] = []
    lost: list[str] = []
    joining: set[str] = set()
    alone: dict[str, set[str]] = {}  # by leaving group, when it began to leave
    for before, view in itertools.pairwise(views):
        for name, group in view.groups.items():
            if group["joining"]:
                joining.add(name)
            elif name in joining:
                joining.remove(name)
                # After the controller's next tick more may be wanted of it.
                if view.at - before.at < TICK_S:
                    wanted = set(group["desired"])
                    brought += len(wanted)
                    early += [f"{name}: {key}" for key in wanted - group["resident"].keys()]
            if group["leaving"] and name not in alone:
                alone[name] = group["resident"].keys() - _held(before, name)
        for name in before.groups.keys() - view.groups.keys():
            held = _held(view, name)
            handed_over += len(alone.get(name, set()) & held)
            lost += [f"{name}: {key}" for key in before.groups[name]["resident"].keys() - held]
    return {
        "adapters_before_requests": brought,
        "requests_before_adapters": early,
        "last_copies_handed_over": handed_over,
        "last_copies_lost": lost,
    }


def _held(view: View, leaving: str) -> set[str]:
    """Adapters in the pools of other groups."""
    return {key for name, g in view.groups.items() if name != leaving for key in g["resident"]}


async def updates(run: Run, clients: int, rounds: int) -> Any:
    """The applications are deployed with another setting, again and again."""
    took: list[float] = []

    async def update() -> None:
        for i in range(rounds):
            took.append(await _update(run, max_running=32 + i))

    began = time.monotonic()
    await run.beside(clients, update)
    views = [v for v in run.watch.views if v.at > began]
    return {
        "updates": rounds,
        "clients": clients,
        "replaced_s": _spread(took),
        **_hand_overs(views),
    }


async def _update(run: Run, **settings: Any) -> float:
    """Seconds until nothing of before is left."""
    groups, gateways = run.watch.views[-1].serving, run.nodes.replicas("gateway")
    began = time.monotonic()
    await asyncio.to_thread(deploy, **settings)
    await run.need(
        lambda view: not view.groups.keys() & groups and len(view.serving) >= run.groups,
        "new groups",
    )
    await run.need(lambda _: not run.nodes.replicas("gateway") & gateways, "new gateways")
    await asyncio.to_thread(wait_running)
    return time.monotonic() - began


def _first(views: Sequence[View], after: float, condition: Callable[[View], bool]) -> float | None:
    return next((v.at for v in views if v.at > after and condition(v)), None)


def _spread(times: Any) -> dict[str, float] | None:
    known = [round(t, 1) for t in times if t is not None]
    if not known:
        return None
    return {"median": round(statistics.median(known), 1), "max": max(known), "of": len(known)}
