"""An engine's report as metrics; the group's front exports them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter

from ...workers import EngineReport
from .instruments import BoundedSeries, Key, counter, gauge, set_top_gauge
from .metric import TIERS
from .store import StoreRequests

_GAUGES = {
    "queued": "loraplex_engine_queued_requests",
    "running": "loraplex_engine_running_requests",
    "kv_blocks_total": "loraplex_engine_kv_blocks",
    "kv_blocks_used": "loraplex_engine_kv_used_blocks",
    "pool_bytes_total": "loraplex_engine_pool_bytes",
    "pool_bytes_used": "loraplex_engine_pool_used_bytes",
    "pool_bytes_active": "loraplex_engine_pool_active_bytes",
    "weights_bytes": "loraplex_engine_weights_bytes",
    "ready_seconds": "loraplex_engine_ready_seconds",
    "device_bytes_total": "loraplex_engine_device_bytes",
    "device_bytes_used": "loraplex_engine_device_used_bytes",
}
_COUNTERS = {
    "steps": "loraplex_engine_steps_total",
    "step_seconds": "loraplex_engine_step_seconds_total",
    "preemptions": "loraplex_engine_preemptions_total",
    "prefix_hit_tokens": "loraplex_engine_prefix_hit_tokens_total",
    "load_failures": "loraplex_engine_load_failures_total",
    "evictions": "loraplex_engine_evictions_total",
    "step_tokens": "loraplex_engine_step_tokens_total",
    "step_adapters": "loraplex_engine_step_adapters_total",
    "step_adapter_bytes": "loraplex_engine_step_adapter_bytes_total",
    "compiles_after_ready": "loraplex_engine_late_compiles_total",
}
# Fields that are maps, and the values of the second label (the first is the group) that are
# always there.
_BY_LABEL = {
    "loads": ("loraplex_engine_loads_total", TIERS[1:]),
    "tier_load_seconds": ("loraplex_engine_load_seconds_total", TIERS[1:]),
    "tier_load_bytes": ("loraplex_engine_load_bytes_total", TIERS[1:]),
    "admissions": ("loraplex_engine_admitted_requests_total", ("base", *TIERS)),
    "queue_seconds": ("loraplex_engine_queue_seconds_total", ()),
}
SHORT_DIGEST = 12  # hex digits shown of a digest: 48 bits tell a tenant's adapters apart


def adapter_labels(key: str) -> tuple[str, str]:
    """`AdapterRef.key` ("tenant/digest" or "tenant/base") -> labels (tenant, adapter)."""
    tenant, _, digest = key.rpartition("/")
    return tenant, digest[:SHORT_DIGEST]


def add_up(values: Mapping[str, float]) -> dict[Key, float]:
    """Values by adapter key -> by labels, of which two keys may have the same."""
    sums: dict[Key, float] = {}
    for key, value in values.items():
        labels = adapter_labels(key)
        sums[labels] = sums.get(labels, 0.0) + value
    return sums


class EngineMetrics:
    """Metrics of one worker group, fed with its engine's cumulative reports.

    A counter that went down means that the engine's process was restarted: what it shows now is
    new work.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        group: str,
        *,
        top_adapters: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._top_adapters = top_adapters
        self._gauges = {f: gauge(n, registry).labels(group) for f, n in _GAUGES.items()}
        self._counters = {f: counter(n, registry).labels(group) for f, n in _COUNTERS.items()}
        self._prompt = counter("loraplex_engine_prompt_tokens_total", registry)
        self._output = counter("loraplex_engine_output_tokens_total", registry)
        self._of_tenant = {
            "tenant_leads": gauge("loraplex_engine_tenant_lead_tokens", registry),
            "tenants_waiting": gauge("loraplex_engine_tenant_waiting_requests", registry),
        }
        self._by_label = {f: counter(n, registry) for f, (n, _) in _BY_LABEL.items()}
        for name, (_, values) in _BY_LABEL.items():
            for value in values:
                self._by_label[name].labels(group, value)
        self._resident = gauge("loraplex_engine_resident_adapters", registry)
        self._loading = gauge("loraplex_engine_loading_adapters", registry)
        self._bytes = gauge("loraplex_engine_adapter_bytes", registry)
        self._adapters = BoundedSeries(
            (self._prompt, self._output), (group,), top_adapters, clock=clock
        )
        self._last = EngineReport()
        StoreRequests(registry, self._store_requests)

    def update(self, report: EngineReport) -> None:
        """Takes over a report; call it with each one, in order."""
        last = self._last
        for name, metric in self._gauges.items():
            metric.set(getattr(report, name))
        for name, metric in self._counters.items():
            metric.inc(_delta(getattr(report, name), getattr(last, name)))
        for name, metric in self._by_label.items():
            before = getattr(last, name)
            for value, count in getattr(report, name).items():
                metric.labels(self._group, value).inc(_delta(count, before.get(value, 0)))
        self._resident.labels(self._group, "gpu").set(len(report.gpu))
        self._resident.labels(self._group, "host").set(len(report.host))
        self._resident.labels(self._group, "disk").set(len(report.disk))
        self._loading.labels(self._group).set(len(report.loading))

        self._count_tokens(self._prompt, report.prompt_tokens, last.prompt_tokens)
        self._count_tokens(self._output, report.output_tokens, last.output_tokens)
        here = add_up(report.gpu)
        held = here.keys() | {adapter_labels(k) for k in report.loading}
        for tenant, adapter in self._adapters.kept() - held:
            if adapter != "base":
                self._adapters.leave(tenant, adapter)
        for name, metric in self._of_tenant.items():
            figures = {(tenant,): float(n) for tenant, n in getattr(report, name).items()}
            set_top_gauge(metric, figures, (self._group,), self._top_adapters)
        set_top_gauge(self._bytes, here, (self._group,), self._top_adapters)
        self._last = report

    def _store_requests(self) -> dict[tuple[str, str], int]:
        counts: dict[tuple[str, str], int] = {}
        for name, count in self._last.store_requests.items():
            operation, _, result = name.partition("/")
            counts[operation, result] = count
        return counts

    def _count_tokens(
        self, metric: Counter, now: Mapping[str, int], before: Mapping[str, int]
    ) -> None:
        for key, count in now.items():
            new = _delta(count, before.get(key, 0))
            if new:
                labels = self._adapters.labels(*adapter_labels(key), weight=new)
                metric.labels(*labels).inc(new)


def _delta(now: float, before: float) -> float:
    return now - before if now >= before else now
