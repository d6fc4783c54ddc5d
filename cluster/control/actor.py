"""The Ray actor around the controller's core: its loop, its clock, its epoch and its listeners."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ...adapter_store import Catalogue, ObjectStore, next_epoch
from ..errors import SettingsError
from ..logs import configure_logs
from ..metrics import (
    ControllerMetrics,
    MetricsServer,
    Target,
    fan_in,
    http_sd,
    new_registry,
    serve_metrics,
    serve_routes,
)
from ..named_actors import CONTROLLER_NAME, start_named
from ..replica_address import advertised
from ..settings import Settings
from .controller import Controller, ControllerConfig
from .deleted import deleted_adapters
from .errors import ControllerStarting, ControllerSuperseded

logger = logging.getLogger(__name__)

TICK_S = 0.5
_RETRY_S = 1.0
_CHECK_S = 2.0
_NUM_CPUS = 0.05


def start_controller(settings: Settings, config: ControllerConfig | None = None) -> Any:
    """Starts the controller's actor, or finds the one that runs; returns its handle."""
    config = config or ControllerConfig()
    return start_named(
        CONTROLLER_NAME,
        ControllerActor,
        settings,
        config,
        num_cpus=_NUM_CPUS,
        resources=settings.control_resources,
    )


class ControllerActor:
    """Answers groups (`report`), gateways (`table`, `purge`, `register_target`) and operators
    (`status`, `metrics_targets`).

    Until the object store has given it an epoch, and after a newer controller has taken over, its
    methods raise; groups and gateways go on with what they know.
    """

    async def __init__(self, settings: Settings, config: ControllerConfig) -> None:
        configure_logs(settings.logs, "controller")
        token = settings.metrics_token
        self._token = token.get_secret_value() if token else None
        self._settings = settings
        self._config = config
        self._controller: Controller | None = None
        self._superseded = False
        registry = new_registry()
        self._metrics = ControllerMetrics(registry)
        # The listeners' threads read this list; it is replaced, never changed.
        self._targets: list[Target] = []
        self._exporter_port, _ = serve_metrics(registry, settings.metrics_host, token=self._token)
        self._admin_port: int | None = None
        self._admin: MetricsServer | None = None
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def report(self, wire: Mapping[str, Any]) -> dict[str, Any]:
        """See `Controller.report`."""
        return self._live().report(wire)

    async def table(self, since: Sequence[int] | None = None) -> dict[str, Any] | None:
        """See `Controller.table`."""
        return self._live().table(since)

    async def purge(self, keys: Sequence[str]) -> None:
        """See `Controller.purge`."""
        self._live().purge(keys)

    async def register_target(
        self, kind: str, labels: Mapping[str, str], host: str, port: int
    ) -> None:
        """See `Controller.register_target`."""
        self._live().register_target(kind, labels, host, port)

    async def metrics_targets(self) -> list[Target]:
        """Exporters of all processes, this one included."""
        return self._all_targets(self._live())

    async def status(self) -> dict[str, Any]:
        """`Controller.status`, and the port of the admin side's metrics."""
        return {**self._live().status(), "metrics_port": self._admin_port}

    def _live(self) -> Controller:
        if self._superseded:
            raise ControllerSuperseded("a newer controller has taken over; look it up by its name")
        if self._controller is None:
            raise ControllerStarting("the controller is starting: it has no epoch yet")
        return self._controller

    async def _run(self) -> None:
        store = await self._patiently(lambda: ObjectStore(**self._settings.store_options()))
        epoch = await self._patiently(lambda: next_epoch(store))
        logger.info("controller starts with epoch %d", epoch)
        self._controller = Controller(self._config, time.monotonic, epoch)
        checks = self._check_adapters(self._controller, Catalogue(store))
        self._checks = asyncio.get_running_loop().create_task(checks)
        while not self._superseded:
            started = time.monotonic()
            try:
                await self._tick(self._controller, store, started)
            except Exception:
                # The next tick starts from the groups' reports again.
                logger.exception("a controller tick failed")
            await asyncio.sleep(max(0.0, started + TICK_S - time.monotonic()))

    async def _tick(self, controller: Controller, store: ObjectStore, started: float) -> None:
        controller.tick()
        self._targets = self._all_targets(controller)
        self._metrics.tick(seconds=time.monotonic() - started, **controller.figures())
        if self._admin is None:
            self._listen()
        if controller.superseded_by is not None:
            await self._resolve(controller, store, controller.superseded_by)

    async def _check_adapters(self, controller: Controller, catalogue: Catalogue) -> None:
        """Finds deleted adapters on groups that come newly; beside the ticks, for the store may
        take its time."""
        while not self._superseded:
            if keys := controller.unchecked():
                deleted = await self._patiently(partial(deleted_adapters, catalogue, keys))
                controller.checked(keys, deleted)
            await asyncio.sleep(_CHECK_S)

    async def _resolve(self, controller: Controller, store: ObjectStore, seen: int) -> None:
        """A group obeys a newer epoch: a newer controller took it, or the store has lost it."""
        epoch = await asyncio.to_thread(next_epoch, store)
        if epoch > controller.epoch + 1:
            logger.error("epoch %d is superseded: this controller stops", controller.epoch)
            self._superseded = True
            return
        while epoch <= seen:
            epoch = await asyncio.to_thread(next_epoch, store)
        logger.warning("the store had lost epoch %d; going on with epoch %d", seen, epoch)
        controller.adopt_epoch(epoch)

    async def _patiently(self, make: Callable[[], Any]) -> Any:
        """Tries until it works: there is nothing else that a controller could do meanwhile."""
        told = False
        while True:
            try:
                return await asyncio.to_thread(make)
            except Exception as error:
                if not told:
                    logger.warning("the controller waits for the object store: %s", error)
                told = True
                await asyncio.sleep(_RETRY_S)

    def _all_targets(self, controller: Controller) -> list[Target]:
        own = Target(
            "controller",
            advertised(self._settings.internal_host),
            self._exporter_port,
            {"replica": CONTROLLER_NAME},
        )
        return [own, *controller.metrics_targets()]

    def _listen(self) -> None:
        """Opens the admin side's metrics port; tried again each tick until it can be bound."""
        settings = self._settings
        routes = {
            "/metrics": ("text/plain; version=0.0.4", self._merged),
            "/metrics/targets": ("application/json", lambda: http_sd(self._targets)),
        }
        try:
            self._admin_port, self._admin = serve_routes(
                routes, settings.metrics_host, settings.metrics_port, self._token
            )
        except SettingsError as error:
            logger.warning("%s", error)

    def _merged(self) -> str:
        return fan_in(self._targets, self._token)
