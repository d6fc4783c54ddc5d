"""A group in a real Ray: rank actors in the replica's placement group, restart, no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from loraplex.cluster.control import Controller as ControllerCore
from loraplex.cluster.control import ControllerConfig
from loraplex.cluster.control.table import GroupEntry, RoutingTable
from loraplex.cluster.dispatch import Dispatcher, DispatchLimits
from loraplex.cluster.group_scaling import Scaling
from loraplex.cluster.routing import choose
from loraplex.cluster.worker_group import WorkerGroupConfig, worker_group_app
from loraplex.workers import (
    FrontConfig,
    GenerationRequest,
    GroupFailed,
    GroupFront,
    GroupRanks,
    RankPlacement,
    SamplingParams,
)
from ray import serve
from ray.util.placement_group import placement_group, remove_placement_group

from tests.workers import fake_group as fake

ray.cloudpickle.register_pickle_by_value(fake)  # type: ignore[attr-defined]

pytestmark = pytest.mark.cluster
SECRET = b"cluster secret"
NAMESPACE = "loraplex"


def _advice(
    epoch: int,
    desired: Sequence[str] = (),
    purge: Sequence[str] = (),
    host: Sequence[str] | None = None,
) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "desired": list(desired),
        "host": host,
        "purge": list(purge),
        "release": True,
    }


class Controller:
    """Takes reports like the real one and tells what came."""

    def __init__(self) -> None:
        self.reports: dict[str, tuple[float, dict[str, Any]]] = {}
        self.advice: dict[str, Any] = _advice(2)

    def report(self, report: dict[str, Any]) -> dict[str, Any]:
        self.reports[report["group"]] = time.monotonic(), report
        return self.advice

    def set_advice(self, advice: dict[str, Any]) -> None:
        self.advice = advice

    def live(self) -> list[dict[str, Any]]:
        return [r for at, r in self.reports.values() if time.monotonic() - at < 1.5]


@pytest.fixture(scope="module")
def local_ray():
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )
    yield
    serve.shutdown()
    ray.shutdown()


async def until(condition, timeout_s=40.0):
    async with asyncio.timeout(timeout_s):
        while not (result := condition()):
            await asyncio.sleep(0.05)
        return result


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pids_of(title: str) -> list[int]:
    # Ray's processes are our descendants; somebody else's Ray may be on this machine too.
    ours = psutil.Process().children(recursive=True)
    return [p.pid for p in ours if alive(p.pid) and (p.cmdline() or [""])[0].startswith(title)]


def rank_pids() -> list[int]:
    return pids_of("ray::RankActor")


def replica_pids() -> list[int]:
    return pids_of("ray::ServeReplica:groups")


async def test_ranks_run_in_their_bundles_and_end_with_the_front(local_ray):
    bundles = placement_group([{"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 0.5}], strategy="STRICT_PACK")
    await bundles.ready()
    placement = RankPlacement(ranks=2, cpus=0.5, gpus=0, threads=3, bundles=bundles)
    front = GroupFront(FrontConfig("g", SECRET, ranks=2))
    await front.start()
    ranks = await GroupRanks.start(fake.FakeProgram(), front.rank_link, placement)
    await front.wait_ready(20)
    assert len(set(ranks.pids)) == 2
    for pid in ranks.pids:
        assert psutil.Process(pid).environ()["OMP_NUM_THREADS"] == "3"

    os.kill(ranks.pids[1], signal.SIGKILL)
    await until(lambda: front.failure is not None)
    assert "rank 1 is gone" in str(front.failure)
    await front.close()
    await until(lambda: not any(map(alive, ranks.pids)))
    ranks.kill()

    front = GroupFront(FrontConfig("g", SECRET))
    await front.start()
    placement = RankPlacement(ranks=1, cpus=0.5, gpus=0, threads=1)
    with pytest.raises(GroupFailed, match="can't be unpickled"):
        await GroupRanks.start(fake.Unreadable(), front.rank_link, placement)
    await front.close()
    remove_placement_group(bundles)


async def test_a_deployment_serves_obeys_restarts_and_leaves_nothing(local_ray):
    controller: Any = (
        ray.remote(Controller).options(name="controller", namespace=NAMESPACE, num_cpus=0).remote()
    )
    config = WorkerGroupConfig(
        "groups", fake.FakeProgram(0.005), SECRET, tp_size=2, rank_cpus=0.5, drain_timeout_s=5
    )
    serve.run(worker_group_app(config, 1), name="groups", route_prefix=None)

    [first] = await until(lambda: ray.get(controller.live.remote()))
    assert first["deployment"] == "groups"
    assert not first["draining"]
    first_pids = rank_pids()
    assert len(first_pids) == 2

    async def table(since):
        live = await controller.live.remote()
        entries = [
            GroupEntry(r["deployment"], r["group"], r["host"], r["port"], r["draining"])
            for r in live
        ]
        return RoutingTable(1, since[1] + 1, tuple(entries)).to_wire()

    def request(name: str, count: int) -> GenerationRequest:
        return GenerationRequest(name, (1, 2), SamplingParams(max_tokens=count), "tenant")

    async def collect(req: GenerationRequest) -> list[int]:
        return [t async for o in gateway.generate(req) for t in o.token_ids]

    limits = DispatchLimits(patience_s=30.0, continuation_patience_s=30.0)
    gateway = Dispatcher(table, SECRET, choose, limits)
    await gateway.start()
    await until(gateway.ready)
    assert await collect(request("r0", 50)) == fake.expected_tokens((1, 2), 50)

    # Advice of the newest epoch is obeyed, an older one's refused.
    await controller.set_advice.remote(_advice(3, ["t/aa"], host=["t/cc"]))
    await until(lambda: [r["seen_epoch"] for r in ray.get(controller.live.remote())] == [3])
    await until(lambda: list(ray.get(controller.live.remote())[0]["engine"]["gpu"]) == ["t/aa"])
    await until(lambda: list(ray.get(controller.live.remote())[0]["engine"]["host"]) == ["t/cc"])
    await controller.set_advice.remote(_advice(2, ["t/bb"], ["t/aa"], host=[]))
    await asyncio.sleep(1.2)
    [report] = ray.get(controller.live.remote())
    assert (report["seen_epoch"], list(report["engine"]["gpu"])) == (3, ["t/aa"])

    # A rank dies in the middle of a stream: Serve brings a new group, which carries it on.
    stream = asyncio.create_task(collect(request("r1", 400)))
    await until(lambda: any(c.streams for c in gateway._connections.values()))
    os.kill(first_pids[1], signal.SIGKILL)
    assert await stream == fake.expected_tokens((1, 2), 400)
    live = await until(lambda: [r for r in ray.get(controller.live.remote()) if not r["draining"]])
    assert [r["group"] for r in live] != [first["group"]]

    # A rank stops without dying: its group ends it, and another group carries the stream on.
    [first] = live
    stream = asyncio.create_task(collect(request("r2", 1500)))
    await until(lambda: any(c.streams for c in gateway._connections.values()))
    stopped = rank_pids()[-1]
    os.kill(stopped, signal.SIGSTOP)
    await until(lambda: not alive(stopped), 5)
    assert not stream.done()
    assert await stream == fake.expected_tokens((1, 2), 1500)
    live = ray.get(controller.live.remote())
    assert first["group"] not in [r["group"] for r in live if not r["draining"]]

    # The replica's process is killed: its ranks end too, and another group comes.
    pids = rank_pids()
    # The first group's replica may still be on its way out.
    [replica] = await until(lambda: len(found := replica_pids()) == 1 and found)
    os.kill(replica, signal.SIGKILL)
    await until(lambda: not any(map(alive, pids)))
    assert await collect(request("r3", 50)) == fake.expected_tokens((1, 2), 50)

    # Stopping lets the open request end, and no rank outlives its group.
    stream = asyncio.create_task(collect(request("r4", 200)))
    await until(lambda: any(c.streams for c in gateway._connections.values()))
    pids = rank_pids() + first_pids
    await asyncio.to_thread(serve.delete, "groups")
    assert await stream == fake.expected_tokens((1, 2), 200)
    await until(lambda: not any(map(alive, pids)))
    await gateway.close()
    ray.kill(controller)


class TickingController:
    """The controller's core without a store; a tick for each report."""

    def __init__(self) -> None:
        self._core = ControllerCore(ControllerConfig(settle_s=0.0), time.monotonic)

    def report(self, wire: dict[str, Any]) -> dict[str, Any]:
        advice = self._core.report(wire)
        self._core.tick()
        return advice

    def table(self, since: tuple[int, int]) -> dict[str, Any] | None:
        self._core.tick()
        return self._core.table(since)


