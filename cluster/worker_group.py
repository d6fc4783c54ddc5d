"""The Ray Serve deployment of worker groups: a replica is a group's front with its ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.util import get_current_placement_group

from ..workers import (
    FrontConfig,
    GroupFront,
    GroupRanks,
    GroupReport,
    RankPlacement,
    RankProgram,
)
from .errors import ActorUnavailable
from .group_scaling import ByExpectedWait, GroupWork, Scaling
from .logs import LogConfig, configure_logs
from .metrics import EngineMetrics, MetricsServer, new_registry, serve_metrics
from .named_actors import CONTROLLER_NAME, NamedActor
from .replica_address import advertised, listen_on_node_address
from .tracing import make_tracer

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.5
_LEAVE_POLL_S = 0.1
# Of the time to drain, what handing adapters over may take; the rest is for open requests.
_LEAVE_SHARE = 0.5
_HEALTH_EVERY_S = 1.0
_SCALING_EVERY_S = 2.0


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
        step_timeout_s: a group whose engine step takes longer counts as hung.
        drain_timeout_s: how long a group that is stopped may take to hand over its adapters and to
            end its open requests.
        logs: of the front's process.
        trace_endpoint: of the collector of traces, if there is one.
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
    max_open: int = 512
    start_timeout_s: float = 600.0
    step_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    logs: LogConfig = field(default_factory=LogConfig)
    trace_endpoint: str | None = None


def worker_group_app(
    config: WorkerGroupConfig,
    groups: int,
    scaling: Scaling | None = None,
    surge_percent: int = 0,
) -> serve.Application:
    """The Serve application of `groups` groups.

    Args:
        scaling: when groups are added and taken away again; None: their number is fixed.
        surge_percent: of the groups, how many may be there beyond their number in an update; 0:
            old ones stop first, which takes no more machines.
    """
    rank: dict[str, float] = {"CPU": config.rank_cpus}
    if config.rank_gpus:
        rank["GPU"] = config.rank_gpus
    deployment = serve.deployment(
        WorkerGroup,
        name=config.deployment,
        **_replicas(groups, scaling),
        max_surge_percent=surge_percent,
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


def _replicas(groups: int, scaling: Scaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"num_replicas": groups}
    policy = AutoscalingPolicy(
        policy_function=ByExpectedWait,
        policy_kwargs={"target_wait_s": scaling.target_wait_s},
    )
    config = AutoscalingConfig(
        min_replicas=groups,
        max_replicas=scaling.max_groups,
        policy=policy,
        metrics_interval_s=_SCALING_EVERY_S,
        # Serve wants more than one report in it.
        look_back_period_s=max(2 * _SCALING_EVERY_S, scaling.up_after_s),
        upscale_delay_s=scaling.up_after_s,
        downscale_delay_s=scaling.down_after_s,
    )
    return {"autoscaling_config": config}


class WorkerGroup:
    """A Serve replica. Requests don't come through Serve: gateways connect to its front."""

    async def __init__(self, config: WorkerGroupConfig):
        listen_on_node_address()
        configure_logs(config.logs, "group")
        self._config = config
        self._tracer = make_tracer(config.trace_endpoint, "loraplex-group")
        self._controller = NamedActor(CONTROLLER_NAME)
        self._group = serve.get_replica_context().replica_id.unique_id
        self._seen_epoch = 0
        self._leaving = False
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
                step_timeout_s=config.step_timeout_s,
            ),
            self._tracer.group_request if self._tracer is not None else None,
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where groups are added under load."""
        return GroupWork.of(self._front.report).to_metrics()

    async def check_health(self) -> None:
        """Called by Serve, which restarts the replica when this raises."""
        if self._front.failure is not None:
            raise RuntimeError(self._front.failure)

    async def __del__(self) -> None:
        # Serve's way to say that the replica is to stop; the ranks end here, not by the
        # garbage collector.
        ends = time.monotonic() + self._config.drain_timeout_s
        await self._hand_over(_LEAVE_SHARE * self._config.drain_timeout_s)
        if not await self._front.drain(ends - time.monotonic()):
            log.warning("group %s stops with requests open", self._group)
        await self._stop()

    async def _stop(self) -> None:
        if self._reports is not None:
            self._reports.cancel()
        await self._front.close()
        if self._ranks is not None:
            self._ranks.kill()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    async def _hand_over(self, timeout_s: float) -> None:
        """Serves on until others hold the adapters that only this group does."""
        self._leaving = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._front.failure is None:
                    with contextlib.suppress(ActorUnavailable):  # a new one may come in time
                        if await self._tell():
                            return
                    await asyncio.sleep(_LEAVE_POLL_S)
        except TimeoutError:
            log.warning("group %s may leave with adapters that no other holds", self._group)

    async def _tell(self) -> bool:
        """Reports and obeys the advice; whether the controller lets the group go."""
        advice = await self._controller.call("report", self._group_report().to_wire())
        self._obey(advice)
        return advice["release"]

    async def _report(self) -> None:
        """Tells the controller about the group for as long as it lives, and obeys its advice."""
        missed = False
        while True:
            try:
                try:
                    await self._tell()
                finally:  # neither waits for the other to work
                    self._metrics.update(self._front.report)
                missed = False
            except Exception as e:
                # The group serves on without a controller, whatever is wrong with that one.
                if not missed:
                    log.warning("group %s can't report: %s: %s", self._group, type(e).__name__, e)
                missed = True
            await asyncio.sleep(_REPORT_EVERY_S)

    def _obey(self, advice: Mapping[str, Any]) -> None:
        if advice["epoch"] < self._seen_epoch:
            return  # a controller that was replaced and doesn't know it
        self._seen_epoch = advice["epoch"]
        self._front.advise(advice["desired"], advice["purge"], advice["host"])

    def _group_report(self) -> GroupReport:
        return GroupReport(
            deployment=self._config.deployment,
            group=self._group,
            host=advertised(self._config.host),
            port=self._front.port,
            metrics_port=self._metrics_port,
            # A failed group is on its way out as well: nobody should be sent to it.
            draining=self._front.draining or self._front.failure is not None,
            engine=self._front.report,
            seen_epoch=self._seen_epoch,
            leaving=self._leaving,
        )
