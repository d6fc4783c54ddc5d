"""The Ray Serve deployment of worker groups: a replica is a group's front with its ranks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
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
from .group_scaling import METRIC, ByOpenSequences
from .logs import LogConfig, configure_logs
from .metrics import EngineMetrics, MetricsServer, new_registry, serve_metrics
from .named_actors import CONTROLLER_NAME, NamedActor
from .replica_address import advertised, listen_on_node_address
from .tracing import make_tracer

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.5
_HEALTH_EVERY_S = 1.0


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
        drain_timeout_s: how long open requests may take when the group is stopped.
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
    max_open: int = 256
    start_timeout_s: float = 600.0
    step_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    logs: LogConfig = field(default_factory=LogConfig)
    trace_endpoint: str | None = None


def worker_group_app(
    config: WorkerGroupConfig,
    groups: int,
    max_groups: int | None = None,
    target_sequences: float = 1.0,
) -> serve.Application:
    """The Serve application of `groups` groups.

    Args:
        max_groups: groups are added and taken away between the two numbers; None: they are fixed.
        target_sequences: open in each group, which more groups are started for.
    """
    rank: dict[str, float] = {"CPU": config.rank_cpus}
    if config.rank_gpus:
        rank["GPU"] = config.rank_gpus
    deployment = serve.deployment(
        WorkerGroup,
        name=config.deployment,
        **_replicas(groups, max_groups, target_sequences),
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


def _replicas(groups: int, max_groups: int | None, target: float) -> dict[str, Any]:
    if max_groups is None:
        return {"num_replicas": groups}
    scaling = AutoscalingConfig(
        min_replicas=groups,
        max_replicas=max_groups,
        policy=AutoscalingPolicy(policy_function=ByOpenSequences, policy_kwargs={"target": target}),
    )
    return {"autoscaling_config": scaling}


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
        report = self._front.report
        return {METRIC: report.running + report.queued}

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
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    async def _report(self) -> None:
        """Tells the controller about the group for as long as it lives, and obeys its advice."""
        missed = False
        while True:
            self._metrics.update(self._front.report)
            try:
                advice = await self._controller.call("report", self._group_report().to_wire())
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
            host=advertised(self._config.host),
            port=self._front.port,
            metrics_port=self._metrics_port,
            # A failed group is on its way out as well: nobody should be sent to it.
            draining=self._front.draining or self._front.failure is not None,
            engine=self._front.report,
            seen_epoch=self._seen_epoch,
        )