async def test_groups_are_added_replaced_and_taken_away_without_a_failed_request(local_ray):
    controller: Any = (
        ray.remote(TickingController)
        .options(name="controller", namespace=NAMESPACE, num_cpus=0)
        .remote()
    )
    # A fake group decodes 8 requests together and expects an end each second: 16 that are open
    # would make a new one wait for long, and fit three groups.
    config = WorkerGroupConfig("groups", fake.FakeProgram(0.01), SECRET, drain_timeout_s=10)
    scaling = Scaling(max_groups=3, target_wait_s=1.0, up_after_s=0.1, down_after_s=1.0)

    def deploy(config: WorkerGroupConfig) -> None:
        app = worker_group_app(config, 1, scaling)
        serve.run(app, name="groups", route_prefix=None, blocking=False)

    async def table(since):
        return await controller.table.remote(since)

    gateway = Dispatcher(table, SECRET, choose, DispatchLimits(patience_s=30.0))
    clients, answered = 16, 0

    async def client(i: int) -> None:
        nonlocal answered
        while i < clients:
            prompt = (i, answered)
            sampling = SamplingParams(max_tokens=60)
            request = GenerationRequest(f"{i}-{answered}", prompt, sampling, "tenant")
            tokens = [t async for o in gateway.generate(request) for t in o.token_ids]
            assert tokens == fake.expected_tokens(prompt, 60)
            answered += 1

    def groups() -> set[str]:
        return {e.group for e in gateway.table.groups if not (e.draining or e.standby)}

    await asyncio.to_thread(deploy, config)
    await gateway.start()
    await until(gateway.ready)
    assert len(groups()) == 1
    load = [asyncio.create_task(client(i)) for i in range(clients)]
    await until(lambda: len(groups()) == 3, 60)

    first = groups()
    await asyncio.to_thread(deploy, replace(config, max_open=128))
    await until(lambda: len(groups() - first) == 3 and not groups() & first, 90)

    clients = 2
    await until(lambda: len(groups()) == 1, 60)
    clients, before = 0, answered
    await asyncio.gather(*load)
    assert before > 50
    await gateway.close()
    await asyncio.to_thread(serve.delete, "groups")
    ray.kill(controller)
