"""The Ray Serve deployment that carries the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import partial

from fastapi import FastAPI
from ray import serve

from ...adapter_store import Catalogue, ObjectStore
from ..actor_clients import ControlClient, IngestClient, LimiterClient
from ..control import GroupEntry, RoutingTable
from ..dispatch import Dispatcher
from ..errors import ActorUnavailable
from ..ingest import make_uploads
from ..leases import LocalLeases
from ..logs import configure_logs
from ..metrics import GatewayMetrics, MetricsServer, Target, new_registry, serve_metrics
from ..model import base_model, model_source
from ..replica_address import advertised, listen_on_node_address
from ..routing import Ask, GroupLoad, decide
from ..settings import Settings
from ..tracing import Tracer, make_tracer
from .app import build_gateway
from .deps import GatewayDeps
from .tokenizer import TextTokenizer

GATEWAY_CPUS = 0.2
MAX_ONGOING_REQUESTS = 1000
REGISTER_EVERY_S = 5.0


@serve.deployment(
    name="Gateway",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    ray_actor_options={"num_cpus": GATEWAY_CPUS},
)
@serve.ingress()
class Gateway:
    """One gateway replica: assembles the real parts and serves `build_gateway` on them.

    Args:
        settings: with the cluster secret in it (`Settings.with_cluster_secret`).
    """

    _dispatcher: Dispatcher | None = None
    _metrics_server: MetricsServer | None = None
    _tracer: Tracer | None = None

    def __init__(self, settings: Settings) -> None:
        listen_on_node_address()
        configure_logs(settings.logs, "gateway")
        model = model_source(settings)
        self._registry = new_registry()
        self._metrics = GatewayMetrics(self._registry)
        self._tracer = make_tracer(settings.trace_endpoint, "loraplex-gateway")
        control = ControlClient()
        leases = LocalLeases(LimiterClient(), time.monotonic)
        store = ObjectStore(**settings.store_options())
        self._dispatcher = Dispatcher(
            control.table, settings.secret_bytes(), self._choose, on_event=self._on_event
        )
        self._deps = GatewayDeps(
            settings=settings,
            catalogue=Catalogue(store),
            uploads=make_uploads(settings, store),
            tokenizer=TextTokenizer.from_folder(model.folder()),
            base_model=base_model(settings),
            dispatcher=self._dispatcher,
            ingest=IngestClient(),
            limits=leases,
            control=control,
            metrics=self._metrics,
            tracer=self._tracer,
            background=[leases.run, partial(_register, control, self._export(settings))],
        )

    async def __serve_build_asgi_app__(self) -> FastAPI:
        assert self._dispatcher is not None
        await self._dispatcher.start()
        return build_gateway(self._deps, sends_request_id=False)

    async def __del__(self) -> None:
        if self._dispatcher is not None:
            await self._dispatcher.close()
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._tracer is not None:
            self._tracer.close()

    def _export(self, settings: Settings) -> Target:
        """Opens this replica's metrics port."""
        token = settings.metrics_token
        port, self._metrics_server = serve_metrics(
            self._registry,
            settings.metrics_host,
            token=token.get_secret_value() if token else None,
        )
        replica = serve.get_replica_context().replica_id.unique_id
        host = advertised(settings.internal_host)
        return Target("gateway", host, port, {"replica": replica})

    def _choose(
        self,
        table: RoutingTable,
        ask: Ask,
        loads: Mapping[str, GroupLoad],
        exclude: AbstractSet[str],
    ) -> GroupEntry | None:
        decision = decide(table, ask, loads, exclude)
        if decision is None:
            return None
        self._metrics.routed(decision.reason)
        return decision.entry

    def _on_event(self, event: str, group: str) -> None:
        if event == "continuation":
            self._metrics.continuation()


async def _register(control: ControlClient, target: Target) -> None:
    """Tells the controller of this exporter, again and again: it may have been restarted."""
    while True:
        with contextlib.suppress(ActorUnavailable):
            await control.register_target(target)
        await asyncio.sleep(REGISTER_EVERY_S)
