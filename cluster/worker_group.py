"""The Ray Serve deployment of worker groups: a replica is a group's front with its ranks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.util import get_current_placement_group

from ..workers import (
    FrontConfig,
    GroupFront,
    GroupRanks,
    GroupReport,
    RankPlacement,
    RankProgram,
)
from .metrics import EngineMetrics, MetricsServer, new_registry, serve_metrics
from .replica_address import listen_on_node_address
from .settings import RAY_NAMESPACE

log = logging.getLogger(__name__)

CONTROLLER_NAME = "controller"
_REPORT_EVERY_S = 0.5
_REPORT_TIMEOUT_S = 5.0
_HEALTH_EVERY_S = 1.0

# A group's report -> the controller's advice {"epoch", "desired": [keys], "purge": [keys]}
Reporter = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class WorkerGroupConfig:
    """One deployment of worker groups: all of its groups are alike.

    Args:
        deployment: its name in Ray Serve.
        program: what the ranks run.
        secret: the cluster secret.
        tp_size: ranks in a group.
        rank_cpus, rank_gpus: Ray resources of one rank.
        front_cpus: Ray CPUs of the front.
        threads: torch threads of one rank.
        host: address of the front's listener.
        metrics_host, metrics_token: of the metrics exporter.
        start_timeout_s: loading the model and warming up must be done by then.
        drain_timeout_s: how long open requests may take when the group is stopped.
    """

    deployment: str
    program: RankProgram
    secret: bytes = field(repr=False)
    tp_size: int = 1
    rank_cpus: float = 0.5
    rank_gpus: float = 0.0
    front_cpus: float = 0.1
    threads: int = 1
    host: str = "127.0.0.1"
    metrics_host: str = "127.0.0.1"
    metrics_token: str | None = field(default=None, repr=False)
    max_open: int = 256
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0


def worker_group_app(config: WorkerGroupConfig, groups: int) -> serve.Application:
    """The Serve application of `groups` groups."""
    rank: dict[str, float] = {"CPU": config.rank_cpus}
    if config.rank_gpus:
        rank["GPU"] = config.rank_gpus
    deployment = serve.deployment(
        WorkerGroup,
        name=config.deployment,
        num_replicas=groups,
        ray_actor_options={"num_cpus": config.front_cpus},
        # One node holds a whole group: its ranks talk over loopback and share the node's packs.
        placement_group_bundles=[{"CPU": config.front_cpus}, *([rank] * config.tp_size)],
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=_HEALTH_EVERY_S,
        health_check_timeout_s=10 * _HEALTH_EVERY_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.drain_timeout_s + 10.0,
    )
    return deployment.bind(config)


class WorkerGroup:
    """A Serve replica. Requests don't come through Serve: gateways connect to its front."""

    async def __init__(self, config: WorkerGroupConfig, reporter: Reporter | None = None):
        listen_on_node_address()
        self._config = config
        self._reporter = reporter or ControllerLink()
        self._group = serve.get_replica_context().replica_id.unique_id
        self._seen_epoch = 0
        self._ranks: GroupRanks | None = None
        self._reports: asyncio.Task[None] | None = None
        self._metrics_server: MetricsServer | None = None
        self._front = GroupFront(
            FrontConfig(
                group=self._group,
                secret=config.secret,
                host=config.host,
                ranks=config.tp_size,
                max_open=config.max_open,
            )
        )
        try:
            await self._front.start()
            placement = RankPlacement(
                ranks=config.tp_size,
                cpus=config.rank_cpus,
                gpus=config.rank_gpus,
                threads=config.threads,
                bundles=get_current_placement_group(),
            )
            self._ranks = await GroupRanks.start(config.program, self._front.rank_link, placement)
            await self._front.wait_ready(config.start_timeout_s)
            registry = new_registry()
            self._metrics = EngineMetrics(registry, self._group)
            self._metrics_port, self._metrics_server = serve_metrics(
                registry, config.metrics_host, token=config.metrics_token
            )
        except BaseException:
            await self._stop()
            raise
        self._reports = asyncio.get_running_loop().create_task(self._report())

    async def check_health(self) -> None:
        """Called by Serve, which restarts the replica when this raises."""
        if self._front.failure is not None:
            raise RuntimeError(self._front.failure)

    async def __del__(self) -> None:
        # Serve's way to say that the replica is to stop; the ranks end here, not by the
        # garbage collector.
        if not await self._front.drain(self._config.drain_timeout_s):
            log.warning("group %s stops with requests open", self._group)
        await self._stop()

    async def _stop(self) -> None:
        if self._reports is not None:
            self._reports.cancel()
        await self._front.close()
        if self._ranks is not None:
            self._ranks.kill()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    async def _report(self) -> None:
        """Tells the controller about the group for as long as it lives, and obeys its advice."""
        missed = False
        while True:
            self._metrics.update(self._front.report)
            try:
                async with asyncio.timeout(_REPORT_TIMEOUT_S):
                    advice = await self._reporter(self._group_report().to_wire())
                self._obey(advice["epoch"], advice["desired"], advice["purge"])
                missed = False
            except Exception as e:
                # The group serves on without a controller, whatever is wrong with that one.
                if not missed:
                    log.warning("group %s can't report: %s: %s", self._group, type(e).__name__, e)
                missed = True
            await asyncio.sleep(_REPORT_EVERY_S)

    def _obey(self, epoch: int, desired: Sequence[str], purge: Sequence[str]) -> None:
        if epoch < self._seen_epoch:
            return  # a controller that was replaced and doesn't know it
        self._seen_epoch = epoch
        self._front.advise(desired, purge)

    def _group_report(self) -> GroupReport:
        return GroupReport(
            deployment=self._config.deployment,
            group=self._group,
            host=self._config.host,
            port=self._front.port,
            metrics_port=self._metrics_port,
            # A failed group is on its way out as well: nobody should be sent to it.
            draining=self._front.draining or self._front.failure is not None,
            engine=self._front.report,
            seen_epoch=self._seen_epoch,
        )


class ControllerLink:
    """Calls the controller's actor by name; looks it up again after a failure."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def __call__(self, report: dict[str, Any]) -> dict[str, Any]:
        if self._actor is None:
            # Blocks while Ray's head is away, which must not stop the front's event loop.
            self._actor = await asyncio.to_thread(
                ray.get_actor, CONTROLLER_NAME, namespace=RAY_NAMESPACE
            )
        try:
            return await self._actor.report.remote(report)
        except BaseException:
            self._actor = None
            raise
