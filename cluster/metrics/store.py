"""Requests to object stores, counted where they are sent, as a metric of any process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from ...adapter_store import store_requests
from .catalogue_controller import STORE


class StoreRequests(Collector):
    """Shows (operation, result) -> requests as they are when somebody asks.

    Args:
        counts: whose; None: those of this process.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        counts: Callable[[], Mapping[tuple[str, str], int]] = store_requests,
    ) -> None:
        self._counts = counts
        registry.register(self)

    def collect(self) -> Iterable[CounterMetricFamily]:
        (metric,) = STORE
        family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, count in sorted(self._counts().items()):
            family.add_metric(labels, count)
        yield family
